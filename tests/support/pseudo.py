"""A program on a pseudo-terminal: what it prints, and keys that are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

SECONDS = 120  # a program may take to start, on a busy machine


START = """  # with the terminal as the one that Ctrl-C comes from
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell lets its background jobs ignore it
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """`halfstep <words>` on a pseudo-terminal; at the end of its context it is killed.

    program: what Python starts with these words
    """

    def __init__(
        self, *words: str, columns: int = 80, program: tuple[str, ...] = ("-m", "halfstep.cli")
    ):
        self.own, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        variables = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            variables.pop(name, None)
        command = [sys.executable, "-c", START, *program, *words]
        streams = dict(stdin=there, stdout=there, stderr=there)
        self.program = subprocess.Popen(command, env=variables, start_new_session=True, **streams)
        os.close(there)
        self.printed = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exc: object) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.own)

    def read_until(self, pattern: str) -> str:
        """Read until a pattern is printed after what was read before; what was read now."""
        read, end = "", time.monotonic() + SECONDS
        while not re.search(pattern, without_escapes(read)):
            before = self.printed[-99:]
            assert time.monotonic() < end, f"no {pattern!r} in {read!r}, after {before!r}"
            if select.select([self.own], [], [], 0.5)[0]:
                read += os.read(self.own, 1 << 16).decode(errors="replace")
        self.printed += read
        return read

    def press(self, keys: str) -> None:
        os.write(self.own, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C while the program waits for a key.

        Just after a key Python may be on its way to wait, and then sees the signal at the next key.
        So nothing of the program may change for half a second, and it sleeps.
        """
        status, before, unchanged = Path(f"/proc/{self.program.pid}/status"), "", 0
        end = time.monotonic() + SECONDS
        while unchanged < 5:
            assert time.monotonic() < end, before
            now = status.read_text()
            unchanged = unchanged + 1 if now == before and "State:\tS" in now else 0
            before = now
            time.sleep(0.1)
        self.press("\x03")

    def end(self) -> int:
        """Read all that is left; the exit code."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                data = os.read(self.own, 1 << 16)
            except OSError:  # the program has ended
                break
            self.printed += data.decode(errors="replace")
        return self.program.wait(SECONDS)


def without_escapes(text: str) -> str:
    """The text without colors and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)

"""Standard output and standard error whose reader may leave, as `| head` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any


class UnreadStream:
    """A stream that drops what is written after its reader has left; the command goes on.

    All but `write` and `flush` is the stream's own.
    """

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        with self.dropping():
            return self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what is written, or drop it."""
        with self.dropping():
            self.stream.flush()

    @contextmanager
    def dropping(self, *more: type[OSError]) -> Iterator[None]:
        """Without a reader (or after other errors), let the stream end in /dev/null."""
        try:
            yield
        except (BrokenPipeError, *more):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)
            with suppress(OSError):
                self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Within this context the readers of standard output and standard error may leave."""
    out: Any = UnreadStream(sys.stdout)
    err: Any = UnreadStream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            yield
        finally:
            for stream in (out, err):
                if stream.stream is not None:
                    with stream.dropping(OSError):
                        stream.flush()

"""Hostile inputs: what each is, and how the real command line must answer it."""

from __future__ import annotations

import functools
import os
import re
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import forked

SECONDS = 20  # no command may take longer to refuse an input
MEMORY = 2 * 1024**3  # bytes that a command may hold beyond what a fresh process holds


@dataclass(frozen=True)
class Hostile:
    """One hostile input.

    `make(folder)` writes the input into an empty folder, which is the current folder of the
    command. `arguments` are those of halfstep, as a list: outputs must be named below `out`.
    `refused` is a pattern that the one sentence on stderr must match; None: the command succeeds.
    """

    kind: str  # a row of the table in docs/reliability.md
    name: str
    make: Callable[[Path], object]
    arguments: list[str]
    refused: str | None
    check: Callable[[Path], object] = lambda folder: None  # after a success
    variables: Mapping[str, str] = field(default_factory=dict)  # of the command's environment

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}".encode("ascii", "backslashreplace").decode()


def answer(case: Hostile, folder: Path) -> None:
    """Run the command on the input; assert that it answers as `case` says.

    In any case: it ends within 20 seconds and 2 GiB, prints no traceback and no control character,
    and writes nothing outside `out`. A refusal has exit code 1 (2 for usage) and one line.
    """
    _start_server()
    case.make(folder)
    before = _listing(folder)
    errors = folder.parent / f"{folder.name}.errors"
    child = forked._context.Process(
        target=_run, args=(case.arguments, dict(case.variables), folder, errors)
    )
    child.start()
    child.join(SECONDS)
    hung = child.exitcode is None
    child.kill()
    child.join()
    text = errors.read_text(errors="surrogateescape") if errors.exists() else ""
    assert not hung, f"no end after {SECONDS} seconds: {text}"
    assert "Traceback" not in text, text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), ascii(text)
    assert _listing(folder) == before, "something outside `out` was written"
    if case.refused is None:
        assert child.exitcode == 0, (child.exitcode, text)
        case.check(folder)
        return
    assert child.exitcode in (1, 2), (child.exitcode, text)
    assert text.count("\n") == 1 or child.exitcode == 2, text
    assert len(text) < 600, text
    assert re.search(case.refused, text), text


@functools.cache
def _start_server() -> None:
    """Let the server of the forks load its modules, once, before a command is timed."""
    child = forked._context.Process(target=_peak_bytes)
    child.start()
    child.join()


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of change) of each file outside `out`, by path."""
    found = {}
    for root, folders, files in os.walk(folder):
        if Path(root) == folder and "out" in folders:
            folders.remove("out")
        for name in files:
            facts = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = facts.st_size, facts.st_mtime_ns
    return found


def _run(arguments: list[str], variables: dict[str, str], folder: Path, errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="surrogateescape")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    forked.torch.set_num_threads(1)
    os.environ.update(variables)
    os.chdir(folder)
    held = _peak_bytes()
    code = forked.main(arguments)
    grown = _peak_bytes() - held
    assert grown < MEMORY, f"{grown:,} bytes of memory"
    sys.exit(code)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""Commands in a forked process: everything that they print, and the files that they leave."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import forked

SECONDS = 120
CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"


@dataclass(frozen=True)
class Call:
    """`halfstep <arguments>` in a folder, with further variables of the environment."""

    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def printed(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.printed"

    @property
    def code(self) -> Path:
        return self.folder.parent / f"{self.folder.name}.code"


def outputs_of(
    calls: list[Call], before: Callable[[], None] | None = None
) -> list[tuple[int, str]]:
    """Exit code, and stdout and stderr together, of each call; one after another in one process."""
    child = forked._context.Process(target=_run, args=(calls, before))
    child.start()
    child.join(SECONDS)
    hung = child.exitcode is None
    child.kill()
    child.join()
    texts = [
        call.printed.read_text(errors="surrogateescape") if call.printed.exists() else ""
        for call in calls
    ]
    assert not hung, texts
    codes = [int(call.code.read_text()) if call.code.exists() else -1 for call in calls]
    return list(zip(codes, texts, strict=True))


def output_of(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit code, and stdout and stderr together, of `halfstep <arguments>` in the folder."""
    return outputs_of([Call(arguments, folder)])[0]


def _run(calls: list[Call], before: Callable[[], None] | None) -> None:
    forked.torch.set_num_threads(1)
    if before:
        before()
    outside = dict(os.environ)
    for call in calls:
        file = os.open(call.printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(file, number)
            stream = os.fdopen(number, "w", buffering=1, closefd=False, errors="surrogateescape")
            setattr(sys, name, stream)
        os.environ.clear()
        os.environ.update(outside | call.environment)
        os.chdir(call.folder)
        try:
            code = forked.main(call.arguments)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        call.code.write_text(str(code))


def files_with(text: str, folder: Path) -> list[str]:
    """The files below the folder whose name or content holds the text."""
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if text in str(file.relative_to(folder))
        or (file.is_file() and text.encode() in file.read_bytes())
    ]


def control_characters(text: str) -> list[str]:
    """The control characters of a text, but tab and line feed."""
    return re.findall(CONTROL, text)

"""`halfstep write`: continue and fill in the texts that a person types, one after the other."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
from torch import Tensor

from halfstep.checkpoint import Model, load_checkpoint
from halfstep.commands.terminal import DenoisingView, document_end, terminal
from halfstep.commands.writers import (
    MASK,
    Writer,
    default_steps,
    encode_prompt,
    note_unused_options,
    separate_documents,
    text_writer,
)
from halfstep.config import Device, WriteOptions
from halfstep.diffusion.contracts import Samples
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.watching import Show
from halfstep.distributed.device import find_device
from halfstep.errors import HalfstepError
from halfstep.resolve import explain
from halfstep.sanitize import one_line, shorten

if TYPE_CHECKING:
    from rich.console import Console

HELP = (
    f"a text: continue it, or fill in each {MASK} in it | /again: the same once more | "
    "/steps N | /temperature T | /seed N | /quit"
)
SETTINGS = {"steps": "steps", "temperature": "temperature", "seed": "sampling_seed"}


def write(checkpoint: Path, drawing: WriteOptions, machine: Device) -> None:
    """Continue each text that you type, or fill in each <|mask|> in it; end with /quit or Ctrl-D.

    The answer ends with the document that the text begins. The same line has the same answer, and
    /again writes another one: the i-th time it is text i of `halfstep generate`, whose first is 0.

    Without a terminal each line of the input is answered by one line, so a program can use it.

    Args:
        checkpoint: checkpoint folder; its flag may be left out where it comes first
    """
    loaded = load_checkpoint(
        checkpoint, drawing.weights, str(find_device(machine)), drawing.precision
    )
    console = terminal() if sys.stdin.isatty() else None
    loop = _Loop(loaded, drawing, console)
    steps = loop.steps if loaded.denoiser else loaded.length
    note_unused_options(loaded, loaded.length, steps, drawing)
    loop.writer()  # a sampler may refuse the step count
    if console:
        print(HELP)
    for line in _lines(console):
        try:
            answer = loop.answer(line)
        except HalfstepError as error:
            answer = one_line(str(error))
        except KeyboardInterrupt:
            if console is None:
                raise
            answer = "stopped"
        if answer is None:
            break
        if answer:
            print(answer, flush=True)


def _lines(console: Console | None) -> Iterator[str]:
    """The lines that are typed, with history, or those of the input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if console:
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines and knows the earlier ones
    while True:
        try:
            yield input("> " if console else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if console is None:
                raise
            print()


@dataclass
class _Loop:
    """The model, the options as the commands have set them, and the last text.

    number: of the text that the options and the prompt give, from 0 on
    """

    model: Model
    options: WriteOptions
    console: Console | None
    prompt: Tensor | None = None
    number: int = 0

    def answer(self, line: str) -> str | None:
        """The answer to a line: None ends the loop, and "" is on the terminal already."""
        if not line.startswith("/"):
            self.prompt, self.number = encode_prompt(self.model, line), 0
            return self._write()
        name, _, value = line[1:].strip().partition(" ")
        if name == "quit":
            return None
        if name == "help":
            return HELP
        if name == "again":
            if self.prompt is None:
                raise HalfstepError("/again: there is no text yet; type one")
            self.number += 1
            return self._write()
        if name in SETTINGS:
            return self._set(name, value.strip())
        raise HalfstepError(f"/{shorten(name)}: unknown command; /help lists all")

    def _set(self, name: str, value: str) -> str:
        key = SETTINGS[name]
        if name == "steps" and self.model.denoiser is None:
            raise HalfstepError("/steps: an autoregressive model takes one step per token")
        if value:
            before = self.options
            try:
                changed = before.model_dump() | {key: value}
                self.options = WriteOptions.model_validate(changed)
                self.writer()  # a sampler may refuse the step count
            except pydantic.ValidationError as error:
                raise HalfstepError(f"/{explain(error)[0].removeprefix('sampling_')}") from None
            except HalfstepError:
                self.options = before
                raise
        return f"{name}: {self.steps if name == 'steps' else getattr(self.options, key)}"

    @property
    def steps(self) -> int:
        """The number of sampling steps of now."""
        return self.options.steps or default_steps(self.model, self.options.sampler)

    def writer(self, show: Show | None = None) -> Writer:
        """A function that writes texts with the options of now."""
        return text_writer(self.model, self.model.length, self.steps, self.options, show=show)

    def _write(self) -> str:
        """Write the text. On a terminal the view shows that of a diffusion model, step by step."""
        assert self.prompt is not None
        model, prompt, steps = self.model, self.prompt[None], self.steps
        if self.console and model.denoiser:
            by_time = SAMPLERS[self.options.sampler].by_time
            view = DenoisingView(
                model, steps, self.writer, self.console, whole=False, by_time=by_time
            )
            view(prompt, self.number)
            return ""
        texts = self.writer()(prompt, self.number)
        ids = texts.ids[:, : document_end(model, texts.ids[0], len(self.prompt))]
        (text,) = separate_documents(model, Samples(ids, texts.network_evaluations))
        return text if self.console else one_line(text)

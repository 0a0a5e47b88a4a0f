"""Texts on standard output: printed as they are drawn, and their denoising step by step."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.checkpoint import Model
from halfstep.data.tokenizer import EOS
from halfstep.diffusion.contracts import Samples
from halfstep.diffusion.watching import GIVEN, HIDDEN, Reveals, Show
from halfstep.sanitize import escape_controls

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

    from halfstep.commands.writers import Writer

SEPARATOR = f"\n{EOS}\n"  # between two documents of a text
END = " ¶ "  # the same in the view, whose lines should not jump
LONG_ENOUGH_S = 4.0  # for all steps of a text together, so that the eye can follow
SCALE = 12  # blocks of color in the legend, at most
RAMP = ((66, 133, 244), (150, 90, 235), (225, 70, 150), (240, 120, 40), (215, 165, 20))
"""Colors of the first to the last step, red, green, blue; readable on black and on white."""


def terminal() -> Console | None:
    """The terminal that standard output is, for texts that are sanitized; None for a file or pipe.

    rich moves the cursor and colors texts by control characters, which standard output escapes.
    """
    from rich.console import Console

    if not sys.stdout.isatty():
        return None
    stream = getattr(sys.stdout, "unguarded", sys.stdout)
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # a terminal may not know our blocks
    return Console(file=stream)


def print_title(title: str, console: Console | None) -> None:
    """Print the title of a text, if it has one: as in samples.txt, or as a line on a terminal."""
    from rich.rule import Rule
    from rich.text import Text

    if title and console:
        console.print(Rule(Text(f"text {title}"), align="left", style="bright_black"))
    elif title:
        print(f"=== {title}", flush=True)


class DenoisingView:
    """Shows how a sampler fills in one text after another; it is itself a Writer of single texts.

    make(show) is a Writer that calls `show` before each pass. On a terminal the text is drawn again
    after each step, in the colors of its steps, and takes at least `least_s` seconds. Without a
    terminal each step that takes a pass is one line. With whole=False only the document that the
    prompt begins is shown.
    """

    def __init__(
        self,
        model: Model,
        steps: int,
        make: Callable[[Show], Writer],
        console: Console | None = None,
        least_s: float = 0.0,
        whole: bool = True,
        by_time: bool = True,
    ):
        self.model, self.steps, self.console, self.least_s = model, steps, console, least_s
        self.whole, self.by_time = whole, by_time
        self.write = make(self._before_pass)

    def __call__(self, prompts: Tensor, first: int) -> Samples:
        """Write one text and show its steps: prompts[1, P]."""
        self.given = prompts.shape[1]
        given = torch.full((self.model.length,), self.model.mask_id)
        given[: self.given] = prompts[0]
        self.reveals = Reveals(given, self.model.mask_id, self.steps, self.by_time)
        self.started = time.monotonic()
        if self.console is None:
            self.redraw = lambda: print(self._line(), flush=True)
            return self._written(prompts, first)
        from rich.live import Live

        options: dict[str, Any] = dict(redirect_stdout=False, redirect_stderr=False)
        with Live(self.frame(), console=self.console, refresh_per_second=20, **options) as live:
            self.redraw = lambda: live.update(self.frame())
            return self._written(prompts, first)

    def _written(self, prompts: Tensor, first: int) -> Samples:
        samples = self.write(prompts, first)
        self._show_step(samples.ids[0])
        return samples

    def _before_pass(self, xt: Tensor, t: Tensor) -> None:
        if self.reveals.passes:
            self._show_step(xt[0])
        self.reveals.before_pass(xt, t)

    def _show_step(self, ids: Tensor) -> None:
        """Show the ids[L] that the step has left behind, once its share of the time is over."""
        self.reveals.note(ids)
        due = self.started + self.least_s * self.reveals.step / self.steps
        time.sleep(max(0.0, due - time.monotonic()))
        self.redraw()

    def _pieces(self) -> list[tuple[str, int]]:
        ids, step_of = self.reveals.ids, self.reveals.step_of
        end = None if self.whole else document_end(self.model, ids, self.given)
        return text_pieces(self.model, ids[:end].tolist(), step_of[:end].tolist())

    def _line(self) -> str:
        """The step and the text in one line."""
        shown = "".join(" _" if step == HIDDEN else text for text, step in self._pieces())
        return f"step {self.reveals.step} of {self.steps} | {self._count()} | {_in_a_row(shown)}"

    def _count(self) -> str:
        written = int((self.reveals.step_of > GIVEN).sum())
        return f"{written} of {int((self.reveals.step_of != GIVEN).sum())} tokens"

    def frame(self) -> Group:
        """What the terminal shows now: the text, and below it the colors of the steps so far."""
        from rich.console import Group

        return Group(self.body(), self.legend())

    def body(self) -> Text:
        """The text as it is now; given tokens are bold, written ones have the color of their step.

        A token that is not revealed is three blocks.
        """
        from rich.text import Text

        body = Text()
        for text, step in self._pieces():
            if step == HIDDEN:
                body.append(" ░░░", "bright_black")
            else:
                style = "bold" if step == GIVEN else step_color(step, self.steps)
                body.append(escape_controls(text.replace(SEPARATOR, END)), style)
        return body

    def legend(self) -> Text:
        """The steps so far in their colors, and how many tokens they have revealed."""
        from rich.text import Text

        reveals, blocks = self.reveals, min(self.steps, SCALE)
        legend = Text(f"\nstep {reveals.step} of {self.steps} ", "bright_black")
        for block in range(blocks):
            step = 1 + block * (self.steps - 1) // max(1, blocks - 1)
            legend.append("■" if step <= reveals.step else "·", step_color(step, self.steps))
        words = [""]
        if self.whole:
            words.append(self._count())
        if (reveals.step_of == GIVEN).any():
            words.append("bold: given")
        if self.whole and (reveals.ids == self.model.eos_id).any():
            words.append(f"{END.strip()} ends a document")
        legend.append(" | ".join(words), "bright_black")
        return legend


def _in_a_row(text: str) -> str:
    """The text on one line, with one blank in place of all others and of line ends."""
    return " ".join(text.split())


def step_color(step: int, steps: int) -> str:
    """The color of a step from 1 to `steps`, as #rrggbb."""
    place = (step - 1) / max(1, steps - 1) * (len(RAMP) - 1)
    lower = min(int(place), len(RAMP) - 2)
    share = place - lower
    mixed = (round(a + share * (b - a)) for a, b in zip(RAMP[lower], RAMP[lower + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def document_end(model: Model, ids: Tensor, given: int) -> int:
    """Number of tokens of ids[L] up to the end of the document that `given` tokens begin."""
    ends = (ids[given:] == model.eos_id).nonzero()[:, 0]
    return given + int(ends[0]) + 1 if len(ends) else len(ids)


def text_pieces(model: Model, ids: list[int], step_of: list[int]) -> list[tuple[str, int]]:
    """(text, step) of the tokens of a text in order, without BOS and a last EOS.

    Tokens that are parts of one character are one piece, with the step of the last. A hidden
    position is ("", HIDDEN).
    """
    pieces: list[tuple[str, int]] = []
    parts: list[int] = []  # tokens of a character that is not complete
    for place, (token, step) in enumerate(zip(ids, step_of, strict=True)):
        is_special = token in (model.eos_id, model.mask_id)
        if is_special and parts:
            pieces.append((model.tokenizer.decode(parts), step_of[place - 1]))
            parts = []
        if token == model.mask_id:
            pieces.append(("", HIDDEN))
        elif token == model.eos_id and 0 < place < len(ids) - 1:
            pieces.append((SEPARATOR, step))
        elif not is_special:
            parts.append(token)
            text = model.tokenizer.decode(parts)
            if place + 1 == len(ids) or not text.endswith("\ufffd"):
                pieces.append((text, step))
                parts = []
    return pieces

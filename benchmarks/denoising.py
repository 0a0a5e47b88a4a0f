"""A picture of `halfstep write` and `generate --watch`: a text after some of its steps, as an SVG.

    python benchmarks/denoising.py results/models/stories-tiny/kl_backward/round-7 \
        --output docs/results/denoising.svg

The text is the first one of the default options. Only the document that the prompt begins is drawn.
"""

import argparse
import io
import math
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from halfstep.checkpoint import load_checkpoint
from halfstep.commands.terminal import DenoisingView
from halfstep.commands.writers import encode_prompt, text_writer
from halfstep.config import DEFAULT_STEPS, DrawOptions
from halfstep.diffusion.watching import HIDDEN
from halfstep.metrics.rows import model_name

PROMPT = "At the <|mask|> Mia the cat"
SHARES = (1 / 8, 3 / 8, 5 / 8, 1)  # of the steps after which the text is drawn
FONT = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # rich names files of another site
SHAPE = dict(width=80, force_terminal=True, color_system="truecolor")


def draw(folder: Path, output: Path, prompt: str, steps: int) -> None:
    """Write the first text of a checkpoint and draw it after some of its steps."""
    torch.set_num_threads(1)
    model = load_checkpoint(folder, "ema", "cpu", "float32")

    def writer(show):
        return text_writer(model, model.length, steps, DrawOptions(), show=show)

    view = DenoisingView(model, steps, writer, Console(file=io.StringIO()), whole=False)
    view(encode_prompt(model, prompt)[None], 0)
    ids, step_of = view.reveals.ids, view.reveals.step_of
    picture = Console(record=True, file=io.StringIO(), **SHAPE)
    for step in sorted({math.ceil(share * steps) for share in SHARES}):
        later = step_of > step
        view.reveals.ids = ids.masked_fill(later, model.mask_id)
        view.reveals.step_of = step_of.masked_fill(later, HIDDEN)
        title = Text(f"after step {step} of {steps}", "bright_black")
        picture.print(Rule(title, align="left", style="bright_black"))
        picture.print(view.body())
    view.reveals.step = steps
    picture.print(view.legend())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(FONT.sub("", picture.export_svg(title=model_name(folder))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    given = parser.parse_args()
    draw(given.checkpoint, given.output, given.prompt, given.steps)

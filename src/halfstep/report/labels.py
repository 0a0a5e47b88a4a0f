"""Names of lines: keys become words, and stand next to their ends so that none covers another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Behind a label; an outline around the letters would triple the size of an SVG.
PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
WORDS = {  # of keys and column names in a figure
    "kl_backward": "reverse KL",
    "kl_forward": "forward KL",
    "mse": "squared error",
    "tvd": "total variation",
    "l1_log_p": "L1 of log-probabilities",
    "data": "held-out text",
    "baseline": "autoregressive",
    "the baseline's quality": "autoregressive",
    "unigram": "random tokens",
    "bigram": "random token pairs",
    "cut_and_paste": "shuffled sentences",
    "last_words": "last words",
    "infilling": "held-out text",
}
GAP = 9.5  # points between two labels
LETTER = 0.056  # width of a letter of a label, in inches


class Label(NamedTuple):
    """A name to write next to the end (x, y) of its line."""

    x: float
    y: float
    name: str
    color: str


def in_words(text: str) -> str:
    """A name of lines or panels with its keys as words: `kl_backward, round 7`."""
    if text in WORDS:
        return WORDS[text]
    return re.sub(r"(?<![\w-])\w+(?![\w-])", lambda key: WORDS.get(key[0], key[0]), text)


def name_model(run: str, round_: int) -> str:
    """A model as a reader sees it in a sentence or a grid: `reverse KL round 7`, `teacher`."""
    return f"{in_words(run)} round {round_}" if round_ else run


def label_lines(axes: Axes, labels: Sequence[Label], side: str, shift: float = 0) -> None:
    """Write each name next to the end of its line, moved as little as possible, without overlap.

    Args:
        axes: the axes of a panel, with their final limits
        labels: the names, and the ends of their lines
        side: left (of the lines) or right (of the axes)
        shift: inches between the axes and the names at their right
    """
    if not labels:
        return
    labels = sorted(labels, key=lambda label: label.y)
    scale = 72 / axes.figure.dpi
    box = axes.get_window_extent()
    ends = [axes.transData.transform((label.x, label.y)) for label in labels]
    ends_x = [scale * x for x, _ in ends]
    ends_y = [scale * y for _, y in ends]
    places = spread(ends_y, GAP, scale * box.y0 + 3, scale * box.y1 - 3)
    column = min(ends_x) - 14 if side == "left" else scale * box.x1 + 12 + 72 * shift
    for label, x, y, place in zip(labels, ends_x, ends_y, places, strict=True):
        # A long leader is dotted, so that it does not look like a line of the figure.
        dashes = "-" if abs(column - x) < 30 else (0, (1, 3))
        leader = {
            "arrowstyle": "-",
            "color": label.color,
            "linewidth": 0.5,
            "linestyle": dashes,
            "shrinkA": 2.5,
            "shrinkB": 3,
            "relpos": (1 if side == "left" else 0, 0.5),
        }
        axes.annotate(
            label.name,
            (label.x, label.y),
            (column - x, place - y),
            textcoords="offset points",
            fontsize=7,
            color=label.color,
            annotation_clip=False,
            ha="right" if side == "left" else "left",
            va="center",
            bbox=PLATE,
            arrowprops=leader,
        )


def spread(wish: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to the wished ones that keep a gap between them, within [low, high].

    Least squares by pooling adjacent violators; `wish` is ascending.
    """
    gap = min(gap, (high - low) / max(len(wish) - 1, 1))
    blocks: list[list[float]] = []  # [sum of wishes less their offsets, count]
    for i, place in enumerate(wish):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    top = high - gap * (len(wish) - 1)
    flat = []
    for total, count in blocks:
        flat += [min(max(total / count, low), top)] * int(count)
    return [place + i * gap for i, place in enumerate(flat)]

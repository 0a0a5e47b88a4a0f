"""How figures look: a sentence as title, colors that survive gray print, labels at the lines.

A figure is drawn from `points`, a DataFrame with the columns POINTS, and shows exactly these.
Equal points give equal files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame, Series

from halfstep.report.labels import LETTER, in_words
from halfstep.report.marks import (
    FEWEST_FOR_BAND,
    LEVELS,
    SMOOTHED,
    STRIP,
    draw_series,
    has_band,
    rounds_of,
)

RC = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#333",
    "ytick.color": "#333",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "pdf.fonttype": 42,
    "svg.hashsalt": "halfstep",
}
GOALS = {"lower": "↓ lower is better", "higher": "↑ higher is better"}
DARK = (  # of an SVG that is shown by itself or as an image: hues stay, lightness turns
    "@media (prefers-color-scheme: dark) {"
    "svg:root {filter: invert(0.9) hue-rotate(180deg) brightness(1.3)}"
    "}"
)
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
LEFT, ABOVE, BELOW = 0.82, 0.4, 0.5  # inches around the axes of a panel
TOKENS = 0.3  # inches of the axis of tokens per step, above the panel


def draw_over_steps(
    points: DataFrame,
    note: str,
    ylabel: str,
    title: str = "",
    better: str = "",
    log_y: bool = False,
    before: Callable[[Axes, DataFrame], None] | None = None,
) -> Figure:
    """`draw_panels` of curves over sampling steps, with their names at the fewest steps."""
    return draw_panels(
        points,
        note,
        title=title,
        xlabel="sampling steps",
        ylabel=ylabel,
        better=better,
        x_scale="steps",
        log_y=log_y,
        labels="left",
        before=before,
    )


def draw_panels(  # noqa: PLR0913 - the look of a figure, in keywords with defaults
    points: DataFrame,
    note: str,
    *,
    xlabel: str,
    ylabel: str | Mapping[str, str],
    title: str = "",
    better: str | Mapping[str, str] = "",
    subtitles: Mapping[str, str] | None = None,
    x_scale: str = "linear",
    log_y: bool = False,
    labels: str = "right",
    share_y: bool = True,
    columns: int = 3,
    interval: str = "95% intervals",
    before: Callable[[Axes, DataFrame], None] | None = None,
) -> Figure:
    """One panel for each value of `panel`, one line for each series, the note at the foot.

    The y axis spans the lines. Levels stand in a strip at the right edge, and those outside of the
    axis at its end, with an arrow. Axes have fixed inches, so that labels are placed before the
    figure is drawn.

    Args:
        points: what is drawn
        note: what the figure shows and how it was measured, in plain words
        xlabel: text below the x axis
        ylabel: text at the y axis, one for all or one for each panel
        title: the message of the figure, a sentence
        better: `lower` or `higher` where that is better, one for all or one for each panel
        subtitles: titles of panels; by default what their names do not have in common
        x_scale: linear (with ticks at whole numbers), real (linear, with any ticks), log, or steps
            (powers of two, with a tick at every x)
        log_y: whether y is logarithmic
        labels: the end of the lines where their names are written: right or left
        share_y: whether all panels have the same y limits
        columns: maximum number of panels side by side
        interval: what `low` and `high` are, in the plural
        before: draws what is no series on the axes of a panel, given the points of the panel
    """
    with matplotlib.rc_context(RC):
        panels = list(dict.fromkeys(points["panel"]))
        heads = _panel_titles(panels, bool(title)) | dict(subtitles or {})
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        wide, high = (4.4, 2.9) if len(panels) == 1 else (3.0, 2.4)  # inches
        if columns > 2:
            wide = 2.6
        above = ABOVE if any(heads.values()) else 0.15
        if points["tokens"].notna().any():
            above += TOKENS
        right = _room_at_right(points, labels)
        # Levels that are the same in all panels of a row are named once, at its end.
        once = share_y and labels == "left" and _same_levels(points)
        inner = 0.15 + (STRIP if (points["kind"] == "level").any() else 0) if once else right
        left = 0.4 if share_y else LEFT  # of all columns but the first
        width = LEFT + columns * wide + (columns - 1) * (inner + left) + right
        head = textwrap.wrap(title, int(width * 11.5), break_on_hyphens=False)
        foot = " ".join([note, *_explain(points, interval)])
        lines = textwrap.wrap(foot, int(width * 17), break_on_hyphens=False)
        top = 0.12 + 0.19 * len(head) if head else 0
        height = top + rows * (high + above + BELOW) + 0.12 + 0.14 * len(lines)
        figure = Figure(figsize=(width, height))
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            x = LEFT + column * (wide + inner + left)
            y = height - top - row * (high + above + BELOW) - above - high
            place = (x / width, y / height, wide / width, high / height)
            axes = figure.add_axes(place, label=panel)
            mine = points[points["panel"] == panel]
            axes.set_title(heads[panel], fontweight="bold", color="#222")
            axes.set_xlabel(xlabel)
            if column == 0 or not share_y:
                goal = better if isinstance(better, str) else better.get(panel, "")
                name = ylabel if isinstance(ylabel, str) else ylabel[panel]
                axes.set_ylabel(f"{name}\n{GOALS[goal]}" if goal else name)
            room = _room_at_left(mine) / wide if labels == "left" else 0
            _set_x_axis(axes, mine["x"].dropna(), x_scale, room)
            _add_tokens_axis(axes, mine.dropna(subset="tokens"))
            _set_y_axis(axes, points if share_y else mine, log_y)
            if before:
                before(axes, mine)
            is_last = column == columns - 1 or i == len(panels) - 1
            draw_series(axes, mine, points, labels, is_last or not once)
        for i, line in enumerate(head):
            place = (0.12 / width, 1 - (0.22 + 0.19 * i) / height)
            figure.text(*place, line, fontsize=9.5, fontweight="bold", color="#111", gid="title")
        for i, line in enumerate(reversed(lines)):
            place = (0.12 / width, (0.1 + 0.14 * i) / height)
            figure.text(*place, line, fontsize=6.5, color="#555")
        return figure


def save_figure(figure: Figure, target: Path, suffix: str) -> None:
    """Write a figure as .pdf, .svg or .png, without dates: equal figures give equal bytes.

    An SVG is dark where its reader prefers that.
    """
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(RC):
        figure.savefig(target, format=suffix[1:], metadata=dates.get(suffix), dpi=150)
    if suffix == ".svg":
        svg = Path(target).read_text(encoding="utf-8")
        Path(target).write_text(svg.replace("</style>", f"{DARK}</style>", 1), encoding="utf-8")


def _panel_titles(panels: Sequence[str], has_title: bool) -> dict[str, str]:
    """What each panel is called: the parts of its name that not all panels have, in words."""
    parts = {panel: panel.split(" · ") for panel in panels}
    shared = set.intersection(*map(set, parts.values())) if has_title else set()
    own = {
        panel: in_words(" · ".join(part for part in names if part not in shared))
        for panel, names in parts.items()
    }
    return {panel: f"{name[:1].upper()}{name[1:]}" for panel, name in own.items()}


def _explain(points: DataFrame, interval: str) -> list[str]:
    """Sentences on what a reader sees: rings, faint lines, bands."""
    found = []
    if (points["own_steps"] == True).any():  # noqa: E712 - the column has missing values
        found.append("Ring: the number of steps that the round was trained to write in.")
    if any(len(rounds_of(panel)) > 3 for _, panel in points.groupby("panel")):
        found.append("Faint: the rounds in between.")
    lines = points[~points["kind"].isin(("level", "published", "raw"))]
    with_interval = lines[lines["low"].notna()]
    groups = [group for _, group in with_interval.groupby(["panel", "series"])]
    if any(map(has_band, groups)):
        shape = "Bands" if (with_interval["kind"] == "line").any() else "Bars"
        found.append(f"{shape}: {interval}.")
    if not all(map(has_band, groups)):
        fewest = int(with_interval["repeats"].min())
        found.append(
            f"No bands where a point has fewer than {FEWEST_FOR_BAND} repeats (here {fewest}); "
            f"its {interval} are in the CSV."
        )
    return found


def _same_levels(points: DataFrame) -> bool:
    """Do all panels have the same levels and published lines?"""
    references = points[points["kind"].isin(("level", "published"))]
    panels = [
        set(mine[["series", "y"]].itertuples(index=False, name=None))
        for _, mine in references.groupby("panel")
    ]
    return points["panel"].nunique() == len(panels) and all(mine == panels[0] for mine in panels)


def _room_at_right(points: DataFrame, labels: str) -> float:
    """Inches at the right of a panel for the strip of levels and the names that are written there.

    A level has its value after its name, or its values, and an arrow if it is outside of the axis.
    """
    lengths, strip = [0.0], 0.0
    ranges = set(points.loc[points.duplicated(["panel", "series"]), "series"])
    for series, kind in zip(points["series"], points["kind"], strict=True):
        if kind == "level":
            strip = STRIP
            lengths.append(len(in_words(series)) + 8)
        elif kind == "published":
            lengths.append(len(series.partition(":")[0]) + 2)
        elif labels == "right" and kind != "raw":
            name = in_words(series.removesuffix(SMOOTHED))
            values = 15 if series in ranges else 8
            lengths.append(len(name) + (values if series in LEVELS else 0))
    longest = max(lengths)
    return 0.15 + strip + (0.2 + LETTER * longest if longest else 0)


def _room_at_left(panel: DataFrame) -> float:
    """Inches at the left inside a panel for the names of its lines."""
    names = panel.loc[panel["kind"].isin(("line", "curve")), "series"].map(in_words)
    return 0.25 + LETTER * max(map(len, names), default=0)


def _set_x_axis(axes: Axes, x: Series, scale: str, room: float) -> None:
    """Limits and ticks; a share `room` of the width stays free at the left for labels."""
    low, high = x.min(), x.max()
    if scale in ("linear", "real"):
        space = (0.03 if scale == "linear" else 0.07) * (high - low or 1)
        axes.set_xlim(low - space - room / (1 - room) * (high - low), high + space)
        whole = scale == "linear"
        axes.xaxis.set_major_locator(MaxNLocator(9 if whole else 6, integer=whole))
        if low == high:  # a curve of one point
            axes.set_xticks([low])
    else:
        axes.set_xscale("log", base=2 if scale == "steps" else 10)
        span = (high / low if high > low else 4) ** (room / (1 - room))
        axes.set_xlim(low / span / 1.12, high * 1.12)
        axes.xaxis.set_minor_locator(NullLocator())
        if scale == "steps":
            axes.set_xticks(sorted(x.unique()))
            if x.nunique() > 6:
                axes.tick_params(axis="x", labelsize=6.5)
        else:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(PLAIN)


def _add_tokens_axis(axes: Axes, points: DataFrame) -> None:
    """Tokens per step along the top, at the ticks of the steps."""
    if points.empty:
        return
    tokens = points.drop_duplicates("x")
    top = axes.secondary_xaxis("top")
    top.set_xticks(tokens["x"], [f"{value:.3g}" for value in tokens["tokens"]])
    top.xaxis.set_minor_locator(NullLocator())
    top.tick_params(length=0, labelcolor="#777", labelsize=6.5, pad=1)
    top.spines["top"].set_visible(False)
    top.set_xlabel("tokens per step", color="#777", fontsize=6.5, labelpad=2)


def _set_y_axis(axes: Axes, points: DataFrame, log: bool) -> None:
    """Limits around all lines and their bands, and ticks.

    Levels, published values, and curves of the baseline and of held-out text do not count.
    """
    is_reference = points["kind"].isin(("level", "published")) | (
        (points["kind"] == "curve") & points["series"].isin(LEVELS)
    )
    ours = points[~is_reference]
    ours = ours if len(ours) else points
    with_band = ours[ours["repeats"] >= FEWEST_FOR_BAND]
    y = pandas.concat([ours["y"], with_band["low"], with_band["high"]]).dropna().astype(float)
    if log and (y > 0).any():
        y = y[y > 0]
        axes.set_yscale("log")
        axes.set_ylim(y.min() / 1.15, y.max() * 1.15)
        if y.max() < 4 * y.min():
            axes.yaxis.set_major_locator(MaxNLocator(6))
        else:
            ticks = (1, 3) if y.max() > 50 * y.min() else (1, 2, 3, 5, 7)
            axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        space = 0.06 * (y.max() - y.min() or abs(y.max()) or 1)
        axes.set_ylim(y.min() - space, y.max() + space)
    axes.yaxis.set_major_formatter(PLAIN)

"""How figures look: a ramp that survives grey, labels at the lines instead of a legend, the source at the foot, the same bytes every time.

A figure is drawn from `points`, a DataFrame with the columns POINTS; what is drawn is what the CSV beside the figure holds.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

if TYPE_CHECKING:
    from pandas import DataFrame

POINTS = (
    "panel",
    "series",
    "kind",
    "round",
    "x",
    "y",
    "low",
    "high",
    "text",
)  # kind: line; level (a horizontal line); point; published. text: beside it
RC = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.titlelocation": "left", "axes.labelsize": 8, "axes.linewidth": 0.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#555", "axes.axisbelow": True, "axes.grid": True, "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6, "xtick.color": "#333", "ytick.color": "#333", "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "lines.linewidth": 1.3, "lines.markersize": 4, "pdf.fonttype": 42, "svg.hashsalt": "halfstep",
}  # fmt: skip
MARKERS = "ov^D<>X"
RUNS = (
    ("#123a6b", "-"),
    ("#c4542d", (0, (5, 1.5))),
    ("#4f9d69", (0, (1, 1))),
    ("#8d5a97", (0, (4, 1, 1, 1))),
    ("#a8842c", (0, (7, 2, 1, 2))),
)
LEVELS = {"baseline": ("#555", (0, (5, 2))), "data": ("#555", (0, (1, 1.5)))}
PUBLISHED = {
    "color": "#8c8c8c",
    "linewidth": 0.7,
    "linestyle": "-",
    "marker": ".",
    "markersize": 3.5,
}  # called by what stands before the colon
PLATE = {
    "facecolor": "white",
    "edgecolor": "none",
    "alpha": 0.75,
    "pad": 0.4,
}  # behind a label; outlined letters would triple an SVG
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
GAP, LETTER = 9.5, 0.056  # points between two labels; inches of one letter in them


def series_style(series: str, round_: int, rounds: int, order: int) -> dict:
    """Teacher: black with hollow squares; rounds: a ramp from light orange to dark blue; runs without rounds: hue, lightness and dashes."""
    if series == "teacher":
        return {
            "color": "black",
            "marker": "s",
            "markerfacecolor": "white",
            "linewidth": 1.5,
            "linestyle": "-",
        }
    if series.startswith("baseline"):
        other = series in ("baseline, transformers", "baseline, vLLM")
        return {
            "color": LEVELS["baseline"][0],
            "marker": "P" if other else "D",
            "markerfacecolor": "white",
            "linestyle": LEVELS["data" if other else "baseline"][1],
        }
    if round_:
        shade = matplotlib.colormaps["plasma"](0.8 - 0.78 * (round_ - 1) / max(rounds - 1, 1))
        return {
            "color": matplotlib.colors.to_hex(shade),
            "marker": MARKERS[(round_ - 1) % len(MARKERS)],
            "linestyle": "-",
        }
    color, dashes = RUNS[order % len(RUNS)]
    return {"color": color, "marker": MARKERS[order % len(MARKERS)], "linestyle": dashes}


def draw_panels(
    points: DataFrame,
    note: str,
    *,
    xlabel: str,
    ylabel: str | dict[str, str],
    x_scale: str = "linear",
    log_y: bool = False,
    labels: str = "right",
    share_y: bool = True,
    columns: int = 3,
    before: Callable[[Axes, DataFrame], None] | None = None,
) -> Figure:
    """One panel for each value of `panel`, one line for each series.

    x_scale: linear, log, or steps (powers of two, with a tick at every x); labels: at the right or left ends of the lines;
    before: adds to the axes of a panel what is no series. Axes have fixed inches, so that labels know where the lines end.
    """
    with matplotlib.rc_context(RC):
        panels = list(dict.fromkeys(points["panel"]))
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        shown = points.assign(series=points["series"].str.partition(":")[0])
        beside = [
            name
            for name, kind in zip(shown["series"], shown["kind"], strict=True)
            if labels == "right" or kind in ("level", "published")
        ]
        wide, high = (4.4, 2.9) if len(panels) == 1 else (3.0, 2.4)  # inches, as all that follow
        left, above, below = 0.64, 0.4, 0.5
        right = 0.15 + max(
            [0, *(0.2 + LETTER * (len(name) + 5 * (name in LEVELS)) for name in beside)]
        )
        lines = textwrap.wrap(
            note, int(columns * (wide + left + right) * 19), break_on_hyphens=False
        )
        width, height = (
            columns * (wide + left + right),
            rows * (high + above + below) + 0.12 + 0.13 * len(lines),
        )
        figure = Figure(figsize=(width, height))
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            bottom = height - row * (high + above + below) - above - high
            axes = figure.add_axes(
                (
                    (column * (wide + left + right) + left) / width,
                    bottom / height,
                    wide / width,
                    high / height,
                ),
                label=panel,
            )
            mine = points[points["panel"] == panel]
            axes.set_title(panel, fontweight="bold", color="#222")
            axes.set_xlabel(xlabel)
            if column == 0 or not share_y:
                axes.set_ylabel(ylabel if isinstance(ylabel, str) else ylabel[panel])
            _x_axis(
                axes,
                mine["x"].dropna(),
                x_scale,
                (0.25 + LETTER * mine.loc[mine["kind"] != "published", "series"].str.len().max())
                / wide
                if labels == "left"
                else 0,
            )
            _y_axis(axes, points if share_y else mine, log_y)
            if before:
                before(axes, mine)
            _lines(axes, mine, points, labels)
        for i, line in enumerate(reversed(lines)):
            figure.text(0.12 / width, (0.1 + 0.13 * i) / height, line, fontsize=6, color="#666")
        return figure


def save_figure(figure: Figure, target: Path, suffix: str) -> None:
    """.pdf or .svg without dates, so that equal inputs give equal bytes; .png to look at."""
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(RC):
        figure.savefig(target, format=suffix[1:], metadata=dates.get(suffix), dpi=150)


def _x_axis(axes: Axes, x, scale: str, room: float) -> None:
    """Limits with a share `room` of the width kept free at the left, for labels."""
    low, high = x.min(), x.max()
    if scale == "linear":
        space = 0.03 * (high - low or 1)
        axes.set_xlim(low - space - room / (1 - room) * (high - low), high + space)
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    else:
        axes.set_xscale("log", base=2 if scale == "steps" else 10)
        span = (high / low if high > low else 4) ** (room / (1 - room))
        axes.set_xlim(low / span / 1.12, high * 1.12)
        axes.xaxis.set_minor_locator(NullLocator())
        if scale == "steps":
            axes.set_xticks(sorted(x.unique()))
        else:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(PLAIN)


def _y_axis(axes: Axes, points: DataFrame, log: bool) -> None:
    y = points[["y", "low", "high"]].stack().dropna()
    if log:
        axes.set_yscale("log")
        axes.set_ylim(y.min() / 1.15, y.max() * 1.15)
        axes.yaxis.set_major_locator(
            LogLocator(subs=(1, 3) if y.max() > 50 * y.min() else (1, 2, 3, 5, 7))
        )
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        space = 0.06 * (y.max() - y.min() or abs(y.max()) or 1)
        axes.set_ylim(y.min() - space, y.max() + space)
    axes.yaxis.set_major_formatter(PLAIN)


def _lines(axes: Axes, mine: DataFrame, points: DataFrame, labels: str) -> None:
    ours = points[points["kind"] != "published"]
    rounds, names = (
        int(ours["round"].fillna(0).max()),
        [name for name in dict.fromkeys(ours["series"]) if name not in (*LEVELS, "teacher")],
    )
    at_lines, at_levels = (
        [],
        [],
    )  # what is called at the end of a line, and what always at the right
    for name, group in mine.groupby("series", sort=False):
        first = group.iloc[0]
        if first["kind"] == "level":
            color, dashes = LEVELS.get(name, ("#555", ":"))
            axes.axhline(
                first["y"], color=color, linestyle=dashes, linewidth=1, label=name, gid=name
            )
            at_levels.append((first["y"], axes.get_xlim()[1], f"{name} {first['y']:.3g}", color))
            continue
        if first["kind"] == "published":
            axes.plot(
                group["x"].to_numpy(float),
                group["y"].to_numpy(float),
                label=name,
                gid=name,
                zorder=2,
                **PUBLISHED,
            )
            at_levels.append(
                (
                    group["y"].iloc[-1],
                    group["x"].iloc[-1],
                    name.partition(":")[0],
                    PUBLISHED["color"],
                )
            )
            continue
        style = series_style(
            name,
            int(first["round"]) if first["round"] == first["round"] else 0,
            rounds,
            names.index(name) if name in names else 0,
        )
        style |= {"marker": "", "linewidth": 1} if len(group) > 20 else {}
        if first["kind"] == "point":
            style |= {"linestyle": "", "markersize": 6}
        axes.plot(
            group["x"].to_numpy(float),
            group["y"].to_numpy(float),
            label=name,
            gid=name,
            zorder=3,
            **style,
        )
        if group["low"].notna().any():
            band = (
                group["x"].to_numpy(float),
                group["low"].to_numpy(float),
                group["high"].to_numpy(float),
            )
            if first["kind"] == "point":
                axes.vlines(*band, color=style["color"], linewidth=1)
            else:
                axes.fill_between(*band, color=style["color"], alpha=0.16, linewidth=0, zorder=1)
        for point in group.dropna(subset="text").itertuples():
            axes.annotate(
                point.text,
                (point.x, point.y),
                (5, 3),
                textcoords="offset points",
                fontsize=6.5,
                color="#444",
                bbox=PLATE,
            )
        if first["kind"] == "line":
            end = group.loc[group["x"].idxmin() if labels == "left" else group["x"].idxmax()]
            at_lines.append((end["y"], end["x"], name, style["color"]))
    label_lines(axes, at_lines + ([] if labels == "left" else at_levels), labels)
    if labels == "left":
        label_lines(axes, at_levels, "right")


def label_lines(axes: Axes, ends: Sequence[tuple[float, float, str, str]], side: str) -> None:
    """Write each name beside the end of its line, moved up or down as little as possible so that no two names touch."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[0])
    scale = 72 / axes.figure.dpi
    box = axes.get_window_extent()
    spots = [[scale * part for part in axes.transData.transform((x, y))] for y, x, _, _ in ends]
    places = spread([spot[1] for spot in spots], GAP, scale * box.y0 + 3, scale * box.y1 - 3)
    column = min(spot[0] for spot in spots) - 14 if side == "left" else scale * box.x1 + 12
    for (y, x, name, color), spot, place in zip(ends, spots, places, strict=True):
        dashes = (
            "-" if abs(column - spot[0]) < 30 else (0, (1, 3))
        )  # a long leader is not a line of the figure
        axes.annotate(
            name, (x, y), (column - spot[0], place - spot[1]), textcoords="offset points", fontsize=7, color=color, annotation_clip=False,
            ha="right" if side == "left" else "left", va="center", bbox=PLATE,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "linestyle": dashes, "shrinkA": 2.5, "shrinkB": 3, "relpos": (side == "left", 0.5)},
        )  # fmt: skip


def spread(wish: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to the wished ones (ascending, least squares) that keep `gap` apart within [low, high]: pool adjacent violators."""
    gap = min(gap, (high - low) / max(len(wish) - 1, 1))
    blocks: list[list[float]] = []  # [sum of wishes less their offsets, count]
    for i, place in enumerate(wish):
        blocks.append([place - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    flat = [
        min(max(total / count, low), high - gap * (len(wish) - 1))
        for total, count in blocks
        for _ in range(int(count))
    ]
    return [place + i * gap for i, place in enumerate(flat)]

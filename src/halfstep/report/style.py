"""How figures look: colors that survive gray print, labels at the lines, conditions at the foot.

A figure is drawn from `points`, a DataFrame with the columns POINTS, and shows exactly these.
Equal points give equal files.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame, Series

from halfstep.report.labels import LETTER, PLATE, Label, label_lines

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
MARKERS = "ov^D<>X"
RUNS = (  # color and dashes of runs that are not drawn by rounds
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
}
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
LEFT, ABOVE, BELOW = 0.64, 0.4, 0.5  # inches around the axes of a panel
TOKENS = 0.3  # inches of the axis of tokens per step, above the panel


def series_style(series: str, round_: int, rounds: int, order: int) -> dict:
    """Color, marker and dashes of a line.

    The teacher is black with hollow squares, rounds go from light orange to dark blue, and runs
    without rounds differ in hue, lightness and dashes.

    Args:
        series: name of the line
        round_: its round (0: none)
        rounds: number of rounds in the figure
        order: position of the series among those of the figure
    """
    if series == "teacher":
        return {
            "color": "black",
            "marker": "s",
            "markerfacecolor": "white",
            "linewidth": 1.5,
            "linestyle": "-",
        }
    if series == "data":
        return {"color": LEVELS["data"][0], "marker": "*", "linestyle": ""}
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


def draw_over_steps(
    points: DataFrame,
    note: str,
    ylabel: str,
    log_y: bool = False,
    before: Callable[[Axes, DataFrame], None] | None = None,
) -> Figure:
    """`draw_panels` of curves over sampling steps, with their names at the fewest steps."""
    return draw_panels(
        points,
        note,
        xlabel="sampling steps",
        ylabel=ylabel,
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
    x_scale: str = "linear",
    log_y: bool = False,
    labels: str = "right",
    share_y: bool = True,
    columns: int = 3,
    before: Callable[[Axes, DataFrame], None] | None = None,
) -> Figure:
    """One panel for each value of `panel`, one line for each series, the note at the foot.

    Axes have fixed inches, so that labels are placed before the figure is drawn.

    Args:
        points: what is drawn
        note: the conditions of measurement
        xlabel: text below the x axis
        ylabel: text at the y axis, one for all or one for each panel
        x_scale: linear (with ticks at whole numbers), real (linear, with any ticks), log, or steps
            (powers of two, with a tick at every x)
        log_y: whether y is logarithmic
        labels: the end of the lines where their names are written: right or left
        share_y: whether all panels have the same y limits
        columns: maximum number of panels side by side
        before: draws what is no series on the axes of a panel, given the points of the panel
    """
    with matplotlib.rc_context(RC):
        panels = list(dict.fromkeys(points["panel"]))
        columns = min(columns, len(panels))
        rows = -(-len(panels) // columns)
        wide, high = (4.4, 2.9) if len(panels) == 1 else (3.0, 2.4)  # inches
        above = ABOVE + (TOKENS if points["tokens"].notna().any() else 0)
        right = _room_at_right(points, labels)
        line_length = int(columns * (wide + LEFT + right) * 19)
        lines = textwrap.wrap(note, line_length, break_on_hyphens=False)
        width = columns * (wide + LEFT + right)
        height = rows * (high + above + BELOW) + 0.12 + 0.13 * len(lines)
        figure = Figure(figsize=(width, height))
        for i, panel in enumerate(panels):
            row, column = divmod(i, columns)
            x = column * (wide + LEFT + right) + LEFT
            y = height - row * (high + above + BELOW) - above - high
            place = (x / width, y / height, wide / width, high / height)
            axes = figure.add_axes(place, label=panel)
            mine = points[points["panel"] == panel]
            axes.set_title(panel, fontweight="bold", color="#222")
            axes.set_xlabel(xlabel)
            if column == 0 or not share_y:
                axes.set_ylabel(ylabel if isinstance(ylabel, str) else ylabel[panel])
            room = _room_at_left(mine) / wide if labels == "left" else 0
            _set_x_axis(axes, mine["x"].dropna(), x_scale, room)
            _add_tokens_axis(axes, mine.dropna(subset="tokens"))
            _set_y_axis(axes, points if share_y else mine, log_y)
            if before:
                before(axes, mine)
            _draw_series(axes, mine, points, labels)
        for i, line in enumerate(reversed(lines)):
            place = (0.12 / width, (0.1 + 0.13 * i) / height)
            figure.text(*place, line, fontsize=6, color="#666")
        return figure


def save_figure(figure: Figure, target: Path, suffix: str) -> None:
    """Write a figure as .pdf, .svg or .png, without dates: equal figures give equal bytes."""
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context(RC):
        figure.savefig(target, format=suffix[1:], metadata=dates.get(suffix), dpi=150)


def _room_at_right(points: DataFrame, labels: str) -> float:
    """Inches at the right of a panel for the names that are written there."""
    lengths = []
    for series, kind in zip(points["series"], points["kind"], strict=True):
        if labels == "right" or kind in ("level", "published"):
            name = series.partition(":")[0]
            value = 5 if name in LEVELS else 0  # letters of the value after the name of a level
            lengths.append(len(name) + value)
    return 0.15 + max([0, *(0.2 + LETTER * length for length in lengths)])


def _room_at_left(points: DataFrame) -> float:
    """Inches at the left inside a panel for the names of its lines."""
    names = points.loc[points["kind"] != "published", "series"]
    return 0.25 + LETTER * names.str.len().max()


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
    """Limits around all values and intervals of these points, and ticks."""
    y = points[["y", "low", "high"]].stack().dropna()
    if log:
        axes.set_yscale("log")
        axes.set_ylim(y.min() / 1.15, y.max() * 1.15)
        ticks = (1, 3) if y.max() > 50 * y.min() else (1, 2, 3, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=ticks))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        space = 0.06 * (y.max() - y.min() or abs(y.max()) or 1)
        axes.set_ylim(y.min() - space, y.max() + space)
    axes.yaxis.set_major_formatter(PLAIN)


def _draw_series(axes: Axes, mine: DataFrame, points: DataFrame, labels: str) -> None:
    """All series of a panel and their names; `points` are those of all panels."""
    ours = points[points["kind"] != "published"]
    rounds = int(ours["round"].fillna(0).max())
    names = [name for name in dict.fromkeys(ours["series"]) if name not in (*LEVELS, "teacher")]
    at_lines, at_right = [], []
    for name, group in mine.groupby("series", sort=False):
        first = group.iloc[0]
        if first["kind"] == "level":
            at_right.append(_draw_level(axes, name, first["y"]))
        elif first["kind"] == "published":
            at_right.append(_draw_published(axes, name, group))
        else:
            round_ = int(first["round"]) if first["round"] == first["round"] else 0
            order = names.index(name) if name in names else 0
            look = series_style(name, round_, rounds, order)
            if len(group) > 20:
                look |= {"marker": "", "linewidth": 1}
            if first["kind"] == "point":
                look |= {"linestyle": "", "markersize": 6}
            _draw_line(axes, name, group, look)
            if first["kind"] in ("line", "curve"):
                end = group["x"].idxmin() if labels == "left" else group["x"].idxmax()
                x, y = group.loc[end, ["x", "y"]]
                at_lines.append(Label(x, y, name, look["color"]))
    if labels == "left":
        label_lines(axes, at_lines, "left")
        label_lines(axes, at_right, "right")
    else:
        label_lines(axes, at_lines + at_right, "right")


def _draw_level(axes: Axes, name: str, y: float) -> Label:
    color, dashes = LEVELS.get(name, ("#555", ":"))
    axes.axhline(y, color=color, linestyle=dashes, linewidth=1, label=name, gid=name)
    return Label(axes.get_xlim()[1], y, f"{name} {y:.3g}", color)


def _draw_published(axes: Axes, name: str, group: DataFrame) -> Label:
    """A published line, called by what is before the colon of its name."""
    x, y = group["x"].to_numpy(float), group["y"].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=2, **PUBLISHED)
    return Label(x[-1], y[-1], name.partition(":")[0], PUBLISHED["color"])


def _draw_line(axes: Axes, name: str, group: DataFrame, look: dict) -> None:
    """A line or a point, with its interval and the annotations of its points."""
    x, y = group["x"].to_numpy(float), group["y"].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=3, **look)
    if group["low"].notna().any():
        low, high = group["low"].to_numpy(float), group["high"].to_numpy(float)
        if group["kind"].iloc[0] in ("point", "curve"):
            axes.vlines(x, low, high, color=look["color"], linewidth=1)
        else:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0, zorder=1)
    texts = group.dropna(subset="text")
    if group["kind"].iloc[0] != "curve":
        _annotate(axes, texts, (5, 3), "left")
    elif name == "teacher":  # the others have the same texts in the same order
        _annotate(axes, texts.head(1), (0, -10), "center")
        _annotate(axes, texts.tail(1), (0, 5), "center")


def _annotate(axes: Axes, points: DataFrame, offset: tuple[int, int], align: str) -> None:
    """Write the texts of points next to them."""
    for point in points.itertuples():
        axes.annotate(
            point.text,
            (point.x, point.y),
            offset,
            textcoords="offset points",
            ha=align,
            fontsize=6.5,
            color="#444",
            bbox=PLATE,
        )

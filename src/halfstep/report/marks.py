"""The marks of a figure: lines, their intervals and rings, levels and published values."""

from __future__ import annotations

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from pandas import DataFrame

from halfstep.config import NAIVE
from halfstep.report.grids import round_number
from halfstep.report.labels import PLATE, Label, in_words, label_lines
from halfstep.report.rows import DEFAULT

MARKERS = "ov^D<>X"
RUNS = (  # color and dashes of runs that are not drawn by rounds
    ("#123a6b", "-"),
    ("#c4542d", (0, (5, 1.5))),
    ("#4f9d69", (0, (1, 1))),
    ("#8d5a97", (0, (4, 1, 1, 1))),
    ("#a8842c", (0, (7, 2, 1, 2))),
    ("#2f8f9d", (0, (2, 2))),
    ("#c2618c", (0, (6, 1, 2, 1))),
)
FIRST = ("teacher", DEFAULT)  # with which the other lines of a panel are compared
LEVELS = {"baseline": ("#555", (0, (5, 2))), "data": ("#555", (0, (1, 1.5)))}
PUBLISHED = {
    "color": "#8c8c8c",
    "linewidth": 0.7,
    "linestyle": "-",
    "marker": ".",
    "markersize": 3.5,
}
SMOOTHED = ", smoothed"  # after the name of a line that is the mean of a `raw` one
FEWEST_FOR_BAND = 10  # repeats (texts, trainings, timed runs) of which an interval is drawn
PLACES = numpy.array([(5, 3), (5, -9), (5, 13), (5, -19)])  # of a point's text, in points from it
STRIP = 0.16  # inches of the strip of levels, with the space before it


def series_style(series: str, round_: int, rounds: int, order: int) -> dict:
    """Color, marker and dashes of a line.

    The teacher, and the default of several ways to draw, are black with hollow squares. Rounds go
    from light orange to dark blue. Runs without rounds differ in hue, lightness and dashes.

    Args:
        series: name of the line, without SMOOTHED
        round_: its round (0: none)
        rounds: number of rounds in the figure
        order: position of the series among those of the figure
    """
    if series in FIRST:
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


def strong_rounds(panel: DataFrame) -> set[int]:
    """The rounds that a panel draws strongly: the first, middle and last of those it shows."""
    rounds = rounds_of(panel)
    return {rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]} if rounds else set()


def rounds_of(panel: DataFrame) -> list[int]:
    """The rounds whose lines are in a panel, in order."""
    is_round = panel["series"].str.startswith("round ") & panel["kind"].isin(("line", "curve"))
    return sorted(set(panel.loc[is_round, "round"].astype(int)))


def has_band(group: DataFrame) -> bool:
    """Does a line have intervals, each of at least FEWEST_FOR_BAND repeats?"""
    found = group[group["low"].notna()]
    return len(found) > 0 and bool((found["repeats"] >= FEWEST_FOR_BAND).all())


def _is_strong(series: str, number: float, strong: set[int]) -> bool:
    """Is this a line with a name? All are but those of rounds in between."""
    return not series.startswith("round ") or number in strong


def draw_series(
    axes: Axes, mine: DataFrame, points: DataFrame, labels: str, names_levels: bool
) -> None:
    """All series of a panel and their names; `points` are those of all panels."""
    ours = points[points["kind"] != "published"]
    rounds, strong = int(ours["round"].fillna(0).max()), strong_rounds(mine)
    plain = dict.fromkeys(name.removesuffix(SMOOTHED) for name in ours["series"])
    names = [name for name in plain if name not in (*LEVELS, *FIRST)]
    at_lines, at_right = [], []
    if (mine["kind"] == "level").any():
        _draw_strip(axes)
    for name, group in mine.groupby("series", sort=False):
        first = group.iloc[0]
        if first["kind"] == "level":
            at_right.append(_draw_level(axes, name, first["y"]))
        elif first["kind"] == "published":
            at_right.append(_draw_published(axes, name, group))
        else:
            base = name.removesuffix(SMOOTHED)
            round_ = int(first["round"]) if first["round"] == first["round"] else 0
            order = names.index(base) if base in names else 0
            look = series_style(base, round_, rounds, order)
            is_strong = _is_strong(name, round_, strong)
            if len(group) > 20:
                look |= {"marker": "", "linewidth": 1.3}
            if first["kind"] == "point":
                look |= {"linestyle": "", "markersize": 6}
            if first["kind"] == "raw":
                look |= {"marker": "", "linewidth": 0.6, "alpha": 0.3 if is_strong else 0.12}
            elif not is_strong:
                look |= {"linewidth": 0.8, "alpha": 0.35}
                if len(group) > 1:
                    look["marker"] = ""
            _draw_line(axes, name, group, look, is_strong)
            if is_strong and first["kind"] in ("line", "curve"):
                end = group["x"].idxmin() if labels == "left" else group["x"].idxmax()
                x, y = group.loc[end, ["x", "y"]]
                text = in_words(base)
                if first["kind"] == "curve" and name in LEVELS:
                    values = dict.fromkeys(map(round_number, (group["y"].min(), group["y"].max())))
                    at, pinned = _pin(axes, y, f"{text} {' to '.join(values)}")
                    y, text = at, pinned if at != y or len(group) == 1 else text
                at_lines.append(Label(x, y, text, look["color"]))
    shift = STRIP if (mine["kind"] == "level").any() else 0
    if labels == "left":
        label_lines(axes, at_lines, "left")
        label_lines(axes, at_right if names_levels else [], "right", shift)
    else:
        label_lines(axes, at_lines + at_right, "right", shift)


def _pin(axes: Axes, y: float, text: str) -> tuple[float, str]:
    """A value and its text; outside of the axis it stands at the axis's end, with an arrow."""
    low, high = axes.get_ylim()
    if y < low:
        return low, f"{text} ↓"
    if y > high:
        return high, f"{text} ↑"
    return y, text


def _draw_strip(axes: Axes) -> None:
    """The narrow strip at the right edge in which levels stand."""
    left, wide = _strip(axes)
    strip = Rectangle(
        (1 + left, 0),
        wide,
        1,
        transform=axes.transAxes,
        clip_on=False,
        color="#f1f1f1",
        linewidth=0,
    )
    axes.add_patch(strip)


def _strip(axes: Axes) -> tuple[float, float]:
    """Left end and width of the strip, in shares of the width of the axes."""
    inches = axes.get_position().width * axes.figure.get_figwidth()
    return 0.05 / inches, (STRIP - 0.05) / inches


def _draw_level(axes: Axes, name: str, y: float) -> Label:
    """A short line in the strip at the right, and a hairline across the panel."""
    color, dashes = LEVELS.get(name, ("#777", "-"))
    left, wide = _strip(axes)
    at, text = _pin(axes, y, f"{in_words(name)} {round_number(y)}")
    is_inside = at == y
    axes.plot(
        [1 + left, 1 + left + wide], [y, y], transform=axes.get_yaxis_transform(), color=color,
        linestyle="-", linewidth=1.6, label=name, gid=name, clip_on=False, visible=is_inside,
    )  # fmt: skip
    if not is_inside:
        marker = "v" if y < at else "^"
        axes.plot(
            [1 + left + wide / 2], [at], transform=axes.get_yaxis_transform(), color=color,
            marker=marker, markersize=3.5, clip_on=False, linestyle="",
        )  # fmt: skip
    elif name not in NAIVE:
        axes.axhline(y, color=color, linestyle=dashes, linewidth=0.6, alpha=0.7, zorder=1)
    end = axes.transData.inverted().transform(axes.transAxes.transform((1 + left + wide, 0)))
    return Label(end[0], at, text, color)


def _draw_published(axes: Axes, name: str, group: DataFrame) -> Label:
    """A published line, called by what is before the colon of its name."""
    x, y = group["x"].to_numpy(float), group["y"].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=2, **PUBLISHED)
    at, text = _pin(axes, y[-1], name.partition(":")[0])
    end = x[-1] if at == y[-1] else axes.get_xlim()[1]
    return Label(end, at, text, PUBLISHED["color"])


def _draw_line(axes: Axes, name: str, group: DataFrame, look: dict, is_strong: bool) -> None:
    """A line or a point, with its interval, its ring and the annotations of its points."""
    x, y = group["x"].to_numpy(float), group["y"].to_numpy(float)
    axes.plot(x, y, label=name, gid=name, zorder=3 if is_strong else 2.5, **look)
    if is_strong and has_band(group):
        low, high = group["low"].to_numpy(float), group["high"].to_numpy(float)
        if group["kind"].iloc[0] in ("point", "curve") or len(group) == 1:
            axes.vlines(x, low, high, color=look["color"], linewidth=1)
        else:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0, zorder=1)
    own = (group["own_steps"] == True).to_numpy()  # noqa: E712 - the column has missing values
    if own.any():
        ring = {"markersize": 8.5 if is_strong else 6.5, "markeredgewidth": 0.9, "linestyle": ""}
        color = {"markerfacecolor": "none", "markeredgecolor": look["color"]}
        alpha = look.get("alpha", 1)
        axes.plot(x[own], y[own], marker="o", zorder=4, alpha=alpha, **ring, **color)
    if group["kind"].iloc[0] != "curve":
        _annotate(axes, group.dropna(subset="text"), look["color"])


def _annotate(axes: Axes, points: DataFrame, color: str) -> None:
    """Write the texts of points next to them, in the color of their line, not over one another."""
    per_point = axes.figure.dpi / 72
    for point in points.itertuples():
        places = PLACES + axes.transData.transform((point.x, point.y)) / per_point
        apart = [
            numpy.abs(places - axes.transData.transform(other.xy) / per_point - other.xyann)
            for other in axes.texts
            if isinstance(other, Annotation)
        ]
        size = numpy.array([4.5 * len(point.text), 9])  # points, a little more than the text needs
        is_free = numpy.array([(gap >= size).any(axis=1) for gap in apart]).all(axis=0)
        offset = PLACES[numpy.argmax(is_free)]
        axes.annotate(
            point.text,
            (point.x, point.y),
            tuple(offset),
            textcoords="offset points",
            fontsize=6.5,
            color=color,
            bbox=PLATE,
        )

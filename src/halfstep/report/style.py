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
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from pandas import DataFrame, Series

from halfstep.config import NAIVE
from halfstep.report.labels import LETTER, PLATE, Label, in_words, label_lines

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
GOALS = {"lower": "↓ lower is better", "higher": "↑ higher is better"}
DARK = (  # of an SVG that is shown by itself or as an image: hues stay, lightness turns
    "@media (prefers-color-scheme: dark) {"
    "svg:root {filter: invert(0.9) hue-rotate(180deg) brightness(1.3)}"
    "}"
)
SMOOTHED = ", smoothed"  # after the name of a line that is the mean of a `raw` one
FEWEST_FOR_BAND = 10  # repeats (texts, trainings, timed runs) of which an interval is drawn
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
STRIP = 0.16  # inches of the strip of levels, with the space before it
LEFT, ABOVE, BELOW = 0.82, 0.4, 0.5  # inches around the axes of a panel
TOKENS = 0.3  # inches of the axis of tokens per step, above the panel


def series_style(series: str, round_: int, rounds: int, order: int) -> dict:
    """Color, marker and dashes of a line.

    The teacher is black with hollow squares, rounds go from light orange to dark blue, and runs
    without rounds differ in hue, lightness and dashes.

    Args:
        series: name of the line, without SMOOTHED
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
            _draw_series(axes, mine, points, labels, is_last or not once)
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


def strong_rounds(panel: DataFrame) -> set[int]:
    """The rounds that a panel draws strongly: the first, middle and last of those it shows."""
    rounds = _rounds(panel)
    return {rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]} if rounds else set()


def _rounds(panel: DataFrame) -> list[int]:
    """The rounds whose lines are in a panel, in order."""
    is_round = panel["series"].str.startswith("round ") & panel["kind"].isin(("line", "curve"))
    return sorted(set(panel.loc[is_round, "round"].astype(int)))


def has_band(group: DataFrame) -> bool:
    """Does a line have intervals, each of at least FEWEST_FOR_BAND repeats?"""
    found = group[group["low"].notna()]
    return len(found) > 0 and bool((found["repeats"] >= FEWEST_FOR_BAND).all())


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
    if any(len(_rounds(panel)) > 3 for _, panel in points.groupby("panel")):
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

    A level has its value after its name, and an arrow if it is outside of the axis.
    """
    lengths, strip = [0.0], 0.0
    for series, kind in zip(points["series"], points["kind"], strict=True):
        if kind == "level":
            strip = STRIP
            lengths.append(len(in_words(series)) + 8)
        elif kind == "published":
            lengths.append(len(series.partition(":")[0]) + 2)
        elif labels == "right" and kind != "raw":
            name = in_words(series.removesuffix(SMOOTHED))
            lengths.append(len(name) + (8 if series in LEVELS else 0))
    longest = max(lengths)
    return 0.15 + strip + (0.2 + LETTER * longest if longest else 0)


def _room_at_left(panel: DataFrame) -> float:
    """Inches at the left inside a panel for the names of its lines."""
    names = panel.loc[panel["kind"].isin(("line", "curve")), "series"].map(in_words)
    return 0.25 + LETTER * max(map(len, names), default=0)


def _is_strong(series: str, number: float, strong: set[int]) -> bool:
    """Is this a line with a name? All are but those of rounds in between."""
    return not series.startswith("round ") or number in strong


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


def _draw_series(
    axes: Axes, mine: DataFrame, points: DataFrame, labels: str, names_levels: bool
) -> None:
    """All series of a panel and their names; `points` are those of all panels."""
    ours = points[points["kind"] != "published"]
    rounds, strong = int(ours["round"].fillna(0).max()), strong_rounds(mine)
    plain = dict.fromkeys(name.removesuffix(SMOOTHED) for name in ours["series"])
    names = [name for name in plain if name not in (*LEVELS, "teacher")]
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
                    y, text = _pin(axes, y, f"{text} {y:.3g}" if len(group) == 1 else text)
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
    at, text = _pin(axes, y, f"{in_words(name)} {y:.3g}")
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
        if group["kind"].iloc[0] in ("point", "curve"):
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
        _annotate(axes, group.dropna(subset="text"))


def _annotate(axes: Axes, points: DataFrame) -> None:
    """Write the texts of points next to them."""
    for point in points.itertuples():
        axes.annotate(
            point.text,
            (point.x, point.y),
            (5, 3),
            textcoords="offset points",
            fontsize=6.5,
            color="#444",
            bbox=PLATE,
        )

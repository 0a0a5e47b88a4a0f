"""Points of figures: rows of tables as the lines, levels and published values that a figure shows.

Points are a DataFrame with the columns POINTS. The figure draws them, and its CSV holds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy
import pandas
from pandas import DataFrame, Series

from halfstep.errors import HalfstepError
from halfstep.report.conditions import describe_conditions
from halfstep.report.rows import LEVELS, WITHOUT_STEPS

# kind: line, curve (a line with bars at its points), raw (a line before it was smoothed), level (a
# horizontal line), point or published. repeats: the texts, trainings or timed runs behind low and
# high. text: annotation of the point. tokens: per step, where x are sampling steps. own_steps: is
# the point at the steps that its round was made for? conditions: how the figure's rows were taken
POINTS = (
    "panel", "series", "kind", "round", "x", "y", "low", "high", "repeats", "text", "tokens",
    "own_steps", "conditions",
)  # fmt: skip


def make_points(
    rows: DataFrame,
    panel: str,
    series: str | Sequence[str],
    x: Series | float | None,
    unit: float = 1,
    **columns: object,
) -> DataFrame:
    """One point for each row: y is its value and low to high its interval, all times `unit`.

    Args:
        rows: metric rows
        panel: the panel that shows the points
        series: the line of the points, one for all or one for each
        x: where the points are; None for a level, which has no x
        unit: factor from the unit of the rows to that of the figure
        columns: other columns of POINTS (kind: line, round: that of the row)
    """
    tokens: object = numpy.nan
    if isinstance(x, Series):
        if x.name == "steps":
            tokens = rows["tokens_per_step"].to_numpy(float)
        x = x.to_numpy(float)
    frame = {
        "panel": panel,
        "series": series,
        "kind": "line",
        "round": rows["round"].to_numpy(int),
        "x": numpy.nan if x is None else x,
        "y": unit * rows["value"].to_numpy(float),
        "low": unit * rows["low"].to_numpy(float),
        "high": unit * rows["high"].to_numpy(float),
        "repeats": _repeats(rows),
        "tokens": tokens,
        "own_steps": (rows["steps"] == rows["student_steps"]).fillna(False).to_numpy(bool),
    }
    points = DataFrame(frame, columns=POINTS, index=range(len(rows)))
    return points.assign(**columns)


def _repeats(rows: DataFrame) -> numpy.ndarray:
    """The texts, trainings or timed runs from which the interval of each row is computed."""
    timed = rows["bounds"].astype(str).str.extract(r"(\d+)$")[0].astype(float)  # quartiles of 10
    repeats = timed.fillna(rows["num_samples"].astype(float))
    if "trainings" in rows:
        repeats = rows["trainings"].astype(float).fillna(repeats)
    return repeats.to_numpy(float)


def make_level(rows: DataFrame, panel: str, series: str, **columns: object) -> DataFrame:
    """A horizontal line at the value of the last of these rows; no points if there are none."""
    return make_points(rows.tail(1), panel, series, None, kind="level", **columns)


def join_points(parts: Sequence[DataFrame]) -> DataFrame:
    """All points in one frame; empty parts add nothing."""
    filled = [part for part in parts if len(part)]
    return pandas.concat(filled or parts[:1], ignore_index=True)


def with_conditions(points: DataFrame, rows: DataFrame) -> DataFrame:
    """The points with how the rows that they are made from were taken, for the CSV."""
    return points.assign(conditions=describe_conditions(rows))


def points_by_run(rows: DataFrame, x: str, naive: bool = False) -> DataFrame:
    """The teacher, the rounds and the levels against a column, in a panel for each run.

    Levels are the baseline, held-out text and, where asked for, naive samplers. Where a teacher's
    rows are of several judges, each judge has its own panels.
    """
    parts = []
    several_judges = rows.groupby("teacher")["judge"].nunique() > 1
    groups = rows.groupby(["teacher", "judge"], dropna=False, sort=False)
    for (teacher, judge), mine in groups:
        for run in run_names(mine):
            names = [teacher]
            if run != "teacher":
                names.append(run)
            if several_judges[teacher]:
                names.append(f"judge {short_judge(judge)}")
            panel = " · ".join(names)
            lines = mine[mine["run"].isin(("teacher", run))].sort_values(["round", x])
            series = [f"round {r}" if r else "teacher" for r in lines["round"]]
            parts.append(make_points(lines, panel, series, lines[x]))
            for level in WITHOUT_STEPS if naive else LEVELS:
                parts.append(make_level(mine[mine["run"] == level], panel, level))
    return join_points(parts)


def run_names(rows: DataFrame) -> list[str]:
    """The runs of students among these rows, or the teacher alone where there are none."""
    known = ("teacher", *WITHOUT_STEPS)
    return [run for run in rows["run"].unique() if run not in known] or ["teacher"]


def one_metric(table: DataFrame, metric: str, all_judges: bool = False) -> DataFrame:
    """The rows of one metric by a teacher's first judge, or by all of its judges.

    Of several protocols of a judge it is the first one by name (ids before retokenized).

    Raises:
        HalfstepError: the table has no row of this metric
    """
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise HalfstepError(f"no row of {metric} in the table; measure it first")
    if not all_judges:
        first = rows.groupby("teacher")["judge"].transform("first")
        rows = rows[rows["judge"].isna() | (rows["judge"] == first)]
    first = rows.groupby(["teacher", "judge"], dropna=False)["protocol"].transform("min")
    return rows[rows["protocol"] == first]


def panel_title(table: DataFrame, teacher: str, text: str) -> str:
    """The title of a panel, with the teacher's name where a table has several teachers."""
    return f"{teacher}: {text}" if table["teacher"].nunique() > 1 else text


def short_judge(judge: str) -> str:
    """A judge without its revision and folder: gpt2-large, Meta-Llama-3-8B, baseline."""
    return str(judge).partition("@")[0].removesuffix("/hf").rpartition("/")[2]


def add_published(
    points: DataFrame,
    tables: Mapping[str, DataFrame],
    metric: str,
    x: str,
    panels: Mapping[str, int | None],
    unit: float = 1,
) -> tuple[DataFrame, str]:
    """The points with published ones, and a sentence that names the sources by their letters.

    Where `tables` has no `published`, the points stay the same and the sentence is empty.

    Args:
        points: our points; published values outside the range of their x are left out
        tables: the tables of the figure, among them `published`
        metric: the metric of the figure
        x: the column of the x axis
        panels: the panels to draw in, each with the batch size of the values (None for all values)
        unit: as for `make_points`
    """
    if "published" not in tables:
        return points, ""
    rows = _published_lines(tables["published"], points, metric, x)
    parts = [points]
    letters: dict[str, str] = {}
    for panel, batch_size in panels.items():
        shown = rows if batch_size is None else rows[rows["batch_size"] == batch_size]
        for name, line in shown.sort_values(x).groupby("name", sort=False):
            letter = letters.setdefault(name, chr(ord("a") + len(letters)))
            series = f"published {letter}: {name}"
            parts.append(make_points(line, panel, series, line[x], unit, kind="published", round=0))
    sources = "; ".join(f"{letter} {name}" for name, letter in letters.items())
    sentence = f" Published by others: {sources}." if sources else ""
    return pandas.concat(parts, ignore_index=True), sentence


def _published_lines(published: DataFrame, points: DataFrame, metric: str, x: str) -> DataFrame:
    """The published rows in the range of our lines, with the name of their line: model, source."""
    ours = points.loc[points["kind"] == "line", "x"]
    rows = published[(published["metric"] == metric) & published["in_figures"]]
    rows = rows[rows[x].between(ours.min(), ours.max())]
    if x == "round":  # a teacher and its rounds are one line
        rows = rows.assign(model=rows.groupby("source")["model"].transform(" and ".join))
    names = []
    for model, steps, source in rows[["model", "steps", "source"]].itertuples(index=False):
        timed = x == "length" and not pandas.isna(steps)
        names.append(f"{model}, {steps} steps, {source}" if timed else f"{model}, {source}")
    return rows.assign(name=names)

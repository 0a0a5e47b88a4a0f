"""The generative frontier in tables and figures: perplexities with their entropies, and readings.

Rows of temperature 1 have none in files; here they have it, so that temperatures are in order.
"""

from __future__ import annotations

from typing import Any

import numpy
import pandas
from pandas import DataFrame

from halfstep.report.grids import model_label, round_number
from halfstep.report.points import join_points, make_points, one_metric, panel_title
from halfstep.report.rows import sampled_rows

MOST_PANELS = 6  # step counts of a teacher in the figure; the table has all


def with_entropy(table: DataFrame) -> DataFrame:
    """The rows of the frontier's table, those of a perplexity with its `entropy`."""
    table = table.assign(temperature=table["temperature"].astype(float).fillna(1.0))
    key = ["model", "teacher", "steps", "temperature"]
    entropy = table[table["metric"] == "frontier_entropy"].rename(columns={"value": "entropy"})
    return table.merge(entropy[[*key, "entropy"]], "left", on=key)


def point_cell(row: Any) -> str:
    """Entropy and perplexity of a point: 3.284: 41.4"""
    return f"{row.entropy:.3f}: {round_number(row.value)}"


def reading_cell(row: Any) -> str:
    """A value read off a curve, with its interval: 41.4 [38.0, 45.1], or `not reached`."""
    if pandas.isna(row.value):
        where = row.reached.removeprefix("no")
        return f"not reached{where}" if where != row.reached else "not reached by all trainings"
    low, high = ("open" if pandas.isna(x) else round_number(x) for x in (row.low, row.high))
    return f"{round_number(row.value)} [{low}, {high}]"


def label_with_steps(row: Any) -> str:
    """The line of a grid over temperatures: `teacher, 8 steps`."""
    label = model_label(row)
    return label if pandas.isna(row.steps) else f"{label}, {row.steps} steps"


def explain_readings(rows: DataFrame) -> list[str]:
    """What `not reached` and `open` mean, where cells of these rows say so."""
    missing = rows["value"].isna()
    sentences = []
    if missing.any():
        sentences.append(
            "Not reached: the entropy is above or below all points of the curve, and a curve is "
            "not extrapolated."
        )
    if (rows.loc[~missing, ["low", "high"]].isna()).any(axis=None):
        sentences.append(
            "Open: more than 2.5% of the bootstrap resamples do not reach the entropy, so the "
            "interval has no bound on that side."
        )
    return [" ".join(sentences)] if sentences else []


def held_out_points(steps: DataFrame) -> DataFrame:
    """The perplexity of held-out text in the steps table, with its `entropy`."""
    data = steps[steps["run"] == "data"]
    entropy = data[data["metric"] == "entropy"].set_index("teacher")["value"]
    rows = one_metric(steps, "generative_perplexity")
    rows = rows[rows["run"] == "data"]
    return rows.assign(entropy=rows["teacher"].map(entropy))


def frontier_points(rows: DataFrame, held_out: DataFrame) -> DataFrame:
    """Points of the figure: a panel for each step count, a curve over temperatures for each model.

    Args:
        rows: perplexities `with_entropy`
        held_out: the rows of held-out text, with a column `entropy`
    """
    parts = []
    for teacher, mine in rows.groupby("teacher", sort=False):
        students = sampled_rows(mine)
        baseline = mine[mine["run"] == "baseline"]
        data = held_out[held_out["teacher"] == teacher]
        for steps in _chosen(sorted(students["steps"].unique())):
            at_steps = students[students["steps"] == steps]
            tokens = at_steps["tokens_per_step"].iloc[0]
            title = f"{steps} steps"
            if not pandas.isna(tokens):
                title += f" of {tokens:.3g} token{'' if tokens == 1 else 's'}"
            panel = panel_title(rows, teacher, title)
            for _, curve in at_steps.groupby("model", sort=False):
                parts.append(_curve(curve, panel))
            if len(baseline):
                parts.append(_curve(baseline, panel))
            parts.append(make_points(data, panel, "data", data["entropy"], kind="curve"))
    return join_points(parts)


def _curve(rows: DataFrame, panel: str) -> DataFrame:
    """The points of one model at one step count, with their temperatures as text."""
    rows = rows.sort_values("temperature")
    first = rows.iloc[0]
    series = f"{first['run']}, round {first['round']}" if first["round"] else first["run"]
    texts = [f"T {temperature:g}" for temperature in rows["temperature"]]
    about = {"kind": "curve", "round": 0, "text": texts, "own_steps": False}
    return make_points(rows, panel, series, rows["entropy"], **about)


def _chosen(counts: list[int]) -> list[int]:
    """These step counts, or MOST_PANELS of them from the first to the last."""
    if len(counts) <= MOST_PANELS:
        return counts
    return [counts[round(i)] for i in numpy.linspace(0, len(counts) - 1, MOST_PANELS)]

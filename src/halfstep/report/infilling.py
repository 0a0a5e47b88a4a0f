"""Filled-in positions: what counts as right, cells of the table, and points of the figure."""

from __future__ import annotations

from typing import Any

import pandas
from pandas import DataFrame

from halfstep.report.grids import model_label, round_number, value_cell
from halfstep.report.points import join_points, make_points

RIGHT = {  # by protocol, the one that a figure shows first
    "exact": "An item is right if all tokens of its last word are the original ones; all last "
    "words of a window are masked.",
    "grammar": "All mentions of one fact are masked in each whole story of a window; a story is "
    "right if the grammar finds it consistent, whatever the fact.",
    "tokens": "A masked token is right if it is the original one.",
}


def shown_protocol(table: DataFrame) -> DataFrame:
    """The rows of each task by one protocol: the first in RIGHT that the task has."""
    rank = table["protocol"].map(list(RIGHT).index)
    return table[rank == rank.groupby([table["teacher"], table["task"]]).transform("min")]


def area_cell(row: Any) -> str:
    """An area with its interval, or why there is none."""
    return row.reached if pandas.isna(row.value) else value_cell(row)


def accuracy_cell(row: Any) -> str:
    """An accuracy with its interval, and the measured tokens per forward in brackets."""
    return f"{value_cell(row)} ({round_number(row.tokens_per_forward)})"


def label_with_variant(row: Any) -> str:
    """The model of a row, and how it draws."""
    return f"{model_label(row)}, {row.variant}"


def parallel_points(rows: DataFrame) -> DataFrame:
    """Points of the figure: accuracies against tokens per forward.

    A panel for each task, whose lines are models; with several ways to draw a panel for each task
    and model, whose lines are these. Models are teachers and last rounds.
    """
    last = rows.groupby(["teacher", "run"])["round"].transform("max")
    several, parts = rows["variant"].nunique() > 1, []
    for (teacher, task), mine in rows[rows["round"] == last].groupby(
        ["teacher", "task"], sort=False
    ):
        for _, line in mine.groupby(["model", "variant"], sort=False):
            line = line.sort_values("tokens_per_forward")
            first = next(line.itertuples())
            panel, series, shade = f"{teacher} · {task}", model_label(first), first.round
            if several:
                panel, series, shade = f"{panel} · {series}", first.variant, 0
            x = line["tokens_per_forward"]
            parts.append(
                make_points(line, panel, series, x, kind="curve", round=shade, own_steps=False)
            )
    return join_points(parts)

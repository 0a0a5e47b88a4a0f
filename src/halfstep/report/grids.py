"""Markdown grids: rows of a table laid out by model and by column, and the text of their cells."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pandas
from pandas import DataFrame
from tabulate import tabulate

from halfstep.report.labels import name_model


def model_label(row: Any) -> str:
    """The name of a row's model in a grid: teacher, baseline, `reverse KL round 3`."""
    return name_model(row.run, row.round)


def value_cell(row: Any) -> str:
    """The value with its interval; for entropy also the difference from held-out text.

    Of several trainings the interval is over trainings, and that over texts is in brackets.
    """
    text = _interval(row)
    if not pandas.isna(half := getattr(row, "texts_half", None)):
        text += f" [texts ±{half:.{_decimals(text)}f}]"
    difference = getattr(row, "vs_data_percent", None)
    if row.metric == "entropy" and row.run != "data" and not pandas.isna(difference):
        return f"{text} ({round(difference, 1) + 0.0:+.1f}%)"  # no -0.0
    return text


def share_cell(row: Any) -> str:
    """A share and its interval in percent, which need not be symmetric: 6.1% [3.9, 9.3]

    Of several trainings the interval is over trainings, and that over texts follows.
    """
    value, low, high = (100 * number for number in (row.value, row.low, row.high))
    text = f"{value:.1f}% [{low:.1f}, {high:.1f}]"
    half = getattr(row, "texts_half", None)
    return text if pandas.isna(half) else f"{text} [texts ±{100 * half:.1f}]"


def latency_cell(row: Any) -> str:
    """Milliseconds with their interval, and how many times faster than the fastest baseline."""
    text = _interval(row, unit=1000)
    if row.run == "baseline" or pandas.isna(row.times_faster):
        return text
    return f"{text} ({round_number(row.times_faster, 2)}×)"


def make_grid(
    table: DataFrame,
    across: str,
    corner: str,
    cell: Callable[[Any], str] = value_cell,
    down: Callable[[Any], str] = model_label,
) -> str:
    """A table as a Markdown grid.

    Args:
        table: the rows, one for each cell
        across: the column of `table` whose values are the columns of the grid. Step counts ascend,
            with the tokens per step in brackets, and so do temperatures; others keep the order of
            the table
        corner: the text of the upper left corner
        cell: the text of a row's cell
        down: the line of the grid that a row belongs to
    """
    columns: list[Any] = list(dict.fromkeys(table[across].dropna()))
    if across == "temperature":
        columns.sort()
    names = list(map(str, columns))
    if across == "steps":
        columns.sort()
        names, corner = _with_tokens(table, columns, corner)
    lines: dict[str, dict[Hashable, str]] = {}
    for row in table.itertuples():
        line = lines.setdefault(down(row), {})
        line[getattr(row, across)] = cell(row)
    body = [[name, *(line.get(column, "") for column in columns)] for name, line in lines.items()]
    headers = [corner, *names]
    align = ["left", *("right" for _ in columns)]
    return tabulate(body, headers, "github", disable_numparse=True, colalign=align)


def _with_tokens(table: DataFrame, steps: list[int], corner: str) -> tuple[list[str], str]:
    """Titles of the columns of step counts, and of the corner: 8 (32), steps (tokens per step).

    They stay the counts alone where texts of several lengths share a column, or none is known.
    """
    tokens = table.drop_duplicates(["steps", "tokens_per_step"]).set_index("steps")
    tokens = tokens["tokens_per_step"].dropna()
    if sorted(tokens.index) != steps:
        return list(map(str, steps)), corner
    return [f"{count} ({tokens[count]:.3g})" for count in steps], f"{corner} (tokens per step)"


def round_number(value: float, digits: int = 3) -> str:
    """Three significant digits, without an exponent where a table has room: 152, 15.2, 0.152."""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def _interval(row: Any, unit: float = 1) -> str:
    """The value and the wider half of its interval, with as many decimals: 69.4 ±2.8"""
    text = round_number(unit * row.value)
    if pandas.isna(row.low) or pandas.isna(row.high):
        return text
    half = unit * max(row.high - row.value, row.value - row.low)
    return f"{text} ±{half:,.{_decimals(text)}f}"


def _decimals(text: str) -> int:
    """Number of decimals of the first number in a text."""
    return len(text.partition(" ")[0].partition(".")[2])

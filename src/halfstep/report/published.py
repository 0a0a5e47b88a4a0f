"""Values that others have published, each with its source, kept apart from our own.

`published.csv` holds them as printed, mostly without an interval. Their papers describe the
protocol more or less fully, so it is called `as published`. Column `certainty`: read (in a table or
a caption), figure-read (off a chart), second-hand (quoted by another paper).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pandas
from pandas import DataFrame

from halfstep.report.grids import make_grid, round_number
from halfstep.report.rows import tidy

FILE = Path(__file__).with_name("published.csv")
RUN = "published"  # of these rows, in the column `run`
PROTOCOL = "as published"


def published_rows(metrics: Collection[str] | None = None) -> DataFrame:
    """Metric rows of the published values of these metrics (all).

    `in_figures` says where a value was measured as the lines of a figure are.
    """
    table = pandas.read_csv(FILE, dtype={"round": str})
    if metrics is not None:
        table = table[table["metric"].isin(list(metrics))]
    table = table.assign(
        model=[_model(row) for row in table.itertuples()],
        source=[_source(row) for row in table.itertuples()],
        round=table["round"].fillna("0").str.extract(r"(\d+)")[0].astype(int),
        in_figures=table["in_figures"] == "yes",
        teacher=RUN,
        run=RUN,
        protocol=PROTOCOL,
    )
    return tidy(table.drop(columns=["size", "divergence", "certainty"]))


def without_published(table: DataFrame) -> DataFrame:
    """The rows that were measured here."""
    return table[table["run"] != RUN]


def published_markdown(table: DataFrame, titles: Mapping[str, str]) -> str:
    """One grid for each metric, with the sources down; empty if there are no rows.

    Args:
        table: rows of `published_rows`
        titles: the metrics in their order, and their titles
    """
    parts = []
    for metric, title in titles.items():
        if metric == "latency_s":
            across, corner = "length", "tokens"
        elif metric in ("task_score", "zero_shot_perplexity"):
            across, corner = "task", "task"
        else:
            across, corner = "steps", "sampling steps"
        mine = table[table["metric"] == metric].sort_values(across, kind="stable")
        if mine.empty:
            continue
        cases = ["none" if pandas.isna(count) else str(count) for count in mine[across]]
        grid = make_grid(mine.assign(case=cases), "case", corner, _value, source_name)
        parts.append(f"### Published, protocol {PROTOCOL}: {title}\n\n{grid}")
    return "\n\n".join(parts)


def source_name(row: Any) -> str:
    """The line of a published value in a grid: model, how it was timed, source."""
    name = row.model
    if not pandas.isna(row.batch_size):
        name += f", {row.batch_size} texts at once"
        if not pandas.isna(row.steps):
            name += f", {row.steps} steps"
    return f"{name} [{row.source}]"


def _value(row: Any) -> str:
    return round_number(row.value)


def _model(row: Any) -> str:
    """Name, size and round of the model, as far as they are known."""
    words = [row.model]
    if isinstance(row.size, str):
        words.append(row.size)
    if isinstance(row.round, str) and row.round != "0":
        words.append(f"round {row.round}")
    return " ".join(words)


def _source(row: Any) -> str:
    return row.source if row.certainty == "read" else f"{row.source}, {row.certainty}"

"""Values that others have published, each with its source: laid beside ours in rows and grey lines of their own, never among them.

`published.csv` holds them as printed, by a protocol that their papers describe more or less fully (`as published`), mostly without an
interval. certainty: read (in a table or caption), figure-read (off a chart), second-hand (quoted by another paper).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

FILE = Path(__file__).with_name("published.csv")
RUN = "published"  # of these rows, in the column `run`
PROTOCOL = "as published"


def published(metrics: Collection[str] | None = None) -> DataFrame:
    """Metric rows of published values (of these metrics, or all), columns COLUMNS; `in_figures` where they compare with a figure's lines."""
    import pandas

    from halfstep.report.tables import tidy

    table = pandas.read_csv(FILE, dtype={"round": str})
    table = table[table["metric"].isin(table["metric"] if metrics is None else metrics)]
    rounds = table["round"].fillna("0")
    words = (
        table["model"],
        table["size"].fillna(""),
        ("" if r == "0" else f"round {r}" for r in rounds),
    )
    table = table.assign(
        model=[" ".join(filter(None, name)) for name in zip(*words, strict=True)], round=rounds.str.extract(r"(\d+)")[0].astype(int),
        source=[s if c == "read" else f"{s}, {c}" for s, c in zip(table["source"], table["certainty"], strict=True)],
        teacher=RUN, run=RUN, protocol=PROTOCOL, in_figures=table["in_figures"] == "yes",
    )  # fmt: skip
    return tidy(table.drop(columns=["size", "divergence", "certainty"]))


def without(table: DataFrame) -> DataFrame:
    """A table's own rows."""
    return table[table["run"] != RUN]


def published_markdown(table: DataFrame, titles: dict[str, str]) -> str:
    """For each metric a grid with the sources down; empty without rows. titles: what the metrics are called."""
    import pandas

    from halfstep.report.tables import _grid, number

    parts = []
    for metric, title in titles.items():
        across, corner = (
            ("length", "tokens") if metric == "latency_s" else ("steps", "sampling steps")
        )
        mine = table[table["metric"] == metric].sort_values(
            across, kind="stable"
        )  # what has no steps comes last
        if len(mine):
            cases = mine.assign(case=["none" if pandas.isna(n) else str(n) for n in mine[across]])
            grid = _grid(cases, "case", corner, lambda row: number(row.value), _who)
            parts.append(f"### Published, protocol {PROTOCOL}: {title}\n\n{grid}")
    return "\n\n".join(parts)


def _who(row) -> str:
    import pandas

    case = (
        ""
        if pandas.isna(row.batch_size)
        else f", {row.batch_size} texts at once"
        + ("" if pandas.isna(row.steps) else f", {row.steps} steps")
    )
    return f"{row.model}{case} [{row.source}]"

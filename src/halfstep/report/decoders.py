"""Ways to draw, compared by their costs: quality against network evaluations, points and grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pandas
from pandas import DataFrame, Series
from tabulate import tabulate

from halfstep.report.frontier import reading_cell
from halfstep.report.grids import model_label, round_number, share_cell, value_cell
from halfstep.report.points import join_points, make_level, make_points, one_metric
from halfstep.report.rows import DEFAULT, LEVELS, sampled_rows

APART = 0.02  # share from which on two entropies differ
AT_DATA = "perplexity_at_data_entropy"


QUALITY: dict[str, tuple[str, Callable[[Any], str]]] = {  # titles of the grid: metric, its cell
    "perplexity": ("generative_perplexity", value_cell),
    "at held-out entropy": (AT_DATA, reading_cell),
    "entropy": ("entropy", value_cell),
    "MAUVE": ("sample_mauve", value_cell),
    "accepted stories": ("accepted_share", share_cell),
}
COSTS = {  # titles of the grid: columns of a row
    "network evaluations": "network_evaluations",
    "autoregressive passes": "autoregressive_passes",
    "tokens per network evaluation": "tokens_per_evaluation",
}
IN_CSV = ("entropy", "network_evaluations", "autoregressive_passes")  # of the points
SAME_DRAWS = ["model", "variant", "steps"]  # columns of a set of samples


def with_costs(rows: DataFrame, table: DataFrame) -> DataFrame:
    """Perplexities of teachers and of last rounds, with `entropy` and `tokens_per_evaluation`.

    Args:
        rows: perplexities of the table `variants`; those without network evaluations are left out
        table: the table `variants`, which has the entropies
    """
    rows = sampled_rows(rows)
    last = rows.groupby(["teacher", "run"])["round"].transform("max")
    rows = rows[(rows["round"] == last) & (rows["network_evaluations"] > 0)]
    entropy = table[table["metric"] == "entropy"].rename(columns={"value": "entropy"})
    rows = rows.merge(entropy[[*SAME_DRAWS, "entropy"]], "left", on=SAME_DRAWS)
    tokens = rows["steps"] * rows["tokens_per_step"]
    return rows.assign(tokens_per_evaluation=tokens / rows["network_evaluations"])


def at_held_out_entropy(rows: DataFrame, table: DataFrame) -> DataFrame:
    """Perplexities at the entropy of held-out text, with the costs of their samples.

    Those of baselines are among them. Where a curve does not reach this entropy there is none, and
    where no model's curve does there is no row at all.

    Args:
        rows: perplexities `with_costs`
        table: the table `variants`
    """
    if AT_DATA not in set(table["metric"]):
        return table.iloc[:0]
    read = one_metric(table, AT_DATA).dropna(subset="value")
    costs = rows.drop_duplicates(SAME_DRAWS)[[*SAME_DRAWS, *IN_CSV]]
    mine = sampled_rows(read).drop(columns=list(IN_CSV), errors="ignore")
    mine = mine.merge(costs, on=SAME_DRAWS)
    return join_points([mine, read[read["run"] == "baseline"]]) if len(mine) else mine


def decoder_points(rows: DataFrame, read: DataFrame, levels: DataFrame) -> DataFrame:
    """Points of the figure: a panel for each teacher and last round, a line for each way to draw.

    x are network evaluations. The text of a point is its entropy, where it differs by more than
    APART from that of the default draws with the most similar number of network evaluations. Where
    perplexities at the entropy of held-out text are known, further panels have them.

    Args:
        rows: perplexities `with_costs`
        read: perplexities `at_held_out_entropy`
        levels: perplexities of the baselines and of held-out text
    """
    at_data = join_points([levels[levels["run"] == "data"], read[read["run"] == "baseline"]])
    shown = [("as drawn", rows, levels), ("at the entropy of held-out text", read, at_data)]
    parts = []
    for title, table, references in shown if len(read) else shown[:1]:
        mine = sampled_rows(table)
        for (teacher, _), drawn in mine.groupby(["teacher", "model"], sort=False):
            name = f"{teacher} · {model_label(next(drawn.itertuples()))}"
            panel = f"{name}, {title}" if len(read) else name
            parts += _lines(drawn, panel, table is rows)
            for level in LEVELS:
                is_level = (references["teacher"] == teacher) & (references["run"] == level)
                parts.append(make_level(references[is_level], panel, level))
    return join_points(parts)


def _lines(rows: DataFrame, panel: str, names_entropy: bool) -> list[DataFrame]:
    """The lines of one model, those of the default draws first."""
    parts = []
    for variant in dict.fromkeys([DEFAULT, *rows["variant"]]):
        line = rows[rows["variant"] == variant].sort_values("network_evaluations")
        texts = [_entropy_text(row, rows) if names_entropy else None for _, row in line.iterrows()]
        numbers = {name: line[name].to_numpy(float) for name in IN_CSV}
        x = line["network_evaluations"]
        points = make_points(line, panel, variant, x, round=0, text=texts, own_steps=False)
        parts.append(points.assign(**numbers))
    return parts


def _entropy_text(row: Series, rows: DataFrame) -> str | None:
    usual = rows[rows["variant"] == DEFAULT]
    if usual.empty or row["variant"] == DEFAULT:
        return None
    distance = numpy.log(usual["network_evaluations"] / row["network_evaluations"]).abs()
    apart = abs(row["entropy"] / usual.loc[distance.idxmin(), "entropy"] - 1)
    return f"H {row['entropy']:.2f}" if apart > APART else None


def cost_grid(rows: DataFrame, table: DataFrame) -> str:
    """Markdown of rows `with_costs` of one model: a line for each way to draw and step count.

    `table` is the table `variants`, which has the other measures of the same samples. A column
    without any value is left out.
    """
    lines = []
    for row in rows.itertuples():
        line = {"way to draw": str(row.variant), "steps": f"{row.steps:,}"}
        for title, (metric, cell) in QUALITY.items():
            line[title] = "".join(map(cell, _of_same_draws(table, row, metric).itertuples()))
        for title, name in COSTS.items():
            value = getattr(row, name)
            line[title] = "" if pandas.isna(value) else round_number(value)
        lines.append(line)
    headers = [title for title in lines[0] if any(line[title] for line in lines)]
    body = [[line[title] for title in headers] for line in lines]
    align = ["left", *("right" for _ in headers[1:])]
    return tabulate(body, headers, "github", disable_numparse=True, colalign=align)


def _of_same_draws(table: DataFrame, row: Any, metric: str) -> DataFrame:
    """The row of a metric of the same samples, if there is one: by the same judge and protocol,
    where the metric has these."""
    mine = table[table["metric"] == metric]
    for name in SAME_DRAWS:
        mine = mine[mine[name] == getattr(row, name)]
    mine = mine[mine["judge"].isna() | (mine["judge"] == row.judge)]
    return mine[mine["protocol"] == row.protocol] if "perplexity" in metric else mine

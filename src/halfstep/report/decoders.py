"""Ways to draw, compared by their costs: quality against passes of the network, points and grid."""

from __future__ import annotations

import numpy
import pandas
from pandas import DataFrame, Series
from tabulate import tabulate

from halfstep.report.grids import model_label, round_number, value_cell
from halfstep.report.points import join_points, make_level, make_points
from halfstep.report.rows import DEFAULT, LEVELS, sampled_rows

APART = 0.02  # share from which on two entropies differ
COSTS = {  # titles of the grid: columns of a row
    "entropy": "entropy",
    "network evaluations": "network_evaluations",
    "autoregressive passes": "autoregressive_passes",
    "tokens per network evaluation": "tokens_per_evaluation",
}
IN_CSV = ("entropy", "network_evaluations", "autoregressive_passes")  # of the points


def with_costs(rows: DataFrame, table: DataFrame) -> DataFrame:
    """Perplexities of teachers and of last rounds, with `entropy` and `tokens_per_evaluation`.

    Args:
        rows: perplexities of the table `variants`; those without network evaluations are left out
        table: the table `variants`, which has the entropies
    """
    rows = sampled_rows(rows)
    last = rows.groupby(["teacher", "run"])["round"].transform("max")
    rows = rows[(rows["round"] == last) & (rows["network_evaluations"] > 0)]
    key = ["model", "variant", "steps"]
    entropy = table[table["metric"] == "entropy"].rename(columns={"value": "entropy"})
    rows = rows.merge(entropy[[*key, "entropy"]], "left", on=key)
    tokens = rows["steps"] * rows["tokens_per_step"]
    return rows.assign(tokens_per_evaluation=tokens / rows["network_evaluations"])


def decoder_points(rows: DataFrame, levels: DataFrame) -> DataFrame:
    """Points of the figure: a panel for each teacher and last round, a line for each way to draw.

    x are network evaluations. The text of a point is its entropy, where it differs by more than
    APART from that of the default draws with the most similar number of network evaluations.

    Args:
        rows: perplexities `with_costs`
        levels: perplexities of the baselines and of held-out text
    """
    parts = []
    for (teacher, _), mine in rows.groupby(["teacher", "model"], sort=False):
        panel = f"{teacher} · {model_label(next(mine.itertuples()))}"
        for variant in dict.fromkeys([DEFAULT, *mine["variant"]]):
            line = mine[mine["variant"] == variant].sort_values("network_evaluations")
            texts = [_entropy_text(row, mine) for _, row in line.iterrows()]
            numbers = {name: line[name].to_numpy(float) for name in IN_CSV}
            x = line["network_evaluations"]
            points = make_points(line, panel, variant, x, round=0, text=texts, own_steps=False)
            parts.append(points.assign(**numbers))
        for level in LEVELS:
            of_level = (levels["teacher"] == teacher) & (levels["run"] == level)
            parts.append(make_level(levels[of_level], panel, level))
    return join_points(parts)


def _entropy_text(row: Series, rows: DataFrame) -> str | None:
    usual = rows[rows["variant"] == DEFAULT]
    if usual.empty or row["variant"] == DEFAULT:
        return None
    distance = numpy.log(usual["network_evaluations"] / row["network_evaluations"]).abs()
    apart = abs(row["entropy"] / usual.loc[distance.idxmin(), "entropy"] - 1)
    return f"H {row['entropy']:.2f}" if apart > APART else None


def cost_grid(rows: DataFrame) -> str:
    """Markdown of rows `with_costs` of one model: a line for each way to draw and step count."""
    shown = {title: name for title, name in COSTS.items() if rows[name].notna().any()}
    body = []
    for row in rows.itertuples():
        values = [getattr(row, name) for name in shown.values()]
        cells = ["" if pandas.isna(value) else round_number(value) for value in values]
        body.append([row.variant, f"{row.steps:,}", value_cell(row), *cells])
    headers = ["way to draw", "steps", "perplexity", *shown]
    align = ["left", *("right" for _ in headers[1:])]
    return tabulate(body, headers, "github", disable_numparse=True, colalign=align)

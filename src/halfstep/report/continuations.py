"""The table and the figure of continuations: MAUVE, self-BLEU, distinct bigrams and perplexity of what follows held-out prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

METRICS = {  # metric: its title; the order of the table
    "mauve": "MAUVE against the documents' own continuations, higher is better",
    "self_bleu": "Self-BLEU within a prompt, 0 to 100: low is diverse",
    "continuation_perplexity": "Perplexity of the continuations, given their prompts",
    "continuation_distinct_2": "Share of distinct bigrams among a prompt's continuations",
}


def continuations(table: DataFrame) -> DataFrame:
    """Every model and step count; all of a teacher's numbers are of the same prompts, lengths and number of texts."""
    from halfstep.report.tables import LEVELS, comparable

    table = table[table["metric"].isin(METRICS)].copy()
    comparable(table, ("data", "num_samples", "length"))
    comparable(
        table[~table["run"].isin(LEVELS)], ("sampler", "weights", "draw_dtype", "temperature")
    )
    return table


def continuations_markdown(table: DataFrame) -> str:
    """For each teacher and metric a grid, models down and step counts across; the baseline, which has no steps, below it."""
    from halfstep.report.tables import LEVELS, _by, _cell, _grid, conditions

    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
        parts.append(
            f"## {teacher}: continuations of held-out prompts, texts of {mine['length'].iloc[0]} tokens with their prompts"
        )
        for (metric, _, judge), group in _by(mine, METRICS):
            interval = "the k-means' alone" if metric == "mauve" else "over prompts"
            title = f"### {METRICS[metric]}" + (
                f", judge {judge}" if mine["judge"].nunique() > 1 and judge else ""
            )
            parts.append(f"{title}, ± 95% interval ({interval})")
            students = group[~group["run"].isin(LEVELS)]
            parts += [_grid(students, "steps", "sampling steps")] if len(students) else []
            level = [
                f"{row.run}: {_cell(row)}" for row in group[group["run"].isin(LEVELS)].itertuples()
            ]
            parts += ["Without sampling steps: " + "; ".join(level) + "."] if level else []
        parts.append(conditions(mine))
    return "\n\n".join(parts) + "\n"


def mauve_vs_steps(tables: dict[str, DataFrame]) -> tuple[Figure, DataFrame]:
    """MAUVE against sampling steps: teacher and every round, a panel for each run; the baseline as a line (SDTT figure 5)."""
    from halfstep.report import style
    from halfstep.report.figures import _by_run
    from halfstep.report.tables import conditions

    rows = tables["continuations"]
    rows = rows[rows["metric"] == "mauve"]
    if rows.empty:
        raise HalfstepError(
            "mauve_vs_steps: the table continuations has no row of mauve; score continuations first"
        )
    rows = rows[
        rows["judge"] == rows.groupby("teacher")["judge"].transform("first")
    ]  # of several, the first
    points = _by_run(rows, "steps")
    note = f"MAUVE of continuations against the documents' own, mean and 95% interval over the seeds of its k-means. {conditions(rows)}"
    return style.draw_panels(
        points, note, xlabel="sampling steps", ylabel="MAUVE", x_scale="steps", labels="left"
    ), points

"""The figures: one function each, from tables to a Figure and the points that it shows.

    function(tables: dict[str, DataFrame]) -> (Figure, points)

Tables are those of `halfstep tabulate` by name (steps, lambada, ...). `journals`
are the curves of all trainings, and `published` the values of others, if --published is given.
To add a figure, write a function here that selects points and gives them to a function of `style`,
and a row in catalogue.FIGURES. Each public function of this file is a figure.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from halfstep.errors import HalfstepError
from halfstep.report import style
from halfstep.report.conditions import describe_conditions, join_values
from halfstep.report.curves import CURVE_POINTS, thin_curves
from halfstep.report.frontier import frontier_points, held_out_points, with_entropy
from halfstep.report.points import (
    POINTS,
    add_published,
    join_points,
    make_level,
    make_points,
    one_metric,
    panel_title,
    points_by_run,
    run_names,
)
from halfstep.report.rows import DEFAULT, LEVELS
from halfstep.report.trainings import pool_trainings

Tables = Mapping[str, DataFrame]
Drawn = tuple[Figure, DataFrame]

LOSSES = {  # key of the journals: title; teacher and rounds have val/nelbo, the baseline val/nll
    "train/loss": "training loss",
    "val/nelbo": "held-out loss",
    "val/nll": "held-out loss",
}
MAUVE = (
    "MAUVE of continuations against the documents' own, mean and 95% interval over the seeds of "
    "its k-means."
)


def ppl_vs_steps(tables: Tables) -> Drawn:
    """Generative perplexity against sampling steps: the teacher and every round.

    A panel for each run and judge. The baseline and held-out text are levels. Published values are
    judged by gpt2-large; where there are several judges, only its panels show them.
    """
    rows = one_metric(tables["steps"], "generative_perplexity", all_judges=True)
    points = points_by_run(rows, "steps")
    shown = [name for name in points["panel"] if "judge" not in name or "gpt2-large" in name]
    panels = dict.fromkeys(shown)
    points, sources = add_published(points, tables, "generative_perplexity", "steps", panels)
    conditions = describe_conditions(rows)
    figure = style.draw_over_steps(
        points,
        note=f"Generative perplexity, mean and 95% interval. {conditions}{sources}",
        ylabel="generative perplexity",
        log_y=True,
    )
    return figure, points


def ppl_by_variant(tables: Tables) -> Drawn:
    """Generative perplexity against sampling steps, a panel for each run and way to draw.

    A baseline that is drawn only as `sampling` says is a level in all panels.
    """
    rows = one_metric(tables["variants"], "generative_perplexity")
    levels = rows[rows["run"].isin(LEVELS) & (rows["variant"] == DEFAULT)]
    parts = []
    for variant in dict.fromkeys([DEFAULT, *rows["variant"]]):
        mine = rows[rows["variant"] == variant]
        absent = levels[~levels["run"].isin(mine["run"])]
        points = points_by_run(pandas.concat([mine, absent]), "steps")
        parts.append(points.assign(panel=points["panel"] + f" · {variant}"))
    points = join_points(parts)
    figure = style.draw_over_steps(
        points,
        note=f"Generative perplexity, mean and 95% interval. {describe_conditions(rows)}",
        ylabel="generative perplexity",
        log_y=True,
    )
    return figure, points


def entropy_vs_steps(tables: Tables) -> Drawn:
    """Unigram entropy against sampling steps: the teacher and every round.

    The gray band is 5% around held-out text. Outside of it a low perplexity is no success.
    """
    rows = one_metric(tables["steps"], "entropy")
    points = points_by_run(rows, "steps")
    panels = dict.fromkeys(points["panel"])
    points, sources = add_published(points, tables, "entropy", "steps", panels)
    band = "gray band: within 5% of held-out text"
    conditions = describe_conditions(rows)
    figure = style.draw_over_steps(
        points,
        note=f"Unigram entropy of a sample, mean and 95% interval; {band}. {conditions}{sources}",
        ylabel="entropy (nats)",
        before=_band_around_data,
    )
    return figure, points


def _band_around_data(axes: Axes, points: DataFrame) -> None:
    data = points.loc[points["series"] == "data", "y"]
    if data.empty:
        return
    entropy = data.iloc[0]
    bottom, top = axes.get_ylim()
    low, high = 0.95 * entropy, 1.05 * entropy
    axes.axhspan(low, high, color="#999", alpha=0.12, linewidth=0, zorder=0)
    axes.set_ylim(min(bottom, 0.94 * entropy), max(top, 1.06 * entropy))


def frontier(tables: Tables) -> Drawn:
    """Generative perplexity against entropy: a curve over temperatures for each model.

    A panel for each step count. The baseline's curve and held-out text are in all of them. Of
    several judges it is the first.
    """
    points = pool_trainings(with_entropy(tables["temperatures"]))
    rows = one_metric(points, "frontier_perplexity")
    points = frontier_points(rows, held_out_points(tables["steps"]))
    figure = style.draw_panels(
        points,
        note="Generative perplexity and unigram entropy, means over texts; bars: 95% intervals of "
        "the perplexity; T: temperature at the ends of the teacher's curve, and in the same order "
        f"on all others; star and dotted line: held-out text. {describe_conditions(rows)}",
        xlabel="entropy (nats)",
        ylabel="generative perplexity",
        x_scale="real",
        log_y=True,
        share_y=False,
        before=_line_at_data,
    )
    return figure, points


def _line_at_data(axes: Axes, points: DataFrame) -> None:
    for x in points.loc[points["series"] == "data", "x"]:
        color, dashes = style.LEVELS["data"]
        axes.axvline(x, color=color, linestyle=dashes, linewidth=0.8, zorder=0)


def lambada_vs_round(tables: Tables) -> Drawn:
    """Last-word accuracy and perplexity against the round; round 0 is the teacher.

    A line for each run, a panel for each metric and protocol.
    """
    table = tables["lambada"]
    parts = []
    ylabels = {}
    for (teacher, metric), mine in table.groupby(["teacher", "metric"], sort=False):
        is_baseline = mine["run"] == "baseline"
        for protocol, group in mine[~is_baseline].groupby("protocol", sort=False):
            name = metric.removeprefix("lambada_")
            panel = panel_title(table, teacher, f"{name}, {protocol}")
            ylabels[panel] = name
            for run in run_names(group):
                line = group[group["run"].isin(("teacher", run))]
                parts.append(make_points(line, panel, run, line["round"], round=0))
            parts.append(make_level(mine[is_baseline], panel, "baseline"))
    points = join_points(parts)
    panels = dict.fromkeys(name for name in ylabels if name.endswith("accuracy, parallel"))
    points, sources = add_published(points, tables, "lambada_accuracy", "round", panels)
    words = "Last words (LAMBADA), 95% intervals; round 0 is the teacher."
    figure = style.draw_panels(
        points,
        note=f"{words} {describe_conditions(table)}{sources}",
        xlabel="round",
        ylabel=ylabels,
        share_y=False,
        columns=3 if len(ylabels) % 4 else 2,
    )
    return figure, points


def loss_curves(tables: Tables) -> Drawn:
    """Training loss and held-out loss against optimizer steps.

    A panel for each run with all its rounds, and one for the teacher and the baseline.
    """
    table = tables["journals"]
    parts = []
    ylabels = {}
    for loss in dict.fromkeys(LOSSES.values()):
        kept = table[table["key"].map(LOSSES) == loss]
        for (teacher, group), mine in kept.groupby(["teacher", "group"], sort=False):
            panel = panel_title(table, teacher, f"{group}: {loss}")
            ylabels[panel] = loss
            for series, curve in mine.groupby("series", sort=False):
                part = {
                    "panel": panel,
                    "series": series,
                    "kind": "line",
                    "round": curve["round"].iloc[0],
                    **thin_curves(curve),
                }
                parts.append(DataFrame(part))
    if not parts:
        raise HalfstepError(
            f"loss_curves: the journals hold none of {', '.join(LOSSES)}; "
            "name the folders under results/models with --tables"
        )
    points = join_points(parts).reindex(columns=POINTS)
    groups = table.drop_duplicates(["teacher", "group"])
    repeated = "Of several trainings: the mean, with a band from the lowest to the highest. "
    figure = style.draw_panels(
        points,
        note=f"Means over equal stretches of steps, at most {CURVE_POINTS} a curve. "
        f"{repeated if table['training'].any() else ''}"
        f"Journals of {join_values(table['teacher'])}; commit {join_values(table['commit'])}.",
        xlabel="optimizer steps",
        ylabel=ylabels,
        share_y=False,
        columns=min(len(groups), 6),
    )
    return figure, points


def mauve_vs_steps(tables: Tables) -> Drawn:
    """MAUVE against sampling steps: the teacher and every round (figure 5 of the SDTT paper).

    A panel for each run. The baseline is a level. Of several judges it is the first.
    """
    rows = one_metric(tables["continuations"], "mauve")
    points = points_by_run(rows, "steps")
    figure = style.draw_over_steps(
        points,
        note=f"{MAUVE} {describe_conditions(rows)}",
        ylabel="MAUVE",
    )
    return figure, points

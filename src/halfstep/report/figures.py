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
from pandas import DataFrame, Series

from halfstep.errors import HalfstepError
from halfstep.report import marks, style
from halfstep.report.conditions import explain_conditions, join_values
from halfstep.report.curves import CURVE_POINTS, thin_curves
from halfstep.report.frontier import frontier_points, held_out_points, with_entropy
from halfstep.report.headlines import (
    equal_entropy_ratios,
    ratio_text,
    title_of_best,
    title_of_entropy,
    title_of_frontier,
    title_of_last_words,
    title_of_perplexity,
    title_of_variants,
)
from halfstep.report.labels import in_words
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
    with_conditions,
)
from halfstep.report.rows import DEFAULT, LEVELS, WRITTEN
from halfstep.report.trainings import pool_trainings

Tables = Mapping[str, DataFrame]
Drawn = tuple[Figure, DataFrame]

HELD_OUT = "held-out loss"
LOSSES = {  # key of the journals: title; teacher and rounds have val/nelbo, the baseline val/nll
    "train/loss": "training loss",
    "val/nelbo": HELD_OUT,
    "val/nll": HELD_OUT,
}
UNITS = {  # what the training loss of a round is, by its divergence from the teacher
    "kl_backward": "reverse KL (nats per masked token)",
    "kl_forward": "forward KL (nats per masked token)",
    "mse": "squared difference of log-probabilities",
    "tvd": "total variation distance",
    "l1_log_p": "sum of |differences of log-probabilities|",
}
PROTOCOLS = {  # of last words, in plain words
    "parallel": "all tokens of the word at once",
    "confidence": "the surest token first",
    "elbo-exact": "from the exact bound",
    "elbo-mc": "from the sampled bound",
}
SAME = {"confidence": ("parallel", 0.1), "elbo-mc": ("elbo-exact", 1.0)}
"""Protocols that can say the same as another one, and how far apart that is in half intervals"""
MAUVE = "MAUVE of continuations against the documents' own: 1 means that they cannot be told apart."
PERPLEXITY = "Perplexity is low also where texts repeat themselves: compare the entropy."


def ppl_vs_steps(tables: Tables) -> Drawn:
    """Generative perplexity against sampling steps: the teacher and every round.

    A panel for each run and judge. The baseline, naive samplers and held-out text are levels.
    Published values are judged by gpt2-large; where there are several judges, only its panels show
    them.
    """
    rows = one_metric(tables["steps"], "generative_perplexity", all_judges=True)
    points = points_by_run(rows, "steps", naive=True)
    shown = [name for name in points["panel"] if "judge" not in name or "gpt2-large" in name]
    panels = dict.fromkeys(shown)
    points, sources = add_published(points, tables, "generative_perplexity", "steps", panels)
    figure = style.draw_over_steps(
        points,
        title=title_of_perplexity(rows),
        note=f"{PERPLEXITY} {explain_conditions(rows)}{sources}",
        ylabel="generative perplexity",
        better="lower",
        log_y=True,
    )
    return figure, with_conditions(points, rows)


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
        title=title_of_variants(tables["variants"]),
        note=f"A panel for each way to draw samples. {PERPLEXITY} {explain_conditions(rows)}",
        ylabel="generative perplexity",
        better="lower",
        log_y=True,
    )
    return figure, with_conditions(points, rows)


def entropy_vs_steps(tables: Tables) -> Drawn:
    """Unigram entropy against sampling steps: the teacher and every round.

    The gray band is 5% around held-out text. Outside of it a low perplexity is no success.
    """
    rows = one_metric(tables["steps"], "entropy")
    points = points_by_run(rows, "steps", naive=True)
    panels = dict.fromkeys(points["panel"])
    points, sources = add_published(points, tables, "entropy", "steps", panels)
    figure = style.draw_over_steps(
        points,
        title=title_of_entropy(rows),
        note="Entropy of the tokens of one text, mean over texts. Gray area: within 5% of held-out "
        f"text; below it texts repeat themselves. {explain_conditions(rows)}{sources}",
        ylabel="entropy (nats)",
        before=_band_around_data,
    )
    return figure, with_conditions(points, rows)


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
    titles = _frontier_titles(points, rows, equal_entropy_ratios(tables["temperatures"]))
    ratio = "Ratio: the student's perplexity divided by its teacher's at equal entropy. "
    temperatures = join_values(f"{value:g}" for value in sorted(set(rows["temperature"])))
    figure = style.draw_panels(
        points,
        title=title_of_frontier(tables["temperatures"]),
        subtitles=titles,
        note=f"A curve is one model at the temperatures {temperatures}, from left to right. Dotted "
        f"line: the entropy of held-out text. {ratio if titles else ''}{explain_conditions(rows)}",
        xlabel="entropy (nats)",
        ylabel="generative perplexity",
        better="lower",
        x_scale="real",
        log_y=True,
        share_y=False,
        columns=2,
        before=_line_at_data,
    )
    return figure, with_conditions(points, rows)


def _frontier_titles(points: DataFrame, rows: DataFrame, ratios: DataFrame) -> dict[str, str]:
    """The titles of panels with the ratio at equal entropy; none if there are several students."""
    if rows.loc[rows["round"] > 0, "model"].nunique() != 1:
        return {}
    titles = {}
    for _, row in ratios[ratios["value"].notna()].iterrows():
        for panel in points["panel"].unique():
            if panel.split(" ")[0] == str(row["steps"]):
                titles[panel] = f"{panel}: ratio {ratio_text(row)}"
    return titles


def _line_at_data(axes: Axes, points: DataFrame) -> None:
    for x in points.loc[points["series"] == "data", "x"]:
        color, dashes = marks.LEVELS["data"]
        axes.axvline(x, color=color, linestyle=dashes, linewidth=0.8, zorder=0)


def lambada_vs_round(tables: Tables) -> Drawn:
    """Last-word accuracy and perplexity against the round; round 0 is the teacher.

    A line for each run, a panel for each metric and protocol. A protocol that says the same as
    another is left out: for words of one token the order in which tokens are decided is no choice.
    """
    table = tables["lambada"]
    parts = []
    ylabels, better, subtitles = {}, {}, {}
    left_out = _repeated_protocols(table)
    for (teacher, metric), mine in table.groupby(["teacher", "metric"], sort=False):
        is_baseline = mine["run"] == "baseline"
        for protocol, group in mine[~is_baseline].groupby("protocol", sort=False):
            if protocol in left_out:
                continue
            name = metric.removeprefix("lambada_")
            panel = panel_title(table, teacher, f"{name}, {protocol}")
            words = f"{name.capitalize()}: {PROTOCOLS.get(protocol, protocol)}"
            subtitles[panel] = panel_title(table, teacher, words)
            ylabels[panel] = f"{name} of last words"
            better[panel] = "higher" if name == "accuracy" else "lower"
            for run in run_names(group):
                line = group[group["run"].isin(("teacher", run))]
                parts.append(make_points(line, panel, run, line["round"], round=0))
            parts.append(make_level(mine[is_baseline], panel, "baseline"))
    points = join_points(parts)
    panels = dict.fromkeys(name for name in ylabels if name.endswith("accuracy, parallel"))
    points, sources = add_published(points, tables, "lambada_accuracy", "round", panels)
    same = []
    if left_out:
        names = "; ".join(PROTOCOLS[name] for name in left_out)
        same.append(f"Not drawn, because another panel says the same: {names}.")
    note = " ".join(["Round 0 is the teacher.", *same, explain_conditions(table)])
    figure = style.draw_panels(
        points,
        title=title_of_last_words(table),
        subtitles=subtitles,
        note=f"{note}{sources}",
        xlabel="round",
        ylabel=ylabels,
        better=better,
        share_y=False,
        columns=2,
    )
    return figure, with_conditions(points, table)


def _repeated_protocols(table: DataFrame) -> list[str]:
    """The protocols whose values are those of another one, or within its intervals (SAME)."""
    key = ["model", "metric"]
    half = (table["high"] - table["low"]).astype(float) / 2
    values = table.assign(half=half).set_index(key)[["protocol", "value", "half"]]
    repeated = []
    for one, (other, halves) in SAME.items():
        mine, theirs = (values[values["protocol"] == name] for name in (one, other))
        if len(mine) and set(mine.index) == set(theirs.index):
            theirs = theirs.loc[mine.index]
            apart = (mine["value"] - theirs["value"]).abs()
            if (apart <= halves * theirs["half"].fillna(0)).all():
                repeated.append(one)
    return repeated


def loss_curves(tables: Tables) -> Drawn:
    """Training loss and held-out loss against optimizer steps.

    A panel for each run with all its rounds, and one for the teacher and the baseline. Training
    losses are smoothed, with the logged values behind them.
    """
    table = tables["journals"]
    parts = []
    ylabels, subtitles = {}, {}
    for (teacher, group), mine in table.groupby(["teacher", "group"], sort=False):
        for loss, kept in mine.groupby(mine["key"].map(LOSSES), sort=False):
            panel = panel_title(table, teacher, f"{group}: {loss}")
            words = f"{in_words(group)}: {loss}"
            subtitles[panel] = panel_title(table, teacher, words[0].upper() + words[1:])
            ylabels[panel] = f"{loss} (nats per token)"
            divergence = kept["divergence"].iloc[0]
            if loss != HELD_OUT and divergence in UNITS:
                ylabels[panel] = UNITS[divergence]
            for series, curve in kept.groupby("series", sort=False):
                parts += _loss_lines(curve, panel, series, loss != HELD_OUT)
    if not parts:
        raise HalfstepError(
            f"loss_curves: the journals hold none of {', '.join(LOSSES)}; "
            "name the folders under results/models with --tables"
        )
    points = join_points(parts).reindex(columns=POINTS)
    repeated = "Of several trainings: the mean. "
    thin = (
        "Thick: a running mean over a tenth of the training; thin: the logged values, as means "
        f"over equal stretches of steps (at most {CURVE_POINTS}). "
    )
    figure = style.draw_panels(
        points,
        title=_title_of_losses(table),
        subtitles=subtitles,
        note=f"{thin if (points['kind'] == 'raw').any() else ''}"
        f"{repeated if table['training'].any() else ''}"
        f"Models of {join_values(table['teacher'])}.",
        xlabel="optimizer steps",
        ylabel=ylabels,
        better="lower",
        share_y=False,
        columns=2,
        interval="lowest and highest training",
    )
    conditions = (
        f"Journals of {join_values(table['teacher'])}; commit {join_values(table['commit'])}."
    )
    return figure, points.assign(conditions=conditions)


def _loss_lines(curve: DataFrame, panel: str, series: str, smooth: bool) -> list[DataFrame]:
    """The points of one curve: as logged and, where it is smoothed, also its running mean."""
    number = curve["round"].iloc[0]
    about = {"panel": panel, "round": number, "repeats": curve["training"].nunique()}
    thin = thin_curves(curve)
    if not smooth or len(thin["x"]) < 20:
        return [DataFrame({"series": series, "kind": "line", **about, **thin})]
    window = max(len(thin["x"]) // 10, 1)
    mean = Series(thin["y"]).rolling(window, center=True, min_periods=1).mean().to_numpy()
    about_mean = {"series": series + marks.SMOOTHED, "kind": "line", **about}
    logged = DataFrame({"series": series, "kind": "raw", **about, **thin})
    return [logged, DataFrame({**about_mean, "x": thin["x"], "y": mean})]


def _title_of_losses(table: DataFrame) -> str:
    """The held-out loss at the end of the first teacher's pretraining, and of its last round."""
    rows = table[table["key"] == "val/nelbo"]
    if rows.empty:
        return "Training losses"
    rows = rows[rows["teacher"] == rows["teacher"].iloc[0]]
    ends = []
    for number in sorted({rows["round"].min(), rows["round"].max()}):
        mine = rows[rows["round"] == number]
        mine = mine[mine["group"] == mine["group"].iloc[0]]
        last = mine[mine["step"] == mine["step"].max()]
        name = "the teacher" if number == 0 else f"round {number}"
        if number and rows["group"].nunique() > 2:
            name += f" of {in_words(mine['group'].iloc[0])}"
        unit = "" if ends else " nats per token"
        ends.append(f"{last['value'].mean():.3f}{unit} for {name}")
    return f"The held-out loss ends at {' and '.join(ends)}"


def mauve_vs_steps(tables: Tables) -> Drawn:
    """MAUVE against sampling steps: the teacher and every round (figure 5 of the SDTT paper).

    A panel for each run. The baseline is a level. Of several judges it is the first.
    """
    rows = one_metric(tables["continuations"], "mauve")
    points = points_by_run(rows, "steps")
    figure = style.draw_over_steps(
        points,
        title=title_of_best(rows, "MAUVE"),
        note=f"{MAUVE} {explain_conditions(rows)}",
        ylabel="MAUVE",
        better="higher",
    )
    return figure, with_conditions(points, rows)


def task_accuracy_vs_steps(tables: Tables) -> Drawn:
    """Accuracy of written answers to tasks against sampling steps: teachers and last rounds.

    A panel for each task and run, with the first measure of the task. The baseline is a level.
    """
    rows = tables["tasks"]
    rows = rows[rows["protocol"] == WRITTEN]
    if rows.empty:
        raise HalfstepError(
            "task_accuracy_vs_steps: the table tasks has no written answers; answer a task of type "
            "generate_until first with halfstep score-tasks --steps"
        )
    rows = rows[rows["measure"] == rows.groupby("task")["measure"].transform("first")]
    parts = []
    for task, mine in rows.groupby("task", sort=False):
        points = points_by_run(mine, "steps")
        parts.append(points.assign(panel=points["panel"] + f" · {task}"))
    measures = "; ".join(dict.fromkeys(rows["measure"])).replace("_", " ")
    first = rows[rows["task"] == rows["task"].iloc[0]]
    points = join_points(parts)
    figure = style.draw_over_steps(
        points,
        title=title_of_best(first, "accuracy"),
        note="Share of the questions to which the written answer is right, as lm-eval judges "
        f"({measures}). {explain_conditions(rows)}",
        ylabel="accuracy of written answers",
        better="higher",
    )
    return figure, with_conditions(points, rows)

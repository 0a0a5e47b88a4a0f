"""Figures that only the paper's items show (paper.py); otherwise as those of figures.py."""

from __future__ import annotations

from halfstep.errors import HalfstepError
from halfstep.report import style
from halfstep.report.conditions import explain_conditions
from halfstep.report.figures import MAUVE, Drawn, Tables
from halfstep.report.headlines import title_of_best, title_of_perplexity
from halfstep.report.labels import in_words
from halfstep.report.points import (
    join_points,
    make_level,
    make_points,
    one_metric,
    points_by_run,
    run_names,
    short_judge,
    with_conditions,
)
from halfstep.report.rows import LEVELS, sampled_rows


def mauve_by_round(tables: Tables) -> Drawn:
    """MAUVE against sampling steps, a panel for each round, a line for each run (figure 5)."""
    rows = one_metric(tables["continuations"], "mauve")
    models = sampled_rows(rows)
    teacher = models[models["run"] == "teacher"].sort_values("steps")
    parts = []
    for number in sorted(set(models["round"]) - {0}):
        panel = f"round {number}"
        parts.append(make_points(teacher, panel, "teacher", teacher["steps"]))
        for run, line in models[models["round"] == number].groupby("run", sort=False):
            line = line.sort_values("steps")
            parts.append(make_points(line, panel, run, line["steps"], round=0))
        parts += [make_level(rows[rows["run"] == level], panel, level) for level in LEVELS]
    if not parts:
        raise HalfstepError("mauve_by_round: no rounds among the continuations; continue prompts")
    points = join_points(parts)
    figure = style.draw_over_steps(
        points,
        title=title_of_best(rows, "MAUVE"),
        note=f"{MAUVE} {explain_conditions(rows)}",
        ylabel="MAUVE",
        better="higher",
    )
    return figure, with_conditions(points, rows)


def continuation_ppl_vs_steps(tables: Tables) -> Drawn:
    """Perplexity of continuations, given their prompts, against sampling steps (figure 18)."""
    rows = one_metric(tables["continuations"], "continuation_perplexity")
    points = points_by_run(rows, "steps")
    figure = style.draw_over_steps(
        points,
        title=title_of_perplexity(rows),
        note="Generative perplexity of continuations, prompts not counted, mean over texts. "
        f"{explain_conditions(rows)}",
        ylabel="perplexity of continuations",
        better="lower",
        log_y=True,
    )
    return figure, with_conditions(points, rows)


def quality_vs_self_bleu(tables: Tables) -> Drawn:
    """Perplexity of continuations against their self-BLEU (figures 4a and 19).

    A curve over step counts for the teacher and each round; the baseline is a point.
    """
    rows = one_metric(tables["continuations"], "continuation_perplexity")
    bleu = one_metric(tables["continuations"], "self_bleu")
    key = ["model", "steps"]
    x = bleu.set_index(key)["value"]
    at = [tuple(place) for place in rows[key].itertuples(index=False)]
    rows = rows.assign(self_bleu=[x.get(place) for place in at]).dropna(subset="self_bleu")
    if rows.empty:
        raise HalfstepError("quality_vs_self_bleu: no row has both perplexity and self-BLEU")
    parts = []
    for run in run_names(rows):
        mine = rows[rows["run"].isin(("teacher", run))].sort_values(["round", "steps"])
        series = [f"round {number}" if number else "teacher" for number in mine["round"]]
        parts.append(make_points(mine, run, series, mine["self_bleu"], kind="curve"))
        baseline = rows[rows["run"] == "baseline"]
        place = baseline["self_bleu"]
        named = dict(kind="point", text=in_words("baseline"))
        parts.append(make_points(baseline, run, "baseline", place, **named))
    points = join_points(parts)
    figure = style.draw_panels(
        points,
        note="Perplexity of continuations, mean over texts, against their self-BLEU (low is "
        f"diverse); along a curve the number of sampling steps. {explain_conditions(rows)}",
        xlabel="self-BLEU",
        ylabel="perplexity of continuations",
        better="lower",
        x_scale="real",
        log_y=True,
    )
    return figure, with_conditions(points, rows)


def ppl_by_size(tables: Tables) -> Drawn:
    """Generative perplexity against sampling steps: teachers and last rounds of all sizes.

    A panel for each judge (figure 4b).
    """
    rows = one_metric(tables["steps"], "generative_perplexity", all_judges=True)
    models = sampled_rows(rows)
    last = models.groupby(["teacher", "run"])["round"].transform("max")
    parts = []
    for judge, mine in models[models["round"] == last].groupby("judge", sort=False):
        for (teacher, run), line in mine.groupby(["teacher", "run"], sort=False):
            line = line.sort_values("steps")
            number = line["round"].iloc[0]
            series = f"{teacher}, {f'{run} round {number}' if number else 'teacher'}"
            parts.append(make_points(line, short_judge(judge), series, line["steps"], round=0))
    points = join_points(parts)
    figure = style.draw_panels(
        points,
        note=f"Generative perplexity, mean over texts. {explain_conditions(rows)}",
        xlabel="sampling steps",
        ylabel="generative perplexity",
        better="lower",
        x_scale="steps",
        log_y=True,
    )
    return figure, with_conditions(points, rows)


def lambada_by_size(tables: Tables) -> Drawn:
    """Last words against the round, a line for each network size (figure 17).

    A panel for each metric and protocol.
    """
    table = tables["lambada"]
    parts, ylabels = [], {}
    for (metric, protocol), mine in table.groupby(["metric", "protocol"], sort=False):
        students = mine[mine["run"] != "baseline"]
        if students.empty:
            continue
        panel = f"{metric.removeprefix('lambada_')}, {protocol}"
        ylabels[panel] = metric.removeprefix("lambada_")
        for teacher, line in students.groupby("teacher", sort=False):
            line = line.sort_values("round")
            parts.append(make_points(line, panel, teacher, line["round"], round=0))
    if not parts:
        raise HalfstepError("lambada_by_size: no last words of a denoiser in the table")
    points = join_points(parts)
    figure = style.draw_panels(
        points,
        note=f"Last words (LAMBADA); round 0 is the teacher. {explain_conditions(table)}",
        xlabel="round",
        ylabel=ylabels,
        share_y=False,
    )
    return figure, with_conditions(points, table)

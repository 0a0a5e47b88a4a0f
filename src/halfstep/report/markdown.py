"""The tables as Markdown, one function each.

Markdown is for people and ends with the conditions of measurement; trainings of one model share a
cell (trainings.py). Published values (published.py) have grids apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas
from pandas import DataFrame
from tabulate import tabulate

from halfstep.config import NAIVE
from halfstep.report.catalogue import TABLES
from halfstep.report.conditions import describe_conditions, join_values
from halfstep.report.decoders import AT_DATA, cost_grid, with_costs
from halfstep.report.frontier import (
    explain_readings,
    label_with_steps,
    point_cell,
    reading_cell,
    with_entropy,
)
from halfstep.report.grids import (
    latency_cell,
    make_grid,
    model_label,
    round_number,
    share_cell,
    value_cell,
)
from halfstep.report.infilling import RIGHT, accuracy_cell, area_cell, label_with_variant
from halfstep.report.labels import in_words
from halfstep.report.rows import LEVELS, WRITTEN, baseline_name, sampled_rows, usual_rows
from halfstep.report.sentences import SHARES
from halfstep.report.trainings import pool_trainings

SAMPLES = TABLES["steps"].metrics
OVER_TEMPERATURES = ("temperature", "temperature of the model")  # columns of a grid, its corner
BETTER = {
    "generative_perplexity": "lower",
    "sample_mauve": "higher",
    "sentence_share": "higher",
    "consistent_share": "higher",
    "accepted_share": "higher",
    "distinct_stories": "higher",
    "fact_divergence": "lower",
    "distinct_2": "higher",
    "repetition": "lower",
    "sample_self_bleu": "lower",
}
LATENCY = "milliseconds to write, median ± farther bound (times faster than the fastest baseline)"


def steps_markdown(table: DataFrame, metrics: Sequence[str] = tuple(SAMPLES)) -> str:
    """One grid for each teacher and metric: models down, step counts across."""
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: samples")
        for metric, protocol, judge, group in _by_metric(mine, metrics):
            title = f"### {SAMPLES[metric]} (protocol {protocol})"
            interval = " (the k-means' alone)" if metric == "sample_mauve" else ""
            cell, sign = (share_cell, "") if metric in SHARES else (value_cell, "± ")
            parts.append(f"{title}{judge}, {sign}95% interval{interval}")
            if len(sampled := sampled_rows(group)):
                parts.append(make_grid(sampled, "steps", "sampling steps", cell))
            parts += _levels(group, cell)
            parts += _naive_warnings(group)
            parts += _conditions(group)
        parts += _network_evaluations(sampled_rows(mine[mine["metric"] == metrics[0]]))
    return "\n\n".join(parts) + "\n"


def variants_markdown(table: DataFrame) -> str:
    """For each model one grid of all measures and costs of the ways to draw, then more of some."""
    titles = TABLES["variants"].metrics
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: samples drawn in several ways")
        for _, protocol, judge, group in _by_metric(mine, ("generative_perplexity",)):
            rows = with_costs(group, mine)
            for model, drawn in rows.groupby("model", sort=False):
                parts.append(f"### Costs of {model} (protocol {protocol}){judge}, ± 95% interval")
                parts.append(cost_grid(drawn, mine))
            read = mine[(mine["metric"] == AT_DATA) & (mine["protocol"] == protocol)]
            parts += explain_readings(read[read["model"].isin(rows["model"])])
        for metric in ("generative_perplexity", "entropy"):
            for variant, drawn in mine.groupby("variant", sort=False):
                for _, protocol, judge, group in _by_metric(drawn, (metric,)):
                    about = f"{titles[metric]} (protocol {protocol}){judge}"
                    parts.append(f"### {variant}: {about}, ± 95% interval")
                    parts.append(make_grid(sampled_rows(group), "steps", "sampling steps"))
                    parts += [*_levels(group), *_conditions(group)]
    return "\n\n".join(parts) + "\n"


def temperatures_markdown(table: DataFrame) -> str:
    """For each teacher: points over temperatures, values at held-out entropy, and ratios."""
    titles = TABLES["temperatures"].metrics
    at_data, ratio = "perplexity_at_data_entropy", "perplexity_ratio_at_equal_entropy"
    parts = []
    for teacher, mine in pool_trainings(with_entropy(table)).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: the generative frontier")
        for metric, protocol, judge, group in _by_metric(mine, (at_data,)):
            about = f"(protocol {protocol}){judge}, [95% interval]"
            entropy = f"{group['at_entropy'].iloc[0]:.3f} nats"
            parts.append(f"### {titles[metric]}, {entropy} {about}")
            parts.append(make_grid(sampled_rows(group), "steps", "sampling steps", reading_cell))
            parts += [*_levels(group, reading_cell), *explain_readings(group)]
        for metric, protocol, judge, group in _by_metric(mine, (ratio,)):
            about = f"(protocol {protocol}){judge}, [95% interval]"
            parts.append(f"### {titles[metric]} {about}")
            parts.append(make_grid(group, *OVER_TEMPERATURES, reading_cell, label_with_steps))
            parts += explain_readings(group)
        for _, protocol, judge, group in _by_metric(mine, ("frontier_perplexity",)):
            parts.append(f"### Entropy in nats: perplexity (protocol {protocol}){judge}")
            parts.append(make_grid(group, *OVER_TEMPERATURES, point_cell, label_with_steps))
            parts += _conditions(group)
    return "\n\n".join(parts) + "\n"


def lambada_markdown(table: DataFrame) -> str:
    """One grid for each teacher: models down, metrics and protocols across."""
    names = TABLES["lambada"].metrics
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        cases = zip(mine["metric"], mine["protocol"], strict=True)
        columns = [f"{names[metric]}, {protocol}" for metric, protocol in cases]
        parts.append(f"## {teacher}: last words (LAMBADA), ± 95% interval")
        parts.append(make_grid(mine.assign(case=columns), "case", "model"))
        parts += _conditions(mine)
    return "\n\n".join(parts) + "\n"


def infilling_markdown(table: DataFrame) -> str:
    """For each teacher and task the areas, models down and ways to draw across, and accuracies."""
    titles = TABLES["infilling"].metrics
    accuracy, area = titles
    parts = []
    for (teacher, task), mine in pool_trainings(table).groupby(["teacher", "task"], sort=False):
        parts.append(f"## {teacher}: {in_words(task)} filled in")
        for protocol, group in mine.groupby("protocol", sort=False):
            about = f"(protocol {protocol}), ± 95% interval"
            areas, points = group[group["metric"] == area], group[group["metric"] == accuracy]
            parts.append(f"### {titles[area]} {about}")
            parts.append(make_grid(areas, "variant", "way to draw", area_cell))
            parts.append(f"### {titles[accuracy]} {about}, (tokens per forward)")
            corner = "limit of steps"
            parts.append(make_grid(points, "steps", corner, accuracy_cell, label_with_variant))
            parts.append(RIGHT[protocol])
            parts += _conditions(group)
    return "\n\n".join(parts) + "\n"


def tasks_markdown(table: DataFrame) -> str:
    """For each teacher one grid for each measure and protocol: models down, tasks across.

    Of written answers one for each task and measure: models down, sampling steps across.
    """
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: tasks of lm-eval")
        is_written = mine["protocol"] == WRITTEN
        for (task, measure), group in mine[is_written].groupby(["task", "measure"], sort=False):
            parts.append(f"### {task}: {measure} (protocol {WRITTEN}), ± 95% interval")
            parts.append(make_grid(sampled_rows(group), "steps", "sampling steps"))
            evaluations = _network_evaluations(sampled_rows(group))
            parts += [*_levels(group), *evaluations, *_conditions(group)]
        read = mine[~is_written]
        for (measure, protocol), group in read.groupby(["measure", "protocol"], sort=False):
            parts.append(f"### {measure} (protocol {protocol}), ± 95% interval")
            parts += [make_grid(group, "task", "task"), _masks(group), *_conditions(group)]
    return "\n\n".join(filter(None, parts)) + "\n"


def zero_shot_markdown(table: DataFrame) -> str:
    """One grid for each teacher: models down, texts across; baselines are exact, others bounds."""
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: zero-shot perplexity per token, ± 95% interval over windows")
        parts += [make_grid(mine, "task", "text"), _masks(mine), *_conditions(mine)]
    return "\n\n".join(filter(None, parts)) + "\n"


def speed_markdown(table: DataFrame) -> str:
    """Grids for each teacher: lengths and batch sizes down, step counts and baselines across.

    Other ways to draw have a grid of their own, with a line for each of them.
    """
    parts = []
    for teacher, rows in table.groupby("teacher", sort=False):
        usual, varied = usual_rows(rows), rows[rows["variant"].notna()]
        if len(usual):
            parts += _timed_steps(teacher, usual)
        if len(varied):
            parts += [f"## {teacher}: time to write in other ways", *_timed_variants(varied)]
    return "\n\n".join(parts) + "\n"


def _timed_steps(teacher: str, mine: DataFrame) -> list[str]:
    """Grids of one teacher's students and baselines, and how they were timed."""
    parts = []
    mine = mine.assign(case=[_decoder(row) for row in mine.itertuples()])
    shown: dict[str, Callable[[Any], str]] = {
        LATENCY: latency_cell,
        "tokens per second": lambda row: f"{row.tokens_per_s:,.0f}",
        "tokens per forward pass of a text": lambda row: round_number(row.tokens_per_forward),
    }
    if mine["energy_j"].notna().all():
        shown["joules per text"] = lambda row: round_number(row.energy_j / row.batch_size)
    for title, cell in shown.items():
        parts.append(f"## {teacher}: {title}")
        parts.append(make_grid(mine, "case", "tokens × texts", cell, _length_and_batch))
    is_baseline = mine["run"] == "baseline"
    students, baselines = mine.loc[~is_baseline, "model"], mine.loc[is_baseline, "case"]
    parts.append(
        f"Timed: {join_values([*students, *baselines])}, at each length and batch size in "
        f"turns in one process; weights {join_values(mine['weights'])}; "
        f"± is the farther bound ({join_values(mine['bounds'])}); "
        f"{join_values(mine['device'])}, {join_values(mine['dtype'])}; "
        f"commit {join_values(mine['commit'])}."
    )
    return parts


def _timed_variants(table: DataFrame) -> list[str]:
    """A grid with a line for each way to draw, model and batch size, and how it was timed."""
    students, baselines = sampled_rows(table), table[table["run"] == "baseline"]
    order = ["variant", "model", "steps", "batch_size"]
    lines: list[dict[str, str]] = []
    for row in students.sort_values(order, kind="stable").itertuples():
        text, token = 1000 / row.batch_size, 1000 / row.batch_size / row.length
        low, high = round_number(text * row.low), round_number(text * row.high)
        faster = math.nan if pandas.isna(row.times_faster) else row.times_faster
        line = {
            "way to draw": row.variant,
            "model": model_label(row),
            "steps": f"{row.steps:,}",
            "tokens × texts": _length_and_batch(row),
            "network evaluations": round_number(row.network_evaluations),
            "autoregressive passes": _number_cell(row.autoregressive_passes),
            "tokens a verification": _number_cell(row.tokens_per_verification),
            "ms a text": f"{round_number(text * row.value)} [{low}, {high}]",
            "ms a token": round_number(token * row.value),
            "baseline, ms a token": _number_cell(token * row.value * faster),
            "times faster": _number_cell(faster),
        }
        lines.append(line)
    shown = [title for title in lines[0] if any(line[title] for line in lines)]
    body = [[line[title] for title in shown] for line in lines]
    align = ["left", "left", *("right" for _ in shown[2:])]
    names = dict.fromkeys(map(baseline_name, baselines["sampler"]))
    turns = f"in turns with {join_values(names)} in one process" if names else "without a baseline"
    return [
        tabulate(body, shown, "github", disable_numparse=True, colalign=align),
        f"Medians, with the bounds in brackets ({join_values(table['bounds'])}); passes are means "
        f"over the timed texts. Each way to draw and batch size was timed {turns}; weights "
        f"{join_values(students['weights'])}; {join_values(table['device'])}, "
        f"{join_values(table['dtype'])}; commit {join_values(table['commit'])}.",
    ]


def _number_cell(value: float) -> str:
    return "" if pandas.isna(value) else round_number(value)


def continuations_markdown(table: DataFrame) -> str:
    """One grid for each teacher and metric: models down, step counts across."""
    titles = TABLES["continuations"].metrics
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        length = mine["length"].iloc[0]
        parts.append(
            f"## {teacher}: continuations of held-out prompts, "
            f"texts of {length} tokens with their prompts"
        )
        for metric, _, judge, group in _by_metric(mine, titles):
            interval = "the k-means' alone" if metric == "mauve" else "over prompts"
            parts.append(f"### {titles[metric]}{judge}, ± 95% interval ({interval})")
            students = sampled_rows(group)
            if len(students):
                parts.append(make_grid(students, "steps", "sampling steps"))
            parts += _levels(group)
        parts += _conditions(mine)
    return "\n\n".join(parts) + "\n"


def _decoder(row: Any) -> str:
    """The column of a row of the speed table: a step count, or the name of a baseline."""
    return baseline_name(row.sampler) if row.run in LEVELS else f"{row.steps} steps"


def _length_and_batch(row: Any) -> str:
    return f"{row.length} × {row.batch_size}"


def _masks(rows: DataFrame) -> str:
    """A sentence on the number of masks by which the ELBO of a text is estimated, if it is."""
    bounds = rows[rows["protocol"] != "ar"]
    counts = sorted(bounds["network_evaluations"].dropna().unique())
    if not counts:
        return ""
    listed = join_values(f"{count:.4g}" for count in counts)
    return f"The ELBO of a text is estimated from {listed} masks on average."


def _by_metric(
    table: DataFrame, metrics: Iterable[str]
) -> Iterator[tuple[str, str, str, DataFrame]]:
    """(metric, protocol, words on the judge, rows) of each grid, in the order of the metrics.

    The judge is named in a title only where a table has several.
    """
    several = table["judge"].nunique() > 1
    for metric in metrics:
        mine = table[table["metric"] == metric]
        groups = mine.groupby(["protocol", "judge"], dropna=False, sort=False)
        for (protocol, judge), group in groups:
            named = several and isinstance(judge, str)
            yield metric, protocol, f", judge {judge}" if named else "", group


def _levels(group: DataFrame, cell: Callable[[Any], str] = value_cell) -> list[str]:
    """Lines with the values of models without sampling steps and of naive samplers, if any."""
    lines = []
    for title, runs in (("Without sampling steps", LEVELS), ("Naive samplers", NAIVE)):
        levels = group[group["run"].isin(runs)]
        values = [f"{in_words(row.run)}: {cell(row)}" for row in levels.itertuples()]
        if values:
            lines.append(f"{title}: {'; '.join(values)}.")
    return lines


def _naive_warnings(group: DataFrame) -> list[str]:
    """Sentences on the naive samplers that rank above a model, at some steps or at all.

    That is where they are better and the intervals are apart. The models are the teacher and the
    last round of each run. A metric of which no direction is better, such as the entropy, has none.
    """
    better = BETTER.get(group["metric"].iloc[0])
    if better is None:
        return []
    is_last = group["round"] == group.groupby("run")["round"].transform("max")
    models = sampled_rows(group[is_last]).sort_values("steps")
    is_teacher = models["run"] == "teacher"
    lines = []
    for row in group[group["run"].isin(NAIVE)].itertuples():
        name = in_words(row.run).capitalize()
        above = models["low"] > row.high if better == "lower" else models["high"] < row.low
        if is_teacher.any() and above[is_teacher].all():
            lines.append(
                f"**{name} rank above the teacher: this metric alone is no evidence of quality.**"
            )
            above &= ~is_teacher
        where = [
            f"{'the ' if run == 'teacher' else ''}{model_label(next(rows.itertuples()))} at "
            f"{join_values(rows['steps'])} steps"
            for run, rows in models[above].groupby("run", sort=False)
        ]
        if where:
            lines.append(f"{name} rank above {', and above '.join(where)}.")
    return [" ".join(lines)] if lines else []


def _conditions(group: DataFrame) -> list[str]:
    """The conditions of a grid's numbers, and what its brackets say, if there are any."""
    text = describe_conditions(group)
    if "texts_half" in group and group["texts_half"].notna().any():
        text += " In brackets: the interval over the texts of one training, the median."
    return [text]


def _network_evaluations(rows: DataFrame) -> list[str]:
    """Network evaluations per sample: a grid, or a sentence if there is one per step."""
    rows = rows.dropna(subset="network_evaluations")
    if rows.empty:
        return []
    if (rows["network_evaluations"] == rows["steps"]).all():
        return ["There is one network evaluation per sampling step."]
    blank = {"low": None, "high": None, "texts_half": None}
    counts = rows.assign(value=rows["network_evaluations"], metric="evaluations", **blank)
    return ["### Network evaluations per sample", make_grid(counts, "steps", "sampling steps")]

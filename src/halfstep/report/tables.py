"""The tables: two functions each, from metric rows to the rows of the table, and to its Markdown.

Numbers taken under different conditions never share a column: `select_*` raises HalfstepError and
names the two models that differ. Published values (published.py) have rows and grids apart.
The rows of a table are complete and go to CSV. Markdown is for people and ends with the
conditions of measurement; trainings of one model share a cell (trainings.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pandas
from pandas import DataFrame

from halfstep.config import NAIVE
from halfstep.report.catalogue import TABLES
from halfstep.report.conditions import check_comparable, describe_conditions, join_values
from halfstep.report.frontier import (
    explain_readings,
    label_with_steps,
    point_cell,
    reading_cell,
    with_entropy,
)
from halfstep.report.grids import latency_cell, make_grid, model_label, round_number, value_cell
from halfstep.report.rows import LEVELS, baseline_name, sampled_rows
from halfstep.report.trainings import pool_trainings

SAMPLES = TABLES["steps"].metrics
OVER_TEMPERATURES = ("temperature", "temperature of the model")  # columns of a grid, its corner
# Of stories, whose number differs between models, or of fewer texts.
OF_OTHER_NUMBERS = (
    "consistent_share", "accepted_share", "distinct_stories", "fact_divergence",
)  # fmt: skip
BETTER = {
    "generative_perplexity": "lower",
    "sample_mauve": "higher",
    "consistent_share": "higher",
    "accepted_share": "higher",
    "distinct_stories": "higher",
    "fact_divergence": "lower",
    "distinct_2": "higher",
    "repetition": "lower",
    "sample_self_bleu": "lower",
}
LATENCY = "milliseconds to write, median ± farther bound (times faster than the fastest baseline)"
FRONTIER_SHARES = ("sampler", "weights", "draw_dtype")  # the same for all students
DEFAULT = "default"  # variant of the samples that are drawn as `sampling` says
STUDENTS_SHARE = ("sampler", "weights", "draw_dtype", "temperature")


def select_steps(table: DataFrame) -> DataFrame:
    """Measures of samples, for every model and step count.

    `vs_data_percent` is the difference from held-out text, measured in the same way.
    """
    table = _of_table("steps", table)
    students = sampled_rows(table)
    check_comparable(table, ("data",))
    check_comparable(students, STUDENTS_SHARE)
    for _, same in students.groupby("training_seed", dropna=False, sort=False):
        check_comparable(same, ("seed",))
    check_comparable(students[~students["metric"].isin(OF_OTHER_NUMBERS)], ("num_samples",))
    check_comparable(table[table["run"] == "baseline"], ("temperature",))
    key = ["teacher", "metric", "protocol", "judge"]
    known = table.assign(judge=table["judge"].astype(object).fillna(""))
    data = known[known["run"] == "data"].set_index(key)["value"]
    difference = []
    for *case, value in known[[*key, "value"]].itertuples(index=False):
        reference = data.get(tuple(case))
        difference.append(100 * (value / reference - 1) if reference else None)
    return table.assign(vs_data_percent=difference)


def select_variants(table: DataFrame) -> DataFrame:
    """Perplexity and entropy of the models that are drawn in several ways, by the way to draw.

    The column `variant` is `default` for the options of `sampling`, whose rows come first.
    """
    table = _of_table("variants", table)
    varied = table.loc[table["variant"].notna(), "model"]
    table = table[table["model"].isin(varied) | table["run"].isin(LEVELS)]
    table = table.assign(variant=table["variant"].fillna(DEFAULT))
    parts = [table[table["variant"] == DEFAULT]]
    parts += [mine for name, mine in table.groupby("variant", sort=False) if name != DEFAULT]
    for mine in parts:
        check_comparable(mine, ("data",), same_protocols=False)
        students = sampled_rows(mine)
        check_comparable(students, (*STUDENTS_SHARE, "num_samples"))
        for _, same in students.groupby("training_seed", dropna=False, sort=False):
            check_comparable(same, ("seed",))
    return pandas.concat(parts, ignore_index=True)


def select_temperatures(table: DataFrame) -> DataFrame:
    """Perplexity and entropy over temperatures, and perplexities at equal entropy."""
    table = _of_table("temperatures", table)
    check_comparable(table, ("data",))
    students = sampled_rows(table)
    check_comparable(students, (*FRONTIER_SHARES, "num_samples"))
    for _, same in students.groupby("training_seed", dropna=False, sort=False):
        check_comparable(same, ("seed",))
    check_comparable(table[table["metric"] == "perplexity_at_data_entropy"], ("at_entropy",))
    return table


def select_lambada(table: DataFrame) -> DataFrame:
    """Last words: accuracy and perplexity of every model by every protocol."""
    table = _of_table("lambada", table)
    students = table[table["run"] != "baseline"]
    check_comparable(table, ("data",), same_protocols=False)
    check_comparable(students, ("weights", "num_samples"), same_protocols=False)
    return table


def select_tasks(table: DataFrame) -> DataFrame:
    """Answers to tasks: every measure of every task, by every protocol."""
    return _select_examined("tasks", table, ("task", "measure"))


def select_zero_shot(table: DataFrame) -> DataFrame:
    """Zero-shot perplexity of every text."""
    return _select_examined("zero_shot", table, ("task",))


def select_speed(table: DataFrame) -> DataFrame:
    """Time to write, for every model, step count, length and batch size.

    `times_faster` is the latency of the fastest baseline at the same length and batch size,
    divided by the latency of the row.
    """
    table = _of_table("speed", table)
    check_comparable(table, ("device", "dtype"))
    check_comparable(table[table["run"] != "baseline"], ("draw_dtype",))
    key = ["teacher", "length", "batch_size"]
    fastest = table[table["run"] == "baseline"].groupby(key)["value"].min()
    ratios = []
    for *case, value in table[[*key, "value"]].itertuples(index=False):
        ratios.append(fastest[tuple(case)] / value if tuple(case) in fastest.index else None)
    return table.assign(times_faster=ratios)


def select_continuations(table: DataFrame) -> DataFrame:
    """Measures of continuations, for every model and step count.

    All numbers of a teacher are of the same prompts, lengths and number of texts.
    """
    table = _of_table("continuations", table)
    check_comparable(table, ("data", "num_samples", "length"))
    check_comparable(sampled_rows(table), STUDENTS_SHARE)
    check_comparable(table[table["run"] == "baseline"], ("temperature",))
    return table


def steps_markdown(table: DataFrame, metrics: Sequence[str] = tuple(SAMPLES)) -> str:
    """One grid for each teacher and metric: models down, step counts across."""
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: samples")
        for metric, protocol, judge, group in _by_metric(mine, metrics):
            title = f"### {SAMPLES[metric]} (protocol {protocol})"
            interval = " (the k-means' alone)" if metric == "sample_mauve" else ""
            parts.append(f"{title}{judge}, ± 95% interval{interval}")
            parts.append(make_grid(sampled_rows(group), "steps", "sampling steps"))
            parts += _levels(group)
            parts += _naive_warnings(group)
            parts += _conditions(group)
        parts += _network_calls(sampled_rows(mine[mine["metric"] == metrics[0]]))
    return "\n\n".join(parts) + "\n"


def variants_markdown(table: DataFrame) -> str:
    """One grid for each teacher, metric and way to draw: models down, step counts across."""
    titles = TABLES["variants"].metrics
    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
        parts.append(f"## {teacher}: samples drawn in several ways")
        for metric in titles:
            for variant, drawn in mine.groupby("variant", sort=False):
                pooled = pool_trainings(drawn)
                for _, protocol, judge, group in _by_metric(pooled, (metric,)):
                    about = f"{titles[metric]} (protocol {protocol}){judge}"
                    parts.append(f"### {variant}: {about}, ± 95% interval")
                    students = sampled_rows(group)
                    if len(students):
                        parts.append(make_grid(students, "steps", "sampling steps"))
                    parts += _levels(group)
                    parts += _conditions(group)
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


def tasks_markdown(table: DataFrame) -> str:
    """For each teacher one grid for each measure and protocol: models down, tasks across."""
    parts = []
    for teacher, mine in pool_trainings(table).groupby("teacher", sort=False):
        parts.append(f"## {teacher}: tasks of lm-eval")
        for (measure, protocol), group in mine.groupby(["measure", "protocol"], sort=False):
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
    """Grids for each teacher: lengths and batch sizes down, step counts and baselines across."""
    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
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
    return "\n\n".join(parts) + "\n"


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


def _select_examined(name: str, table: DataFrame, key: tuple[str, ...]) -> DataFrame:
    """The rows of a table with a column for each task or text."""
    table = _of_table(name, table)
    for _, rows in table.groupby(list(key), dropna=False, sort=False):
        check_comparable(rows, ("data",), same_protocols=False)
        students = rows[rows["run"] != "baseline"]
        check_comparable(students, ("weights",), same_protocols=False)
        for _, same in students.groupby("protocol", sort=False):
            check_comparable(same, ("network_evaluations",))
    return table


def _masks(rows: DataFrame) -> str:
    """A sentence on the number of masks by which the ELBO of a text is estimated, if it is."""
    bounds = rows[rows["protocol"] != "ar"]
    counts = sorted(bounds["network_evaluations"].dropna().unique())
    if not counts:
        return ""
    listed = join_values(f"{count:.4g}" for count in counts)
    return f"The ELBO of a text is estimated from {listed} masks on average."


def _of_table(name: str, rows: DataFrame) -> DataFrame:
    """The rows of a table's metrics; one table alone has the variants of samples."""
    rows = rows[rows["metric"].isin(TABLES[name].metrics.keys())]
    return rows if name == "variants" else rows[rows["variant"].isna()]


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
        values = [f"{row.run}: {cell(row)}" for row in levels.itertuples()]
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
        above = models["low"] > row.high if better == "lower" else models["high"] < row.low
        if is_teacher.any() and above[is_teacher].all():
            lines.append(
                f"**{row.run} ranks above the teacher: this metric alone is no evidence of "
                "quality.**"
            )
            above &= ~is_teacher
        where = [
            f"{'the ' if run == 'teacher' else ''}{model_label(next(rows.itertuples()))} at "
            f"{join_values(rows['steps'])} steps"
            for run, rows in models[above].groupby("run", sort=False)
        ]
        if where:
            lines.append(f"{row.run} ranks above {', and above '.join(where)}.")
    return [" ".join(lines)] if lines else []


def _conditions(group: DataFrame) -> list[str]:
    """The conditions of a grid's numbers, and what its brackets say, if there are any."""
    text = describe_conditions(group)
    if "texts_half" in group and group["texts_half"].notna().any():
        text += " In brackets: the interval over the texts of one training, the median."
    return [text]


def _network_calls(rows: DataFrame) -> list[str]:
    """How often the network is called per sample: a grid, or a sentence if once per step."""
    rows = rows.dropna(subset="network_evaluations")
    if rows.empty:
        return []
    if (rows["network_evaluations"] == rows["steps"]).all():
        return ["The network is called once per sampling step."]
    blank = {"low": None, "high": None, "texts_half": None}
    calls = rows.assign(value=rows["network_evaluations"], metric="calls", **blank)
    return ["### Calls of the network per sample", make_grid(calls, "steps", "sampling steps")]

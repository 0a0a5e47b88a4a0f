"""The tables: from metric rows to the rows of a table, one function each.

Numbers taken under different conditions never share a column: `select_*` raises HalfstepError and
names the two models that differ. The rows of a table are complete and go to CSV; markdown.py writes
them for people.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas
from pandas import DataFrame

from halfstep.report.catalogue import TABLES
from halfstep.report.conditions import check_comparable
from halfstep.report.rows import DEFAULT, LEVELS, WRITTEN, sampled_rows, usual_rows

# Of stories, whose number differs between models, or of fewer texts.
OF_OTHER_NUMBERS = (
    "sentence_share", "consistent_share", "accepted_share", "distinct_stories", "fact_divergence",
)  # fmt: skip
FRONTIER_SHARES = ("sampler", "weights", "draw_dtype")  # the same for all students
STUDENTS_SHARE = ("sampler", "weights", "draw_dtype", "temperature")


def select_steps(table: DataFrame) -> DataFrame:
    """Measures of samples, for every model and step count.

    `vs_data_percent` is the difference from held-out text, measured in the same way.
    """
    table = _of_table("steps", table)
    students = sampled_rows(table)
    check_comparable(table, ("data",))
    _check_draws(students, STUDENTS_SHARE)
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
    """Measures of the models that are drawn in several ways, by the way to draw.

    They are those of samples and, where there is a frontier, perplexities at the entropy of
    held-out text. The column `variant` is `default` for the options of `sampling`, whose rows come
    first.
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
        _check_draws(students, STUDENTS_SHARE)
        check_comparable(students[~students["metric"].isin(OF_OTHER_NUMBERS)], ("num_samples",))
    check_comparable(table[table["metric"] == "perplexity_at_data_entropy"], ("at_entropy",))
    return pandas.concat(parts, ignore_index=True)


def select_temperatures(table: DataFrame) -> DataFrame:
    """Perplexity and entropy over temperatures, and perplexities at equal entropy."""
    table = _of_table("temperatures", table)
    check_comparable(table, ("data",))
    _check_draws(sampled_rows(table), (*FRONTIER_SHARES, "num_samples"))
    check_comparable(table[table["metric"] == "perplexity_at_data_entropy"], ("at_entropy",))
    return table


def select_lambada(table: DataFrame) -> DataFrame:
    """Last words: accuracy and perplexity of every model by every protocol."""
    table = _of_table("lambada", table)
    students = table[table["run"] != "baseline"]
    check_comparable(table, ("data",), same_protocols=False)
    check_comparable(students, ("weights", "num_samples"), same_protocols=False)
    return table


def select_infilling(table: DataFrame) -> DataFrame:
    """Accuracy of filled-in positions and the area under it, by task and way to draw.

    The column `variant` is `default` for the options of `sampling`, whose rows come first.
    """
    table = _of_table("infilling", table)
    table = table.assign(variant=table["variant"].fillna(DEFAULT))
    for _, mine in table.groupby("task", sort=False):
        check_comparable(mine, ("data", "num_samples"), same_protocols=False)
        for _, drawn in mine.groupby("variant", sort=False):
            _check_draws(drawn, STUDENTS_SHARE)
    is_usual = table["variant"] == DEFAULT
    return pandas.concat([table[is_usual], table[~is_usual]], ignore_index=True)


def select_tasks(table: DataFrame) -> DataFrame:
    """Answers to tasks: every measure of every task, by every protocol, those that are written at
    every step count."""
    table = _select_examined("tasks", table, ("task", "measure"))
    for _, rows in table[table["protocol"] == WRITTEN].groupby(["task", "measure"], sort=False):
        _check_draws(sampled_rows(rows), STUDENTS_SHARE)
    return table


def select_zero_shot(table: DataFrame) -> DataFrame:
    """Zero-shot perplexity of every text."""
    return _select_examined("zero_shot", table, ("task",))


def select_speed(table: DataFrame) -> DataFrame:
    """Time to write, for every model, step count, length and batch size, and way to draw.

    `times_faster` is the latency of the fastest baseline at the same length and batch size,
    divided by the latency of the row. A variant is compared with the baselines that it took turns
    with, whose rows have its name.
    """
    table = _of_table("speed", table)
    check_comparable(table, ("device", "dtype"))
    usual = usual_rows(table)
    check_comparable(usual[usual["run"] != "baseline"], ("draw_dtype",))
    key = ["teacher", "variant", "length", "batch_size"]
    known = table.assign(variant=table["variant"].astype(object).fillna(""))
    fastest = known[known["run"] == "baseline"].groupby(key)["value"].min()
    ratios = []
    for *case, value in known[[*key, "value"]].itertuples(index=False):
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


def _select_examined(name: str, table: DataFrame, key: tuple[str, ...]) -> DataFrame:
    """The rows of a table with a column for each task or text."""
    table = _of_table(name, table)
    for _, rows in table.groupby(list(key), dropna=False, sort=False):
        check_comparable(rows, ("data",), same_protocols=False)
        students = rows[rows["run"] != "baseline"]
        check_comparable(students, ("weights",), same_protocols=False)
        read = students[students["protocol"] != WRITTEN]
        for _, same in read.groupby("protocol", sort=False):
            check_comparable(same, ("network_evaluations",))
    return table


def _check_draws(students: DataFrame, conditions: Sequence[str]) -> None:
    """HalfstepError unless the students were drawn alike, those of one training with one seed."""
    check_comparable(students, conditions)
    for _, same in students.groupby("training_seed", dropna=False, sort=False):
        check_comparable(same, ("seed",))


def _of_table(name: str, rows: DataFrame) -> DataFrame:
    """The rows of a table's metrics; some tables have those of variants of the draws."""
    rows = rows[rows["metric"].isin(TABLES[name].metrics.keys())]
    return rows if name in ("variants", "speed", "infilling") else usual_rows(rows)

"""Sentences of `halfstep summary`: what a table of steps says of each run, and which texts show it.

All numbers are of the first protocol and judge in the table, and stand with their 95% intervals.
With several trainings, each student is compared with the teacher of its training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pandas import DataFrame, Series

from halfstep.records.shapes import student_steps
from halfstep.report.grids import round_number
from halfstep.report.labels import in_words, name_model
from halfstep.report.trainings import paired_change

LAST_WORDS = {
    "lambada_accuracy": "accuracy of last words",
    "lambada_perplexity": "perplexity of last words",
}
END_OF_DOCUMENT = "<|endoftext|>"  # of our own tokenizers, in samples.txt
RATIO = "perplexity_ratio_at_equal_entropy"
SHARES = {
    "sentence_share": "sentences of the right form",
    "accepted_share": "stories that the grammar accepts",
    "consistent_share": "consistent stories",
}


class AtSteps(NamedTuple):
    """A run's last round and its teacher at the same number of sampling steps."""

    run: str
    steps: int
    teacher: Series
    student: Series


class Headline(NamedTuple):
    """A run's last round at the steps that make up for its teacher's best."""

    student: Series
    same_steps: Series
    """the teacher at the steps of the student"""
    best: Series
    """the teacher at the steps where its perplexity is lowest"""


def headlines(perplexity: DataFrame) -> list[Headline]:
    """For each run its last round at the fewest steps where it beats the teacher's best, clearly.

    Clearly means that their intervals do not overlap, or that the paired interval excludes zero.
    Else it is the fewest steps with a perplexity that is not higher, else the round's best steps.
    """
    found = []
    for pairs in _by_run(perplexity):
        best = _best(perplexity, pairs[0].teacher)
        clear = [
            pair for pair in pairs if compare_intervals(pair.student, best, "lower", "") == "lower"
        ]
        equal = [pair for pair in pairs if pair.student["value"] <= best["value"]]
        at_best = min(pairs, key=lambda pair: pair.student["value"])
        chosen = [*clear, *equal, at_best][0]
        found.append(Headline(chosen.student, chosen.teacher, best))
    return found


def _best(perplexity: DataFrame, teacher: Series) -> Series:
    """The row of this teacher with the lowest value."""
    rows = first_protocol(perplexity)
    mine = rows[rows["model"] == teacher["model"]]
    return mine.loc[mine["value"].idxmin()]


def headline_sentence(headline: Headline) -> str:
    """What a headline says: the student's few steps against its teacher's many."""
    student, best = headline.student, headline.best
    text = (
        f"{student['teacher']}: {_label(student)} with {_steps(student)} has perplexity "
        f"{with_interval(student)}, its teacher at its best, with {_steps(best)}, "
        f"{with_interval(best)}"
    )
    word = compare_intervals(student, best, "better", "not reached")
    if word == "not reached":
        return f"{text}: {word}"
    part = f"1/{best['steps'] / student['steps']:.3g} of the steps"
    ratio = _ratio_of_trainings(student, best)
    return f"{text}{ratio}: {word} with {part}{_evaluations(student, best)}"


def _ratio_of_trainings(student: Series, best: Series) -> str:
    """The mean ratio over pairs of the same training, where there are several."""
    change = paired_change(student, best)
    if change is None:
        return ""
    ratio, low, high = (f"{math.exp(x):.2f}" for x in change)
    return f", a ratio of {ratio} [{low}, {high}]"


def _evaluations(student: Series, best: Series) -> str:
    """Network evaluations, where they are known: (62.9 network evaluations against 163)"""
    mine, other = (row.get("network_evaluations") for row in (student, best))
    if mine is None or mine != mine:
        return ""
    return f" ({round_number(mine)} network evaluations against {round_number(other)})"


def lead_sentences(perplexity: DataFrame, frontier: DataFrame) -> list[str]:
    """What comes first of each run: its perplexity divided by its teacher's at equal entropy.

    It is that at the fewest steps with a clear gain, else with a clear loss, else at the fewest; a
    gain names the first loss, too. Where the frontier has no ratio, it is the headline.

    Args:
        perplexity: the rows of generative perplexity of one teacher
        frontier: its rows of the table `temperatures`; may be empty
    """
    perplexity = perplexity.assign(temperature=perplexity["temperature"].fillna(1))
    ratios = first_protocol(frontier[frontier["metric"] == RATIO]).dropna(subset="value")
    lines = []
    for headline in headlines(perplexity):
        student = headline.student
        mine = ratios[ratios["model"] == student["model"]].sort_values("steps")
        mine = mine[mine["temperature"].fillna(1) == student["temperature"]]
        if mine.empty:
            lines.append(headline_sentence(headline))
            continue
        gains, losses = mine[mine["high"] < 1], mine[mine["low"] > 1]
        row = next(rows.iloc[0] for rows in (gains, losses, mine) if len(rows))
        times = " times the perplexity of its teacher with as many steps ("
        text = (
            f"{row['teacher']}: at equal entropy, {_label(row)} with {_steps(row)} has "
            f"{_ratio(row).replace(' (', times, 1)}"
        )
        if len(gains) and len(losses):
            worst = losses.iloc[0]
            text += f", but with {_steps(worst)} {_ratio(worst)}"
        lines.append(text)
    return lines


def leads_by_teacher(steps: DataFrame, frontier: DataFrame) -> dict[str, list[str]]:
    """`lead_sentences` of every teacher, from the pooled tables `steps` and `temperatures`."""
    perplexity = steps[steps["metric"] == "generative_perplexity"]
    return {
        str(teacher): lead_sentences(mine, frontier[frontier["teacher"] == teacher])
        for teacher, mine in perplexity.groupby("teacher", sort=False)
    }


def equal_entropy(frontier: DataFrame, temperature: float) -> list[str]:
    """For each run: the last round's perplexity divided by its teacher's at the same entropy.

    The entropy is the student's at the temperature of the other tables. A ratio near 1 says that
    the teacher at a lower temperature writes as well.

    Args:
        frontier: the rows of the table `temperatures`
        temperature: that of the other tables
    """
    ratios = frontier[frontier["metric"] == RATIO]
    if ratios.empty:
        return []
    ratios = first_protocol(ratios)
    ratios = ratios[ratios["temperature"].fillna(1) == temperature]
    lines = []
    for _, group in ratios[ratios["round"] > 0].groupby("run", sort=False):
        last = group[group["round"] == group["round"].max()].sort_values("steps")
        found = [f"{_steps(row)}: {_ratio(row)}" for _, row in last.iterrows()]
        title = f"{last['teacher'].iloc[0]}, {_label(last.iloc[0])} at temperature {temperature:g}"
        lines.append("\n  ".join([f"{title}: perplexity / teacher's at equal entropy:", *found]))
    return lines


def _near_one(ratio: float) -> str:
    """A bound of a ratio: two decimals, and four where two would round it to 1: 0.62, 0.9954"""
    return f"{ratio:.2f}" if f"{ratio:.2f}" != "1.00" else f"{ratio:.4f}"


def _ratio(row: Series) -> str:
    """A ratio and what it means: 0.54 [0.47, 0.62] (a gain)"""
    if row["value"] != row["value"]:
        return "the teacher does not reach this entropy"
    low, high = ("open" if x != x else _near_one(x) for x in (row["low"], row["high"]))
    text = f"{row['value']:.2f} [{low}, {high}]"
    if row["high"] < 1:
        return f"{text} (a gain)"
    if row["high"] != row["high"]:
        return f"{text} (the teacher's curve ends too near for an interval)"
    if row["low"] > 1:
        return f"{text} (a loss: the teacher at a lower temperature writes better)"
    return f"{text} (no clear gain: the interval holds 1)"


def gains(perplexity: DataFrame, entropy: DataFrame) -> list[str]:
    """For each run: the last round against the teacher at every step count, with its entropy.

    Step counts without samples of the teacher come first; the round's own is one of them.
    """
    lines = []
    for pairs in _by_run(perplexity):
        title = pairs[0].student
        parts = [f"{title['teacher']}, {_label(title)} against its teacher:"]
        rows = first_protocol(perplexity)
        alone = rows[rows["model"] == title["model"]].sort_values("steps")
        for _, row in alone[~alone["steps"].isin([pair.steps for pair in pairs])].iterrows():
            text = f"{_steps(row)}: {with_interval(row)}, not sampled from the teacher"
            parts.append(text + _entropy(entropy, row["model"], row["steps"]))
        for _, steps, teacher, student in pairs:
            text = f"{_steps(student)}: {with_interval(teacher)} -> {with_interval(student)}"
            verdict = _times_lower(student, teacher)
            parts.append(f"{text} ({verdict}){_entropy(entropy, student['model'], steps)}")
        lines.append("\n  ".join(parts))
    return lines


def _times_lower(student: Series, teacher: Series) -> str:
    """How many times lower the student's value is, or that it is not.

    Of several trainings with the interval of that number over pairs of the same training.
    """
    word = compare_intervals(student, teacher, "lower", "higher")
    change = paired_change(student, teacher)
    if change is None:
        times = f"{teacher['value'] / student['value']:.2g} times "
        return times + word if word == "lower" else word
    mean, low, high = change
    times = f"{math.exp(-mean):.3g} [{math.exp(-high):.3g}, {math.exp(-low):.3g}] times lower"
    return times if word == "lower" else f"{times}: {word}"


def _entropy(entropy: DataFrame, model: str, steps: int) -> str:
    """The entropy of a model at a step count, against held-out text where that is known."""
    mine = entropy[(entropy["model"] == model) & (entropy["steps"] == steps)]
    if "vs_data_percent" not in mine or mine["vs_data_percent"].isna().all():
        return ""
    return f"; entropy {mine['vs_data_percent'].iloc[0]:+.1f}% against held-out text"


def own_steps(perplexity: DataFrame, results: Path) -> list[str]:
    """For each run: every round against its own teacher at the step count that it was made for."""
    rows = first_protocol(perplexity)
    at = {(row["model"], row["steps"]): row for _, row in rows.iterrows()}
    lines = []
    for (base, run), group in rows[rows["round"] > 0].groupby(["teacher", "run"], sort=False):
        found = []
        models = group.drop_duplicates("model").sort_values("round")
        for model, round_ in zip(models["model"], models["round"], strict=True):
            made_for = student_steps(results / "models" / model)
            before = f"{base}/{run}/round-{round_ - 1}" if round_ > 1 else f"{base}/teacher"
            teacher, student = at.get((before, made_for)), at.get((model, made_for))
            if teacher is not None and student is not None:
                word = compare_intervals(student, teacher, "better", "worse")
                found.append(
                    f"{made_for}: {with_interval(teacher)} -> {with_interval(student)} ({word})"
                )
        if found:
            title = "every round at its own step count, its teacher -> the round:"
            lines.append("\n  ".join([f"{base}, {in_words(run)}: {title}", *found]))
    return lines


def story_shares(table: DataFrame) -> list[str]:
    """What the grammar says of the last rounds' sentences and stories, for a corpus of stories.

    A sentence has the right form if the grammar has its pattern, at any place in the story. The
    grammar accepts a whole story; it is consistent if all references agree, too. Teacher and round
    are compared at the step count of the run's headline.
    """
    at = {
        (headline.student["run"]): headline.student["steps"]
        for headline in headlines(table[table["metric"] == "generative_perplexity"])
    }
    lines = []
    for metric, what in SHARES.items():
        for pairs in _by_run(table[table["metric"] == metric]):
            for run, steps, teacher, student in pairs:
                if at.get(run) == steps:
                    word = compare_intervals(student, teacher, "fewer", "more")
                    lines.append(
                        f"{student['teacher']}, {_steps(student)}, {what}: "
                        f"teacher {with_interval(teacher, percent=True)}, "
                        f"{_label(student)} {with_interval(student, percent=True)} ({word})"
                    )
    return lines


def last_word_verdicts(lambada: DataFrame) -> list[str]:
    """For each run of a teacher: last words of the last round and of the teacher.

    They are by the first protocol. lambada: the rows of one teacher in the table `lambada`.
    """
    lines = []
    for metric, what in LAST_WORDS.items():
        rows = lambada[(lambada["metric"] == metric) & (lambada["run"] != "baseline")]
        rows = rows[rows["protocol"] == rows["protocol"].iloc[0]] if len(rows) else rows
        for _, teacher in rows[rows["run"] == "teacher"].iterrows():
            for _, rounds in rows[rows["round"] > 0].groupby("run", sort=False):
                student = rounds.loc[rounds["round"].idxmax()]
                word = compare_intervals(student, teacher, "lower", "higher")
                lines.append(
                    f"{teacher['teacher']}, {what}: teacher {with_interval(teacher)}, "
                    f"{_label(student)} {with_interval(student)} ({word})"
                )
    return lines


def _by_run(rows: DataFrame) -> Iterator[list[AtSteps]]:
    """For each run of a teacher: its last round and the teacher at all common step counts."""
    if rows.empty:
        return
    rows = first_protocol(rows)
    teachers = {row["steps"]: row for _, row in rows[rows["run"] == "teacher"].iterrows()}
    for run, group in rows[rows["round"] > 0].groupby("run", sort=False):
        last = group[group["round"] == group["round"].max()].sort_values("steps")
        pairs = [
            AtSteps(run, row["steps"], teachers[row["steps"]], row)
            for _, row in last.iterrows()
            if row["steps"] in teachers
        ]
        if pairs:
            yield pairs


def first_protocol(rows: DataFrame) -> DataFrame:
    """The rows of the first protocol and judge among them."""
    if rows.empty:
        return rows
    key = rows["protocol"] + " " + rows["judge"].astype(object).fillna("")
    return rows[key == key.iloc[0]]


def compare_intervals(row: Series, other: Series, lower: str, higher: str) -> str:
    """How the interval of a row compares with another: one of the words, or that they overlap.

    Of several trainings, how their paired difference compares with zero.
    """
    if (change := paired_change(row, other)) is not None:
        _, low, high = change
        return lower if high < 0 else higher if low > 0 else "no clear difference"
    if row["high"] < other["low"]:
        return lower
    if row["low"] > other["high"]:
        return higher
    return "intervals overlap"


def _label(student: Series) -> str:
    return name_model(student["run"], student["round"])


def _steps(row: Series) -> str:
    """The steps of a row, with the tokens that each of them reveals: 64 steps (4 tokens each)."""
    steps, tokens = row["steps"], row["tokens_per_step"]
    text = f"{steps} step{'' if steps == 1 else 's'}"
    if tokens != tokens:  # not known
        return text
    return f"{text} ({tokens:.3g} token{'' if tokens == 1 else 's'} each)"


def with_interval(row: Series, percent: bool = False) -> str:
    """The value and its interval, if it has one: 21.4 [20.5, 22.3]"""
    numbers = [row["value"], row["low"], row["high"]]
    if percent:
        value, low, high = (f"{round_number(100 * number)}%" for number in numbers)
    else:
        value, low, high = (round_number(number) for number in numbers)
    return value if row["low"] != row["low"] else f"{value} [{low}, {high}]"


def sample_text(file: Path, number: int, characters: int = 900) -> str | None:
    """Text `number` of samples.txt, in which a line `=== i` precedes each; None without it.

    A text is cut from the middle of a stream of documents. Those that begin within it are shown,
    each with a blank line before the next; one without a second whole document is shown as it is.
    """
    if not file.exists():
        return None
    parts = re.split(r"^=== .*\n", file.read_text(errors="replace"), flags=re.MULTILINE)[1:]
    if number >= len(parts):
        return None
    text = parts[number].strip()
    documents = [part.strip() for part in text.split(END_OF_DOCUMENT) if part.strip()]
    if len(documents) > 2:
        text = "\n\n".join(documents[1:])
    if len(text) <= characters:
        return text
    return text[:characters].rsplit(" ", 1)[0] + " …"

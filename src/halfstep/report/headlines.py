"""Titles of figures: a sentence on what a figure shows, with numbers that its table holds.

Where intervals overlap the sentence says so. Where rows are missing it only names what is drawn.
Of several teachers and runs it is about the first, and names it. Functions return the sentence.
"""

from __future__ import annotations

import pandas
from pandas import DataFrame, Series

from halfstep.report.decoders import APART
from halfstep.report.grids import round_number
from halfstep.report.labels import in_words
from halfstep.report.rows import DEFAULT, sampled_rows
from halfstep.report.sentences import (
    compare_intervals,
    first_protocol,
    headlines,
    with_interval,
)

UNCLEAR = "no clear difference"
BAND = 5.0  # percent around the entropy of held-out text


def title_of_perplexity(rows: DataFrame) -> str:
    """The fewest steps with which a last round is as good as its teacher at its best."""
    found = headlines(_one_teacher(rows))
    if not found:
        return _from_first_to_last(rows, "generative perplexity")
    student, best = found[0].student, found[0].best
    name, steps, many = _who(student, rows), _number(student["steps"]), _number(best["steps"])
    mine, other = with_interval(student), with_interval(best)
    word = compare_intervals(student, best, "lower", "higher")
    if word == "lower":
        return (
            f"{name} with {steps} steps beats its teacher at its best, with {many}: "
            f"perplexity {mine} against {other}"
        )
    end = "its teacher's best is not reached" if word == "higher" else UNCLEAR
    return (
        f"{name} with {steps} steps has perplexity {mine}, its teacher at its best, with {many}, "
        f"{other}: {end}"
    )


def title_of_entropy(rows: DataFrame) -> str:
    """How far a last round is from the entropy of held-out text where it is farthest."""
    mine = _one_teacher(rows)
    data, last = mine[mine["run"] == "data"], _last_round(mine)
    if data.empty or last.empty:
        return _from_first_to_last(rows, "entropy")
    percent = 100 * (last["value"] / data["value"].iloc[-1] - 1)
    inside = last[percent.abs() <= BAND]
    kept = ""
    if len(inside):
        far = percent[inside.index].abs().max()
        first, end = inside["steps"].min(), inside["steps"].max()
        span = f"from {_number(first)} to {_number(end)} steps"
        if len(inside) == 1:
            span = f"at {_number(first)} steps"
        elif last["steps"].between(first, end).sum() > len(inside):
            span = f"at {len(inside)} of {len(last)} step counts"
        kept = f"within {far:.1f}% {span}"
    if len(inside) == len(last):
        return f"{_who(last.iloc[0], rows)} keeps the entropy of held-out text {kept}"
    worst = percent.abs().idxmax()
    side = "below" if percent[worst] < 0 else "above"
    name, steps = _who(last.iloc[0], rows, False), _number(last.loc[worst, "steps"])
    far = f"{abs(percent[worst]):.1f}% {side} that of held-out text"
    text = f"At {steps} steps the entropy of {name} is {far}"
    return f"{text}; it is {kept}" if kept else text


def title_of_variants(table: DataFrame) -> str:
    """What a variant of drawing changes of the last round, where it changes most."""
    rows = first_protocol(_one_teacher(table[table["metric"] == "generative_perplexity"]))
    last = _last_round(rows)
    last = last if len(last) else sampled_rows(rows)
    usual = last[last["variant"] == DEFAULT].set_index("steps")
    others = last[(last["variant"] != DEFAULT) & last["steps"].isin(usual.index)]
    if others.empty:
        return _from_first_to_last(rows, "generative perplexity")
    change = others["value"] / usual.loc[others["steps"], "value"].to_numpy()
    row = others.loc[(change - 1).abs().idxmax()]
    before = usual.loc[row["steps"]]
    text = (
        f"Drawn as {row['variant']}, {_who(row, table, False)} with {_number(row['steps'])} steps "
        f"has perplexity {with_interval(row)} instead of {with_interval(before)}"
    )
    word = compare_intervals(row, before, "", "")
    entropies = _entropies(table, row)
    return f"{text}{entropies}" + (f": {UNCLEAR}" if word else "")


def title_of_decoders(rows: DataFrame) -> str:
    """The fewest network evaluations with which a way to draw is as good as the default's best.

    Drafts have the law of the autoregressive model, so the title says that it decides over them.
    A way to draw is not as good if its entropy is more than 2% below. The default draws count with
    the fewest evaluations with which they are as good as at their best. `rows` have costs
    (decoders.py).
    """
    mine = first_protocol(_one_teacher(rows))
    last = _last_round(mine)
    last = last if len(last) else mine
    usual = last[last["variant"] == DEFAULT]
    if usual.empty:
        return _from_first_to_last(mine, "generative perplexity")
    best = usual.loc[usual["value"].idxmin()]
    words = last.apply(compare_intervals, axis=1, args=(best, "lower", "higher"))
    is_varied = last["entropy"].isna() | (last["entropy"] >= (1 - APART) * best["entropy"])
    good = last[(words != "higher") & is_varied].sort_values("network_evaluations", kind="stable")
    row, other = good.iloc[0], good[good["variant"] == DEFAULT].iloc[0]
    name = _who(row, rows, False)
    if row["variant"] == DEFAULT:
        return (
            f"No other way to draw lets {name} write as well with fewer network evaluations than "
            f"by default: perplexity {with_interval(row)} with {_cost(row)} a text"
        )
    verdict = compare_intervals(row, other, "lower", "higher")
    drafted = str(row["sampler"]).startswith("speculative(")
    law = ", accepted or corrected by the autoregressive model" if drafted else ""
    return (
        f"Drawn as {in_words(row['variant'])}{law}, {name} has perplexity {with_interval(row)} "
        f"with {_cost(row)} a text, by default {with_interval(other)} with {_cost(other)}"
        + ("" if verdict in ("lower", "higher") else f": {UNCLEAR}")
    )


def title_of_infilling(table: DataFrame) -> str:
    """The mean accuracy of a last round in held-out text: of its best way to draw and by default.

    Without other ways to draw it is compared with its teacher. `table` has one protocol a task.
    """
    areas = table[
        (table["metric"] == "accuracy_under_parallelism") & (table["task"] == "infilling")
    ]
    areas = _one_teacher(areas[areas["value"].notna()])
    last = _last_round(areas)
    last = last if len(last) else areas
    usual, others = last[last["variant"] == DEFAULT], last[last["variant"] != DEFAULT]
    teacher = areas[(areas["run"] == "teacher") & (areas["variant"] == DEFAULT)]
    if len(usual) and len(others):
        row, other = others.loc[others["value"].idxmax()], usual.iloc[0]
        drawn, against = f", drawn as {in_words(row['variant'])},", "by default"
    elif len(teacher) and len(usual) and usual.iloc[0]["round"]:
        row, other, drawn, against = usual.iloc[0], teacher.iloc[0], "", "its teacher"
    else:
        return "Accuracy of filled-in positions against tokens per forward"
    what = "stories" if row["protocol"] == "grammar" else "masked tokens"
    text = (
        f"On average from one token a pass to all at once, {_who(row, table, False)}{drawn} "
        f"fills in {with_interval(row)} of the {what} right, {against} {with_interval(other)}"
    )
    verdict = compare_intervals(row, other, "below", "above")
    return text if verdict in ("below", "above") else f"{text}: {UNCLEAR}"


def _cost(row: Series) -> str:
    """The passes of a text, those of an autoregressive model too, if the sampler asks one."""
    text = f"{round_number(row['network_evaluations'])} network evaluations"
    if pandas.isna(row["autoregressive_passes"]):
        return text
    return f"{text} and {round_number(row['autoregressive_passes'])} autoregressive passes"


def _entropies(table: DataFrame, row: Series) -> str:
    """The entropies of a row of a variant and of the default draws, where both are known."""
    entropy = table[(table["metric"] == "entropy") & (table["model"] == row["model"])]
    entropy = entropy[entropy["steps"] == row["steps"]].set_index("variant")["value"]
    if not {row["variant"], DEFAULT} <= set(entropy.index):
        return ""
    mine, other = round_number(entropy[row["variant"]]), round_number(entropy[DEFAULT])
    return f", entropy {mine} instead of {other} nats"


def equal_entropy_ratios(table: DataFrame) -> DataFrame:
    """The last round's perplexity divided by its teacher's at equal entropy, by step count.

    They are of the first teacher and run, at the temperature nearest to 1.
    """
    ratios = table[table["metric"] == "perplexity_ratio_at_equal_entropy"]
    if ratios.empty:
        return ratios
    ratios = first_protocol(ratios)
    distance = (ratios["temperature"].astype(float).fillna(1.0) - 1).abs()
    return _last_round(ratios[distance == distance.min()])


def title_of_frontier(table: DataFrame) -> str:
    """A student's perplexity divided by its teacher's at equal entropy, at the fewest steps.

    A clear gain comes before a clear loss, and this before what is not clear.
    """
    ratios = equal_entropy_ratios(table)
    known = ratios[ratios["value"].notna()] if len(ratios) else ratios
    if known.empty:
        end = "the teacher reaches the entropy of no student" if len(ratios) else ""
        text = "Perplexity against entropy over temperatures"
        return f"{text}: {end}" if end else text
    gains, losses = known[known["high"] < 1], known[known["low"] > 1]
    rows = next(part for part in (gains, losses, known) if len(part))
    row = rows.loc[rows["steps"].idxmin()]
    tokens = row["tokens_per_step"]
    at = f"At {_number(row['steps'])} steps"
    if not pandas.isna(tokens):
        at = f"At {tokens:.3g} token{'' if tokens == 1 else 's'} a step"
    name = _who(row, sampled_rows(table), False)
    of = "times" if rows is losses else "of"
    text = f"{at}, {name} has {ratio_text(row)} {of} its teacher's perplexity at equal entropy"
    if len(gains) and len(losses):
        worst = losses.loc[losses["steps"].idxmin()]
        return f"{text}, but {ratio_text(worst)} at {_number(worst['steps'])} steps"
    return f"{text}: {UNCLEAR}" if rows is known else text


def ratio_text(row: Series) -> str:
    """A ratio and its interval: 0.68 [0.56, 0.80]"""
    low, high = ("open" if pandas.isna(x) else f"{x:.2f}" for x in (row["low"], row["high"]))
    return f"{row['value']:.2f} [{low}, {high}]"


def title_of_best(rows: DataFrame, what: str) -> str:
    """The step count where a last round has its highest value, and its teacher with as many."""
    mine = _one_teacher(rows)
    last, teacher = _last_round(mine), mine[mine["run"] == "teacher"].set_index("steps")
    last = last[last["steps"].isin(teacher.index)]
    if last.empty:
        return _from_first_to_last(rows, what)
    row = last.loc[last["value"].idxmax()]
    other = teacher.loc[row["steps"]]
    text = f"{_who(row, rows)} is best with {_number(row['steps'])} steps: {what}"
    mine, theirs = with_interval(row), f"its teacher's {with_interval(other)}"
    word = compare_intervals(row, other, "below", "above")
    if word in ("below", "above"):
        return f"{text} {mine}, {word} {theirs}"
    return f"{text} {mine}, {theirs}, {UNCLEAR}"


def title_of_last_words(table: DataFrame) -> str:
    """The accuracy of last words before and after all rounds; without it, the perplexity."""
    models = _one_teacher(table[table["run"] != "baseline"])
    for metric in ("lambada_accuracy", "lambada_perplexity"):
        rows = models[models["metric"] == metric]
        chosen = [name for name in ("parallel", "elbo-exact") if name in set(rows["protocol"])]
        rows = rows[rows["protocol"] == chosen[0]] if chosen else rows
        rows = first_protocol(rows)
        last, teacher = _last_round(rows), rows[rows["run"] == "teacher"]
        if len(last) and len(teacher):
            row, other = last.iloc[0], teacher.iloc[0]
            what = f"The {metric.removeprefix('lambada_')} of last words"
            before, after = with_interval(other), with_interval(row)
            name = _who(row, table[table["run"] != "baseline"], False)
            verb = compare_intervals(row, other, "falls", "rises")
            if verb in ("falls", "rises"):
                return f"{what} {verb} from {before} for the teacher to {after} for {name}"
            return f"{what} is {before} for the teacher and {after} for {name}: {UNCLEAR}"
    return "Last words (LAMBADA) of the models"


def _one_teacher(rows: DataFrame) -> DataFrame:
    """The rows of the first teacher that has rounds, or of the first one."""
    students = rows[rows["round"] > 0]
    first = (students if len(students) else rows)["teacher"].head(1)
    return rows[rows["teacher"].isin(first)]


def _last_round(rows: DataFrame) -> DataFrame:
    """The rows of the first teacher and run with rounds, in its last round."""
    students = sampled_rows(rows)
    students = students[students["round"] > 0]
    if students.empty:
        return students
    first = students.iloc[0]
    mine = students[(students["teacher"] == first["teacher"]) & (students["run"] == first["run"])]
    return mine[mine["round"] == mine["round"].max()]


def _who(row: Series, rows: DataFrame, starts: bool = True) -> str:
    """What a model is called in a sentence: round 7, with its run and teacher if there are more."""
    students = rows[rows["round"] > 0]
    name = f"round {row['round']}" if row["round"] else "the teacher"
    if row["round"] and students["run"].nunique() > 1:
        name += f" of {in_words(row['run'])}"
    if rows["teacher"].nunique() > 1:
        name += f" ({row['teacher']})"
    return name[0].upper() + name[1:] if starts else name


def _from_first_to_last(rows: DataFrame, what: str) -> str:
    """What the teacher's curve does, where no round can be compared."""
    teacher = _one_teacher(rows)
    teacher = first_protocol(teacher[teacher["run"] == "teacher"].sort_values("steps"))
    if len(teacher) < 2:
        return f"{what[0].upper()}{what[1:]} against sampling steps"
    first, last = teacher.iloc[0], teacher.iloc[-1]
    return (
        f"The teacher's {what} is {with_interval(first)} with {_number(first['steps'])} "
        f"steps and {with_interval(last)} with {_number(last['steps'])}"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}"

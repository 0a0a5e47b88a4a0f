"""Conditions of measurement: which rows may share a column, and a sentence that names them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas
from pandas import DataFrame, Series

from halfstep.errors import HalfstepError
from halfstep.report.rows import networks_rows, sampled_rows

USUAL = "ancestral"  # the sampler that a figure does not mention
MEASURE = (
    "variant", "metric", "task", "measure", "protocol", "judge", "steps", "temperature", "length",
    "batch_size", "sampler",
)  # fmt: skip
"""The columns that say what was measured of a model."""


def check_comparable(
    table: DataFrame, conditions: Sequence[str], same_protocols: bool = True
) -> None:
    """Refuse a table in which numbers of one column were measured under different conditions.

    The precision of all networks is always one of them; rows of older results have none, which
    counts as float32.

    Args:
        table: metric rows
        conditions: columns that must be constant for each teacher and metric
        same_protocols: whether all models must be measured by the same protocols and judges; False
            where every protocol has its own column

    Raises:
        HalfstepError: two models differ, or one measure of a model is there twice
    """
    table = table.assign(
        temperature=table["temperature"].astype(float).fillna(1.0),
        precision=table["precision"].astype(object).fillna("float32"),
    )
    check_unique(table)
    for (teacher, metric), group in table.groupby(["teacher", "metric"], sort=False):
        for condition in conditions:
            _check_constant(_of_choice(group, condition), metric, condition, condition)
        _check_constant(networks_rows(group), metric, "precision", "precision")
        for protocol, rows in group.groupby("protocol", sort=False):
            _check_constant(rows, metric, "version", f"version of protocol {protocol}")
        if same_protocols:
            _check_protocols(group, teacher, metric)


def _of_choice(group: DataFrame, condition: str) -> DataFrame:
    """The rows whose condition was chosen here: published weights are the only ones of a model."""
    if condition != "weights":
        return group
    return group[~group["weights"].astype(str).str.startswith("published")]


def check_unique(table: DataFrame) -> None:
    """HalfstepError if two rows would be one cell: the same measure of a model, taken twice."""
    key = ["model", "teacher", *MEASURE]
    repeated = table[table.duplicated(key, keep=False)]
    if repeated.empty:
        return
    _, rows = next(iter(repeated.groupby(key, dropna=False, sort=False)))
    row = rows.iloc[0]
    steps = "" if pandas.isna(row["steps"]) else f" at {row['steps']} steps"
    raise HalfstepError(
        f"{row['metric']} of {row['model']} by protocol {row['protocol']}{steps}: "
        f"found {len(rows)} times (checkpoints {join_values(rows['checkpoint'])}; "
        f"seeds {join_values(rows['seed'])}); give --metrics one file of each measurement"
    )


def _check_constant(group: DataFrame, metric: str, column: str, called: str) -> None:
    distinct = group.drop_duplicates(column)
    if len(distinct) < 2:
        return
    models = distinct["model"].tolist()
    values = distinct[column].astype(object).where(distinct[column].notna(), "none").tolist()
    raise HalfstepError(
        f"{metric} of {models[0]} has {called} {values[0]}, that of {models[1]} has {values[1]}: "
        "these numbers do not belong in one column; measure both alike"
    )


def _check_protocols(group: DataFrame, teacher: str, metric: str) -> None:
    """All models of the group are measured by the protocols and judges of the first one."""
    models = group.groupby("model", sort=False, dropna=False)
    found = {model: "; ".join(sorted(set(_protocols(rows)))) for model, rows in models}
    one = next(iter(found))
    for two in found:
        if found[two] != found[one]:
            raise HalfstepError(
                f"{metric} of {one} is by {found[one]}, that of {two} by {found[two]}: "
                f"these numbers do not belong in one column; measure all of {teacher} alike"
            )


def _protocols(rows: DataFrame) -> list[str]:
    """The protocol of every row, and its judge with the precision of that judge, if any."""
    columns = rows[["protocol", "judge", "judge_dtype"]].astype(object).fillna("")
    found = []
    for protocol, judge, dtype in columns.itertuples(index=False):
        name = f"protocol {protocol or 'none'}"
        found.append(f"{name}, judge {f'{judge} {dtype}'.strip()}" if judge else name)
    return found


def describe_commits(table: DataFrame) -> str | None:
    """A warning where the rows come from several commits, or from one with changed files."""
    found = sorted(table["commit"].dropna().unique())
    if len(found) > 1:
        what = "of more than one commit"
    elif found and found[0].endswith("+dirty"):
        what = "of a working tree that differs from its commit"
    else:
        return None
    counts = [f"{commit}: {(table['commit'] == commit).sum()}" for commit in found]
    listed = "; ".join(f"{count} of {len(table)} rows" for count in counts)
    return (
        f"These numbers are {what} ({listed}); "
        "make them anew where the code between may have changed them."
    )


def describe_conditions(table: DataFrame) -> str:
    """A sentence on how the numbers of a table were taken: judge, protocol, data, sampler, seed."""
    students = sampled_rows(table)
    named = {
        "judge": _judges(table),
        "protocol": _versions(table),
        "data": table["data"],
        "sampler": students["sampler"],
        "draws": students["draw_dtype"],
        "precision": students["precision"],
        "temperature": students["temperature"],
        "top-p of the baseline": table.loc[table["run"] == "baseline", "top_p"],
        "n": _range(table["num_samples"]),
        "seed": table["seed"],
        "weights": students["weights"],
        "commit": table["commit"],
    }
    listed = {name: join_values(values) for name, values in named.items()}
    text = "; ".join(f"{name} {values}" for name, values in listed.items() if values) + "."
    return text[0].upper() + text[1:] + _trainings(table)


def explain_conditions(table: DataFrame) -> str:
    """What a reader of a figure must know of its rows, in plain sentences without checksums."""
    students = sampled_rows(table)
    trainings = table.get("trainings", Series(dtype=float)).dropna().astype(int)
    what = f"{_texts(students if len(students) else table)} a point"
    if len(trainings):
        what = f"Means over {join_values(sorted(set(trainings)))} trainings, {what}"
    sentences = [what]
    judges = [str(judge) for judge in dict.fromkeys(table["judge"].dropna())]
    if judges:
        names = [_judge_in_words(judge) for judge in judges]
        sentences.append(f"Measured with {' and '.join(dict.fromkeys(names))}")
    samplers = [name for name in dict.fromkeys(students["sampler"].dropna()) if name != USUAL]
    if samplers:
        sentences.append(f"Sampler {join_values(samplers)}".replace("_", " "))
    return ". ".join([*sentences, "All conditions are in the CSV."])


def _texts(rows: DataFrame) -> str:
    counts = sorted(set(rows["num_samples"].dropna().astype(int)))
    asked = rows["metric"].astype(str).str.match("lambada|task_score").any()
    unit = "questions" if asked else "texts"
    numbers = f"{counts[0]:,}" if counts else "an unknown number of"
    if len(counts) > 1:
        numbers += f" to {counts[-1]:,}"
    return f"{numbers} {unit}"


def _judge_in_words(judge: str) -> str:
    name = judge.partition("@")[0].removesuffix("/hf").rpartition("/")[2]
    return "the autoregressive model of the same corpus" if name == "baseline" else name


def _trainings(table: DataFrame) -> str:
    """A sentence on the rows of several trainings, if there are any."""
    counts = table.get("trainings", Series(dtype=float)).dropna().astype(int)
    if counts.empty:
        return ""
    return (
        f" Models with {join_values(sorted(counts))} trainings: mean and 95% t-interval over "
        "trainings, each with its own training and sampling seed; perplexities have the geometric "
        "mean."
    )


def _judges(table: DataFrame) -> list[str]:
    judges = table[["judge", "judge_dtype"]].dropna(subset="judge").drop_duplicates()
    return [
        f"{judge} ({dtype})" if isinstance(dtype, str) else judge
        for judge, dtype in judges.itertuples(index=False)
    ]


def _versions(table: DataFrame) -> list[str]:
    protocols = table[["protocol", "version"]].drop_duplicates()
    return [f"{protocol} v{version}" for protocol, version in protocols.itertuples(index=False)]


def _range(values: Series) -> list:
    """The distinct values, or the smallest and the largest of more than three."""
    found = sorted(set(values.dropna()))
    return found if len(found) < 4 else [f"{found[0]:,} to {found[-1]:,}"]


def join_values(values: Iterable) -> str:
    """The distinct values that are not missing, in their order, with commas between."""
    return ", ".join(str(value) for value in dict.fromkeys(values) if not pandas.isna(value))

"""Metric rows: their columns, and how they are read from JSON files and from tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas
from pandas import DataFrame, Series

from halfstep.config import NAIVE
from halfstep.errors import HalfstepError, reason
from halfstep.files import open_file
from halfstep.records.shapes import metric_rows

COLUMNS = (
    "teacher", "run", "round", "training_seed", "model", "variant", "metric", "task", "measure",
    "protocol", "version", "steps", "student_steps",
    "tokens_per_step", "network_evaluations", "autoregressive_passes", "value", "low", "high",
    "median_text", "judge", "judge_dtype", "data", "sampler", "num_samples", "seed", "weights",
    "draw_dtype", "precision", "temperature", "top_p", "length", "batch_size", "bounds", "cache",
    "tokens_per_s", "tokens_per_forward", "tokens_per_verification", "energy_j", "device", "dtype",
    "params", "at_entropy", "reached", "checkpoint", "commit", "source",
)  # fmt: skip
INTEGERS = (
    "round", "training_seed", "version", "steps", "student_steps", "median_text", "num_samples",
    "seed", "length", "batch_size", "params",
)  # fmt: skip
FLOATS = {
    "value", "low", "high", "tokens_per_step", "network_evaluations",
    "autoregressive_passes", "temperature", "tokens_per_s", "tokens_per_verification", "at_entropy",
}  # fmt: skip
# within a teacher and run
ORDER = (
    "round", "variant", "metric", "task", "measure", "protocol", "length", "batch_size", "steps",
    "temperature",
)  # fmt: skip
LEVELS = ("baseline", "data")  # runs without sampling steps: levels to compare with
WITHOUT_STEPS = (*LEVELS, *NAIVE)  # all runs without sampling steps
WRITTEN = "written"  # protocol of answers that a model writes (metrics/answers.py)
DEFAULT = "default"  # variant of the samples that are drawn as `sampling` says
BASELINES: dict[object, str] = {  # sampler of the speed table: name of the baseline
    "transformers": "baseline, transformers",
    "vllm": "baseline, vLLM",
}


def row_files(paths: Iterable[Path]) -> list[Path]:
    """These files, and the .json files in these folders, without records of provenance."""
    files = []
    for path in map(Path, paths):
        files += sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return [file for file in files if not file.name.endswith("provenance.json")]


def read_rows(paths: Iterable[Path]) -> DataFrame:
    """All metric rows of these files and folders, one row of the frame for each.

    Raises:
        HalfstepError: a file is missing or holds no list of metric rows
    """
    found = [row for file in row_files(paths) for row in metric_rows(file)]
    return tidy(DataFrame(found))


def read_table(file: Path) -> DataFrame:
    """The rows of a CSV file that `halfstep tabulate` wrote.

    Raises:
        HalfstepError: the file is missing or no such table
    """
    try:
        dtypes = {"seed": "Int64", "checkpoint": str, "commit": str}
        with open_file(file) as opened:  # pandas would download what looks like a URL
            table = pandas.read_csv(opened, dtype=dtypes)
        return tidy(_with_numbers(table))
    except FileNotFoundError:
        raise HalfstepError(f"{file}: no such table; make it with halfstep tabulate") from None
    except HalfstepError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise HalfstepError(
            f"{file}: not a table of halfstep tabulate ({reason(error)}); make it again"
        ) from None


def _with_numbers(table: DataFrame) -> DataFrame:
    """The table; ValueError if a column that it needs is missing or has no numbers in it."""
    missing = {"metric", "model", "value", "teacher", "run", "protocol"} - set(table.columns)
    if missing and len(table):
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    for column in FLOATS & set(table.columns):
        table[column] = pandas.to_numeric(table[column])
    return table


def tidy(frame: DataFrame) -> DataFrame:
    """The same rows with all COLUMNS, integer types and a stable order; extra columns come last."""
    extra = [column for column in frame.columns if column not in COLUMNS]
    frame = frame.reindex(columns=[*COLUMNS, *extra])
    for column in INTEGERS:
        frame[column] = frame[column].astype("Int64")
    frame["round"] = frame["round"].fillna(0)
    ranks = {"teacher": 0, **{run: 2 + i for i, run in enumerate(WITHOUT_STEPS)}}
    frame["rank"] = frame["run"].map(ranks).fillna(1)
    order = ["teacher", "rank", "run", *ORDER]
    frame = frame.sort_values(order, kind="stable", ignore_index=True, key=_filled_temperature)
    return frame.drop(columns="rank")


def _filled_temperature(column: Series) -> Series:
    """The column; 1 for a temperature that is missing."""
    return column.astype(float).fillna(1.0) if column.name == "temperature" else column


def keep_rows(table: DataFrame, where: Iterable[str]) -> DataFrame:
    """The rows with these values, each given as `column=value,value`.

    Of `run`, the teacher, the baseline and held-out text always stay, because runs are compared
    with them.

    Raises:
        HalfstepError: no such form, or no such column
    """
    for text in where:
        column, equals, values = text.partition("=")
        if not equals or column not in COLUMNS:
            raise HalfstepError(
                f"where: found {text!r}, expected column=value,value with one of the columns "
                f"{', '.join(COLUMNS)}; correct it"
            )
        wanted = set(values.split(","))
        if column == "run":
            wanted |= {"teacher", *LEVELS}
        table = table[table[column].astype(str).isin(wanted)]
    return table


def sampled_rows(table: DataFrame) -> DataFrame:
    """The rows of models that write in sampling steps: no baselines and no naive samplers."""
    return table[~table["run"].isin(WITHOUT_STEPS)]


def usual_rows(table: DataFrame) -> DataFrame:
    """The rows without those of variants: other ways to draw, and the baselines timed with them."""
    return table[table["variant"].isna()]


def networks_rows(table: DataFrame) -> DataFrame:
    """The rows of texts that a network wrote: no held-out text and no naive samplers."""
    return table[~table["run"].isin(("data", *NAIVE))]


def baseline_name(sampler: object) -> str:
    """What a baseline of the speed table is called; ours has no suffix, also in older rows."""
    return BASELINES.get(sampler, "baseline")

"""Repeated trainings: the mean of a measure over the trainings of a model, and its interval."""

from __future__ import annotations

import numpy
import pandas
from pandas import DataFrame, Series

from halfstep.report.conditions import MEASURE, join_values

CELL = ("teacher", "run", "round", *MEASURE)  # what the trainings of a model have in common
MEANS = (
    "network_evaluations",
    "autoregressive_passes",
    "tokens_per_forward",
    "vs_data_percent",
    "entropy",
)  # other columns of which the mean is shown


def mean_interval(values: numpy.ndarray) -> tuple[float, float, float]:
    """The mean of values[n], n > 1, and its 95% t-interval (Student 1908): mean, low, high.

    mean -+ t s / sqrt(n), with s^2 = sum (x - mean)^2 / (n - 1) and t the 97.5% point of Student's
    distribution with n - 1 degrees of freedom.
    """
    from scipy.special import stdtrit  # half a second, which tables of one training do not need

    n, mean = len(values), float(values.mean())
    half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1)) / n**0.5
    return mean, mean - half, mean + half


def pool_trainings(table: DataFrame) -> DataFrame:
    """The table with one row for all trainings of a model; without repeats the table itself.

    Such a row holds the mean over trainings and its t-interval, computed from logarithms where the
    metric is a perplexity. `trainings` is their number, and `texts_half` the half-width of the
    interval over texts: the median over trainings. `by_training` holds the value of each training
    by its seed (0: the first), so that models of the same trainings can be compared in pairs. Other
    columns are those of the first training. A model with one training keeps its interval over
    texts.
    """
    if table["training_seed"].isna().all():
        return table
    is_first = ~table.duplicated(list(CELL))
    pooled = table[is_first].assign(
        training_seed=pandas.NA, trainings=numpy.nan, texts_half=numpy.nan, by_training=None
    )
    cells = table.groupby(list(CELL), dropna=False, sort=False)
    for place, (_, rows) in zip(pooled.index, cells, strict=True):
        if len(rows) > 1:
            for column, value in _over_trainings(rows).items():
                pooled.at[place, column] = value
    return pooled.reset_index(drop=True)


def paired_change(row: Series, other: Series) -> tuple[float, float, float] | None:
    """How a pooled row differs from another, paired by training: mean, low, high of a t-interval.

    The difference is that of logarithms where the metric is a perplexity. None if the two do not
    have the same trainings, or only one.
    """
    mine, theirs = row.get("by_training"), other.get("by_training")
    if not isinstance(mine, dict) or not isinstance(theirs, dict) or mine.keys() != theirs.keys():
        return None
    values = numpy.array([(mine[seed], theirs[seed]) for seed in mine])
    if "perplexity" in row["metric"]:
        values = numpy.log(values)
    return mean_interval(values[:, 0] - values[:, 1])


def _over_trainings(rows: DataFrame) -> dict[str, object]:
    """The columns that change when the trainings of one cell become one row."""
    values = rows["value"].to_numpy(float)
    if "perplexity" in rows["metric"].iloc[0]:
        mean, low, high = numpy.exp(mean_interval(numpy.log(values)))
    else:
        mean, low, high = mean_interval(values)
    halves = numpy.maximum(rows["high"] - rows["value"], rows["value"] - rows["low"])
    means = {column: rows[column].mean() for column in MEANS if column in rows}
    return means | {
        "value": mean,
        "low": low,
        "high": high,
        "trainings": len(rows),
        "by_training": dict(zip(rows["training_seed"].fillna(0), values, strict=True)),
        "texts_half": halves.median(),
        "commit": join_values(rows["commit"]),
    }

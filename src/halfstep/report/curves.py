"""Training curves: the journals of trainings as a table, and curves with fewer points."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy
from pandas import DataFrame

from halfstep.records.journal import read_journal
from halfstep.seeds import first_training, repeat_seed

CURVE_POINTS = 120  # at most, of a curve in a figure
COLUMNS = (
    "teacher", "group", "series", "round", "training", "divergence", "commit",
    "key", "step", "value",
)  # fmt: skip


def journal_files(paths: Iterable[Path]) -> list[Path]:
    """These journal files, and the journals in these folders."""
    files = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("journal.jsonl"))
    return files


def read_curves(paths: Iterable[Path]) -> DataFrame:
    """The curves of these journal files and of those in these folders, one row for each value.

    `group` is the run of a round, or `pretraining`, which comes first, with the baseline last.
    `training` tells repeats of a training apart: their seed, or 0 for the first training.
    """
    found = []
    for file in journal_files(paths):
        folder = file.parent
        run, curve = read_journal(folder)
        model = _model_of(folder) | {
            "divergence": run["params"].get("divergence"),
            "commit": run["tags"].get("git_commit", "unknown"),
        }
        for point in curve:
            for key, value in point["metrics"].items():
                found.append(model | {"key": key, "step": point["step"], "value": value})
    table = DataFrame(found, columns=COLUMNS)
    ranked = table.assign(
        is_round=table["group"] != "pretraining",
        is_baseline=table["series"] == "baseline",
    )
    order = ["teacher", "is_round", "group", "is_baseline", "round", "training"]
    ranked = ranked.sort_values(order, kind="stable", ignore_index=True)
    return ranked[list(COLUMNS)]


def _model_of(folder: Path) -> dict:
    """Teacher, group, series, round and training of a model's folder."""
    training = repeat_seed("/".join(folder.parts[-3:])) or 0
    folder = Path(*map(first_training, folder.parts))
    if not folder.name.startswith("round-"):
        teacher, group, series, round_ = folder.parent.name, "pretraining", folder.name, 0
    else:
        teacher, group = folder.parent.parent.name, folder.parent.name
        series, round_ = folder.name.replace("-", " "), int(folder.name.removeprefix("round-"))
    found = {"teacher": teacher, "group": group, "series": series, "round": round_}
    return found | {"training": training}


def thin_curve(values: numpy.ndarray) -> numpy.ndarray:
    """Means of at most CURVE_POINTS stretches of a curve.

    All stretches but the last have the same length, so that every mean is equally smooth.
    """
    length = -(-len(values) // CURVE_POINTS)
    starts = range(0, len(values), length)
    counts = numpy.diff([*starts, len(values)])
    return numpy.add.reduceat(values, starts) / counts


def thin_curves(curve: DataFrame) -> dict[str, numpy.ndarray]:
    """x and y of a curve with fewer points; of several trainings their mean, lowest and highest.

    Only steps that all trainings have are kept, because one of them may have stopped early.
    """
    number = curve["training"].nunique()
    if number == 1:
        x, y = (thin_curve(curve[column].to_numpy(float)) for column in ("step", "value"))
        return {"x": x, "y": y}
    by_step = curve.pivot_table(index="step", columns="training", values="value").dropna()
    values = numpy.stack([thin_curve(by_step[training].to_numpy()) for training in by_step])
    x = thin_curve(by_step.index.to_numpy(float))
    return {"x": x, "y": values.mean(0), "low": values.min(0), "high": values.max(0)}

"""Training curves: the journals of trainings as a table, and curves with fewer points."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy
from pandas import DataFrame

from halfstep.records.journal import read_journal

CURVE_POINTS = 120  # at most, of a curve in a figure
COLUMNS = ("teacher", "group", "series", "round", "commit", "key", "step", "value")


def journal_files(paths: Iterable[Path]) -> list[Path]:
    """These journal files, and the journals in these folders."""
    files = []
    for path in paths:
        files += [path] if path.is_file() else sorted(path.rglob("journal.jsonl"))
    return files


def read_curves(paths: Iterable[Path]) -> DataFrame:
    """The curves of these journal files and of those in these folders, one row for each value.

    `group` is the run of a round, or `pretraining`, which comes first, with the baseline last.
    """
    found = []
    for file in journal_files(paths):
        folder = file.parent
        run, curve = read_journal(folder)
        model = _model_of(folder) | {"commit": run["tags"].get("git_commit", "unknown")}
        for point in curve:
            for key, value in point["metrics"].items():
                found.append(model | {"key": key, "step": point["step"], "value": value})
    table = DataFrame(found, columns=COLUMNS)
    ranked = table.assign(
        is_round=table["group"] != "pretraining",
        is_baseline=table["series"] == "baseline",
    )
    order = ["teacher", "is_round", "group", "is_baseline", "round"]
    ranked = ranked.sort_values(order, kind="stable", ignore_index=True)
    return ranked[list(COLUMNS)]


def _model_of(folder: Path) -> dict:
    """Teacher, group, series and round of a model's folder."""
    if not folder.name.startswith("round-"):
        teacher, group, series, round_ = folder.parent.name, "pretraining", folder.name, 0
    else:
        teacher, group = folder.parent.parent.name, folder.parent.name
        series, round_ = folder.name.replace("-", " "), int(folder.name.removeprefix("round-"))
    return {"teacher": teacher, "group": group, "series": series, "round": round_}


def thin_curve(values: numpy.ndarray) -> numpy.ndarray:
    """Means of at most CURVE_POINTS stretches of a curve.

    All stretches but the last have the same length, so that every mean is equally smooth.
    """
    length = -(-len(values) // CURVE_POINTS)
    starts = range(0, len(values), length)
    counts = numpy.diff([*starts, len(values)])
    return numpy.add.reduceat(values, starts) / counts

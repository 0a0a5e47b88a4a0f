"""`halfstep score-frontier`: rows of samples, and perplexity against entropy over temperatures."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.commands.evaluate import (
    Judged,
    exp_ratio,
    judge_texts,
    read_texts,
    rows_of_texts,
)
from halfstep.commands.samples import sample_files
from halfstep.commands.variety import Texts
from halfstep.config import Evaluation, Machine, Word
from halfstep.data.windows import corpus_files, corpus_name
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError, reason
from halfstep.files import open_file, write_atomic
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.frontier import Reading, perplexity_at, ratio_at
from halfstep.metrics.rows import COLUMNS, mean_row, row, write_rows
from halfstep.records.shapes import metric_rows

WHOLE_CURVE = {"temperature": None, "network_evaluations": None}
"""Columns of a row that is about all temperatures"""
SCORE_AGAIN = "run halfstep score-frontier again"


@dataclass(frozen=True)
class Point:
    """Texts at one temperature under one judge and protocol.

    Attributes:
        protocol: protocol of the perplexity
        columns: columns of its row
        values: [N, 3], for each text the sum of -log p, the number of tokens, and the entropy
    """

    protocol: str
    columns: dict[str, Any]
    values: np.ndarray

    @property
    def temperature(self) -> float:
        return self.columns.get("temperature") or 1.0

    @property
    def curve(self) -> tuple[str, str, int | None]:
        """What the points of a curve have in common: judge, protocol and number of steps."""
        return self.columns["judge"], self.protocol, self.columns["steps"]


@dataclass(frozen=True)
class FrontierFiles:
    """The samples of a frontier, and the rows that it is compared with."""

    frontier: list[Path]
    """folders of samples of the same model at several temperatures; some may be in --samples too"""
    held_out: Path
    """rows of `halfstep score-corpus`"""
    teacher: Path | None = None
    """frontier.json of the model's teacher"""


def score_frontier(
    samples: list[Path],
    files: FrontierFiles,
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    variant: Word | None = None,
) -> None:
    """Score the samples of one model, and its frontier: perplexity against entropy.

    samples.json has the rows of `halfstep score-samples`. frontier.json has perplexity and entropy
    at several temperatures and, for every step count, the perplexity at the entropy of held-out
    text, read off the curve. With a teacher also the perplexity of each point, divided by the
    teacher's at equal entropy. The values of single texts go to frontier.npy. Each judge is loaded
    only once, and reads each text only once.

    Args:
        samples: folders of `halfstep generate` at one temperature, one per step count
        corpus: folder of `halfstep prepare-corpus` on which the model was trained
        output: folder of samples.json and frontier.json
        variant: name of the way in which these samples were drawn, a column of the rows
    """
    group = join_group(machine)
    target, teachers = held_out_entropy(files.held_out, corpus), read_curves_of(files.teacher)
    data = {"data": corpus_name(corpus)}
    folders = list(dict.fromkeys([*samples, *files.frontier]))
    found = [one.with_columns(data) for one in read_texts(folders, corpus, variant)]
    check_sets(found)
    texts = dict(zip(folders, found, strict=True))
    plain, swept = ([texts[one] for one in those] for those in (samples, files.frontier))
    judged, features = judge_texts(found, corpus, evaluation, machine, group, plain)
    if not group.is_main:
        return
    plain_rows = rows_of_texts(plain, judged_of(plain, judged), features, corpus, evaluation)
    points = measured_points(swept, judged_of(swept, judged))
    rows = _point_rows(points, swept, evaluation.bootstrap)
    rows += _readings(points, target, teachers, evaluation.bootstrap)
    read = [*corpus_files(corpus, "validation"), *evaluation.judge]
    write_rows(output / "samples.json", plain_rows, [*sample_files(samples), *read])
    values = output / "frontier.npy"
    write_atomic(values, lambda part: np.save(part, stack_values(points)))
    read = [*sample_files(files.frontier), *corpus_files(corpus), *evaluation.judge, files.held_out]
    if files.teacher:
        read += [files.teacher, files.teacher.with_suffix(".npy")]
    write_rows(output / "frontier.json", rows, read, [values])


def check_sets(texts: list[Texts]) -> None:
    """HalfstepError unless the sets are of one model, drawn alike, and each at another place."""
    places = {_place(one.columns) for one in texts}
    if len(places) < len(texts):
        raise HalfstepError(
            f"samples: found {len(texts)} folders for {len(places)} pairs of step count and "
            "temperature; give --samples and --frontier one folder for each"
        )
    models = {one.columns["model"] for one in texts}
    counts = {one.columns["num_samples"] for one in texts}
    for what, found in (("models", models), ("numbers of texts", counts)):
        if len(found) > 1:
            raise HalfstepError(
                f"samples: found several {what} ({', '.join(map(str, sorted(found)))}), "
                "expected one; give --samples the folders of one model, drawn alike"
            )


def judged_of(texts: list[Texts], judged: list[Judged]) -> list[Judged]:
    """What the judges found in these texts."""
    places = {_place(one.columns) for one in texts}
    return [found for found in judged if _place(found[2]) in places]


def measured_points(texts: list[Texts], judged: list[Judged]) -> list[Point]:
    """The points of all curves, by judge, protocol, step count and temperature."""
    entropy = {_place(one.columns): unigram_entropy(one.counted) for one in texts}
    points = []
    for protocol, values, columns, _ in judged:
        assert values is not None, "this is rank 0"
        sums = values if values.ndim == 2 else np.stack([values, np.ones_like(values)], 1)
        table = np.concatenate([sums, entropy[_place(columns)][:, None]], 1)
        points.append(Point(protocol, columns, table))
    judges = [point.columns["judge"] for point in points]
    return sorted(points, key=lambda point: _order(point, judges))


def _order(point: Point, judges: list[str]) -> tuple[int, str, int, float]:
    judge, protocol, steps = point.curve
    return judges.index(judge), protocol, steps or 0, point.temperature


def _place(columns: dict[str, Any]) -> tuple[int | None, float]:
    """Step count and temperature of a set of texts."""
    return columns["steps"], columns.get("temperature") or 1.0


def curves_of(points: list[Point]) -> dict[tuple, list[Point]]:
    """The points of each curve, whose temperatures ascend."""
    curves: dict[tuple, list[Point]] = defaultdict(list)
    for point in points:
        curves[point.curve].append(point)
    return dict(curves)


def stack_values(points: list[Point]) -> np.ndarray:
    """The values of several points: [T, N, 3]."""
    return np.stack([point.values for point in points])


def _point_rows(points: list[Point], texts: list[Texts], resamples: int) -> list[dict]:
    """Perplexity and entropy of all points."""
    rows = []
    for point in points:
        name, sums = "frontier_perplexity", point.values[:, :2]
        rows.append(mean_row(name, point.protocol, sums, point.columns, resamples, exp_ratio))
    for one in texts:
        entropy = unigram_entropy(one.counted)
        rows.append(mean_row("frontier_entropy", "unigram", entropy, one.columns, resamples))
    return rows


def _readings(
    points: list[Point], target: float, teachers: dict[tuple, list[Point]], resamples: int
) -> list[dict]:
    """Values read off the curves: at the entropy `target`, and against the teacher's curves."""
    rows = []
    for key, curve in curves_of(points).items():
        found = perplexity_at(stack_values(curve), target, resamples)
        rows.append(_reading_row("perplexity_at_data_entropy", curve[0], found, WHOLE_CURVE))
        for point in curve if key in teachers else []:
            paired = _share_draws(point, teachers[key][0])
            found = ratio_at(point.values, stack_values(teachers[key]), resamples, paired)
            rows.append(_reading_row("perplexity_ratio_at_equal_entropy", point, found))
    return rows


def _reading_row(metric: str, point: Point, found: Reading, changes: dict | None = None) -> dict:
    columns = point.columns | (changes or {})
    columns |= {"at_entropy": found.at_entropy, "reached": found.reached}
    return row(metric, point.protocol, found.value, (found.low, found.high), **columns)


def _share_draws(student: Point, teacher: Point) -> bool:
    """Has text i of both the same random numbers? HalfstepError for other data or other counts."""
    for key in ("num_samples", "data", "judge_dtype", "precision"):
        mine, theirs = student.columns[key], teacher.columns[key]
        if mine != theirs:
            raise HalfstepError(
                f"teacher: its samples have {key} {theirs}, those of the student have {mine}; "
                "draw and score both alike"
            )
    return student.columns["seed"] == teacher.columns["seed"]


def held_out_entropy(file: Path, corpus: Path) -> float:
    """The mean entropy of held-out text of the corpus, from the rows of `halfstep score-corpus`."""
    data = corpus_name(corpus)
    for found in metric_rows(file):
        if found["metric"] == "entropy" and found.get("data") == data:
            return found["value"]
    raise HalfstepError(
        f"{file}: no row of the entropy of {data}; name what halfstep score-corpus wrote "
        "of this corpus"
    )


def read_curves_of(file: Path | None) -> dict[tuple, list[Point]]:
    """The curves of a scored model, from its rows and the .npy file next to them."""
    if file is None:
        return {}
    rows = [row for row in metric_rows(file) if row["metric"] == "frontier_perplexity"]
    path = file.with_suffix(".npy")
    try:
        with open_file(path) as opened:
            values = np.load(opened, allow_pickle=False)
        if values.dtype != np.float64 or values.ndim != 3 or values.shape[::2] != (len(rows), 3):
            raise ValueError(f"{values.dtype} {list(values.shape)} for {len(rows)} rows")
    except HalfstepError:
        raise
    except Exception as error:  # a damaged header raises what Python's parser raises
        fault = reason(error)
        raise HalfstepError(
            f"{path}: not the values of its rows ({fault}); {SCORE_AGAIN}"
        ) from None
    older = {"precision": "float32"}  # where rows name none
    columns = [
        {key: row.get(key, older.get(key)) for key in (*COLUMNS, "protocol")} for row in rows
    ]
    points = [Point(c.pop("protocol"), c, part) for c, part in zip(columns, values, strict=True)]
    return curves_of(points)

"""Metric rows that are read from files: checked before a table or a model card uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.records.shapes import MetricRow
from halfstep.resolve import check_fields

# teacher/run/round-3, teacher/baseline, data; a round has a number.
MODEL_NAME = r"^[^/]+(/[^/]+)*$"
ADVICE = "give --metrics only files of metric rows, or measure again"
Whole = Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | None
Number = float | None
Text = str | None


class TableRow(MetricRow):
    """All columns of a metric row whose type matters in a table."""

    model_config = ConfigDict(strict=True)

    model: Annotated[str, Field(pattern=MODEL_NAME)]
    run: Text = None
    round: Whole = None
    version: Whole = None
    num_samples: Whole = None
    seed: Whole = None
    params: Whole = None
    low: Number = None
    high: Number = None
    network_evaluations: Number = None
    temperature: Number = None
    top_p: Number = None
    tokens_per_forward: Number = None
    energy_j: Number = None
    judge_dtype: Text = None
    data: Text = None
    sampler: Text = None
    draw_dtype: Text = None
    device: Text = None
    dtype: Text = None
    commit: Text = None


def metric_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file; HalfstepError if it is not a list of metric rows."""
    return check_rows(read_json(file), file)


def check_rows(rows: Any, file: Path) -> list[dict[str, Any]]:
    """`rows`, the content of a file; HalfstepError if it is not a list of metric rows."""
    required = {"metric", "model", "value"}
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= required for row in rows
    ):
        raise HalfstepError(
            f"{file}: expected a list of metric rows, each with metric, model and value; "
            "give --metrics only such files"
        )
    for number, row in enumerate(rows, start=1):
        check_fields(row, TableRow, f"{file}: row {number}", ADVICE)
    return rows

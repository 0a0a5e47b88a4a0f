"""The fields of run.json and of a metric row, checked before tables, cards and MLflow use them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from halfstep.errors import HalfstepError
from halfstep.files import MAKE_AGAIN, read_json
from halfstep.resolve import check_fields

# teacher/run/round-3, teacher/baseline, data; a round has a number.
MODEL_NAME = r"^[^/]+(/[^/]+)*$"
MEASURE_AGAIN = "give --metrics only files of metric rows, or measure again"

Seconds = Annotated[float, Field(ge=0, lt=2**43, allow_inf_nan=False)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]
Integer = Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)] | None
Real = float | None
Text = str | None


def _stays_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("a file outside of the folder")
    return name


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True)


class _Dataset(_Shape):
    name: str
    digest: str
    source: str | None = None
    context: str = "training"


class _Checkpoint(_Shape):
    folder: str
    sha256: dict[str, str]


class RunRecord(_Shape):
    """run.json, as a Journal writes it."""

    name: str
    started: Seconds
    status: Literal["running", "finished", "failed", "killed"]
    node: str = ""
    fingerprint: str = ""
    params: dict[str, Any] = {}
    tags: dict[str, Any] = {}
    datasets: list[_Dataset] = []
    artifacts: list[Annotated[str, AfterValidator(_stays_inside)]] = []
    checkpoint: _Checkpoint | None = None
    ended: Seconds | None = None


class MetricRow(_Shape):
    """A row of scores, or of seconds."""

    metric: str
    model: str
    value: float | None
    teacher: str | None = None
    steps: Natural | None = None
    protocol: str | None = None
    judge: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    temperature: float | None = None
    tokens_per_step: float | None = None
    median_text: Natural | None = None
    tokens_per_s: float | None = None
    length: Natural | None = None
    batch_size: Natural | None = None
    task: Text = None
    measure: Text = None
    variant: Text = None


class _ScoreRow(MetricRow):
    protocol: str


class _TimingRow(MetricRow):
    teacher: str
    length: Natural
    batch_size: Natural


def check_run(found: Any, file: Path) -> dict[str, Any]:
    """The content of run.json, which is returned unchanged."""
    check_fields(found, RunRecord, file, MAKE_AGAIN)
    return found


def check_row(found: Any, file: Path, number: int) -> dict[str, Any]:
    """Row `number` of a file, which is returned unchanged."""
    where = f"{file}: row {number}"
    is_timing = isinstance(found, dict) and found.get("metric") == "latency_s"
    check_fields(found, _TimingRow if is_timing else _ScoreRow, where, MAKE_AGAIN)
    if "/" not in found["model"] and not found.get("teacher"):
        raise HalfstepError(f"{where}: teacher: found nothing, expected a name; {MAKE_AGAIN}")
    return found


class TableRow(MetricRow):
    """All columns of a metric row whose type matters in a table."""

    model: Annotated[str, Field(pattern=MODEL_NAME)]
    run: Text = None
    round: Integer = None
    version: Integer = None
    num_samples: Integer = None
    seed: Integer = None
    training_seed: Integer = None
    params: Integer = None
    student_steps: Integer = None
    low: Real = None
    high: Real = None
    network_evaluations: Real = None
    autoregressive_passes: Real = None
    top_p: Real = None
    tokens_per_forward: Real = None
    energy_j: Real = None
    at_entropy: Real = None
    reached: Text = None
    judge_dtype: Text = None
    data: Text = None
    sampler: Text = None
    draw_dtype: Text = None
    precision: Text = None
    device: Text = None
    dtype: Text = None
    bounds: Text = None
    cache: Text = None
    commit: Text = None


def student_steps(folder: Path) -> int | None:
    """The sampling steps that the student in a folder was made for, if its meta.json says so."""
    meta = folder / "meta.json"
    about = read_json(meta) if meta.is_file() else None
    steps = about.get("student_steps") if isinstance(about, dict) else None
    return steps if isinstance(steps, int) else None


def metric_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file; HalfstepError if it is not a list of metric rows."""
    return check_table(read_json(file), file)


def check_table(rows: Any, file: Path) -> list[dict[str, Any]]:
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
        check_fields(row, TableRow, f"{file}: row {number}", MEASURE_AGAIN)
    return rows

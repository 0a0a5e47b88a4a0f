"""The fields of run.json and of a metric row that `halfstep track` reads, checked before use."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, ValidationError

from halfstep.errors import HalfstepError

Seconds = Annotated[float, Field(ge=0, lt=2**43, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


def _stays_inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError("a file outside of the folder")
    return name


class _Dataset(BaseModel):
    name: str
    digest: str
    source: str | None = None
    context: str = "training"


class _Checkpoint(BaseModel):
    folder: str
    sha256: dict[str, str]


class RunRecord(BaseModel):
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


class MetricRow(BaseModel):
    """A row of scores, or of seconds."""

    metric: str
    model: str
    value: float | None
    teacher: str | None = None
    steps: Count | None = None
    protocol: str | None = None
    judge: str | None = None
    checkpoint: str | None = None
    weights: str | None = None
    tokens_per_s: float | None = None
    length: Count | None = None
    batch_size: Count | None = None


class _ScoreRow(MetricRow):
    protocol: str


class _TimingRow(MetricRow):
    teacher: str
    length: Count
    batch_size: Count


def check_run(found: object, file: Path) -> dict:
    """The content of run.json, which is returned unchanged."""
    return _check(RunRecord, found, f"{file}")


def check_row(found: object, file: Path, number: int) -> dict:
    """Row `number` of a file, which is returned unchanged."""
    where = f"{file}: row {number}"
    row = _check(MetricRow, found, where)
    if row["metric"] == "latency_s":
        return _check(_TimingRow, row, where)
    if "/" not in row["model"] and not row.get("teacher"):
        raise HalfstepError(f"{where}: teacher: found nothing, expected a name; {_CURE}")
    return _check(_ScoreRow, row, where)


_CURE = "delete the file and run the step that makes it again"


def _check(shape: type[BaseModel], found: Any, where: str) -> Any:
    try:
        shape.model_validate(found, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        place = f"{where}: {key}" if key else where
        given = "nothing" if first["type"] == "missing" else ascii(first["input"])[:60]
        expected = first["msg"].replace("Input should be ", "").replace("Field required", "a value")
        message = f"{place}: found {given}, expected {expected}; {_CURE}"
        raise HalfstepError(message) from None
    return found

"""Metric rows: one flat dict for each number, which says what it is, how it was made and how sure it is."""

import math
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.tracking import commit

ABOUT = (
    "model", "teacher", "run", "round", "steps", "sampler", "network_evaluations", "num_samples", "seed", "weights", "draw_dtype",
    "judge", "checkpoint",
)  # fmt: skip
SPEED = ("length", "batch_size", "tokens_per_s", "device", "dtype", "params")  # columns of timings only


def row(metric: str, protocol: str | None, value: float, interval: tuple[float, float], **about) -> dict:
    """A row of the tables: {metric, protocol, value, low, high, model, ..., commit}; what does not apply is null."""
    if unknown := about.keys() - {*ABOUT, *SPEED}:
        raise TypeError(f"row: unknown columns {sorted(unknown)}; known are {', '.join(ABOUT + SPEED)}")
    low, high = interval
    if not all(map(math.isfinite, (value, low, high))):
        raise HalfstepError(
            f"{metric} of {about.get('model')} is {value} [{low}, {high}], not a finite number: the weights or the judge hold NaN; "
            "check the training's journal, or name another judge"
        )
    numbers = {"metric": metric, "protocol": protocol, "value": float(value), "low": float(low), "high": float(high)}
    return numbers | {key: about.get(key) for key in ABOUT} | {key: about[key] for key in SPEED if key in about} | {"commit": commit()}


def name_parts(model: str) -> dict[str, str | int | None]:
    """`stories-tiny/kl_backward/round-3` -> model, teacher, run and round; 0 for the teacher and the baseline."""
    teacher, _, rest = model.partition("/")
    run, _, last = rest.partition("/")
    number = int(last.removeprefix("round-")) if last.startswith("round-") else 0
    return {"model": model, "teacher": teacher, "run": run or None, "round": number}


def model_name(folder: Path) -> str:
    """What a checkpoint folder is called: its path below results/models/, else the folder's own name."""
    parts = Path(folder).resolve().parts
    at = [i for i, part in enumerate(parts) if part == "models"]
    return "/".join(parts[at[-1] + 1 :] if at and parts[at[-1] + 1 :] else parts[-1:])

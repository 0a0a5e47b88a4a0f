"""Metric rows: one flat dict for each number, which says what it is, how it was made and how sure it is."""

import math
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.records.journal import commit

ABOUT = (
    "model", "teacher", "run", "round", "steps", "sampler", "network_evaluations", "num_samples", "seed", "weights", "draw_dtype",
    "temperature", "top_p", "judge", "judge_dtype", "data", "checkpoint",
)  # fmt: skip
SPEED = (
    "length",
    "batch_size",
    "tokens_per_s",
    "tokens_per_forward",
    "energy_j",
    "device",
    "dtype",
    "params",
)  # columns of timings only


def row(metric: str, protocol: str, value: float, interval: tuple[float, float], **about) -> dict:
    """A row of the tables: {metric, protocol, version, value, low, high, model, ..., commit}; what does not apply is null.

    The protocol must be one of the metric's in PROTOCOLS, which gives its version. `data` names what was examined, with a checksum; `judge`
    its revision; `checkpoint` the weights' sha256. temperature and top_p are null where they are 1, and so change nothing.
    """
    if protocol not in (known := PROTOCOLS.get(metric, {})):
        raise TypeError(
            f"row: {metric} has no protocol {protocol!r}; known are {', '.join(known) or 'none'} (metrics/protocols.py)"
        )
    if unknown := about.keys() - {*ABOUT, *SPEED}:
        raise TypeError(
            f"row: unknown columns {sorted(unknown)}; known are {', '.join(ABOUT + SPEED)}"
        )
    low, high = interval
    if not all(map(math.isfinite, (value, low, high))):
        raise HalfstepError(
            f"{metric} of {about.get('model')} is {value} [{low}, {high}], not a finite number: the weights or the judge hold NaN; "
            "check the training's journal, or name another judge"
        )
    about |= {key: None for key in ("temperature", "top_p") if about.get(key) == 1}
    numbers = {
        "metric": metric,
        "protocol": protocol,
        "version": known[protocol],
        "value": float(value),
        "low": float(low),
        "high": float(high),
    }
    return (
        numbers
        | {key: about.get(key) for key in ABOUT}
        | {key: about[key] for key in SPEED if key in about}
        | {"commit": commit()}
    )


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

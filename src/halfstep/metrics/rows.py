"""Metric rows: one flat dict per number, with its interval, its meaning and its origin."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.metrics.intervals import bootstrap, wilson
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.records import provenance
from halfstep.records.journal import commit
from halfstep.seeds import first_training, repeat_seed

COLUMNS = (
    "model", "teacher", "run", "round", "steps", "tokens_per_step", "sampler",
    "network_evaluations", "num_samples", "seed", "weights", "draw_dtype", "precision",
    "temperature", "top_p", "judge", "judge_dtype", "data", "checkpoint",
)  # fmt: skip
# Only some rows have these: timings, continuations, perplexities, repeats, frontier, tasks,
# samples of a variant, samples of a round (the steps that it was made for), samples of a sampler
# that asks an autoregressive model, timings of drafts that it verifies.
MORE_COLUMNS = (
    "autoregressive_passes", "variant", "task", "measure", "training_seed", "median_text", "length",
    "batch_size", "bounds", "cache", "tokens_per_s", "student_steps",
    "tokens_per_forward", "tokens_per_verification", "energy_j", "device", "dtype", "params",
    "at_entropy", "reached",
)  # fmt: skip


def row(
    metric: str,
    protocol: str,
    value: float | None,
    interval: tuple[float | None, float | None],
    **columns: Any,
) -> dict:
    """One row of the tables; a column that does not apply, or a value that is unknown, is null.

    Its keys are metric, protocol, version, value, low, high, model, ..., commit. The protocol must
    be one of the metric's in PROTOCOLS, which gives its version. Column `data` names what was
    measured, with a checksum; `judge` includes its revision; `checkpoint` is the sha256 of the
    weights; `precision` is that in which the model's network computed. temperature and top_p are
    null if they are 1, where they change nothing.
    """
    known = PROTOCOLS.get(metric, {})
    if protocol not in known:
        raise TypeError(
            f"row: {metric} has no protocol {protocol!r}; known are {', '.join(known) or 'none'} "
            "(metrics/protocols.py)"
        )
    if unknown := columns.keys() - {*COLUMNS, *MORE_COLUMNS}:
        raise TypeError(
            f"row: unknown columns {sorted(unknown)}; known are {', '.join(COLUMNS + MORE_COLUMNS)}"
        )
    low, high = interval
    numbers = {"value": value, "low": low, "high": high}
    if not all(number is None or math.isfinite(number) for number in numbers.values()):
        raise HalfstepError(
            f"{metric} of {columns.get('model')} is {value} [{low}, {high}], not a finite number: "
            "the weights or the judge hold NaN; check the training's journal, or name another judge"
        )
    columns |= {key: None for key in ("temperature", "top_p") if columns.get(key) == 1}
    return {
        "metric": metric,
        "protocol": protocol,
        "version": known[protocol],
        **{name: None if number is None else float(number) for name, number in numbers.items()},
        **{key: columns.get(key) for key in COLUMNS},
        **{key: columns[key] for key in MORE_COLUMNS if key in columns},
        "commit": commit(),
    }


def mean_row(
    metric: str,
    protocol: str,
    values: np.ndarray,
    columns: dict[str, Any],
    resamples: int,
    statistic: Callable[..., float] = float,
) -> dict:
    """The row of statistic(*column means) of values[N] or [N, k], with a bootstrap interval."""
    value = statistic(*np.atleast_1d(values.mean(0)))
    return row(metric, protocol, value, bootstrap(values, statistic, resamples), **columns)


def share_row(metric: str, protocol: str, hits: int, trials: int, columns: dict[str, Any]) -> dict:
    """The row of hits / trials with Wilson's interval; without trials it is 0 in [0, 1]."""
    interval = wilson(hits, trials) if trials else (0.0, 1.0)
    columns = columns | {"num_samples": trials}
    return row(metric, protocol, hits / max(trials, 1), interval, **columns)


def write_rows(
    path: Path, rows: list[dict], inputs: Iterable[Path | str], others: Iterable[Path] = ()
) -> None:
    """Write rows as JSON, and the provenance record of this and other files, with `inputs`."""
    write_json(path, rows)
    provenance.write_record(path.with_suffix(f".{provenance.NAME}"), [path, *others], inputs)


class KeptRows:
    """Rows of the finished parts of a command, in a file that a stopped one leaves behind.

    Rows that are there already count if they were measured with the same settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings
        self.rows: list[dict[str, Any]] = []
        if not file.exists():
            return
        found = read_json(file, "delete it, and measure again")
        if isinstance(found, dict) and found.get("settings") == settings:
            self.rows = found["rows"]
            print(f"note: {file}: {len(self.rows)} rows are finished", file=sys.stderr)
        else:
            print(f"note: {file}: not of these settings, so all is measured again", file=sys.stderr)

    def of(self, **columns: Any) -> list[dict[str, Any]]:
        """The rows of one part: those with these values in these columns."""
        return [row for row in self.rows if all(row.get(key) == columns[key] for key in columns)]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one more part."""
        self.rows += rows
        write_json(self.file, {"settings": self.settings, "rows": self.rows})


def name_parts(model: str) -> dict[str, str | int | None]:
    """Columns model, teacher, run and round of a name such as `stories-tiny/kl_backward/round-3`.

    The round of teacher and baseline is 0. A repeat of a training also has training_seed; its
    teacher and run are those of the first training.
    """
    teacher, _, rest = first_training(model).partition("/")
    run, _, last = rest.partition("/")
    number = int(last.removeprefix("round-")) if last.startswith("round-") else 0
    found = {"model": model, "teacher": teacher, "run": run or None, "round": number}
    seed = repeat_seed(model)
    return found if seed is None else found | {"training_seed": seed}


def model_name(folder: Path) -> str:
    """The name of a checkpoint: its path below results/models/, or else its folder's name."""
    path = Path(folder).resolve()
    _, found, below = f"{path.as_posix()}/".rpartition("/models/")
    return below.removesuffix("/") if found and below else path.name

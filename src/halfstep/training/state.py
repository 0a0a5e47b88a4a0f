"""What a training begins from, what it changes, and the rolling checkpoint that it resumes from."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from halfstep.config import Training
from halfstep.distributed.group import ALONE, Group, shard_like
from halfstep.errors import HalfstepError
from halfstep.files import write_tensors
from halfstep.records.journal import Journal
from halfstep.training.ema import EMA
from halfstep.training.optim import (
    FusedAdamW,
    load_optimizer_state,
    optimizer_state,
    trained_parameters,
)

STATE = "state.safetensors"
CHECKSUM = "sha256"  # key of the header of STATE


@dataclass(frozen=True)
class Start:
    """What a training begins from, besides the weights of its network.

    seed: of the noise of each step, and of dropout
    ema: the moving average to continue (a new one by default)
    optimizer_state: the state to continue (none by default); with it there is no warm-up
    from_zero: the loss begins near zero and grows, because a student begins as its teacher
    """

    seed: int
    ema: EMA | None = None
    optimizer_state: dict[str, Tensor] | None = None
    from_zero: bool = False

    @property
    def warm_up(self) -> bool:
        """True if the learning rate warms up."""
        return self.optimizer_state is None


@dataclass(frozen=True)
class Run:
    """Where a training runs and where it reports; nothing here changes its result.

    folder: of the rolling checkpoint
    label: first words of its lines of progress
    time_limit: minutes after the start of this process (no limit by default)
    flops_per_token: of training, for the MFU in the journal (no MFU by default)
    windows: number of windows of the corpus, for the epochs in lines of progress
    """

    device: torch.device
    micro_batch: int
    folder: Path
    label: str
    journal: Journal
    group: Group = ALONE
    time_limit: float | None = None
    flops_per_token: float | None = None
    windows: int | None = None


@dataclass
class TrainingState:
    """All that a training changes. A rolling checkpoint holds it; `fit` returns it.

    step: finished updates
    loss_sum, loss_count: this rank's losses since the last log, and the number of their steps
    grad_norm: norm of the last gradient before it was clipped (not saved)
    logged: the last losses that were logged
    best: the averaged weights at the lowest held-out loss, whole and on rank 0 only
    validation: the last held-out figures, and under "best" the lowest loss
    """

    network: nn.Module
    optimizer: FusedAdamW
    ema: EMA
    loss_sum: Tensor
    grad_norm: Tensor
    loss_count: int = 0
    step: int = 0
    logged: list[float] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer state by parameter name."""
        return optimizer_state(self.network, self.optimizer)


def begin(network: nn.Module, training: Training, start: Start, run: Run) -> TrainingState:
    """The state before the next step: from the run's rolling checkpoint if it has one, else new."""
    optimizer = FusedAdamW(network, training)
    if start.optimizer_state is not None:
        load_optimizer_state(network, optimizer, start.optimizer_state)
    ema = start.ema or EMA(network, training.ema_decay)
    zero = torch.zeros((), device=run.device)
    state = TrainingState(network, optimizer, ema, loss_sum=zero, grad_norm=zero.clone())
    load_state(state, run)
    run.journal.rewind(state.step)
    return state


def save_state(state: TrainingState, run: Run) -> None:
    """Write the rolling checkpoint as one atomic file; all ranks wait until it is there.

    The file holds trained weights, their average, optimizer state and best average. Its header
    holds the rest, and a checksum of all.
    """
    groups: dict[str, dict[str, Tensor]] = {
        "raw": {**trained_parameters(state.network)},
        "ema": state.ema.shadow,
        "opt": state.optimizer_state,
        "best": state.best,
    }
    tensors = {
        f"{group}/{name}": value.detach().cpu().contiguous()
        for group, named in groups.items()
        for name, value in run.group.gather_tensors(named).items()
    }
    loss_sum = run.group.all_sum(state.loss_sum)
    header = {
        "fingerprint": run.journal.run["fingerprint"],
        "step": str(state.step),
        "ema_updates": str(state.ema.updates),
        "best_step": str(state.best_step),
        "logged": json.dumps(state.logged),
        "pending": json.dumps([loss_sum, state.loss_count]),
    }
    for name, value in state.validation.items():
        header[f"validation:{name}"] = repr(value)
    if run.group.is_main:
        checksum = {CHECKSUM: contents_sha256(tensors, header)}
        write_tensors(run.folder / STATE, tensors, header | checksum)
    run.group.barrier()


def contents_sha256(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """Checksum of everything in a rolling checkpoint; the cores share the tensors.

    It reads the state once in memory, which takes one core about 0.8 s per GB.
    """

    def line(name: str) -> str:
        value = tensors[name]
        digest = hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
        return f"{name} {value.dtype} {list(value.shape)} {digest}"

    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(line, sorted(tensors)))
    return hashlib.sha256(json.dumps([header, lines], sort_keys=True).encode()).hexdigest()


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a rolling checkpoint; HalfstepError if one bit of them has changed."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        fault = f"not a whole file ({error})"
    else:
        expected = header.pop(CHECKSUM, None)
        if contents_sha256(tensors, header) == expected:
            return tensors, header
        fault = "damaged, because its contents differ from their checksum"
    raise HalfstepError(
        f"{path}: {fault}; delete the folder {path.parent} to start this training again"
    )


def load_state(state: TrainingState, run: Run) -> None:
    """Load the rolling checkpoint, if there is one with the fingerprint of this run."""
    path = run.folder / STATE
    if not path.is_file():
        return
    tensors, header = _read_state(path)
    if header["fingerprint"] != run.journal.run["fingerprint"]:
        return
    groups: dict[str, dict[str, Tensor]] = {"raw": {}, "ema": {}, "opt": {}, "best": {}}
    for key, value in tensors.items():
        group, name = key.split("/", 1)
        groups[group][name] = value
    with torch.no_grad():
        for name, p in trained_parameters(state.network).items():
            p.copy_(shard_like(groups["raw"][name], p))
    load_optimizer_state(state.network, state.optimizer, groups["opt"])
    for name, shadow in state.ema.shadow.items():
        shadow.copy_(shard_like(groups["ema"][name], shadow))
    state.ema.updates = int(header["ema_updates"])
    state.step = int(header["step"])
    state.best, state.best_step = groups["best"], int(header["best_step"])
    state.logged = json.loads(header.get("logged", "[]"))
    loss_sum, state.loss_count = json.loads(header.get("pending", "[0, 0]"))
    if run.group.is_main:
        state.loss_sum.fill_(loss_sum)
    for key, figure in header.items():
        if key.startswith("validation:"):
            state.validation[key.removeprefix("validation:")] = float(figure)

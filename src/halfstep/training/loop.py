"""The training loop: global batches from one integer, on one process or many; gradient accumulation, moving average, resumable state."""

import ctypes
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from statistics import median

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.checkpoint import write_tensors
from halfstep.config import Machine, Training
from halfstep.distributed.group import (
    ALONE,
    Group,
    StopRequest,
    exit_stopped,
    full_tensor,
    is_sharded,
    local_device,
    shard_like,
)
from halfstep.errors import HalfstepError, reason
from halfstep.progress import Progress
from halfstep.training.ema import EMA
from halfstep.training.optim import adamw, learning_rate, load_optimizer_state, optimizer_state
from halfstep.training.system_metrics import peak_flops, system_metrics

SAVE_EVERY_S = 300.0
LOOK_EVERY_S = 1.0  # several processes agree about so often whether to save or to stop
EXPLODED, RECENT = (
    20,
    50,
)  # a loss above so many times the median of the last so many logged ones has exploded
Parts = dict[str, Tensor]


@dataclass
class Fitted:
    """What a training leaves: its moving average, its optimiser's moments, and its best held-out loss. `logged`: its last logged losses;
    `pending`: sum and number of the losses that wait for the next log."""

    ema: EMA
    moments: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    logged: list[float] = field(default_factory=list)
    pending: tuple[float, int] = (0.0, 0)


class Objective(nn.Module):
    """The loss as a module, so that DDP sees where a pass begins: what a loss reads of the network outside of its forward counts too."""

    def __init__(self, network: nn.Module, loss: Callable[[Parts], Tensor]):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, part: Parts) -> Tensor:
        return self.loss(part)


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one optimiser step: a function of (seed, step) alone."""
    key = int.from_bytes(blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(key)


def hold_memory() -> None:
    """Let glibc keep what is freed. It hands the pages of large tensors back, and faults them in anew: a fifth of a training step on a CPU."""
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the largest there is


def find_device(machine: Machine) -> torch.device:
    """The device that `machine` names, torch's threads set; HalfstepError when there is no such device. Of several processes each has its own GPU."""
    hold_memory()
    if machine.threads:
        torch.set_num_threads(max(1, machine.threads // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if machine.device == "auto":
        return local_device() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=machine.device).device
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # no such word; not compiled in; no such card
        raise HalfstepError(
            f"device: found {machine.device!r}, which torch cannot use ({reason(error)}); name cpu, or auto"
        ) from None
    return local_device() if machine.device == "cuda" else device


def prefetched(make: Callable[[int], object], first: int, last: int) -> Iterator:
    """make(first), ..., make(last - 1); a thread makes the next one while one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(make, first) if first < last else None
        for step in range(first, last):
            ready = coming.result()
            coming = thread.submit(make, step + 1) if step + 1 < last else None
            yield ready


def fit(
    network: nn.Module,
    batch: Callable[[int], Tensor],
    corrupt: Callable[[Tensor, torch.Generator], tuple[Parts, float]],
    loss: Callable[[Parts], Tensor],
    validate: Callable[[], dict[str, float]],
    training: Training,
    *,
    seed: int,
    device: torch.device,
    micro_batch: int,
    state: Path,
    label: str,
    journal,
    warm: bool = True,
    carried: dict[str, Tensor] | None = None,
    ema: EMA | None = None,
    group: Group = ALONE,
    time_limit: float | None = None,
    flops_per_token: float | None = None,
    from_zero: bool = False,
) -> Fitted:
    """Train `network` for training.num_steps updates and return what they left.

    batch(step) -> x0[B, L], the global batch; corrupt(x0, generator) -> the tensors that `loss` needs, each with leading
    dimension B, and the divisor of the summed loss; loss(parts) -> the sum over its rows, scalar; validate() -> held-out figures of the network
    as it stands (called with averaged weights; the first figure decides which is best). Gradients are those of the global batch
    whatever micro_batch is and however many processes `group` has: each draws the whole batch and its noise, and trains on its own rows (only
    dropout's draws are a process's own). `state` is a folder for a rolling checkpoint: an interrupted call continues there, to the same bits,
    if its journal bears the same fingerprint; else it starts anew. `time_limit`: minutes of this process, before whose end it saves and
    leaves by SystemExit(75); at SIGTERM and SIGINT likewise, with 143 and 130. `flops_per_token`: of training, for the MFU in the journal.
    `from_zero`: the loss begins near zero and grows (a student begins as its teacher), so only what is not finite has exploded.
    """
    optimizer = adamw(network, training)
    if carried:
        load_optimizer_state(network, optimizer, carried)
    ema = ema or EMA(network, training.ema_decay)
    fitted = Fitted(ema, {})
    stamp = journal.run["fingerprint"]
    start = _resume(network, optimizer, fitted, state, stamp)
    journal.rewind(start or -1)
    objective, scale = _shared(network, loss, training, group)
    peak = peak_flops(device, training.precision)
    if device.type == "cuda" and training.precision == "bfloat16":
        torch.set_float32_matmul_precision(
            "high"
        )  # the readout's float32 products by TF32: finer than the bfloat16 around them
    every = max(1, training.num_steps // 200)
    summed = torch.tensor(fitted.pending[0] if group.is_main else 0.0, device=device)
    updates, seen = fitted.pending[1], 0
    since = saved = looked = time.monotonic()
    pace, look = 1, start + 1

    def prepare(step: int) -> tuple[int, int, Parts, float]:
        x0, random = batch(step), step_generator(seed, step)
        parts, divisor = corrupt(x0, random)
        own = {k: v[group.local_slice(len(x0))] for k, v in parts.items()}
        return (
            x0.numel(),
            random.initial_seed(),
            {k: v.pin_memory() if device.type == "cuda" else v for k, v in own.items()},
            divisor,
        )

    network.train()
    with (
        StopRequest(group, time_limit and 60 * time_limit).listening() as stop,
        closing(prefetched(prepare, start, training.num_steps)) as batches,
        Progress(label, training.num_steps, done=start)
        if group.is_main
        else nullcontext() as progress,
    ):
        for done, (tokens, key, parts, divisor) in enumerate(batches, start=start + 1):
            torch.manual_seed(key + group.rank)  # dropout
            lr = learning_rate(training, done - 1, warm)
            rows = len(next(iter(parts.values())))
            for first in range(0, rows, micro_batch):
                part = {
                    k: v[first : first + micro_batch].to(device, non_blocking=True)
                    for k, v in parts.items()
                }
                last = first + micro_batch >= rows
                with (
                    nullcontext()
                    if last or not isinstance(objective, DistributedDataParallel)
                    else objective.no_sync()
                ):
                    with torch.autocast(
                        device.type, torch.bfloat16, enabled=training.precision == "bfloat16"
                    ):
                        value = objective(part) / divisor
                    (value * scale).backward()
                summed += value.detach()
            norm = full_tensor(
                nn.utils.clip_grad_norm_(network.parameters(), training.grad_clip, foreach=True)
            )
            for settings in optimizer.param_groups:
                settings["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            seen, updates = seen + tokens, updates + 1
            if done % every == 0 or done == training.num_steps:
                mean = group.all_sum(summed) / updates
                _check(mean, norm.item(), done, [] if from_zero else fitted.logged)
                fitted.logged = [*fitted.logged, mean][-RECENT:]
                speed = seen / (time.monotonic() - since)
                shown = {"loss": mean, "tokens_per_s": speed}
                if peak and flops_per_token:
                    shown["mfu"] = speed * flops_per_token / (peak * group.size)
                figures = {f"train/{k}": v for k, v in shown.items()} | {
                    "train/lr": lr,
                    "train/grad_norm": norm.item(),
                }
                journal.log(figures | system_metrics(device), done)
                if progress:
                    progress.update(done - progress.done, **shown)
                summed.zero_()
                since, seen, updates = time.monotonic(), 0, 0
            if done % training.validate_every == 0 or done == training.num_steps:
                _validate(network, fitted, validate, journal, done, group)
                since, seen = time.monotonic(), 0
            if done == look and done < training.num_steps:
                now = time.monotonic()
                wish = (
                    1
                    if group.size == 1
                    else min(2 * pace, math.ceil(pace * LOOK_EVERY_S / max(now - looked, 1e-6)))
                )
                code, due, pace = map(
                    int, group.all_max(stop.code, now - saved > SAVE_EVERY_S, wish)
                )
                look, looked = done + pace, now
                if code or due:
                    fitted.pending = group.all_sum(summed), updates
                    _check(
                        fitted.pending[0] / max(1, updates),
                        norm.item(),
                        done,
                        [] if from_zero else fitted.logged,
                    )  # a broken state is never kept
                    _save(network, optimizer, fitted, state, stamp, done, group)
                    saved = time.monotonic()
                if code:
                    exit_stopped(code, label, done)
    fitted.moments = optimizer_state(network, optimizer)
    return fitted


def _shared(
    network: nn.Module, loss: Callable[[Parts], Tensor], training: Training, group: Group
) -> tuple[nn.Module, float]:
    """The loss as the engine runs it, and what its gradients must be scaled by to be the sum over processes: DDP takes their mean."""
    objective, sharded = Objective(network, loss), any(map(is_sharded, network.parameters()))
    if training.batch_size % group.size if sharded else training.batch_size < group.size:
        raise HalfstepError(
            f"batch_size: found {training.batch_size}, but {group.size} processes share it; ask for fewer, by which it can be divided"
        )
    if group.size == 1 or sharded:
        return objective, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # what takes its place in new versions of torch is not in older ones
        return DistributedDataParallel(objective, broadcast_buffers=False), float(group.size)


def _check(loss: float, norm: float, step: int, before: list[float]) -> None:
    mend = "lower lr or grad_clip, or lengthen warmup_steps, and start again"
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise HalfstepError(
            f"the loss is {loss} and the gradient's norm {norm} at step {step}: training diverged; {mend}"
        )
    if len(before) >= 5 and 0 < EXPLODED * median(before) < loss:
        raise HalfstepError(
            f"the loss is {loss:.4g} at step {step}, the median before it {median(before):.4g}: training exploded; {mend}"
        )


def _validate(
    network: nn.Module,
    fitted: Fitted,
    validate: Callable[[], dict[str, float]],
    journal,
    step: int,
    group: Group,
) -> None:
    fitted.ema.swap()
    network.eval()
    with torch.no_grad():
        figures = validate()
    network.train()
    if hasattr(
        network, "reshard"
    ):  # what was gathered for a pass without a backward is stale after the swap
        network.reshard()
    fitted.ema.swap()
    journal.log(figures, step)
    name, value = next(iter(figures.items()))
    if not fitted.validation or value <= fitted.validation.get("best", math.inf):
        average = group.gather_tensors(fitted.ema.shadow)
        fitted.best = {k: v.clone() for k, v in average.items()}
        fitted.best_step, fitted.validation["best"] = step, value
    fitted.validation.update(figures)


def _save(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    fitted: Fitted,
    state: Path,
    stamp: str,
    step: int,
    group: Group,
) -> None:
    """One atomic file: weights, average, moments, best average; the counters in its header. All processes wait until it is there."""
    groups = {
        "raw": dict(network.named_parameters()),
        "ema": fitted.ema.shadow,
        "opt": optimizer_state(network, optimizer),
        "best": fitted.best,
    }
    tensors = {
        f"{name}/{k}": v
        for name, named in groups.items()
        for k, v in group.gather_tensors(named).items()
    }
    counters = {
        "fingerprint": stamp,
        "step": step,
        "ema_updates": fitted.ema.updates,
        "best_step": fitted.best_step,
    }
    counters |= {"logged": json.dumps(fitted.logged), "pending": json.dumps(fitted.pending)}
    header = {k: str(v) for k, v in counters.items()} | {
        f"validation:{k}": repr(v) for k, v in fitted.validation.items()
    }
    if group.is_main:
        write_tensors(state / "state.safetensors", tensors, header)
    group.all_max(0)


def _resume(
    network: nn.Module, optimizer: torch.optim.Optimizer, fitted: Fitted, state: Path, stamp: str
) -> int:
    """Load the rolling checkpoint if there is one of this very run; the number of finished steps."""
    path = state / "state.safetensors"
    if not path.is_file():
        return 0
    groups: dict[str, dict[str, Tensor]] = {"raw": {}, "ema": {}, "opt": {}, "best": {}}
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise HalfstepError(
            f"{path}: not a whole file ({error}); delete the folder {state} to begin this training anew"
        ) from None
    with opened as file:
        header = file.metadata() or {}
        if header.get("fingerprint") != stamp:
            return 0
        for key in file.keys():
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.copy_(shard_like(groups["raw"][name], p))
    load_optimizer_state(network, optimizer, groups["opt"])
    for name, shadow in fitted.ema.shadow.items():
        shadow.copy_(shard_like(groups["ema"][name], shadow))
    fitted.ema.updates, fitted.best, fitted.best_step = (
        int(header["ema_updates"]),
        groups["best"],
        int(header["best_step"]),
    )
    fitted.logged, fitted.pending = (
        json.loads(header.get("logged", "[]")),
        tuple(json.loads(header.get("pending", "[0, 0]"))),
    )
    fitted.validation = {
        k.split(":", 1)[1]: float(v) for k, v in header.items() if k.startswith("validation:")
    }
    return int(header["step"])

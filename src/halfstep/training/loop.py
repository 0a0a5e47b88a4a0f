"""The training loop: global batches from one integer, gradient accumulation, moving average, resumable state."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from halfstep.config import Machine, Training
from halfstep.errors import HalfstepError
from halfstep.files import write_atomic
from halfstep.progress import Progress
from halfstep.training.ema import EMA
from halfstep.training.optim import adamw, learning_rate, moments, restore_moments

SAVE_EVERY_S = 300.0
Parts = dict[str, Tensor]


@dataclass
class Fitted:
    """What a finished training leaves: its moving average, its optimiser's moments, and its best held-out loss."""

    ema: EMA
    moments: dict[str, Tensor]
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    validation: dict[str, float] = field(default_factory=dict)


def generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one optimiser step: a function of (seed, step) alone."""
    key = int.from_bytes(blake2b(f"{seed}/{step}".encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(key)


def device_of(machine: Machine) -> torch.device:
    """The device that `machine` names, torch's threads set; HalfstepError when there is no such device."""
    if machine.threads:
        torch.set_num_threads(machine.threads)
    if machine.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=machine.device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such word; not compiled in; no such card
        raise HalfstepError(
            f"device: found {machine.device!r}, which torch cannot use ({str(error).splitlines()[0][:200]}); name cpu, or auto"
        ) from None


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
) -> Fitted:
    """Train `network` for training.num_steps updates and return what they left.

    batch(step) -> x0[B, L], the global batch; corrupt(x0, generator) -> the tensors that `loss` needs, each with leading
    dimension B, and the divisor of the summed loss; loss(parts) -> the sum over its rows, scalar; validate() -> held-out figures of the network
    as it stands (called with averaged weights; the first figure decides which is best). Gradients are those of the global batch
    whatever micro_batch is. `state` is a folder for a rolling checkpoint: an interrupted call continues there, to the same bits, if its
    journal bears the same fingerprint; else it starts anew.
    """
    optimizer = adamw(network, training)
    if carried:
        restore_moments(network, optimizer, carried)
    ema = ema or EMA(network, training.ema_decay)
    fitted = Fitted(ema, {})
    stamp = journal.run["fingerprint"]
    start = _resume(network, optimizer, fitted, state, stamp)
    journal.rewind(start or -1)
    every = max(1, training.num_steps // 200)
    summed = torch.zeros((), device=device)
    since = saved = time.monotonic()
    seen = updates = 0
    network.train()
    with Progress(label, training.num_steps, done=start) as progress:
        for step in range(start, training.num_steps):
            x0 = batch(step)
            random = generator(seed, step)
            torch.manual_seed(random.initial_seed())  # dropout
            parts, divisor = corrupt(x0, random)
            lr = learning_rate(training, step, warm)
            for first in range(0, len(x0), micro_batch):
                part = {k: v[first : first + micro_batch].to(device, non_blocking=True) for k, v in parts.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
                    value = loss(part) / divisor
                value.backward()
                summed += value.detach()
            norm = nn.utils.clip_grad_norm_(network.parameters(), training.grad_clip, foreach=True)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            ema.update()
            seen, updates, done = seen + x0.numel(), updates + 1, step + 1
            if done % every == 0 or done == training.num_steps:
                mean, updates = summed.item() / updates, 0
                _check(mean, norm.item(), done)
                speed = seen / (time.monotonic() - since)
                journal.log({"train/loss": mean, "train/lr": lr, "train/grad_norm": norm.item(), "train/tokens_per_s": speed}, done)
                progress.update(done - progress.done, loss=mean, tokens_per_s=speed)
                summed.zero_()
                since, seen = time.monotonic(), 0
            if done % training.validate_every == 0 or done == training.num_steps:
                _validate(network, fitted, validate, journal, done)
                since, seen = time.monotonic(), 0
            if time.monotonic() - saved > SAVE_EVERY_S and done < training.num_steps:
                _check(summed.item(), norm.item(), done)  # a broken state is never kept
                _save(network, optimizer, fitted, state, stamp, done)
                saved = time.monotonic()
    fitted.moments = moments(network, optimizer)
    return fitted


def _check(loss: float, norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise HalfstepError(
            f"the loss is {loss} and the gradient's norm {norm} at step {step}: training diverged; lower lr or grad_clip, or lengthen "
            "warmup_steps, and start again"
        )


def _validate(network: nn.Module, fitted: Fitted, validate: Callable[[], dict[str, float]], journal, step: int) -> None:
    fitted.ema.swap()
    network.eval()
    with torch.no_grad():
        figures = validate()
    network.train()
    fitted.ema.swap()
    journal.log(figures, step)
    name, value = next(iter(figures.items()))
    if not fitted.validation or value <= fitted.validation.get("best", math.inf):
        fitted.best = {k: v.cpu().clone() for k, v in fitted.ema.shadow.items()}
        fitted.best_step, fitted.validation["best"] = step, value
    fitted.validation.update(figures)


def _save(network: nn.Module, optimizer: torch.optim.Optimizer, fitted: Fitted, state: Path, stamp: str, step: int) -> None:
    """One atomic file: weights, average, moments, best average; the counters in its header."""
    groups = {"raw": dict(network.named_parameters()), "ema": fitted.ema.shadow, "opt": moments(network, optimizer), "best": fitted.best}
    tensors = {f"{group}/{k}": v.detach().cpu().contiguous() for group, named in groups.items() for k, v in named.items()}
    counters = {"fingerprint": stamp, "step": step, "ema_updates": fitted.ema.updates, "best_step": fitted.best_step}
    header = {k: str(v) for k, v in counters.items()} | {f"validation:{k}": repr(v) for k, v in fitted.validation.items()}
    write_atomic(state / "state.safetensors", lambda path: save_file(tensors, path, header))


def _resume(network: nn.Module, optimizer: torch.optim.Optimizer, fitted: Fitted, state: Path, stamp: str) -> int:
    """Load the rolling checkpoint if there is one of this very run; the number of finished steps."""
    path = state / "state.safetensors"
    if not path.is_file():
        return 0
    groups: dict[str, dict[str, Tensor]] = {"raw": {}, "ema": {}, "opt": {}, "best": {}}
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise HalfstepError(f"{path}: not a whole file ({error}); delete the folder {state} to begin this training anew") from None
    with opened as file:
        header = file.metadata() or {}
        if header.get("fingerprint") != stamp:
            return 0
        for key in file.keys():
            group, name = key.split("/", 1)
            groups[group][name] = file.get_tensor(key)
    network.load_state_dict(groups["raw"], strict=False)
    restore_moments(network, optimizer, groups["opt"])
    for name, shadow in fitted.ema.shadow.items():
        shadow.copy_(groups["ema"][name])
    fitted.ema.updates, fitted.best, fitted.best_step = int(header["ema_updates"]), groups["best"], int(header["best_step"])
    fitted.validation = {k.split(":", 1)[1]: float(v) for k, v in header.items() if k.startswith("validation:")}
    return int(header["step"])

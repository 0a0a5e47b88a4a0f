"""The training loop: update, log, validate, and save or stop, on one process or many."""

import math
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import nn

from halfstep.config import Training
from halfstep.distributed.group import Group, StopRequest, exit_stopped
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.progress import Progress, format_number, format_rate
from halfstep.training.optim import learning_rate
from halfstep.training.state import Run, Start, TrainingState, begin, save_state
from halfstep.training.step import (
    Examples,
    GlobalGradient,
    LocalBatch,
    Objective,
    local_batch,
    prefetched,
    step_generator,
    update,
)
from halfstep.training.system_metrics import peak_flops, system_metrics

SAVE_EVERY_S = 300.0
AGREE_EVERY_S = 1.0  # about how often the ranks agree whether to save or to stop
EXPLODED = 20  # a loss above this multiple of the median of earlier ones has exploded
RECENT = 50  # number of logged losses behind that median
OVERFITTED = 1.02  # a held-out loss above this multiple of its lowest has risen


def fit(
    network: nn.Module,
    objective: Objective,
    batches: Callable[[int], Examples],
    training: Training,
    start: Start,
    run: Run,
) -> TrainingState:
    """Train `network` for training.num_steps updates and return its final state.

    batches(step) is the global batch of a step. The gradient is that of the
    global batch, whatever micro_batch and the number of ranks are. Every rank draws the whole batch
    and its noise, and trains on its own rows; only dropout differs between ranks.

    An interrupted training continues from its rolling checkpoint in run.folder, to the same bits,
    if its journal has the same fingerprint; otherwise it starts again. It saves its state and exits
    by SystemExit(75) before the time limit, and by 143 and 130 at SIGTERM and SIGINT. Raises
    HalfstepError if the loss diverges.
    """

    def prepare(step: int) -> LocalBatch:
        return local_batch(objective, batches(step), step_generator(start.seed, step), run, step)

    state = begin(network, training, start, run)
    overfitting = None if start.from_zero else Overfitting(run.label)
    gradient = GlobalGradient(network, objective, training, run.group)
    log_every = max(1, training.num_steps // 200)
    network.train()
    with (
        StopRequest(run.time_limit and 60 * run.time_limit).listening() as stop,
        closing(prefetched(prepare, state.step, training.num_steps)) as local_batches,
        Progress(run.label, training.num_steps, done=state.step) as progress,
    ):
        agreement = Agreement(run.group, stop, state.step + 1)
        throughput = Throughput()
        for batch in local_batches:
            lr = learning_rate(training, state.step, start.warm_up)
            update(state, gradient, batch, lr, training.grad_clip, run)
            throughput.tokens += batch.num_tokens
            last = state.step == training.num_steps
            if state.step % log_every == 0 or last:
                log_losses(state, throughput, progress, training, start, run)
                throughput.restart()
            if state.step % training.validate_every == 0 or last:
                validate_average(state, objective, run, training.precision)
                if overfitting and run.group.is_main:
                    overfitting.check(state)
                throughput.restart()
            if state.step == agreement.next_step and not last:
                save, exit_code = agreement.agree()
                if save:
                    check_loss(state, mean_loss(state, run.group), start)
                    save_state(state, run)
                    agreement.saved = time.monotonic()
                if exit_code:
                    exit_stopped(exit_code, run.label, state.step)
    return state


@dataclass
class Agreement:
    """When the ranks save their state and when they stop: all at the same step.

    To agree takes an all-reduce, so several ranks do it about once in AGREE_EVERY_S seconds. Each
    time they also agree on the step of the next time: `pace` is the number of steps in between. A
    single rank decides at every step.
    """

    group: Group
    stop: StopRequest
    next_step: int
    pace: int = 1
    agreed: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)

    def agree(self) -> tuple[bool, int]:
        """At `next_step`: whether to save the state, and the exit code to stop with (0: go on)."""
        now = time.monotonic()
        pace = 1
        if self.group.size > 1:
            seconds = max(now - self.agreed, 1e-6)
            pace = min(2 * self.pace, math.ceil(self.pace * AGREE_EVERY_S / seconds))
        overdue = now - self.saved > SAVE_EVERY_S
        exit_code, save, pace = map(int, self.group.all_max(self.stop.code, overdue, pace))
        self.pace, self.agreed = pace, now
        self.next_step += pace
        return bool(save or exit_code), exit_code


@dataclass
class Throughput:
    """Tokens of the global batches since the last restart, per second."""

    tokens: int = 0
    since: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        self.tokens, self.since = 0, time.monotonic()

    def tokens_per_s(self) -> float:
        return self.tokens / (time.monotonic() - self.since)


def mean_loss(state: TrainingState, group: Group) -> float:
    """Mean loss of the global batches since the last log."""
    return group.all_sum(state.loss_sum) / max(1, state.loss_count)


def check_loss(state: TrainingState, loss: float, start: Start) -> None:
    """Raise HalfstepError if the loss or the gradient is not finite, or if the loss exploded.

    A loss that starts near zero may grow, so there only a value that is not finite counts.
    """
    advice = "lower lr or grad_clip, or lengthen warmup_steps, and start again"
    norm = state.grad_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise HalfstepError(
            f"the loss is {loss} and the gradient's norm {norm} at step {state.step}: "
            f"training diverged; {advice}"
        )
    if start.from_zero or len(state.logged) < 5:
        return
    before = median(state.logged)
    if 0 < EXPLODED * before < loss:
        raise HalfstepError(
            f"the loss is {loss:.4g} at step {state.step}, the median before it {before:.4g}: "
            f"training exploded; {advice}"
        )


def log_losses(
    state: TrainingState,
    throughput: Throughput,
    progress: Progress,
    training: Training,
    start: Start,
    run: Run,
) -> None:
    """Write the mean loss since the last log, speed, learning rate and gradient to the journal."""
    loss = mean_loss(state, run.group)
    check_loss(state, loss, start)
    state.logged = [*state.logged, loss][-RECENT:]
    speed = throughput.tokens_per_s()
    figures = {"train/loss": loss, "train/tokens_per_s": speed}
    peak = peak_flops(run.device, training.precision)
    if peak and run.flops_per_token:
        figures["train/mfu"] = speed * run.flops_per_token / (peak * run.group.size)
    figures["train/lr"] = state.optimizer.lr
    figures["train/grad_norm"] = state.grad_norm.item()
    run.journal.log(figures | system_metrics(run.device), state.step)
    progress.update(state.step - progress.done, *progress_words(figures, state, training, run))
    state.loss_sum.zero_()
    state.loss_count = 0


def progress_words(
    figures: dict[str, float], state: TrainingState, training: Training, run: Run
) -> list[str]:
    """The figures of a line of progress: losses, epochs, speed and use of the GPUs."""
    words = [f"loss {figures['train/loss']:.4g}"]
    # By name, because a resumed training has its figures in another order.
    others = ("best", "val/entropy", "val/only_end_of_text")
    held_out = [value for name, value in state.validation.items() if name not in others]
    if held_out:
        words.append(f"held-out loss {held_out[0]:.4g}")
    if run.windows:
        done, asked = (
            format_number(step * training.batch_size / run.windows)
            for step in (state.step, training.num_steps)
        )
        words.append(f"epoch {done} of {asked}")
    words.append(format_rate(figures["train/tokens_per_s"], "token"))
    if "train/mfu" in figures:
        words.append(f"{figures['train/mfu']:.0%} of peak FLOPs")
    return words


def validate_average(state: TrainingState, objective: Objective, run: Run, precision: str) -> None:
    """Measure and log the held-out figures of the averaged weights, and keep the best weights."""
    network = state.network
    state.ema.swap()
    network.eval()
    with torch.no_grad(), computing(run.device, precision):
        figures = objective.validate()
    network.train()
    if reshard := getattr(network, "reshard", None):
        # FSDP gathered the average for a pass without a backward; these copies are now stale.
        reshard()
    state.ema.swap()
    run.journal.log(figures, state.step)
    keep_best(state, figures, run.group)


@dataclass
class Overfitting:
    """Warns once when the held-out loss rises while the training loss falls.

    label: first words of the warning
    at_best: the training loss at the step of the lowest held-out loss
    """

    label: str
    at_best: float = math.nan
    warned: bool = False

    def check(self, state: TrainingState) -> None:
        """Compare the losses after a validation."""
        if not state.logged:
            return
        loss = median(state.logged[-5:])
        figures = dict(state.validation)
        best = figures.pop("best")
        held_out = next(iter(figures.values()))
        if state.best_step == state.step or math.isnan(self.at_best):
            self.at_best = loss
        elif held_out > OVERFITTED * best and loss < self.at_best and not self.warned:
            self.warned = True
            print(
                f"{self.label}: warning: over-fitting: since step {state.best_step} the held-out "
                f"loss rose from {best:.4g} to {held_out:.4g}, and the training loss fell from "
                f"{self.at_best:.4g} to {loss:.4g}; use more text, fewer steps or more dropout, or "
                f"the weights of step {state.best_step} (best.safetensors)",
                file=sys.stderr,
            )


def keep_best(state: TrainingState, figures: dict[str, float], group: Group) -> None:
    """Keep a copy of the averaged weights on rank 0 if the first figure is the lowest so far."""
    loss = next(iter(figures.values()))
    if not state.validation or loss <= state.validation.get("best", math.inf):
        average = group.gather_tensors(state.ema.shadow)
        state.best = {name: value.clone() for name, value in average.items()}
        state.best_step, state.validation["best"] = state.step, loss
    state.validation.update(figures)

"""One training step: from a global batch of texts to the gradient and the new weights."""

import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.config import Training
from halfstep.distributed.group import Group, full_tensor, is_sharded
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.training.state import Run, TrainingState

Tensors = dict[str, Tensor]
T = TypeVar("T")


class Examples(NamedTuple):
    """The texts of a global batch: x0[B, L] int64, and which positions noise may mask.

    asked bool [B, L]; None: all of them
    """

    x0: Tensor
    asked: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A global batch as the loss reads it.

    Each tensor has the leading dimension B. The loss, summed over all B rows, is divided by
    `divisor`.
    """

    tensors: Tensors
    divisor: float


class Objective(Protocol):
    """What a training minimizes, and what it measures on held-out text."""

    def corrupt(
        self,
        x0: Tensor,
        generator: torch.Generator,
        step: int | None = None,
        asked: Tensor | None = None,
    ) -> Batch:
        """The batch of x0[B, L] int64; all random numbers come from `generator`.

        `step` is the number of finished optimizer steps; None for held-out text. No position
        outside of asked[B, L] has a loss; None: all have one.
        """
        ...

    def loss(self, part: Tensors) -> Tensor:
        """Loss of some rows of a batch, summed over these rows; scalar.

        The rows are on the host, where their noise was drawn. So the loss knows which positions
        are masked without waiting for the device, and sends it only what the passes read.
        """
        ...

    def validate(self) -> dict[str, float]:
        """Held-out figures of the network as it is now; the first one decides what is best."""
        ...


@dataclass(frozen=True)
class LocalBatch:
    """This rank's rows of a global batch, and what the step needs to know of the whole."""

    tensors: Tensors
    divisor: float
    num_tokens: int
    seed: int


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers of one optimizer step, a function of (seed, step) alone."""
    digest = blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def local_batch(
    objective: Objective, examples: Examples, generator: torch.Generator, run: Run, step: int
) -> LocalBatch:
    """Corrupt the global batch of a step and keep this rank's rows of it.

    Every rank draws the noise of the whole batch, so the noise does not depend on the number of
    ranks.
    """
    x0, asked = examples
    batch = objective.corrupt(x0, generator, step, asked)
    rows = run.group.local_slice(len(x0))
    tensors = {name: value[rows] for name, value in batch.tensors.items()}
    if run.device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return LocalBatch(tensors, batch.divisor, x0.numel(), generator.initial_seed())


def prefetched(make: Callable[[int], T], first: int, last: int) -> Generator[T, None, None]:
    """make(first), ..., make(last - 1); a thread makes the next item while one is used."""
    with ThreadPoolExecutor(1) as thread:
        if first < last:
            future = thread.submit(make, first)
        for step in range(first, last):
            ready = future.result()
            if step + 1 < last:
                future = thread.submit(make, step + 1)
            yield ready


def micro_batches(tensors: Tensors, size: int) -> Iterator[tuple[Tensors, bool]]:
    """Consecutive parts of at most `size` rows, each with: is it the last one?"""
    rows = len(next(iter(tensors.values())))
    for first in range(0, rows, size):
        part = {name: value[first : first + size] for name, value in tensors.items()}
        yield part, first + size >= rows


class LossModule(nn.Module):
    """The objective's loss as a module that owns the network's parameters.

    DDP then sees where a pass begins, although the loss also reads weights outside of the
    network's forward.
    """

    def __init__(self, network: nn.Module, objective: Objective):
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, part: Tensors) -> Tensor:
        return self.objective.loss(part)


class GlobalGradient:
    """Adds up the gradient of the global batch: over micro-batches, and over the ranks.

    Raises HalfstepError if the batch is too small for the ranks, or if ranks that shard the
    network do not divide it.
    """

    def __init__(self, network: nn.Module, objective: Objective, training: Training, group: Group):
        self.precision = training.precision
        self.loss: nn.Module = LossModule(network, objective)
        self.scale = 1.0
        sharded = any(is_sharded(p) for p in network.parameters())
        too_many = training.batch_size % group.size if sharded else training.batch_size < group.size
        if too_many:
            raise HalfstepError(
                f"batch_size: found {training.batch_size}, but {group.size} processes share it; "
                "use fewer processes, a number that divides batch_size"
            )
        if group.size > 1 and not sharded:
            with warnings.catch_warnings():
                # The successor of broadcast_buffers does not exist in older versions of torch.
                warnings.simplefilter("ignore", FutureWarning)
                self.loss = DistributedDataParallel(self.loss, broadcast_buffers=False)
            self.scale = float(group.size)  # DDP averages over the ranks; we need the sum

    def add(self, part: Tensors, divisor: float, device: torch.device, last: bool) -> Tensor:
        """Add the gradient of loss(part) / divisor, and return this value.

        DDP reduces over the ranks in the backward pass of the last part only.
        """
        ddp = self.loss if isinstance(self.loss, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and not last else nullcontext():
            with computing(device, self.precision):
                value = self.loss(part) / divisor
            (value * self.scale).backward()
        return value.detach()


def update(
    state: TrainingState,
    gradient: GlobalGradient,
    batch: LocalBatch,
    lr: float,
    grad_clip: float,
    run: Run,
) -> None:
    """One optimizer step: the gradient of the global batch, clipped; AdamW; the moving average."""
    torch.manual_seed(batch.seed + run.group.rank)  # for dropout
    for part, last in micro_batches(batch.tensors, run.micro_batch):
        state.loss_sum += gradient.add(part, batch.divisor, run.device, last)
    parameters = state.network.parameters()
    state.grad_norm = full_tensor(nn.utils.clip_grad_norm_(parameters, grad_clip, foreach=True))
    state.optimizer.lr = lr
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update()
    state.step += 1
    state.loss_count += 1

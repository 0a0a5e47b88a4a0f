"""The processes of one job, and how a job is asked to stop.

torchrun starts several processes and says so in RANK, WORLD_SIZE and LOCAL_RANK; without it there is one. The engine is torch's own
(torch.distributed: DDP, and fully_shard for large networks) and not Lightning Fabric: the loss reads the vocabulary's weights outside of the network's
forward, which Fabric's wrapper forbids, and its launcher silently falls back to one process inside of a Slurm job.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfstep.config import Machine
from halfstep.distributed.launch import already_printed
from halfstep.errors import HalfstepError, reason

STARTED = time.monotonic()
OUT_OF_TIME = 75  # EX_TEMPFAIL: the same command goes on where this one stopped; docs/reliability.md lists all codes
REPLICATED = 500e6  # parameters up to which every process keeps the whole network (medium: 424M); above, they are sharded
TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Group:
    """This process among its equals; alone when size is 1."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    def local_slice(self, n: int) -> slice:
        """The rows of `n` that are this process's: consecutive, and all processes' together are each row once, in order."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_max(self, *values: float) -> list[float]:
        """The largest of the processes' values, each for itself; on the CPU, so that no device waits."""
        found = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.tolist()

    def all_sum(self, value: Tensor) -> float:
        """The sum of the processes' scalars."""
        if self.size > 1:
            dist.all_reduce(value := value.detach().clone())
        return value.item()

    def gather(self, piece: object) -> list | None:
        """The processes' pieces in order, in the first process; None in the others."""
        if self.size == 1:
            return [piece]
        pieces = [None] * self.size if self.is_main else None
        with self._with_others():
            dist.gather_object(piece, pieces)
        return pieces

    def map_rows(self, n: int, work: Callable[[slice], np.ndarray]) -> np.ndarray | None:
        """work(rows) of each process's own rows of `n`, an array with a row for each, all in order, in the first process; None in the others."""
        own = self.local_slice(n)
        pieces = self.gather(work(own) if own.start < own.stop else None)
        return pieces and np.concatenate([piece for piece in pieces if piece is not None])

    def broadcast(self, said: object = None) -> object:
        """What the first process says, in all of them; the others wait for it."""
        box = [said]
        if self.size > 1:
            with self._with_others():
                dist.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def _with_others(self):
        """Around what processes do together: HalfstepError when one of them is gone."""
        try:
            yield
        except RuntimeError as error:  # gloo's
            raise HalfstepError(
                f"another process of this job has ended, or was silent for {TIMEOUT.seconds // 60} minutes; its own message says why"
            ) from error

    def gather_tensors(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU, in the first process; all have to ask, for each holds a part of what is sharded."""
        found = {}
        for key, value in named.items():
            value = full_tensor(value.detach())
            if self.is_main:
                found[key] = value.cpu()
        return found

    def shard(self, network: nn.Module) -> bool:
        """Shard a large network over the processes, in place (FSDP2), its gradients being summed; False when each process is to keep all of it."""
        if self.size == 1 or sum(p.numel() for p in network.parameters()) <= REPLICATED:
            return False
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(network.parameters()).device.type, (self.size,))
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows sums only
        return True


ALONE = Group()


def join_group(machine: Machine) -> Group:
    """This process's group. HalfstepError unless there are as many processes as `machine.processes` asks for, when it does."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if machine.processes not in (None, size):
        raise HalfstepError(
            f"processes: {machine.processes} were asked for, but torchrun started {size}; let it start as many, or leave it away: "
            f"`halfstep <command> ... --processes {machine.processes}` starts them"
        )
    if size == 1:
        return ALONE
    if not dist.is_initialized():
        cuda = machine.device != "cpu" and torch.cuda.is_available()
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
        except RuntimeError as error:
            raise HalfstepError(
                f"processes: {size} were to meet, but not all did within {TIMEOUT.seconds / 60:.3g} minutes ({reason(error)}); one that "
                "ended early says why in its own message"
            ) from error
    return Group(dist.get_rank(), dist.get_world_size())


def leave_group() -> None:
    """Leave the group, if this process is in one. Without it gloo's threads now and then abort a process that had finished (134)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device() -> torch.device:
    """This process's GPU. HalfstepError where there are fewer than processes."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise HalfstepError(
            f"processes: found {os.environ['LOCAL_WORLD_SIZE']} on this machine, but torch sees {torch.cuda.device_count()} GPUs; ask for as many processes, "
            "or name --device cpu"
        )
    torch.cuda.set_device(device)
    return device


def is_sharded(value: Tensor) -> bool:
    """Does each process hold a part of it (a DTensor)?"""
    return hasattr(value, "full_tensor")


def full_tensor(value: Tensor) -> Tensor:
    """A tensor as one process has it; of a sharded one the parts of all, which all have to ask for."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A copy of `value` on the device of `like`, sharded as that is."""
    value = value.detach().to(like.device, copy=True)
    if not is_sharded(like) or is_sharded(value) or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


@dataclass
class StopRequest:
    """Why this job should stop, if it should: a signal came, or the time is nearly over. `code` is the job's exit code then, else 0."""

    group: Group
    limit: float | None = None
    """seconds after the start of this process"""
    signals: list[int] = field(default_factory=list)

    @property
    def code(self) -> int:
        if self.signals:
            return 128 + self.signals[0]
        left = self.limit is None or time.monotonic() - STARTED < self.limit - min(
            300, 0.08 * self.limit
        )
        return 0 if left else OUT_OF_TIME

    @contextmanager
    def listening(self):
        """SIGTERM and SIGINT are noted, and end nothing, while this lasts."""
        before = {}

        def note(number: int, _) -> None:
            self.signals.append(number)

        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread, where no signal arrives
            pass
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_stopped(code: int, label: str, step: int) -> None:
    """SystemExit with this code, and a line that says why."""
    why = (
        "the time limit is near"
        if code == OUT_OF_TIME
        else f"{signal.Signals(code - 128).name} came"
    )
    line = f"{label} | stopped after step {step}: {why}; its state is kept, and the same command goes on from there"
    if not already_printed(line):
        print(line, file=sys.stderr, flush=True)
    leave_group()
    raise SystemExit(code)

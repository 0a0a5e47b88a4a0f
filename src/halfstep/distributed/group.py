"""The ranks of one job, what they exchange, and the requests to stop the job.

torchrun starts the processes and sets RANK, WORLD_SIZE and LOCAL_RANK; without these variables
there is one process. The engine is torch.distributed: DDP, and fully_shard (FSDP2) for large
networks. It is not Lightning Fabric, for two reasons. The loss reads the readout's weights outside
of the network's forward, which Fabric's wrapper forbids. And inside a Slurm job Fabric's launcher
silently falls back to one process.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from halfstep.config import Machine
from halfstep.distributed.device import local_gpu
from halfstep.distributed.environment import check_first_address, own_rank, world_size
from halfstep.distributed.launch import MEETING, already_printed
from halfstep.errors import HalfstepError, reason

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

STARTED = time.monotonic()
OUT_OF_TIME = 75  # EX_TEMPFAIL: the same command continues; docs/reliability.md lists all codes
REPLICATED = 500e6  # up to this many parameters every rank keeps the whole network (medium: 424M)
TIMEOUT = timedelta(minutes=30)
LEFT: list[Any] = []  # groups that this process was in; see leave_group
EXIT_S = 20.0  # seconds in which a process whose state is saved must end; torchrun waits 30


@dataclass(frozen=True)
class Group:
    """The ranks that share one job; `rank` is this process, `size` the world size."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only rank that writes files."""
        return self.rank == 0

    def local_slice(self, n: int) -> slice:
        """This rank's contiguous slice of n rows; the slices of all ranks partition range(n)."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def all_max(self, *values: float) -> list[float]:
        """All-reduce: the maximum over the ranks of each value. It runs on the CPU."""
        maximum = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return maximum.tolist()

    def all_sum(self, value: Tensor) -> float:
        """All-reduce: the sum over the ranks of a scalar tensor."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value.item()

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_max(0)

    def broadcast(self, value: Any = None) -> Any:
        """Broadcast rank 0's value to every rank as JSON; the `value` of other ranks is ignored.

        Tuples become lists on the other ranks. Nothing that comes over the network is unpickled.
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_main else b""
        (length,) = self.all_max(len(text))
        content = _as_tensor(text, int(length))
        dist.broadcast(content, src=0)
        return value if self.is_main else json.loads(content.numpy().tobytes())

    def gather_rows(self, rows: np.ndarray | None) -> np.ndarray | None:
        """Concatenate the rows of all ranks, in rank order, on rank 0; other ranks get None.

        A rank without rows gives None; if all do, rank 0 gets None too. The rows travel in NumPy's
        format, without pickles.
        """
        if self.size == 1:
            return rows
        file = io.BytesIO()
        if rows is not None:
            np.save(file, rows, allow_pickle=False)
        (length,) = self.all_max(len(file.getvalue()))
        if not length:
            return None
        content = _as_tensor(file.getvalue(), int(length))
        every = [torch.empty_like(content) for _ in range(self.size)]
        dist.gather(content, every if self.is_main else None)
        if not self.is_main:
            return None
        # np.load ignores the zeros after an array; only zeros stand for no rows.
        files = [io.BytesIO(one.numpy().tobytes()) for one in every if one.any()]
        return np.concatenate([np.load(file, allow_pickle=False) for file in files])

    def map_rows(self, n: int, work: Callable[[slice], np.ndarray]) -> np.ndarray | None:
        """Compute n rows on all ranks, each its `local_slice`, and gather them on rank 0.

        work(rows) returns an array with one row for each of `rows`. Other ranks get None.
        """
        rows = self.local_slice(n)
        return self.gather_rows(work(rows) if rows.start < rows.stop else None)

    def gather_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors on the CPU of rank 0; an empty dict on other ranks.

        Every rank must call it, because each holds a shard of a sharded tensor.
        """
        whole = {}
        for name, value in tensors.items():
            value = full_tensor(value.detach())
            if self.is_main:
                whole[name] = value.cpu()
        return whole

    def shards(self, network: nn.Module) -> bool:
        """Is this network sharded over the ranks?"""
        return self.size > 1 and sum(p.numel() for p in network.parameters()) > REPLICATED

    def shard(self, network: nn.Module) -> bool:
        """Shard a network of more than REPLICATED parameters over the ranks, in place (FSDP2).

        Its gradients are then summed over the ranks. Returns False if every rank keeps all of it.
        """
        if not self.shards(network):
            return False
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(next(network.parameters()).device.type, (self.size,))
        for module in (*network.blocks, network):
            fully_shard(module, mesh=mesh)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo supports only sums
        return True


ALONE = Group()


def _as_tensor(content: bytes, length: int) -> Tensor:
    """The bytes as a tensor [length] uint8, with zeros at its end."""
    return torch.frombuffer(bytearray(content.ljust(length, b"\0")), dtype=torch.uint8)


def join_group(machine: Machine) -> Group:
    """Join the group that torchrun's variables describe; its GPU becomes this process's device.

    Raises HalfstepError if the world size is not machine.processes, where that is given, or if
    some ranks do not join in time.
    """
    size = world_size()
    if machine.processes not in (None, size):
        raise HalfstepError(
            f"processes: found a world size of {size}, expected {machine.processes}; "
            f"let torchrun start {machine.processes} processes, or leave torchrun out: "
            f"`halfstep <command> ... --processes {machine.processes}` starts them"
        )
    if size == 1:
        if "RANK" in os.environ:
            own_rank()  # one of several processes that do not know of one another
        return ALONE
    if not dist.is_initialized():
        cuda = machine.device != "cpu" and torch.cuda.is_available()
        _meet("cpu:gloo,cuda:nccl" if cuda else "gloo", size)
        if cuda and machine.device in ("auto", "cuda"):
            torch.cuda.set_device(local_gpu())
    return Group(dist.get_rank(), dist.get_world_size())


def _meet(backend: str, size: int) -> None:
    """Form the group: through a file on one machine, else at the address of rank 0."""
    rank = own_rank()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        _stay_on_loopback()
    path = os.environ.get(MEETING)
    try:
        if path:
            _check_folder(path)
            store = dist.FileStore(path, size)
            dist.init_process_group(
                backend, timeout=TIMEOUT, store=store, rank=rank, world_size=size
            )
        else:
            check_first_address()
            dist.init_process_group(backend, timeout=TIMEOUT)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise HalfstepError(
                f"MASTER_PORT: another program has port {os.environ['MASTER_PORT']} of this "
                "machine; name another port to torchrun"
            ) from error
        minutes = TIMEOUT.seconds / 60
        raise HalfstepError(
            f"processes: not all {size} joined the group within {minutes:.3g} minutes "
            f"({reason(error)}); one that ended early says why in its own message"
        ) from error


def _check_folder(meeting: str) -> None:
    """The folder of the meeting must be there; torch would wait for it."""
    folder = os.path.dirname(meeting)
    if not os.path.isdir(folder):
        raise HalfstepError(
            f"{MEETING}: found {meeting[:200]!r}, but its folder is not there: the command that "
            "started this process has ended; start it again, or unset the variable"
        )


def _stay_on_loopback() -> None:
    """Let gloo, and NCCL unless the environment names its interface, listen on loopback only."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = "lo" if "lo" in names else "lo0"  # Linux, macOS
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def lost_rank(error: RuntimeError) -> str:
    """The sentence for an error of the network that another process causes; "" for any other."""
    lost = re.search("Connection (closed|reset)|Broken pipe|[Tt]imed? ?out", str(error))
    if not dist.is_initialized() or not (lost or isinstance(error, dist.DistBackendError)):
        return ""
    return (
        "another process of this job has ended, or was silent for "
        f"{TIMEOUT.seconds // 60} minutes; its own message says why"
    )


def leave_group() -> None:
    """Leave the group, if this process is in one.

    Otherwise a thread of gloo may abort a process that has already finished (exit code 134).

    The group's object is kept. If DDP were its last owner, Python would free it while it holds its
    global lock and wait for gloo's threads, one of which may wait for that lock.
    """
    if dist.is_initialized():
        LEFT.append(dist.group.WORLD)
        dist.destroy_process_group()


def is_sharded(value: Tensor) -> TypeGuard[DTensor]:
    """True for a DTensor, of which each rank holds a shard."""
    return hasattr(value, "full_tensor")


def full_tensor(value: Tensor) -> Tensor:
    """The whole of a sharded tensor, which all ranks must ask for; any other tensor as it is."""
    return value.full_tensor() if is_sharded(value) else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """A copy of `value` on the device of `like`, sharded in the same way."""
    value = value.detach().to(like.device, copy=True)
    if not is_sharded(like) or is_sharded(value) or value.ndim == 0:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


@dataclass
class StopRequest:
    """Whether this process should stop: after a signal, or when its time is nearly over.

    limit: seconds after the start of this process (no limit by default)
    signals: the numbers of the signals that came
    """

    limit: float | None = None
    signals: list[int] = field(default_factory=list)

    @property
    def code(self) -> int:
        """The exit code to stop with; 0 if there is no reason to stop."""
        if self.signals:
            return 128 + self.signals[0]
        if self.limit is None:
            return 0
        reserve = min(300, 0.08 * self.limit)  # seconds to save the state in
        return OUT_OF_TIME if time.monotonic() - STARTED >= self.limit - reserve else 0

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Record SIGTERM and SIGINT instead of ending the process.

        A SIGINT that was ignored when this program began stays ignored.
        """
        before = {}

        def note(number: int, _frame: object) -> None:
            self.signals.append(number)

        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        try:
            for number in numbers:
                before[number] = signal.signal(number, note)
        except ValueError:  # not the main thread, which alone receives signals
            pass
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def exit_stopped(code: int, label: str, step: int) -> NoReturn:
    """Leave the group, print one line that says why, and raise SystemExit(code)."""
    why = "the time limit is near"
    if code != OUT_OF_TIME:
        why = f"received {signal.Signals(code - 128).name}"
    line = f"{label} | stopped after step {step}: {why}; "
    line += "the state is saved, and the same command continues from it"
    if not already_printed(line):
        print(line, file=sys.stderr, flush=True)
    if dist.is_initialized():
        end_in_time(code)
        leave_group()
    raise SystemExit(code)


def end_in_time(code: int) -> None:
    """End this process with `code` after EXIT_S seconds, if it has not ended by itself.

    A process that hangs would hold its node. Where even Python's threads hang, faulthandler prints
    their stacks and ends the process with code 1.
    """
    end = threading.Timer(EXIT_S, os._exit, [code])
    end.daemon = True
    end.start()
    faulthandler.dump_traceback_later(1.5 * EXIT_S, exit=True, file=2)

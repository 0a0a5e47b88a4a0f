"""halfstep commands in processes of their own that start in milliseconds: forks of a server that has imported torch already."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed

from halfstep.cli import main
from halfstep.commands import distill, generate, train
from halfstep.distributed import group as processes
from halfstep.errors import HalfstepError
from halfstep.training import loop

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([  # Python 3.11's server does not see the path of the tests, so not this file
    "pytest", "tyro", "safetensors.torch", "torch.distributed.fsdp", "torch._dynamo", "halfstep.cli", "halfstep.resolve", "halfstep.commands.train",
    "halfstep.commands.distill", "halfstep.commands.generate", "transformers.models.auto", "transformers.models.gpt_neox.modeling_gpt_neox",
    "halfstep.metrics.lambada",
])  # fmt: skip


def start(
    line: str,
    errors: Path,
    before: Callable[..., None] | None = None,
    *args: object,
    env: dict[str, str] | None = None,
):
    """A running `halfstep <line>`, its standard error in a file; `before(*args)`, a function of a module, is called in it first.

    `one && another` are run one after another, until one fails.
    """
    process = _context.Process(target=_run, args=(line, errors, before, args, env or {}))
    process.start()
    return process


def _run(line: str, errors: Path, before, args, env: dict[str, str]) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(env)
    torch.set_num_threads(1)
    if before:
        before(*args)
    for part in line.split(" && "):
        try:
            code = main(part.split())
        except SystemExit as stopped:
            code = stopped.code
        assert (
            code == 1 or not torch.distributed.is_initialized()
        )  # else gloo may abort a process that had finished
        if code:
            sys.exit(code)


def launch(
    line: str, size: int, log: Path, before=None, *args: object, timeout: float = 120
) -> list[tuple[int, str]]:
    """(exit code, standard error) of `size` processes that run one command together, with torchrun's variables and a file to meet in."""
    log.mkdir(exist_ok=True, parents=True)
    children = []
    for rank in range(size):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        children.append(
            start(
                line,
                log / f"errors-{rank}",
                _meet,
                log / "meeting",
                rank,
                size,
                before,
                *args,
                env=env,
            )
        )
    for child in children:
        child.join(timeout)
        assert child.exitcode is not None, [
            (log / f"errors-{rank}").read_text() for rank in range(size)
        ]
    return [
        (child.exitcode, (log / f"errors-{rank}").read_text())
        for rank, child in enumerate(children)
    ]


def _meet(meeting: Path, rank: int, size: int, before, *args) -> None:
    real, times = torch.distributed.init_process_group, count()
    torch.distributed.init_process_group = lambda *a, **k: real(
        *a, init_method=f"file://{meeting}-{next(times)}", rank=rank, world_size=size, **k
    )
    if before:
        before(*args)


def note_batches(log: Path, sharded: bool) -> None:
    """From now on `fit` writes down what each process draws (the whole batch, its noise and divisor) and on how many rows it trains."""
    if sharded:
        processes.REPLICATED = 0
    real = loop.fit

    def fit(network, batch, corrupt, loss, validate, training, *, group, **more):
        assert any(map(processes.is_sharded, network.parameters())) == (sharded and group.size > 1)
        drawn, rows = [], []

        def noted(x0, random):
            parts, divisor = corrupt(x0, random)
            noise = b"".join(v.contiguous().numpy().tobytes() for _, v in sorted(parts.items()))
            drawn.append((hashlib.sha256(x0.numpy().tobytes() + noise).hexdigest(), divisor))
            return parts, divisor

        def counted(part):
            rows.append(len(next(iter(part.values()))) if torch.is_grad_enabled() else 0)
            return loss(part)

        fitted = real(network, batch, noted, counted, validate, training, group=group, **more)
        (log / f"batches-{group.rank}").write_text("\n".join(map(repr, drawn)))
        (log / f"rows-{group.rank}").write_text(str(sum(rows)))
        return fitted

    train.fit = distill.fit = fit


def note_rows(log: Path) -> None:
    """From now on each process writes down every text that it begins to draw, every row that a network reads for a score, and every file that it writes."""
    file, embedding, sample = (
        open(log / f"rows-{os.environ['RANK']}", "w", buffering=1),
        torch.nn.functional.embedding,
        generate.sample,
    )
    drawing = []

    def noted(x, table, *more):
        if not drawing:
            file.writelines(
                " ".join(map(str, row)).rstrip(" 0") + "\n" for row in x.tolist()
            )  # without padding, which is 0
        return embedding(x, table, *more)

    def begun(denoiser, number, *more, draws, **how):
        file.writelines(f"text {draws.first + i}\n" for i in range(number))
        drawing.append(draws.first)
        try:
            return sample(denoiser, number, *more, draws=draws, **how)
        finally:
            drawing.pop()

    def audit(event, about):
        if event == "os.rename" and str(about[1]).startswith(f"{log}/"):
            file.write(f"file {os.path.relpath(about[1], log)}\n")

    torch.nn.functional.embedding, generate.sample = noted, begun
    sys.addaudithook(audit)


def break_down(rank: int, how: str) -> None:
    """In one process the first pass of a network ends in an error, or in kill -9."""
    if os.environ["RANK"] != str(rank):
        return

    def embedding(*_):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise HalfstepError("the network broke down")

    torch.nn.functional.embedding = embedding


def impatient(absent: int) -> None:
    """Three seconds to meet, and one process that ends at once."""
    processes.TIMEOUT = timedelta(seconds=3)
    if os.environ["RANK"] == str(absent):
        os._exit(0)

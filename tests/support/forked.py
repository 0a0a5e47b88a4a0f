"""halfstep commands in processes that start fast: forks of a server that has torch loaded."""

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
from halfstep.commands import distill, train, writers
from halfstep.distributed import group as distributed
from halfstep.distributed.launch import MEETING
from halfstep.errors import HalfstepError
from halfstep.training import loop
from halfstep.training.step import Batch

PATIENCE_S = 600  # with commands of several ranks on a busy machine

_context = multiprocessing.get_context("forkserver")
# Not this file: Python 3.11's server does not know the path of the tests.
_context.set_forkserver_preload(
    [
        "pytest",
        "tyro",
        "safetensors.torch",
        "torch.distributed.fsdp",
        "torch._dynamo",
        "halfstep.cli",
        "halfstep.resolve",
        "halfstep.commands.train",
        "halfstep.commands.distill",
        "halfstep.commands.generate",
        "transformers.models.auto",
        "transformers.models.gpt_neox.modeling_gpt_neox",
        "halfstep.metrics.lambada",
        "halfstep.commands.track",
        "mlflow.store.tracking.sqlalchemy_store",
        "snakemake.cli",
        "snakemake.workflow",
    ]
)


def start(
    line: str,
    errors: Path,
    before: Callable[..., None] | None = None,
    *args: object,
    env: dict[str, str] | None = None,
):
    """A running `halfstep <line>`, with its standard error in a file.

    It calls `before(*args)` first, a function of a module. `one && another` runs the commands one
    after another, until one fails.
    """
    process = _context.Process(target=_run, args=(line, errors, before, args, env or {}))
    process.start()
    return process


def _run(line: str, errors: Path, before, args, env: dict[str, str]) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started the tests
    os.environ.update(env)
    torch.set_num_threads(1)
    if before:
        before(*args)
    for part in line.split(" && "):
        try:
            code = main(part.split())
        except SystemExit as stopped:
            code = stopped.code
        # A process that is still in its group may be aborted by gloo after it has finished.
        assert code == 1 or not torch.distributed.is_initialized()
        if code:
            sys.exit(code)


def launch(line: str, size: int, log: Path, before=None, *args: object) -> list[tuple[int, str]]:
    """(exit code, standard error) of each of `size` ranks that run one command together.

    They have torchrun's variables, and a file as their meeting point.
    """
    log.mkdir(exist_ok=True, parents=True)
    errors = [log / f"errors-{rank}" for rank in range(size)]
    children = []
    for rank in range(size):
        env = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        meeting = log / "meeting", rank, size, before, *args
        children.append(start(line, errors[rank], _meet, *meeting, env=env))
    for child in children:
        child.join(PATIENCE_S)
        assert child.exitcode is not None, [file.read_text() for file in errors]
    codes = [child.exitcode for child in children]
    return [(code, file.read_text()) for code, file in zip(codes, errors, strict=True)]


def _meet(meeting: Path, rank: int, size: int, before, *args) -> None:
    real, times = torch.distributed.init_process_group, count()

    def init_process_group(*given, **options):
        store = torch.distributed.FileStore(f"{meeting}-{next(times)}", size)
        return real(*given, **options | {"store": store, "rank": rank, "world_size": size})

    os.environ[MEETING] = str(meeting)  # a command after another meets in another file
    torch.distributed.init_process_group = init_process_group
    if before:
        before(*args)


class NotedObjective:
    """An objective that notes what is drawn, and the number of rows that are trained on."""

    def __init__(self, objective):
        self.objective, self.drawn, self.rows = objective, [], 0

    def corrupt(self, x0, generator, step=None, asked=None) -> Batch:
        batch = self.objective.corrupt(x0, generator, step, asked)
        digest = hashlib.sha256(x0.numpy().tobytes())
        for _, value in sorted(batch.tensors.items()):
            digest.update(value.contiguous().numpy().tobytes())
        self.drawn.append((digest.hexdigest(), batch.divisor))
        return batch

    def loss(self, part):
        if torch.is_grad_enabled():
            self.rows += len(next(iter(part.values())))
        return self.objective.loss(part)

    def validate(self):
        return self.objective.validate()


def note_batches(log: Path, sharded: bool) -> None:
    """From now on `fit` writes what each rank draws (whole batch, noise, divisor) and its rows."""
    if sharded:
        distributed.REPLICATED = 0
    real = loop.fit

    def fit(network, objective, batches, training, start, run):
        found = any(map(distributed.is_sharded, network.parameters()))
        assert found == (sharded and run.group.size > 1)
        noted = NotedObjective(objective)
        state = real(network, noted, batches, training, start, run)
        (log / f"batches-{run.group.rank}").write_text("\n".join(map(repr, noted.drawn)))
        (log / f"rows-{run.group.rank}").write_text(str(noted.rows))
        return state

    train.fit = distill.fit = fit


def note_rows(log: Path) -> None:
    """From now on each rank writes down what it does.

    That is: every text that it begins to draw, every row that a network reads for a score, and
    every file that it writes.
    """
    file = open(log / f"rows-{os.environ['RANK']}", "w", buffering=1)  # noqa: SIM115 - until the rank ends
    embedding, sample = torch.nn.functional.embedding, writers.sample
    drawing = []

    def noted(x, table, *more):
        if not drawing:
            for row in x.tolist():
                file.write(" ".join(map(str, row)).rstrip(" 0") + "\n")  # 0 is padding
        return embedding(x, table, *more)

    def begun(denoiser, number, *more, draws, **options):
        file.writelines(f"text {draws.first + i}\n" for i in range(number))
        drawing.append(draws.first)
        try:
            return sample(denoiser, number, *more, draws=draws, **options)
        finally:
            drawing.pop()

    def audit(event, about):
        if event == "os.rename" and str(about[1]).startswith(f"{log}/"):
            file.write(f"file {os.path.relpath(about[1], log)}\n")

    torch.nn.functional.embedding, writers.sample = noted, begun
    sys.addaudithook(audit)


def break_down(rank: int, how: str) -> None:
    """On one rank the first pass of a network ends in an error, or in kill -9."""
    if os.environ["RANK"] != str(rank):
        return

    def embedding(*_):
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise HalfstepError("the network broke down")

    torch.nn.functional.embedding = embedding


def impatient(absent: int) -> None:
    """The ranks have three seconds to meet, and one of them ends at once."""
    distributed.TIMEOUT = timedelta(seconds=3)
    if os.environ["RANK"] == str(absent):
        os._exit(0)

"""--processes N starts torchrun: the codes, sentences and signals are those of one process."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from small import MACHINE, call

from halfstep.distributed import launch
from halfstep.distributed.group import Group
from halfstep.errors import HalfstepError

TRAINING = "--size tiny --num-steps 100000 --batch-size 4 --warmup-steps 2 --precision float32 --validate-every 5"


@pytest.fixture
def start(pipeline, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def started(words: str) -> subprocess.Popen:
        line = f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/t/out {TRAINING} {MACHINE} --processes 2 {words}"
        return subprocess.Popen(
            [sys.executable, "-m", "halfstep.cli", *line.split()], stderr=subprocess.PIPE, text=True
        )

    return started


def children(process: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == process and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.parametrize(("words", "code", "line"), [
    ("--time-limit 1e-6", 75, "pretrain t | stopped after step 1: the time limit is near; its state is kept, and the same command goes on from there"),
    ("--lr -1", 1, "halfstep pretrain: lr: found -1.0: input should be greater than 0"),
    ("--batch-size 1", 1, "halfstep pretrain: batch_size: found 1, but 2 processes share it; ask for fewer, by which it can be divided"),
])  # fmt: skip
def test_the_processes_code_and_one_sentence(start, words, code, line):
    process = start(words)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (code, f"{line}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("number", "target", "code"), [
    (signal.SIGTERM, "launcher", 143), (signal.SIGINT, "launcher", 130), (signal.SIGTERM, "all", 143), (signal.SIGKILL, "launcher", -9),
    (signal.SIGKILL, "worker", 137),
])  # fmt: skip
def test_a_signal_reaches_the_processes_and_their_state_is_kept(
    start, tmp_path, number, target, code
):
    process, journal = start(""), tmp_path / "t/out/journal.jsonl"
    until = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    try:
        for one in {
            "launcher": [process.pid],
            "worker": workers[1:],
            "all": [*workers, process.pid],
        }[target]:
            os.kill(one, number)
        _, said = process.communicate(timeout=120)
        assert process.returncode == code, said
        while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
            assert time.monotonic() < until, left
            time.sleep(0.05)
    finally:
        for one in (*workers, process.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    if target != "worker":
        came = signal.Signals(number if number != signal.SIGKILL else signal.SIGTERM).name
        assert (
            said.count(f"{came} came; its state is kept") == 1
            and (tmp_path / "t/out/state/state.safetensors").exists()
        ), said


@pytest.mark.parametrize(("argv", "world", "processes"), [
    ("pretrain --processes 4 --seed 1", None, 4), ("pretrain --processes=4", None, 4), ("pretrain --processes 1", None, 1), ("pretrain --seed 4", None, 1),
    ("pretrain --processes 4", "4", 1), ("pretrain --processes 4", "2", 1), ("pretrain --processes 4 --help", None, 1), ("pretrain --processes four", None, 1),
])  # fmt: skip
def test_who_starts_processes(monkeypatch, argv, world, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world:
        monkeypatch.setenv("WORLD_SIZE", world)
    assert launch.processes_requested(argv.split()) == processes


def test_one_process_pays_nothing_for_it():
    code = "import sys; from halfstep.cli import main; main(['generate', '--processes', '1', '--checkpoint', 'none', '--output', 'none', '--steps', '8'])"
    seen = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True
    ).stderr
    assert "halfstep.distributed.launch" in seen and "torch.distributed.run" not in seen


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A task of srun on nodes a3 and a4, and Slurm's own word about them."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\ncase "$*" in\n"show hostnames a[3-4]") printf "a3\\na4\\n" ;;\n'
        '"show node a3") echo "NodeName=a3 NodeAddr=10.0.0.3 Port=1" ;;\n*) exit 1\nesac\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key, value in dict(
        STEP_NUM_NODES=2, STEP_NUM_TASKS=2, STEP_NODELIST="a[3-4]", NODEID=1, JOB_ID=7
    ).items():
        monkeypatch.setenv(f"SLURM_{key}", str(value))
    return monkeypatch


def test_a_task_on_each_of_two_nodes_is_torchruns_node(step):
    assert launch.torchrun_arguments(8) == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=4",
        "--master-addr=10.0.0.3",
        "--master-port=15104",
    ]


def test_tasks_that_do_not_fit_the_nodes(step):
    with pytest.raises(
        HalfstepError, match="processes: 3 were asked for, but srun started 2 tasks on 2 nodes"
    ):
        launch.torchrun_arguments(3)
    step.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(
        HalfstepError, match="processes: 8 were asked for, but srun started 4 tasks on 2 nodes"
    ):
        launch.torchrun_arguments(8)
    step.setenv("SLURM_STEP_NUM_TASKS", "2")
    step.setenv("SLURM_STEP_NODELIST", "elsewhere")
    with pytest.raises(HalfstepError, match="`scontrol show hostnames elsewhere` has to say"):
        launch.torchrun_arguments(8)


def test_a_meeting_that_fails_is_a_sentence():
    """The first of two nodes cannot have its port: another program has it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [
            "--nnodes=2",
            "--node-rank=0",
            "--nproc-per-node=1",
            "--master-addr=127.0.0.1",
            f"--master-port={taken.getsockname()[1]}",
        ]
        code = f"import sys; from halfstep import cli, launch; launch.torchrun_arguments = lambda n: {words}; sys.exit(cli.main(['pretrain', '--processes', '2']))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert (
        "halfstep pretrain: processes: torchrun could not bring 2 together (--nnodes=2"
        in done.stderr
    )


def test_what_asks_for_processes(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for line, n in {
        "--processes 3": 3,
        "--processes=3": 3,
        "--processes 3 --processes 1": 1,
        "--processes": 1,
        "--processes many": 1,
        "--help --processes 3": 1,
    }.items():
        assert launch.processes_requested(["generate", *line.split()]) == n, line
    assert launch.processes_requested(["generate", "--prompt", "use --processes 4 now"]) == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert launch.processes_requested(["generate", "--processes", "3"]) == 1


def test_latency_is_of_one_process(monkeypatch, pipeline, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("halfstep.commands.benchmark.join_group", lambda machine: Group(0, 2))
    assert (
        call(
            f"latency --checkpoint {pipeline.teacher} --baseline {pipeline.baseline} --output {tmp_path}/rows.json --processes 2 {MACHINE}"
        )
        == 1
    )
    assert (
        "halfstep latency: processes: latency times one process" in capsys.readouterr().err
        and not (tmp_path / "rows.json").exists()
    )

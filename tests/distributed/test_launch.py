"""`--processes N` starts torchrun: exit codes, messages and signals are those of one process."""

import errno
import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from small import MACHINE, call

from halfstep.distributed import launch
from halfstep.distributed.group import Group
from halfstep.errors import HalfstepError

TRAINING = (
    "--size tiny --num-steps 100000 --batch-size 4 --warmup-steps 2 --precision float32 "
    "--validate-every 5"
)
STOPPED = "the state is saved, and the same command continues from it"


@pytest.fixture
def start(pipeline, tmp_path, monkeypatch):
    """Starts a training of two processes with more options."""
    monkeypatch.setenv("PYTHONPATH", str(Path(launch.__file__).parents[2]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place = f"--corpus {pipeline.corpus} --output {tmp_path}/t/out"

    def started(options: str, sigint: Any = signal.default_int_handler) -> subprocess.Popen:
        signal.signal(signal.SIGINT, sigint)  # a program inherits whether a signal is ignored
        line = f"pretrain {place} {TRAINING} {MACHINE} --processes 2 {options}"
        command = [sys.executable, "-m", "halfstep.cli", *line.split()]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    before = signal.getsignal(signal.SIGINT)
    yield started
    signal.signal(signal.SIGINT, before)


def wait_for_a_logged_step(process: subprocess.Popen, journal: Path) -> None:
    until = time.monotonic() + 120
    while not (journal.exists() and journal.stat().st_size):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def children(process: int) -> list[int]:
    """Ids of the living child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if int(parent) == process and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (
            "--time-limit 1e-6",
            75,
            f"pretrain t | stopped after step 1: the time limit is near; {STOPPED}",
        ),
        ("--lr -1", 1, "halfstep pretrain: lr: found -1.0: input should be greater than 0"),
        (
            "--batch-size 1",
            1,
            "halfstep pretrain: batch_size: found 1, but 2 processes share it; "
            "use fewer processes, a number that divides batch_size",
        ),
    ],
)
def test_the_exit_code_of_the_processes_and_one_message(start, options, code, message):
    process = start(options)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (code, f"{message}\n")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "target", "code"),
    [
        (signal.SIGTERM, "launcher", 143),
        (signal.SIGINT, "launcher", 130),
        (signal.SIGTERM, "all", 143),
        (signal.SIGKILL, "launcher", -9),
        (signal.SIGKILL, "worker", 137),
    ],
)
def test_a_signal_reaches_the_processes_and_their_state_is_kept(
    start, tmp_path, number, target, code
):
    process, journal = start(""), tmp_path / "t/out/journal.jsonl"
    until = time.monotonic() + 120
    wait_for_a_logged_step(process, journal)
    workers = children(process.pid)
    assert len(workers) == 2
    targets = {
        "launcher": [process.pid],
        "worker": workers[1:],
        "all": [*workers, process.pid],
    }
    try:
        for one in targets[target]:
            os.kill(one, number)
        _, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "Traceback" not in err
        while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
            assert time.monotonic() < until, left
            time.sleep(0.05)
    finally:
        for one in (*workers, process.pid):
            with suppress(ProcessLookupError):
                os.kill(one, signal.SIGKILL)
    if target == "worker":
        assert re.search("the process of rank 1 was ended by SIGKILL", err), err
    else:
        # The workers get SIGTERM when their launcher is killed.
        name = "SIGINT" if number == signal.SIGINT else "SIGTERM"
        assert err.count(f"received {name}; {STOPPED}") == 1, err
        assert (tmp_path / "t/out/state/state.safetensors").exists()


@pytest.mark.parametrize("target", ["launcher", "all"])
def test_a_sigint_that_was_ignored_at_the_start_stays_ignored(start, tmp_path, target):
    """A shell without job control starts `command &` so. SIGTERM stops the training."""
    process, journal = start("", signal.SIG_IGN), tmp_path / "t/out/journal.jsonl"
    wait_for_a_logged_step(process, journal)
    targets = [process.pid, *children(process.pid)]
    try:
        for one in targets if target == "all" else targets[:1]:
            os.kill(one, signal.SIGINT)
        size, until = journal.stat().st_size, time.monotonic() + 120
        while journal.stat().st_size == size:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.terminate()
        _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and err.count(f"received SIGTERM; {STOPPED}") == 1, err


@pytest.mark.parametrize("interface", [None, "eth0"])
def test_nothing_listens_off_loopback(start, monkeypatch, tmp_path, interface):
    """Every socket of the command and its processes that is open to connections or datagrams.

    A site may name an interface for jobs of several nodes; one machine needs loopback only.
    """
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    process = start("")
    try:
        wait_for_a_logged_step(process, tmp_path / "t/out/journal.jsonl")
        command = psutil.Process(process.pid)
        tree = [command, *command.children(recursive=True)]
        meeting = Path(tree[-1].environ()[launch.MEETING])
        assert meeting.exists() and meeting.parent.stat().st_mode & 0o777 == 0o700
        sockets = [found for one in tree for found in one.net_connections("inet")]
    finally:
        process.terminate()
        process.communicate(timeout=120)
    listening = [s.laddr.ip for s in sockets if not s.raddr and s.laddr]
    assert len(tree) >= 3 and listening  # gloo listens
    assert {ip for ip in listening if not ipaddress.ip_address(ip).is_loopback} == set()


@pytest.mark.parametrize(
    ("line", "world_size", "processes"),
    [
        ("pretrain --processes 4 --seed 1", None, 4),
        ("pretrain --processes=4", None, 4),
        ("pretrain --processes 1", None, 1),
        ("pretrain --seed 4", None, 1),
        ("pretrain --processes 4", "4", 1),
        ("pretrain --processes 4", "2", 1),
        ("pretrain --processes 4 --help", None, 1),
        ("pretrain --help --processes 4", None, 1),
        ("pretrain --processes four", None, 1),
        ("pretrain --processes", None, 1),
        ("pretrain --processes 3 --processes 1", None, 1),
        ("generate --processes 3", "3", 1),
    ],
)
def test_how_many_processes_a_command_starts(monkeypatch, line, world_size, processes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert launch.processes_requested(line.split()) == processes


def test_a_prompt_about_processes_starts_none(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert launch.processes_requested(["generate", "--prompt", "use --processes 4 now"]) == 1


def test_one_process_does_not_import_torchrun():
    line = "generate --processes 1 --checkpoint none --output none --steps 8"
    code = f"import sys; from halfstep.cli import main; main({line.split()})"
    command = [sys.executable, "-X", "importtime", "-c", code]
    err = subprocess.run(command, capture_output=True, text=True).stderr
    assert "halfstep.distributed.launch" in err and "torch.distributed.run" not in err


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A task of srun on nodes a3 and a4, with a `scontrol` that knows them."""
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\ncase "$*" in\n"show hostnames a[3-4]") printf "a3\\na4\\n" ;;\n'
        '"show node a3") echo "NodeName=a3 NodeAddr=10.0.0.3 Port=1" ;;\n*) exit 1\nesac\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    variables = {
        "STEP_NUM_NODES": 2,
        "STEP_NUM_TASKS": 2,
        "STEP_NODELIST": "a[3-4]",
        "NODEID": 1,
        "JOB_ID": 7,
    }
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    return monkeypatch


def test_a_task_on_each_of_two_nodes_is_one_node_of_torchrun(step):
    assert launch.torchrun_arguments(8) == [
        "--nnodes=2",
        "--node-rank=1",
        "--nproc-per-node=4",
        "--master-addr=10.0.0.3",
        f"--master-port={launch.step_port()}",
    ]


def test_the_port_is_one_for_all_nodes_and_differs_with_what_srun_alone_knows(step):
    ports = set()
    for launcher in range(40_000, 40_100):
        step.setenv("SLURM_STEP_LAUNCHER_PORT", str(launcher))
        step.setenv("SLURM_NODEID", "0")
        first = launch.step_port()
        step.setenv("SLURM_NODEID", "1")
        assert launch.step_port() == first and 15_000 <= first < 25_000
        ports.add(first)
    assert len(ports) > 90  # hardly any two of a hundred are the same


def test_several_nodes_meet_without_a_file_and_without_torchruns_pickles(step):
    """torchrun's rendezvous `static`, its default, keeps no pickles in its store."""
    arguments = launch.torchrun_arguments(8)
    assert not any(word.startswith("--rdzv") or word == "--standalone" for word in arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STEP_NUM_NODES", "abc"),
        ("STEP_NUM_NODES", "0"),
        ("STEP_NUM_TASKS", "2.5"),
        ("STEP_NUM_TASKS", "9" * 5000),
        ("NODEID", "-1"),
        ("NODEID", ""),
    ],
)
def test_a_variable_of_slurm_that_is_no_number(step, name, value):
    step.setenv(f"SLURM_{name}", value)
    with pytest.raises(HalfstepError, match=f"SLURM_{name}: found .*, expected a whole number"):
        launch.torchrun_arguments(8)


def test_far_more_processes_than_cores_are_a_slip(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(48), raising=False)
    assert launch.torchrun_arguments(48) == [*launch.ONE_MACHINE, "--nproc-per-node=48"]
    with pytest.raises(HalfstepError, match="processes: found 49 for 1 machines of 48 cores"):
        launch.torchrun_arguments(49)


def test_tasks_that_do_not_fit_the_nodes(step):
    message = "processes: found 2 tasks of srun on 2 nodes for 3 processes"
    with pytest.raises(HalfstepError, match=message):
        launch.torchrun_arguments(3)
    step.setenv("SLURM_STEP_NUM_TASKS", "4")
    message = "processes: found 4 tasks of srun on 2 nodes for 8 processes"
    with pytest.raises(HalfstepError, match=message):
        launch.torchrun_arguments(8)
    step.setenv("SLURM_STEP_NUM_TASKS", "2")
    step.setenv("SLURM_STEP_NODELIST", "elsewhere")
    message = "processes: `scontrol show hostnames elsewhere` failed"
    with pytest.raises(HalfstepError, match=message):
        launch.torchrun_arguments(8)


@pytest.mark.parametrize(("processes", "threads"), [(1, "8"), (3, "2"), (16, "1")])
def test_the_processes_share_the_cores(monkeypatch, processes, threads):
    """torchrun would give each process one thread. A number in the environment stays."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # so that monkeypatch restores it
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    launch._share_cores(["--nnodes=2", f"--nproc-per-node={processes}", "--master-port=1"])
    assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launch._share_cores([f"--nproc-per-node={processes}"])
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_a_meeting_that_fails_is_a_sentence():
    """Another program has the port of the first of two nodes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        arguments = [
            "--nnodes=2",
            "--node-rank=0",
            "--nproc-per-node=1",
            "--master-addr=127.0.0.1",
            f"--master-port={taken.getsockname()[1]}",
        ]
        code = (
            "import sys; from halfstep import cli; from halfstep.distributed import launch; "
            f"launch.torchrun_arguments = lambda n: {arguments}; "
            "sys.exit(cli.main(['pretrain', '--processes', '2']))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    message = "halfstep pretrain: processes: torchrun could not connect 2 processes (--nnodes=2"
    assert message in done.stderr


def test_a_message_of_several_processes_is_printed_once(monkeypatch, tmp_path):
    monkeypatch.delenv(launch.PRINTED, raising=False)
    assert not launch.already_printed("one process") and not launch.already_printed("one process")
    monkeypatch.setenv(launch.PRINTED, str(tmp_path))
    assert not launch.already_printed("a") and not launch.already_printed("b")
    assert launch.already_printed("a") and launch.already_printed("b")
    monkeypatch.setenv(launch.PRINTED, str(tmp_path / "gone"))
    assert not launch.already_printed("a")


def test_a_folder_of_temporary_files_without_locks(monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    launch._check_locks(str(tmp_path))
    monkeypatch.setattr(launch.fcntl, "flock", flock)
    with pytest.raises(HalfstepError, match="no file can be locked there .* set TMPDIR to"):
        launch._check_locks(str(tmp_path))


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return 7", 7),
        ("sys.exit(75)", 75),
        ("sys.exit()", 0),
        ("raise RuntimeError('a fault of ours')", 1),
    ],
)
def test_one_of_several_processes_ends_at_once_with_its_code(monkeypatch, end, code):
    """A thread that never ends does not hold it. Its output and its traceback are whole."""
    program = (
        "import sys, threading\nfrom halfstep import cli\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        f"def main():\n    print('the last words')\n    {end}\n"
        "cli.main = main\ncli.program()"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (code, "the last words\n"), done.stderr
    assert ("RuntimeError: a fault of ours" in done.stderr) == (code == 1)


def test_latency_is_of_one_process(monkeypatch, pipeline, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("halfstep.commands.benchmark.join_group", lambda machine: Group(0, 2))
    models = f"--checkpoint {pipeline.teacher} --baseline {pipeline.baseline}"
    assert call(f"latency {models} --output {tmp_path}/rows.json --processes 2 {MACHINE}") == 1
    message = "halfstep latency: processes: latency times one process"
    assert message in capsys.readouterr().err and not (tmp_path / "rows.json").exists()

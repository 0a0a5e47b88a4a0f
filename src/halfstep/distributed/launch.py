"""`--processes N`: start one command in N processes with torchrun, and end with their exit code.

torchrun runs inside this process. Its own program ends with 1 whatever its processes ended with,
and it kills them 30 s after a signal, which may be too soon to save a large network's state.
Only the standard library is imported before processes are started.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from halfstep.distributed.environment import environment_number
from halfstep.errors import HalfstepError, reason

MEETING = "HALFSTEP_MEETING"  # the file in which the processes of one machine meet
PRINTED = "HALFSTEP_PRINTED"  # folder in which the processes of one launcher note printed messages
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PER_NODE = "--nproc-per-node="
ONE_MACHINE = ["--rdzv-backend=one-machine", "--rdzv-endpoint=localhost"]  # see meeting.py
MOST = 16  # processes on a machine of fewer cores: more are taken for a slip
PORTS = range(15_000, 25_000)  # below the ports that Linux and macOS give to clients


def processes_requested(argv: list[str]) -> int:
    """Number of processes that this command must start: the last value of `--processes`.

    1 under torchrun, which has started them already, and for arguments that will be refused.
    """
    if "WORLD_SIZE" in os.environ or "--help" in argv:
        return 1
    value = "1"
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--processes":
            value = following
        elif flag.startswith("--processes="):
            value = flag.removeprefix("--processes=")
    return int(value[:9]) if value.isdecimal() else 1  # nine digits are too many as well


def torchrun_arguments(processes: int) -> list[str]:
    """torchrun's arguments for this machine, or for this node of several in a task of srun.

    Raises HalfstepError if the tasks of srun do not fit the nodes, or if one machine would get far
    more processes than it has cores.
    """
    nodes = environment_number("SLURM_STEP_NUM_NODES", 1, least=1)
    tasks = environment_number("SLURM_STEP_NUM_TASKS", 1, least=1)
    most = max(MOST, _cores())
    if processes > most * nodes:
        raise HalfstepError(
            f"processes: found {processes} for {nodes} machines of {_cores()} cores, "
            f"expected at most {most * nodes}; use one process for each GPU"
        )
    if nodes == 1 and tasks == 1:
        return [*ONE_MACHINE, f"{PER_NODE}{processes}"]
    if tasks != nodes or processes % nodes:
        raise HalfstepError(
            f"processes: found {tasks} tasks of srun on {nodes} nodes for {processes} processes, "
            "expected one task on each node and the same number of processes on each; "
            f"use --ntasks-per-node=1 and a multiple of {nodes} processes"
        )
    first = _scontrol("show", "hostnames", os.environ.get("SLURM_STEP_NODELIST", "")).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
    return [
        f"--nnodes={nodes}",
        f"--node-rank={environment_number('SLURM_NODEID')}",
        f"{PER_NODE}{processes // nodes}",
        f"--master-addr={address[1] if address else first}",
        f"--master-port={step_port()}",
    ]


def step_port() -> int:
    """The port at which the nodes of a step of srun meet.

    It follows from facts that srun tells its tasks alone: the ports that the kernel chose for it.
    """
    names = ("JOB_ID", "STEP_ID", "STEP_LAUNCHER_PORT", "SRUN_COMM_PORT")
    facts = "/".join(os.environ.get(f"SLURM_{name}", "") for name in names)
    number = int.from_bytes(sha256(facts.encode()).digest(), "big")
    return PORTS[number % len(PORTS)]


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        if not done.stdout.strip():
            raise OSError("it printed nothing")
    except (OSError, subprocess.SubprocessError) as error:
        raise HalfstepError(
            f"processes: `{' '.join(command)}` failed, which names the first node: {error}; "
            "repair Slurm and run the command again"
        ) from None
    return done.stdout


def launch(argv: list[str], processes: int) -> int:
    """Run `halfstep <argv>` in torchrun's processes; return the exit code of the first that failed.

    Signals are forwarded to the processes, which save their state and exit, however long it takes.
    """
    arguments = torchrun_arguments(processes)
    _share_cores(arguments)
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.agent.server import local_elastic_agent as agent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from halfstep.distributed.meeting import register_one_machine

    register_one_machine()
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes print all messages
    agent.start_processes = _with_signals(agent.start_processes)
    with tempfile.TemporaryDirectory() as folder:  # nobody else may open it
        os.environ[PRINTED] = folder
        if arguments[: len(ONE_MACHINE)] == ONE_MACHINE:
            _check_locks(folder)
            os.environ[MEETING] = str(Path(folder, "meeting"))
        words = [
            *arguments,
            "--signals-to-handle=SIGUSR2",  # nobody sends it: torchrun handles no signal
            "--monitor-interval=0.1",
            f"--log-dir={folder}",
            *("-m", "halfstep.cli", *argv),
        ]
        try:
            run.run(run.parse_args(words))
        except ChildFailedError as error:
            # One that was killed comes first: the others fail because they miss it.
            failures = sorted(error.failures.items())
            killed = [rank for rank, one in failures if one.exitcode == -signal.SIGKILL]
            if not killed:
                code = error.get_first_failure()[1].exitcode
                return code if code >= 0 else 128 - code
            print(
                f"halfstep {argv[0]}: the process of rank {killed[0]} was ended by SIGKILL, as the "
                "system does when memory runs out; give the same command again",
                file=sys.stderr,
            )
            return 128 + signal.SIGKILL
        # The port is taken, or the first node cannot be reached.
        except (OSError, RuntimeError, RendezvousError) as error:
            raise HalfstepError(
                f"processes: torchrun could not connect {processes} processes "
                f"({' '.join(arguments)}: {type(error).__name__}: {reason(error)}); "
                "check that the first node can be reached at that port, and run the command again"
            ) from error
    return 0


def _check_locks(folder: str) -> None:
    """The processes lock the file of their meeting. Raises HalfstepError if that is impossible."""
    try:
        with open(Path(folder, "lock"), "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise HalfstepError(
            f"{folder}: no file can be locked there ({error.strerror}), but processes that meet "
            "need a lock; set TMPDIR to a folder on a local disk"
        ) from None


def _with_signals(start_processes: Callable[..., Any]) -> Callable[..., Any]:
    """torchrun's function that starts the processes, which from now on get the signals FORWARDED.

    A signal that was ignored when this program began stays ignored (nohup, `&` in a script).
    """
    came: list[int] = []
    running: list[Any] = []

    def forward(number: int, _frame: object = None) -> None:
        came.append(number)
        for pid in running[0].pids().values() if running else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def start(**given: Any) -> Any:
        if came:
            raise SystemExit(128 + came[0])
        running.append(start_processes(**given))
        for number in came[:]:  # signals that came during the start
            forward(number)
        return running[0]

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    return start


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _share_cores(arguments: list[str]) -> None:
    """Give each process of this node an equal share of the cores; torchrun would give it one."""
    (per_node,) = (word for word in arguments if word.startswith(PER_NODE))
    share = _cores() // int(per_node.removeprefix(PER_NODE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def die_with_launcher() -> None:
    """In a process of `launch`, on Linux: end when the launcher ends, even if it is killed."""
    if os.environ.get(PRINTED) and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def already_printed(message: str) -> bool:
    """True if another process of this launcher has printed the message; notes it otherwise."""
    if not os.environ.get(PRINTED):
        return False
    try:
        note = Path(os.environ[PRINTED], sha256(message.encode()).hexdigest())
        note.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # the folder went with the launcher
        pass
    return False


def end_process(code: object) -> NoReturn:
    """End the program with this code.

    One of several processes ends at once: nothing is left to write, and to free what torch holds
    may hang, or abort the process with another code.
    """
    if "WORLD_SIZE" not in os.environ or not isinstance(code, int):
        raise SystemExit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)

"""`--processes N`: start one command in N processes with torchrun, and end with their exit code.

torchrun runs inside this process. Its own program ends with 1 whatever its processes ended with,
and it kills them 30 s after a signal, which may be too soon to save a large network's state.
Only the standard library is imported before processes are started.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from halfstep.errors import HalfstepError, reason

PRINTED = "HALFSTEP_PRINTED"  # folder in which the processes of one launcher note printed messages
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
PER_NODE = "--nproc-per-node="


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
    return int(value) if value.isdecimal() else 1


def torchrun_arguments(processes: int) -> list[str]:
    """torchrun's arguments for this machine, or for this node of several in a task of srun.

    Raises HalfstepError if the tasks of srun do not fit the nodes.
    """
    names = ("STEP_NUM_NODES", "STEP_NUM_TASKS", "NODEID", "JOB_ID", "STEP_ID")
    step = {name: os.environ.get(f"SLURM_{name}", "1") for name in names}
    nodes, tasks = int(step["STEP_NUM_NODES"]), int(step["STEP_NUM_TASKS"])
    if nodes == 1 and tasks == 1:
        return ["--standalone", "--local-addr=localhost", f"{PER_NODE}{processes}"]
    if tasks != nodes or processes % nodes:
        raise HalfstepError(
            f"processes: found {tasks} tasks of srun on {nodes} nodes for {processes} processes, "
            "expected one task on each node and the same number of processes on each; "
            f"use --ntasks-per-node=1 and a multiple of {nodes} processes"
        )
    first = _scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
    port = 15_000 + (int(step["JOB_ID"]) + 97 * int(step["STEP_ID"])) % 5_000
    return [
        f"--nnodes={nodes}",
        f"--node-rank={step['NODEID']}",
        f"{PER_NODE}{processes // nodes}",
        f"--master-addr={address[1] if address else first}",
        f"--master-port={port}",
    ]


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
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

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes print all messages
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

    start_processes, agent.start_processes = agent.start_processes, start
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, forward)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[PRINTED] = folder
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
            code = error.get_first_failure()[1].exitcode
            return code if code >= 0 else 128 - code
        # The port is taken, or the first node cannot be reached.
        except (OSError, RuntimeError, RendezvousError) as error:
            raise HalfstepError(
                f"processes: torchrun could not connect {processes} processes "
                f"({' '.join(arguments)}: {type(error).__name__}: {reason(error)}); "
                "check that the first node can be reached at that port, and run the command again"
            ) from error
    return 0


def _share_cores(arguments: list[str]) -> None:
    """Give each process of this node an equal share of the cores; torchrun would give it one."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    (per_node,) = (word for word in arguments if word.startswith(PER_NODE))
    share = cores // int(per_node.removeprefix(PER_NODE))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


def die_with_launcher() -> None:
    """In a process of `launch`, on Linux: end when the launcher ends, even if it is killed."""
    if PRINTED in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def already_printed(message: str) -> bool:
    """True if another process of this launcher has printed the message; notes it otherwise."""
    if PRINTED not in os.environ:
        return False
    try:
        note = Path(os.environ[PRINTED], sha256(message.encode()).hexdigest())
        note.touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # the folder went with the launcher
        pass
    return False

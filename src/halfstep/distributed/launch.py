"""One command, several processes: `halfstep pretrain ... --processes 4` starts torchrun, and ends as its processes do.

torchrun runs inside of this process, for its own program ends with 1 whatever its processes ended with, and kills them 30 s after a signal, which is
less than a large network's state may take. Nothing but the standard library is imported where no processes are to be started.
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

from halfstep.errors import HalfstepError, reason

SAID = "HALFSTEP_SAID"  # the folder where the processes of one launcher note what was said already
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def processes_requested(argv: list[str]) -> int:
    """How many processes this command is to start: those of `--processes`; 1 where torchrun has started it, and where the flags will be refused anyway."""
    said = [after if word == "--processes" else word.partition("=")[2] for word, after in zip(argv, [*argv[1:], ""], strict=True)
            if word.split("=")[0] == "--processes"]  # fmt: skip
    return (
        1
        if "WORLD_SIZE" in os.environ or "--help" in argv or not said or not said[-1].isdecimal()
        else int(said[-1])
    )


def torchrun_arguments(processes: int) -> list[str]:
    """torchrun's words for this machine alone or, in a task of srun on several nodes, for this node of them. HalfstepError where the tasks do not fit."""
    step = {
        key: os.environ.get(f"SLURM_{key}", "1")
        for key in ("STEP_NUM_NODES", "STEP_NUM_TASKS", "NODEID", "JOB_ID", "STEP_ID")
    }
    nodes, tasks = int(step["STEP_NUM_NODES"]), int(step["STEP_NUM_TASKS"])
    if nodes == 1 and tasks == 1:
        return ["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}"]
    if tasks != nodes or processes % nodes:
        raise HalfstepError(
            f"processes: {processes} were asked for, but srun started {tasks} tasks on {nodes} nodes; start one task on each node "
            "(--ntasks-per-node=1), and as many processes on each"
        )
    first = _scontrol("show", "hostnames", os.environ["SLURM_STEP_NODELIST"]).split()[0]
    address = re.search(r"NodeAddr=(\S+)", _scontrol("show", "node", first))
    return [
        f"--nnodes={nodes}", f"--node-rank={step['NODEID']}", f"--nproc-per-node={processes // nodes}",
        f"--master-addr={address[1] if address else first}", f"--master-port={15_000 + (int(step['JOB_ID']) + 97 * int(step['STEP_ID'])) % 5_000}",
    ]  # fmt: skip


def _scontrol(*words: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *words], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise HalfstepError(
            f"processes: where the first node is, `scontrol {' '.join(words)}` has to say, but: {error}; mend Slurm, and call again"
        ) from None


def launch(argv: list[str], processes: int) -> int:
    """Run `halfstep <argv>` in so many processes, torchrun's; the exit code is theirs, of the first that failed.

    Signals are sent on to the processes, who keep their state and leave; there is no limit to the time they take.
    """
    words = torchrun_arguments(processes)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(1, cores // int(words[2].rpartition("=")[2])))
    )  # torchrun would say 1
    import logging

    from torch.distributed import run
    from torch.distributed.elastic.agent.server import local_elastic_agent as agent
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch").setLevel(logging.CRITICAL)  # the processes say what is to be said
    came: list[int] = []
    running: list = []

    def forward(number: int, _=None) -> None:
        came.append(number)
        for pid in running[0].pids().values() if running else ():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def start(**given):
        if came:
            raise SystemExit(128 + came[0])
        running.append(start_processes(**given))
        for number in came[:]:  # while they were started
            forward(number)
        return running[0]

    start_processes, agent.start_processes = agent.start_processes, start
    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, forward)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[SAID] = folder
        # torchrun is to handle no signal but one that nobody sends
        words += [
            "--signals-to-handle=SIGUSR2",
            "--monitor-interval=0.1",
            f"--log-dir={folder}",
            "-m",
            "halfstep.cli",
            *argv,
        ]
        try:
            run.run(run.parse_args(words))
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            return code if code >= 0 else 128 - code
        except (
            OSError,
            RuntimeError,
            RendezvousError,
        ) as error:  # a taken port, a first node out of reach
            raise HalfstepError(
                f"processes: torchrun could not bring {processes} together ({' '.join(words[: -1 - len(argv)])}: {type(error).__name__}: {reason(error)}); "
                "look whether the first node can be reached at that port, and call again"
            ) from error
    return 0


def die_with_launcher() -> None:
    """In a process of `launch`: end with it, even if it is killed; on Linux."""
    if SAID in os.environ and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def already_printed(line: str) -> bool:
    """Has another process of this launcher said it? From now on this one has."""
    if SAID not in os.environ:
        return False
    try:
        Path(os.environ[SAID], sha256(line.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return True
    except OSError:  # gone, with the launcher
        pass
    return False

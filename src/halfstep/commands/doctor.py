"""`halfstep doctor`: check that this machine and its cluster can run the graph."""

from __future__ import annotations

import base64
import http.client
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import psutil

import halfstep
from halfstep.commands.fetch import read_fetched
from halfstep.distributed.environment import environment_number, world_size
from halfstep.errors import HalfstepError
from halfstep.workflow.slurm_plugin import LONGEST_POLL_S, ask

NETWORK_FILE_SYSTEMS = (
    *("nfs", "nfs4", "cifs", "lustre", "gpfs", "beegfs", "ceph", "fuse.sshfs", "9p", "afs"),
    *("panfs", "wekafs"),
)
NO_CLUSTER = "Could not establish a configuration source"  # sinfo, without slurm.conf and DNS
Finding = tuple[str, str]  # ok, warning or broken; a sentence that says what to do
Check = Callable[[Path, Path], Iterator[Finding]]  # of the results and the table of mounts


def doctor(results: Path = Path("results"), mounts: Path = Path("/proc/mounts")) -> None:
    """Check everything that a run depends on, and print one line for each finding.

    First comes this machine: Python, torch, cores, memory, disk, and optional packages. Findings of
    a cluster follow where there is one: Slurm's commands, or its variables in the environment. The
    command fails if a finding is broken. Slurm's commands without a cluster are not broken.

    Args:
        results: folder of the results, which need not exist yet
        mounts: the table of mounted file systems
    """
    checks = CHECKS | (CLUSTER_CHECKS if cluster_in_sight() else {})
    findings = [
        (name, state, message)
        for name, check in checks.items()
        for state, message in _findings(check, results.absolute(), mounts)
    ]
    for name, state, message in findings:
        print(f"{state:8}{name:12}{message}")
    broken = sum(state == "broken" for _, state, _ in findings)
    if broken:
        raise HalfstepError(
            f"{broken} of {len(findings)} findings are broken; "
            "do what the lines `broken` above say, and call again"
        )


def _findings(check: Check, results: Path, mounts: Path) -> Iterator[Finding]:
    """The findings of a check; a fault that ends it is its last finding."""
    try:
        yield from check(results, mounts)
    except HalfstepError as error:
        yield _broken(str(error))


def _ok(message: str) -> Finding:
    return "ok", message


def _warning(message: str) -> Finding:
    return "warning", message


def _broken(message: str) -> Finding:
    return "broken", message


def cluster_in_sight() -> bool:
    """Is this a machine of a cluster, or is one asked for in the environment?"""
    return cluster_named() or shutil.which("sbatch") is not None


def cluster_named() -> bool:
    """Is a cluster asked for in the environment: by Slurm's variables, ours, or a profile?"""
    asked = any(name.startswith(("SLURM_", "HALFSTEP_SLURM_")) for name in os.environ)
    return asked or "slurm" in os.environ.get("SNAKEMAKE_PROFILE", "")


def check_python(results: Path, mounts: Path) -> Iterator[Finding]:
    """The interpreter, and the halfstep that it imports."""
    folder = Path(halfstep.__file__).parent
    yield _ok(f"Python {platform.python_version()}, halfstep {halfstep.__version__} in {folder}")


def check_torch(results: Path, mounts: Path) -> Iterator[Finding]:
    """The build of torch fits the machine: CUDA where there is a GPU of NVIDIA."""
    import torch

    built = f"torch {torch.__version__}, built for " + (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    )
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        yield _ok(f"{built}; it uses {torch.cuda.device_count()} GPUs ({', '.join(names)})")
    elif shutil.which("nvidia-smi"):
        yield _broken(
            f"{built}; this machine has nvidia-smi, but torch cannot use a GPU: "
            "install a CUDA build of torch (envs/gpu.yaml)"
        )
    else:
        yield _ok(f"{built}; no GPU here, so everything runs on the CPU")


def check_cores(results: Path, mounts: Path) -> Iterator[Finding]:
    """The cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = platform.machine() or "unknown processor"
    yield _ok(f"{allowed} of {os.cpu_count()} cores ({processor}) can be used")


def check_memory(results: Path, mounts: Path) -> Iterator[Finding]:
    """There is memory left."""
    memory = psutil.virtual_memory()
    free_gb, all_gb = memory.available / 1e9, memory.total / 1e9
    if free_gb < 1:
        yield _warning(f"only {free_gb:.1f} of {all_gb:.0f} GB are free: end other programs")
    else:
        yield _ok(f"{free_gb:.1f} of {all_gb:.0f} GB are free")


EXTRAS = {  # of pyproject.toml, and what needs them
    "workflow": "snakemake, which runs everything",
    "report": "tables and figures",
    "eval": "judges and texts of the hub, LAMBADA and other tasks, MAUVE",
    "lora": "rounds that train adapters (lora_rank)",
    "track": "runs in MLflow",
    "docs": "the documentation as a site",
}


def check_extras(results: Path, mounts: Path) -> Iterator[Finding]:
    """The optional packages are installed, or are named with the command that installs them."""
    try:
        lines = metadata.requires("halfstep") or []
    except metadata.PackageNotFoundError:
        yield _warning(f"halfstep is not installed for {sys.executable}: {install_command('all')}")
        return
    for extra, use in EXTRAS.items():
        wanted = [
            re.match(r"[\w.-]+", line)[0]
            for line in lines
            if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", line)
        ]
        missing = [name for name in wanted if not _is_installed(name)]
        if missing:
            command = install_command(extra)
            yield _warning(f"{extra} ({use}): without {', '.join(missing)}; install: {command}")
        else:
            yield _ok(f"{extra} ({use}) is installed")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def install_command(extra: str) -> str:
    """The command that installs an extra: of the checkout that runs, or of the package."""
    checkout = Path(halfstep.__file__).parents[2]
    what = ["-e", f"{checkout}[{extra}]"] if (checkout / "pyproject.toml").is_file() else []
    words = [sys.executable, "-m", "pip", "install", *(what or [f"halfstep[{extra}]"])]
    return shlex.join(words)


def check_slurm(results: Path, mounts: Path) -> Iterator[Finding]:
    """Slurm answers, and the partition that jobs will use is up and allows our time limits."""
    if not shutil.which("sbatch"):
        yield _warning(
            "no sbatch here: only this machine can be used; "
            "log in to the cluster's login node for --profile slurm"
        )
        return
    sinfo = ask("sinfo", "--noheader", "-o", "%R %l %a")
    if sinfo is None and not cluster_named() and NO_CLUSTER in _answer(["sinfo"])[1]:
        yield _ok(
            "Slurm's commands are installed, but no cluster is configured here, so everything runs "
            "on this machine; --profile slurm needs a cluster's login node"
        )
        return
    if sinfo is None:
        yield _broken(
            "sinfo gets no answer from Slurm's controller: wait, or ask the administrators; "
            "a Snakemake that is running waits by itself"
        )
        return
    yield _ok("Slurm answers")
    rows = [line.split() for line in sinfo.splitlines()]
    partitions = {name: parse_time_limit(limit) for name, limit, state in rows if state == "up"}
    name = os.environ.get("HALFSTEP_SLURM_PARTITION") or _default_partition()
    longest = environment_number("HALFSTEP_SLURM_MAX_MINUTES", 72 * 60, least=1)
    if name not in partitions:
        yield _broken(
            f"partition {name} is not among those that are up ({', '.join(partitions)}): "
            "set HALFSTEP_SLURM_PARTITION to one of them"
        )
    elif partitions[name] < longest:
        yield _broken(
            f"partition {name} ends jobs after {partitions[name]:.0f} minutes, but ours may ask "
            f"for {longest}: export HALFSTEP_SLURM_MAX_MINUTES={partitions[name]:.0f}"
        )


def _default_partition() -> str | None:
    marked = re.search(r"(\S+)\*", ask("sinfo", "--noheader", "-o", "%P") or "")
    return marked[1] if marked else None


def parse_time_limit(limit: str) -> float:
    """Minutes of Slurm's [days-]hours:minutes:seconds, or infinity."""
    if limit in ("infinite", "UNLIMITED"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def check_accounting(results: Path, mounts: Path) -> Iterator[Finding]:
    """The end of a job is known long enough to be polled, from squeue or from sacct."""
    settings = ask("scontrol", "show", "config")
    if settings is None:  # no Slurm, or no answer; check_slurm reports it
        return
    age = re.search(r"MinJobAge\s*=\s*(\d+)", settings)
    if age and int(age[1]) >= LONGEST_POLL_S:
        yield _ok(f"squeue remembers ended jobs for {age[1]} s, long enough to ask for their state")
    elif ask("sacct", "-X", "--noheader") is not None:
        yield _ok("sacct answers, and is asked for the state of jobs")
    else:
        yield _broken(
            f"squeue forgets ended jobs after {age[1] if age else 'an unknown number of'} s and "
            "sacct does not answer, so the end of a job could be missed; "
            f"ask for MinJobAge={LONGEST_POLL_S} or more, or for accounting"
        )


def check_gpus(results: Path, mounts: Path) -> Iterator[Finding]:
    """Slurm has the GPUs that jobs will ask for."""
    resources = ask("sinfo", "--noheader", "-o", "%G")
    if resources:
        yield _slurm_gpus(resources)


def _slurm_gpus(resources: str) -> Finding:
    model = os.environ.get("HALFSTEP_SLURM_GPU_MODEL")
    per_node = os.environ.get("HALFSTEP_SLURM_GPUS_PER_NODE", "4")
    if "gpu" not in resources:
        return _warning(
            "Slurm knows no GPU (sinfo -o %G): every preset except those of size tiny asks for "
            "one, and would be refused"
        )
    if model and f"gpu:{model}" not in resources:
        return _broken(
            f"no GPU model {model} among {' '.join(resources.split())}: "
            "set HALFSTEP_SLURM_GPU_MODEL to one of these, or unset it"
        )
    pattern = rf"\bgpu:{re.escape(model)}:(\d+)" if model else r"\bgpu(?::[^:,()\s]+)?:(\d+)"
    most = max(map(int, re.findall(pattern, resources)), default=1)
    if not per_node.isdecimal() or len(per_node) > 9 or int(per_node) < 1:
        return _broken(
            f"HALFSTEP_SLURM_GPUS_PER_NODE: found {per_node[:40]!r}, expected a whole number above "
            f"zero: export HALFSTEP_SLURM_GPUS_PER_NODE={most}"
        )
    if most < int(per_node):
        wanted = f"{per_node} GPUs {model}" if model else f"{per_node} GPUs"
        return _broken(
            f"no node has {wanted}, which large trainings ask of each node: "
            f"export HALFSTEP_SLURM_GPUS_PER_NODE={most}"
        )
    return _ok(f"Slurm's GPUs: {' '.join(sorted(set(resources.split())))}")


def check_world_size(results: Path, mounts: Path) -> Iterator[Finding]:
    """In a Slurm job that torchrun started: one process per GPU."""
    if "WORLD_SIZE" not in os.environ or not os.environ.get("SLURM_GPUS_ON_NODE"):
        return
    nodes = environment_number("SLURM_NNODES", 1, least=1)
    gpus = nodes * environment_number("SLURM_GPUS_ON_NODE")
    processes = world_size()
    if processes == gpus:
        yield _ok(f"{processes} processes for {gpus} GPUs")
    else:
        yield _broken(f"{processes} processes for {gpus} GPUs: give the command --processes {gpus}")


def check_disk(results: Path, mounts: Path) -> Iterator[Finding]:
    """The results can be written, and there is room for them."""
    folder = _existing(results)
    if not os.access(folder, os.W_OK):
        yield _broken(
            f"{folder} cannot be written: change its permissions, or work in another folder"
        )
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb < 1:
        yield _broken(
            f"{free_gb:.1f} GB free at {folder}: free some space, or put results/ elsewhere"
        )
    elif free_gb <= 20:
        yield _warning(f"only {free_gb:.0f} GB free at {folder}: compare with `halfstep plan`")
    else:
        yield _ok(f"{free_gb:.0f} GB free at {folder}")


def check_shared_folder(results: Path, mounts: Path) -> Iterator[Finding]:
    """A compute node sees a file that this machine writes."""
    if ask("sinfo", "--noheader") is None:
        return
    folder = _existing(results)
    call = ["srun", "--immediate=30", "--ntasks=1", "--time=1", "--quiet"]
    for key in ("partition", "account", "qos"):
        if value := os.environ.get(f"HALFSTEP_SLURM_{key.upper()}"):
            call.append(f"--{key}={value}")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as probe:
        listed, _ = _answer([*call, "ls", "-d", "/", probe.name])  # a node that answers has a /
    if not listed.startswith("/"):
        yield _warning(
            "no compute node was free within 30 s, so whether it sees this folder is not known: "
            "call again later"
        )
    elif Path(probe.name).name not in listed:
        yield _broken(
            f"a compute node does not see {folder}: work in a folder that all nodes share"
        )
    else:
        yield _ok(f"a compute node sees {folder}")


def _answer(words: list[str]) -> tuple[str, str]:
    """The output and the errors of a command, whatever its exit code; blank without an answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "", ""
    return done.stdout, done.stderr


def check_hub(results: Path, mounts: Path) -> Iterator[Finding]:
    """What was fetched from the Hugging Face hub is still there, or can be fetched."""
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    fetched = results / "hub.json"
    if fetched.is_file():
        names = ", ".join(read_fetched(fetched))
        if cache.is_dir():
            yield _ok(f"fetched: {names}")
        else:
            yield _broken(
                f"{fetched} lists {names}, but there is no {cache}: set HF_HOME to the folder they "
                "were fetched into, or remove the file and fetch again"
            )
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield _warning(
            "HF_HUB_OFFLINE is set and nothing was fetched yet: unset it on the login node for the "
            f"rule fetch, or provide everything in {cache}"
        )
    else:
        yield _ok(f"nothing is fetched yet; what a run takes from the hub goes to {cache}")


def check_mlflow(results: Path, mounts: Path) -> Iterator[Finding]:
    """MLflow's server answers, or its database is on a local file system."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
    if uri.startswith("http"):
        try:
            with urllib.request.urlopen(_health_request(uri), timeout=5) as answer:
                answer.read()
        except (OSError, ValueError, http.client.HTTPException) as error:
            yield _warning(
                f"MLflow at {uri} does not answer ({error}): nothing is lost, "
                "`halfstep track` sends the journals once it does"
            )
        else:
            yield _ok(f"MLflow answers at {uri}")
        return
    database = Path(uri.removeprefix("sqlite:///"))
    kind = file_system_of(database, mounts) if uri.startswith("sqlite:///") else ""
    if kind in NETWORK_FILE_SYSTEMS:
        yield _warning(
            f"sqlite on {kind} can lock up: set MLFLOW_TRACKING_URI to a server, "
            "or to sqlite:////a/local/folder/mlflow.db"
        )
    else:
        yield _ok(f"MLflow keeps its runs in {uri}")


def _health_request(uri: str) -> urllib.request.Request:
    """The question whether a server lives; urllib takes user and password only as a header."""
    parts = urlsplit(uri)
    userinfo, _, host = parts.netloc.rpartition("@")
    address = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", ""))
    request = urllib.request.Request(address)
    if userinfo:
        encoded = base64.b64encode(unquote(userinfo).encode()).decode()
        request.add_header("Authorization", f"Basic {encoded}")
    return request


def file_system_of(path: Path, mounts: Path) -> str:
    """The type of the file system that holds a path: that of the longest mount point above it."""
    lines = mounts.read_text().splitlines() if mounts.is_file() else []
    points = [line.split()[1:3] for line in lines]
    above = [(len(point), kind) for point, kind in points if path.absolute().is_relative_to(point)]
    return max(above, default=(0, "unknown"))[1]


def _existing(path: Path) -> Path:
    """The path itself, or the closest folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


CHECKS: dict[str, Check] = {
    "python": check_python,
    "torch": check_torch,
    "cores": check_cores,
    "memory": check_memory,
    "disk": check_disk,
    "extras": check_extras,
    "hub": check_hub,
    "mlflow": check_mlflow,
}
CLUSTER_CHECKS: dict[str, Check] = {
    "slurm": check_slurm,
    "accounting": check_accounting,
    "gpus": check_gpus,
    "world": check_world_size,
    "shared": check_shared_folder,
}

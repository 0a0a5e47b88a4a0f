"""`halfstep doctor`: is this machine, and the cluster behind it, ready for `snakemake --profile slurm all`?"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.workflow.slurm_plugin import LONGEST_POLL_S, ask

NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "fuse.sshfs",
    "9p",
    "afs",
    "panfs",
    "wekafs",
)
Finding = tuple[str, str]  # ok, warning or broken; a sentence that says what to do


def doctor(results: Path = Path("results"), mounts: Path = Path("/proc/mounts")) -> None:
    """Print a line for each thing that a run depends on; an error when one of them is broken.

    Args:
        results: where the results are, or will be
        mounts: the table of mounted file systems
    """
    found = [
        (check.__name__, *finding)
        for check in CHECKS
        for finding in check(results.absolute(), mounts)
    ]
    for name, state, sentence in found:
        print(f"{state:8}{name:12}{sentence}")
    broken = sum(state == "broken" for _, state, _ in found)
    if broken:
        raise HalfstepError(
            f"{broken} of {len(found)} findings must be mended, see the lines `broken` above"
        )


def slurm(results: Path, mounts: Path) -> Iterator[Finding]:
    if not shutil.which("sbatch"):
        yield (
            "warning",
            "no sbatch here: only this machine can be used; log in to the cluster's login node for --profile slurm",
        )
        return
    sinfo = ask("sinfo", "--noheader", "-o", "%R %l %a")
    if sinfo is None:
        yield (
            "broken",
            "sinfo gets no answer from Slurm's controller: wait, or ask those who run the cluster; running snakemakes wait by themselves",
        )
        return
    yield "ok", "Slurm answers"
    partitions = {
        name: minutes(limit)
        for name, limit, state in (line.split() for line in sinfo.splitlines())
        if state == "up"
    }
    default = (re.findall(r"(\S+)\*", ask("sinfo", "--noheader", "-o", "%P") or "") or [None])[0]
    name = os.environ.get("HALFSTEP_SLURM_PARTITION") or default
    if name not in partitions:
        yield (
            "broken",
            f"partition {name} is not among those that are up ({', '.join(partitions)}): set HALFSTEP_SLURM_PARTITION to one of them",
        )
    elif partitions[name] < (most := int(os.environ.get("HALFSTEP_SLURM_MAX_MINUTES", 72 * 60))):
        yield (
            "broken",
            (
                f"partition {name} ends jobs after {partitions[name]:.0f} minutes and ours may ask for {most}: export HALFSTEP_SLURM_MAX_MINUTES={partitions[name]:.0f}"
            ),
        )


def minutes(limit: str) -> float:
    """Slurm's [days-]hours:minutes:seconds, or infinite."""
    if limit in ("infinite", "UNLIMITED"):
        return float("inf")
    days, _, clock = limit.rpartition("-")
    hours, mins, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def accounting(results: Path, mounts: Path) -> Iterator[Finding]:
    if (
        settings := ask("scontrol", "show", "config")
    ) is None:  # no Slurm, or no answer: `slurm` says which
        return
    age = re.search(r"MinJobAge\s*=\s*(\d+)", settings)
    if age and int(age[1]) >= LONGEST_POLL_S:
        yield (
            "ok",
            f"squeue remembers ended jobs for {age[1]} s, which is enough to ask it for their state",
        )
    elif ask("sacct", "-X", "--noheader") is not None:
        yield "ok", "sacct answers, and is asked for the jobs' state"
    else:
        yield (
            "broken",
            (
                f"squeue forgets ended jobs after {age[1] if age else 'an unknown number of'} s and sacct does not answer: a job's end could be missed; "
                f"ask for MinJobAge={LONGEST_POLL_S} or more, or for accounting"
            ),
        )


def gpus(results: Path, mounts: Path) -> Iterator[Finding]:
    if kinds := ask("sinfo", "--noheader", "-o", "%G"):
        model, each = (
            os.environ.get("HALFSTEP_SLURM_GPU_MODEL"),
            os.environ.get("HALFSTEP_SLURM_GPUS_PER_NODE", "4"),
        )
        most = max(
            map(
                int,
                re.findall(
                    rf"\bgpu:{re.escape(model)}:(\d+)" if model else r"\bgpu(?::[^:,()\s]+)?:(\d+)",
                    kinds,
                ),
            ),
            default=1,
        )
        if "gpu" not in kinds:
            yield (
                "warning",
                "Slurm knows no GPU (sinfo -o %G): every preset but those of size tiny asks for one, and would be refused",
            )
        elif model and f"gpu:{model}" not in kinds:
            yield (
                "broken",
                f"no GPU model {model} among {' '.join(kinds.split())}: set HALFSTEP_SLURM_GPU_MODEL to one of these, or not at all",
            )
        elif not each.isdecimal() or int(each) < 1:
            yield (
                "broken",
                f"HALFSTEP_SLURM_GPUS_PER_NODE: found {each!r}, expected a whole number above zero: export HALFSTEP_SLURM_GPUS_PER_NODE={most}",
            )
        elif most < int(each):
            yield (
                "broken",
                f"no node has {each} GPUs{f' {model}' * bool(model)}, which large trainings ask of each: export HALFSTEP_SLURM_GPUS_PER_NODE={most}",
            )
        else:
            yield "ok", f"Slurm's GPUs: {' '.join(sorted(set(kinds.split())))}"
    import torch

    if torch.cuda.is_available():
        yield "ok", f"torch uses {torch.cuda.device_count()} GPUs of this machine"
    elif shutil.which("nvidia-smi"):
        yield (
            "broken",
            f"this machine has nvidia-smi but torch {torch.__version__} cannot use a GPU: install a CUDA build of torch (envs/gpu.yaml)",
        )


def world(results: Path, mounts: Path) -> Iterator[Finding]:
    """Inside a job that torchrun started: a process for each GPU."""
    if "WORLD_SIZE" in os.environ and (here := os.environ.get("SLURM_GPUS_ON_NODE")):
        asked, size = (
            int(here) * int(os.environ.get("SLURM_NNODES", 1)),
            int(os.environ["WORLD_SIZE"]),
        )
        if size == asked:
            yield "ok", f"{size} processes for {asked} GPUs"
        else:
            yield (
                "broken",
                f"{size} processes for {asked} GPUs: give the command --processes {asked}",
            )


def disk(results: Path, mounts: Path) -> Iterator[Finding]:
    place = _exists(results)
    if not os.access(place, os.W_OK):
        yield (
            "broken",
            f"{place} cannot be written: change its permissions, or work in another folder",
        )
    free = shutil.disk_usage(place).free / 1e9
    if free < 1:
        yield "broken", f"{free:.1f} GB free at {place}: free some space, or put results/ elsewhere"
    else:
        yield (
            ("ok", f"{free:.0f} GB free at {place}")
            if free > 20
            else ("warning", f"only {free:.0f} GB free at {place}: compare with `halfstep plan`")
        )


def shared(results: Path, mounts: Path) -> Iterator[Finding]:
    """A file written here is seen by a compute node."""
    if ask("sinfo", "--noheader") is None:
        return
    options = [
        f"--{key}={value}"
        for key in ("partition", "account", "qos")
        if (value := os.environ.get(f"HALFSTEP_SLURM_{key.upper()}"))
    ]
    call = ["srun", "--immediate=30", "--ntasks=1", "--time=1", "--quiet", *options]
    with tempfile.NamedTemporaryFile(dir=_exists(results), prefix=".doctor-") as probe:
        seen = ask(
            *call, "sh", "-c", f"test -e '{probe.name}' && echo seen || echo unseen", timeout=60
        )
    if seen is None:
        yield (
            "warning",
            "no compute node was free within 30 s, so whether it sees this folder was not tried: call again later",
        )
    elif seen.strip() != "seen":
        yield (
            "broken",
            f"a compute node does not see {_exists(results)}: clone the repository into a folder that all nodes share",
        )
    else:
        yield "ok", f"a compute node sees {_exists(results)}"


def hub(results: Path, mounts: Path) -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    fetched, offline = results / "hub.json", os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    if fetched.is_file():
        names = ", ".join(read_json(fetched))
        if cache.is_dir():
            yield "ok", f"fetched: {names}"
        else:
            yield (
                "broken",
                f"{fetched} lists {names}, but there is no {cache}: set HF_HOME to where they were fetched, or remove the file and fetch again",
            )
    elif offline:
        yield (
            "warning",
            f"HF_HUB_OFFLINE is set and nothing was fetched yet: unset it on the login node for the rule fetch, or have all in {cache}",
        )
    else:
        yield "ok", f"the rule fetch fills {cache} from here; jobs run with the hub switched off"


def mlflow(results: Path, mounts: Path) -> Iterator[Finding]:
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
    if uri.startswith("http"):
        try:
            urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5).read()
            yield "ok", f"MLflow answers at {uri}"
        except (OSError, ValueError) as error:
            yield (
                "warning",
                f"MLflow at {uri} does not answer ({error}): nothing is lost, journals are sent by `halfstep track` once it does",
            )
    elif (
        uri.startswith("sqlite:///")
        and (kind := filesystem(Path(uri.removeprefix("sqlite:///")), mounts)) in NETWORK
    ):
        yield (
            "warning",
            f"sqlite on {kind} can lock up: set MLFLOW_TRACKING_URI to a server, or to sqlite:////a/local/folder/mlflow.db",
        )
    else:
        yield "ok", f"MLflow keeps its runs in {uri}"


def filesystem(path: Path, mounts: Path) -> str:
    """Kind of the file system that holds a path, by the longest mount point above it."""
    points = (
        [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.is_file() else []
    )
    above = [(len(point), kind) for point, kind in points if path.absolute().is_relative_to(point)]
    return max(above, default=(0, "unknown"))[1]


def _exists(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


CHECKS: tuple[Callable[[Path, Path], Iterator[Finding]], ...] = (
    slurm,
    accounting,
    gpus,
    world,
    disk,
    shared,
    hub,
    mlflow,
)

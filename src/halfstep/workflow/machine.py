"""What a job asks of its machine: threads, memory, GPUs, nodes, micro-batch and time.

All of it is speed: none of these numbers makes a finished file stale. Only the draws of dropout
depend on processes and micro-batches. `--set-resources distill_round:micro_batch=16` overrides a
number for one rule, `--set-threads` its threads; `--resources gpu=2` caps the GPUs of a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from halfstep.config import SIZES, shape_of_size
from halfstep.errors import ConfigError

Resources = dict[str, int | str | None]
"""Values by name; Snakemake leaves out a resource that is None."""


class Demand(NamedTuple):
    """What the jobs of one network size ask for. Threads and memory are those of each node."""

    threads: int
    mem_mb: int
    micro_batch: int
    pretrain: tuple[int, int]
    """GPUs and hours of pretraining the teacher or the baseline"""
    round: tuple[int, int]
    """GPUs and hours of one round of distillation"""
    sample: tuple[int, int]
    """GPUs and hours of a job that samples or scores"""


MACHINE = {
    "tiny":   Demand(1,   3000, 64, pretrain=(0, 1),   round=(0, 1),   sample=(0, 1)),
    "mini":   Demand(2,   8000, 64, pretrain=(1, 12),  round=(1, 2),   sample=(1, 1)),
    "small":  Demand(8,  32000, 32, pretrain=(8, 72),  round=(4, 8),   sample=(1, 4)),
    "medium": Demand(8,  48000, 16, pretrain=(8, 72),  round=(8, 16),  sample=(1, 8)),
    "large":  Demand(8,  64000,  8, pretrain=(16, 72), round=(8, 24),  sample=(1, 12)),
    "1.3B":   Demand(8,  96000,  8, pretrain=(16, 72), round=(8, 36),  sample=(1, 16)),
    "3B":     Demand(8, 192000,  4, pretrain=(16, 72), round=(16, 72), sample=(1, 24)),
    "8B":     Demand(8, 384000,  1, pretrain=(32, 72), round=(16, 72), sample=(1, 48)),
}  # fmt: skip


def demand_of(size: str) -> Demand:
    """The row of MACHINE for a network size: its own, or that of the next larger named size."""
    blocks, width, *_ = shape_of_size(size)
    for name, (named_blocks, named_width, _) in SIZES.items():
        if blocks * width**2 <= named_blocks * named_width**2:
            return MACHINE[name]
    return MACHINE["8B"]


BASE = ("gpu", "gpu_model", "mem_mb", "runtime")
SPREAD = ("nodes", "mpi", "tasks", "tasks_per_gpu", "gres", "srun", "processes")
TASK_HOURS = 4  # of a job that answers tasks, for each hour of one that samples
JOINED = 2
"""Jobs that continue prompts and score them: a group on Slurm, which gets the sum of their times"""
RESOURCES = {
    "pretrain": (*SPREAD, *BASE, "micro_batch", "limit", "blocks"),
    "round": (*SPREAD, *BASE, "micro_batch", "limit", "blocks"),
    "sample": (*SPREAD, *BASE, "micro_batch"),
    "tasks": (*SPREAD, *BASE, "micro_batch"),
    "continuations": (*SPREAD, *BASE, "micro_batch"),
    "latency": BASE,
    "import": ("mem_mb",),
}
"""The resources of each kind of job. SPREAD distributes a job over several GPUs and nodes."""


@dataclass(frozen=True)
class Site:
    """Settings of the cluster, from environment variables."""

    gpu_model: str = ""
    """HALFSTEP_SLURM_GPU_MODEL: model of GPU to ask for (any)"""
    gpus_per_node: int = 4
    """HALFSTEP_SLURM_GPUS_PER_NODE: GPUs that one node has"""
    max_minutes: int = 72 * 60
    """HALFSTEP_SLURM_MAX_MINUTES: longest time limit of a job; a longer training takes several"""


def read_site(environment: Mapping[str, str]) -> Site:
    """The site's variables. Raises ConfigError for a number that is not a whole one above zero."""
    gpu_model = environment.get("HALFSTEP_SLURM_GPU_MODEL", Site.gpu_model)
    gpus_per_node = _count(environment, "HALFSTEP_SLURM_GPUS_PER_NODE", Site.gpus_per_node)
    max_minutes = _count(environment, "HALFSTEP_SLURM_MAX_MINUTES", Site.max_minutes)
    return Site(gpu_model, gpus_per_node, max_minutes)


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if text.isdecimal() and len(text) < 10 and int(text) > 0:
        return int(text)
    raise ConfigError(
        f"{name}: found {text[:40]!r}, expected a whole number above zero; change it, or unset it"
    )


def names_cluster(arguments: list[str], environment: Mapping[str, str]) -> bool:
    """Do these command-line arguments of snakemake name a profile, or an executor elsewhere?"""
    if "SNAKEMAKE_PROFILE" in environment:
        return True
    names = ("--profile", "--workflow-profile", "--executor", "-e")
    for word, following in pairwise([*arguments, ""]):
        name, equals, value = word.partition("=")
        if name in names and (value if equals else following) not in ("none", "local"):
            return True
    return False


def base_resources(
    size: str, kind: str, attempt: int, site: Site, first_minutes: int | None = None
) -> Resources:
    """What a job of this kind asks for, by the size of its network.

    Each retry asks for half as much memory and time again; the time stays within the site's limit.
    The two jobs of a model's continuations share the time of one job that samples.

    Args:
        size: a network size
        kind: a key of RESOURCES
        attempt: 1 for the first try
        site: see `Site`
        first_minutes: time limit of the first try (default: by the size)
    """
    demand = demand_of(size)
    gpus, hours = demand.sample
    others = {
        "pretrain": demand.pretrain,
        "round": demand.round,
        "tasks": (gpus, TASK_HOURS * hours),
    }
    gpus, hours = others.get(kind, (gpus, hours))
    first = 60 * hours if first_minutes is None else first_minutes
    minutes = min(first * (attempt + 1) // 2, site.max_minutes)
    if kind == "continuations":
        minutes = max(1, minutes // JOINED)
    return {
        "gpu": gpus,
        "gpu_model": site.gpu_model if gpus else "",
        "mem_mb": demand.mem_mb * (attempt + 1) // 2,
        "micro_batch": demand.micro_batch,
        "runtime": minutes,
        # The time limit by which a training saves its state, in a Slurm job only. It is a resource,
        # because a changed parameter would make the model stale.
        "limit": f"${{SLURM_JOB_ID:+--time-limit {minutes}}}",
        "blocks": "",  # for a user's --recompute and --compile
    }


def spread_resources(gpus: int, nodes: int, gpu_model: str, threads: int, rule: str) -> Resources:
    """What a job on several GPUs asks for: one process for each GPU, equally many on each node.

    Args:
        gpus: GPUs of the whole job; below two, nothing is asked for
        nodes: nodes of the job
        gpu_model: model of GPU, "" for any
        threads: CPU threads on each node
        rule: name of the rule, for the error message
    """
    resources: Resources = dict.fromkeys(SPREAD) | {"srun": "", "processes": ""}
    if gpus < 2:
        return resources
    resources |= {"nodes": 1, "processes": f"--processes {gpus}"}
    if nodes < 2:
        return resources
    if gpus % nodes:
        raise ValueError(
            f"gpu: found {gpus} for {nodes} nodes, which do not share them evenly; "
            f"choose other numbers: --set-resources {rule}:gpu=... {rule}:nodes=..."
        )
    each = gpus // nodes
    return resources | {
        "nodes": nodes,
        "mpi": "srun",  # tells Snakemake's Slurm plugin that the command starts srun itself
        "tasks": nodes,
        "tasks_per_gpu": 0,
        "gres": f"gpu:{gpu_model}:{each}" if gpu_model else f"gpu:{each}",  # for each node
        "srun": f"srun --nodes={nodes} --ntasks-per-node=1 --gpus-per-node={each} "
        f"--cpus-per-task={threads} --kill-on-bad-exit=1 ",
    }


def fewest_nodes(gpus: int, gpus_per_node: int) -> int:
    """The fewest nodes that hold these GPUs, equally many on each."""
    enough = range(-(-gpus // gpus_per_node), gpus + 1)
    return next((nodes for nodes in enough if nodes and gpus % nodes == 0), 1)

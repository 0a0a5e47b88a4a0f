"""The jobs of Snakemake's graph, as far as prices depend on them."""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

from halfstep.errors import HalfstepError
from halfstep.sanitize import shorten
from halfstep.workflow.packaged import NO_SNAKEMAKE


@dataclass(frozen=True)
class PlannedJob:
    """A job of the graph that calls halfstep."""

    rule: str
    input: list[str]
    output: list[str]
    gpu: int = 0
    runtime: float = 0.0
    """time limit in minutes"""
    threads: int = 1
    command: Sequence[str] = ()
    number: int = 0
    """Snakemake's number of the job"""

    @property
    def resumes(self) -> bool:
        """Does it continue after its time limit, where it stopped? Trainings do."""
        return any("--time-limit" in word for word in self.command)


class Graph(NamedTuple):
    """Jobs to run, what snakemake has for them on this machine, and the preset of the graph."""

    jobs: list[PlannedJob]
    cores: int
    gpus: int
    preset: str


def plan_graph(arguments: list[str]) -> Graph:
    """The jobs that `snakemake <arguments>` would run.

    The graph is built in this process and nothing runs, as with `snakemake -n`. A run that is going
    on in the same folder is not disturbed. Raises HalfstepError if Snakemake cannot build it.
    """
    try:
        from snakemake.api import DAGApi
        from snakemake.cli import args_to_api, parse_args
    except ImportError:
        raise HalfstepError(NO_SNAKEMAKE) from None
    found: list[Graph] = []
    dry_run = DAGApi.execute_workflow

    def execute(api: Any, **settings: Any) -> None:
        dry_run(api, **settings | {"pseudo_executor": "dryrun"})
        workflow = api.workflow_api._workflow
        jobs = graph_jobs(workflow.dag.needrun_jobs(exclude_finished=False))
        found.append(Graph(jobs, *devices_of(workflow), workflow.globals["CONFIG"].preset))

    line = ["--quiet", "rules", "progress", "--nolock", *arguments]
    printed, fault = io.StringIO(), ""
    with (
        # The rules read sys.argv: -n says that nothing will run, and a profile names the cluster.
        patch.object(sys, "argv", ["snakemake", "-n", *line]),
        patch.object(DAGApi, "execute_workflow", execute),
        redirect_stdout(printed),
        redirect_stderr(printed),
    ):
        try:
            parser, parsed = parse_args(line)
            args_to_api(parsed, parser)
        except SystemExit as stop:  # a fault of the configuration, or of the command line
            fault = stop.code if isinstance(stop.code, str) else ""
        except Exception as error:  # Snakemake and its plugins each raise their own
            fault = str(error)
    if not found:
        raise HalfstepError(
            f"snakemake cannot plan this graph: {_fault_of(printed.getvalue() + fault)}; "
            "correct it, and call again"
        )
    return found[0]


def _fault_of(printed: str) -> str:
    """The line of Snakemake's output that says what is wrong: ours, or the last one."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    ours = [line for line in lines if line.startswith("configuration: ")]
    return shorten((ours or lines[-1:])[0], 300)


def devices_of(workflow: Any) -> tuple[int, int]:
    """Cores and GPUs that Snakemake has for the jobs of a workflow on this machine."""
    gpus = getattr(workflow.global_resources.get("gpu"), "value", None) or 0
    return workflow.resource_settings.cores or 1, gpus


def graph_jobs(jobs: Iterable[Any]) -> list[PlannedJob]:
    """The jobs of Snakemake's graph that call halfstep."""
    found = []
    for job in jobs:
        command = halfstep_command(job.shellcmd or "")
        if command is None:
            continue
        one = PlannedJob(
            rule=job.rule.name,
            input=list(map(str, job.input)),
            output=list(map(str, job.output)),
            gpu=job.resources.get("gpu") or 0,
            runtime=job.resources.get("runtime") or 0,
            threads=job.threads,
            command=command,
            number=job.jobid,
        )
        found.append(one)
    return found


def halfstep_command(shell: str) -> list[str] | None:
    """The call of halfstep in a rule's shell command, as words; None if there is none."""
    found = re.search(r"halfstep .*?(?=2>&1)", shell.replace("\\\n", " "), re.DOTALL)
    return shlex.split(found[0]) if found else None


def jobs_before(jobs: list[PlannedJob]) -> list[list[int]]:
    """For each job the indices of those whose outputs it reads."""
    maker = {path: i for i, job in enumerate(jobs) for path in job.output}
    return [
        sorted({maker[path] for path in job.input if path in maker} - {i})
        for i, job in enumerate(jobs)
    ]


def longest_paths(jobs: list[PlannedJob], seconds: list[float]) -> list[tuple[float, list[int]]]:
    """The path that takes longest to the end of each job: its seconds, the indices of its jobs."""
    before = jobs_before(jobs)
    best: dict[int, tuple[float, list[int]]] = {}

    def path_to(i: int) -> tuple[float, list[int]]:
        if i not in best:
            time, path = max(map(path_to, before[i]), default=(0.0, []))
            best[i] = (time + seconds[i], [*path, i])
        return best[i]

    return list(map(path_to, range(len(jobs))))

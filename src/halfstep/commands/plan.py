"""`halfstep plan`: the cost of a graph before it is submitted, and the measured cost afterwards."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, Field

from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.records import provenance
from halfstep.resolve import check_fields
from halfstep.workflow.graph import PlannedJob, longest_paths, plan_graph
from halfstep.workflow.machine import names_cluster
from halfstep.workflow.packaged import snakemake_words, with_preset
from halfstep.workflow.prices import A_DAY, SOURCES, Estimate, Prices, clock
from halfstep.workflow.rates import Rates, choose_rates
from halfstep.workflow.slurm_plugin import ask
from halfstep.workflow.timeline import Expected, seconds_of_graph

LOCAL = {
    "fetch", "tabulate", "plot", "track", "start_page", "merge_provenance", "list_sizes",
    "paper", "paper_figure", "paper_table", "paper_report",
}  # fmt: skip
"""Rules that run where snakemake runs and cost no job."""
ATTEMPTS = 4
"""How often profiles/slurm submits a job: once, and again for each of its retries"""
CHEAPER = ("sdtt-published", "sdtt-small", "owt-adapted")
"""Presets with the paper's results at a small part of the price of the cluster's default"""


def plan(
    arguments: Annotated[list[str], tyro.conf.Positional] = [],  # noqa: B006
    results: Path = Path("results"),
    gpu: str | None = None,
    preset: str | None = None,
) -> None:
    """Price the graph of `snakemake all <arguments>`; nothing is started or submitted.

    It is planned for this machine; with `--profile slurm` among the arguments, or where Slurm
    answers, for the cluster. The last line of the table says which speeds are assumed.

    Args:
        arguments: more arguments of snakemake, after `--`:
            halfstep plan -- --profile slurm --config preset=owt-scaling
        results: folder with the records of finished jobs; their speed is the best estimate
        gpu: model of every GPU: b200, h200, h100, a100, l40s, 4090 (by default
            $HALFSTEP_SLURM_GPU_MODEL, or h100)
        preset: in place of the preset that config.yaml names: laptop, own-model, sdtt-small, ...
    """
    if preset is not None:
        arguments = with_preset(arguments, preset)
    rates = choose_rates(gpu)
    on_cluster, profile = names_cluster(arguments, os.environ), []
    if not on_cluster and ask("sinfo", "--noheader", timeout=5) is not None:
        on_cluster, profile = True, ["--profile", "slurm"]
    graph = plan_graph(snakemake_words(["all", *profile, *arguments]))
    priced = PricedJobs(graph.jobs, results, rates)
    if not priced.jobs:
        print(f"nothing to do: all results of the preset {graph.preset} are there")
        print("\n".join(finished_lines(planned_of(results), priced.prices, results)))
        return
    if gpu and not any(job.gpu for job in graph.jobs):
        raise HalfstepError(
            f"--gpu {gpu}: no job of this graph has a GPU here; leave it out, or plan for a "
            "cluster: halfstep plan -- --profile slurm"
        )
    print(f"planned for {'the cluster' if on_cluster else 'this machine'}: preset {graph.preset}")
    print("\n".join(price_lines(priced)))
    if not on_cluster:
        print(machine_line(priced, graph.cores, graph.gpus))
    for line in late_lines(priced) if on_cluster else slow_lines(priced):
        print(line, file=sys.stderr)


class PricedJobs:
    """Jobs of a graph with their estimates.

    Attributes:
        jobs: all of them
        estimates: of each job
        results: folder with the records of finished jobs
    """

    def __init__(self, jobs: list[PlannedJob], results: Path, rates: Rates | None = None):
        self.jobs, self.results, self.rates = jobs, results, rates or choose_rates(None)
        self.prices = Prices(jobs, results, self.rates)
        self.estimates = [self.prices.price(job) for job in jobs]

    def expected(self) -> dict[int, Expected]:
        """For the timeline of a run: by Snakemake's number of the job."""
        both = zip(self.jobs, self.estimates, strict=True)
        return {job.number: Expected(job, estimate.seconds) for job, estimate in both}

    def paid(self) -> list[tuple[PlannedJob, Estimate]]:
        """The jobs that cost something, each with its estimate."""
        both = zip(self.jobs, self.estimates, strict=True)
        return [(job, estimate) for job, estimate in both if job.rule not in LOCAL]


class PlannedFields(BaseModel):
    """What plan.json says about one job."""

    rule: str
    gpu: int
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: str


class Planned(BaseModel):
    """The whole plan.json, by record."""

    jobs: dict[str, PlannedFields]


def price_lines(priced: PricedJobs) -> list[str]:
    """The price of these jobs, one line for each rule, and what finished jobs took.

    Writes the estimates to {results}/plan.json, where an earlier estimate of a job is kept.
    """
    paid, prices, results = priced.paid(), priced.prices, priced.results
    jobs, estimates = [job for job, _ in paid], [estimate for _, estimate in paid]
    seconds = [estimate.seconds for estimate in estimates]
    gpu_hours = [s * job.gpu / 3600 for s, job in zip(seconds, jobs, strict=True)]
    gigabytes = [prices.disk(job) / 1e9 for job in jobs]
    paths = longest_paths(jobs, seconds)
    total, path = max(paths, default=(0.0, []))
    lines = [
        f"{'rule':22}{'jobs':>5}{'GPU-hours':>11}{'CPU-only':>11}{'disk':>9}"
        f"{'on longest path':>17}  estimated from"
    ]
    in_order = sorted(range(len(jobs)), key=lambda i: (len(paths[i][1]), jobs[i].rule))
    for rule in dict.fromkeys(jobs[i].rule for i in in_order):
        mine = [i for i, job in enumerate(jobs) if job.rule == rule]
        gpu = sum(gpu_hours[i] for i in mine)
        cpu = clock(sum(seconds[i] for i in mine if not jobs[i].gpu))
        disk = sum(gigabytes[i] for i in mine)
        on_path = clock(sum(seconds[i] for i in path if i in mine))
        found = {estimates[i].source for i in mine}
        sources = ", ".join(source for source in SOURCES if source in found)
        lines.append(
            f"{rule:22}{len(mine):5}{gpu:11.1f}{cpu:>11}{disk:6.1f} GB{on_path:>17}  {sources}"
        )
    speeds = priced.rates.described(any(job.gpu for job in jobs))
    lines += [
        f"{'together':22}{len(jobs):5}{sum(gpu_hours):11.1f}{'':11}{sum(gigabytes):6.1f} GB"
        f"{clock(total):>17}",
        f"measured: the time of finished jobs of the same kind; assumed: {speeds}; "
        "limit: the job's time limit, an upper bound",
    ]
    planned = keep_estimates(jobs, estimates, prices, results)
    return lines + finished_lines(planned, prices, results)


def machine_line(priced: PricedJobs, cores: int, gpus: int) -> str:
    """How long all jobs take on this machine: the longest path, or the load of its devices."""
    seconds = [estimate.seconds for estimate in priced.estimates]
    device = f" and {gpus} GPU" if gpus else ""
    takes = seconds_of_graph(priced.jobs, seconds, cores, gpus)
    return f"on {cores} cores{device} of this machine: {clock(takes)}"


def slow_lines(priced: PricedJobs) -> list[str]:
    """A warning for each rule whose longest job would take more than a day on this machine."""
    longest: dict[str, tuple[float, int]] = {}
    for job, estimate in priced.paid():
        if estimate.source != "limit":
            longest[job.rule] = max(longest.get(job.rule, (0.0, 0)), (estimate.seconds, job.gpu))
    return [
        f"warning: on the {'GPU' if gpu else 'CPU'} of this machine a job of {rule} takes about "
        f"{clock(seconds)}; lower num_steps, batch_size or the network's size, or use a cluster "
        "(docs/cluster.md)"
        for rule, (seconds, gpu) in longest.items()
        if seconds > A_DAY
    ]


def late_lines(priced: PricedJobs) -> list[str]:
    """A warning for each rule with a job that would not end within its time limit on the cluster.

    A training resumes where it stopped, so it may take as many limits as it is submitted.
    """
    longest: dict[str, tuple[float, float]] = {}
    for job, estimate in priced.paid():
        limit = 60 * job.runtime * (ATTEMPTS if job.resumes else 1)
        if estimate.seconds > limit > 0:
            longest[job.rule] = max(longest.get(job.rule, (0.0, 0.0)), (estimate.seconds, limit))
    return [
        f"warning: a job of {rule} takes about {clock(seconds)}, but its time limit is "
        f"{clock(limit)} in all; raise it: --set-resources {rule}:runtime=<minutes>"
        for rule, (seconds, limit) in longest.items()
    ]


def cheaper_presets(preset: str, presets: Path) -> list[str]:
    """A line that names the cheaper presets, for the start of a run of another one."""
    names = [name for name in CHEAPER if name != preset and (presets / f"{name}.yaml").is_file()]
    if preset in CHEAPER or not names:
        return []
    return [
        f"cheaper presets: {', '.join(names)}; their price: "
        "halfstep plan -- --profile slurm --config preset=<name>"
    ]


def keep_estimates(
    jobs: list[PlannedJob], estimates: list[Estimate], prices: Prices, results: Path
) -> dict[str, dict]:
    """Write and return {results}/plan.json: the first estimate of each job, by its record.

    Until the job has finished, a measured estimate replaces another one.
    """
    file, planned = results / "plan.json", planned_of(results)
    for job, (seconds, source) in zip(jobs, estimates, strict=True):
        record = next((path for path in job.output if provenance.is_record(Path(path))), None)
        if record is None:
            continue
        about = {"rule": job.rule, "gpu": job.gpu, "seconds": seconds, "source": source}
        known = planned.setdefault(record, about)
        if source == "measured" != known["source"] and record not in prices.took:
            planned[record] = about
    if planned:
        write_json(file, planned)
    return planned


def planned_of(results: Path) -> dict[str, dict]:
    """{results}/plan.json, checked; empty where nothing was planned yet."""
    file = results / "plan.json"
    if not file.exists():
        return {}
    planned = read_json(file)
    check_fields({"jobs": planned}, Planned, file, "delete it and plan again")
    return planned


def finished_lines(planned: dict[str, dict], prices: Prices, results: Path) -> list[str]:
    """Estimated and actual seconds of the planned jobs that have finished, for each rule."""
    took = {
        str(Path("results") / Path(path).relative_to(results)): seconds
        for path, seconds in prices.took.items()
    }
    done = {path: about for path, about in planned.items() if path in took}
    if not done:
        return []
    lines = [
        f"finished: {'rule':22}{'jobs':>5}{'estimated':>12}{'took':>12}{'ratio':>8}"
        "  (estimated before the job, or else by today's options)"
    ]
    for rule in dict.fromkeys(about["rule"] for about in done.values()):
        mine = [path for path, about in done.items() if about["rule"] == rule]
        estimated = sum(done[path]["seconds"] for path in mine)
        actual = sum(took[path] for path in mine)
        ratio = actual / max(estimated, 1.0)
        lines.append(
            f"          {rule:22}{len(mine):5}{clock(estimated):>12}{clock(actual):>12}{ratio:8.2f}"
        )
    return lines

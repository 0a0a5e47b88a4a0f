"""`halfstep plan`: the cost of a graph before it is submitted, and the measured cost afterwards."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import tyro
from pydantic import BaseModel, Field

from halfstep.config import (
    Corpus,
    Distillation,
    GenerateOptions,
    Network,
    Training,
    shape_of_size,
)
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.records import provenance
from halfstep.resolve import check_fields
from halfstep.sanitize import shorten
from halfstep.workflow.machine import names_cluster
from halfstep.workflow.slurm_plugin import ask

GPU_SPEED = 100e12  # assumed FLOP/s of each GPU, until a job of the same kind has finished
CPU_SPEED = 20e9  # the same of a job without a GPU
SOURCES = ("measured", "assumed", "limit")
"""Of an estimate: finished jobs of the same kind, the assumed speed, or the job's time limit."""
A_DAY = 86400.0  # seconds
LOCAL = {"fetch", "tabulate", "plot", "track", "merge_provenance"}
"""Rules that run where snakemake runs and cost no job."""


@dataclass(frozen=True)
class PlannedJob:
    """A job of the graph, as far as its price depends on it."""

    rule: str
    input: list[str]
    output: list[str]
    gpu: int = 0
    runtime: float = 0.0
    """time limit in minutes"""
    command: Sequence[str] = ()


class Estimate(NamedTuple):
    """Seconds that a job will take, and where the number comes from: one of SOURCES."""

    seconds: float
    source: str


def plan(
    arguments: Annotated[list[str], tyro.conf.Positional] = [],  # noqa: B006
    results: Path = Path("results"),
) -> None:
    """Price the graph of `snakemake all <arguments>`; nothing is started or submitted.

    It is planned for this machine; with `--profile slurm` among the arguments, or where Slurm
    answers, for the cluster. Until a job of its kind has finished, a GPU counts as 100 TFLOP/s.

    Args:
        arguments: more arguments of snakemake, after `--`:
            halfstep plan -- --profile slurm --config preset=owt-scaling
        results: folder with the records of finished jobs; their speed is the best estimate
    """
    on_cluster, profile = names_cluster(arguments, os.environ), []
    if not on_cluster and ask("sinfo", "--noheader", timeout=5) is not None:
        on_cluster, profile = True, ["--profile", "slurm"]
    call = [sys.executable, "-m", "snakemake", "-np", *profile, "all", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise HalfstepError(
            f"snakemake cannot plan this graph: {_fault_of(done.stdout + done.stderr)}; "
            "correct it, and call again"
        )
    jobs = printed_jobs(done.stdout)
    print("planned for the cluster" if on_cluster else "planned for this machine")
    print("\n".join(price_lines(jobs, results)))
    for line in [] if on_cluster else slow_lines(jobs, results):
        print(line, file=sys.stderr)


def _fault_of(printed: str) -> str:
    """The line of Snakemake's output that says what is wrong: ours, or the last one."""
    lines = printed.strip().splitlines() or ["it printed nothing"]
    ours = [line for line in lines if line.startswith("configuration: ")]
    return shorten((ours or lines[-1:])[0], 300)


def printed_jobs(text: str) -> list[PlannedJob]:
    """The jobs in the output of `snakemake -np` that call halfstep."""
    jobs = []
    for block in re.split(r"^(?:local)?rule ", text, flags=re.MULTILINE)[1:]:
        about, _, shell = block.partition("Shell command:")
        command = halfstep_command(shell)
        if command is None:
            continue
        facts = dict(re.findall(r"^ {4}(\w+): (.*)", about, re.MULTILINE))
        resources = dict(re.findall(r"(\w+)=([^,]*)", facts.get("resources", "")))
        job = PlannedJob(
            rule=about.split(":", 1)[0],
            input=facts.get("input", "").split(", "),
            output=facts.get("output", "").split(", "),
            gpu=int(resources.get("gpu") or 0),
            runtime=float(resources.get("runtime") or 0),
            command=command,
        )
        jobs.append(job)
    return jobs


def graph_jobs(jobs: Iterable[Any]) -> list[PlannedJob]:
    """Jobs of Snakemake's own graph that call halfstep."""
    found = []
    for job in jobs:
        command = halfstep_command(job.shellcmd or "")
        if command is None:
            continue
        files = {"input": list(map(str, job.input)), "output": list(map(str, job.output))}
        gpu, runtime = job.resources.get("gpu", 0), job.resources.get("runtime", 0)
        found.append(PlannedJob(job.rule.name, **files, gpu=gpu, runtime=runtime, command=command))
    return found


def halfstep_command(shell: str) -> list[str] | None:
    """The call of halfstep in a rule's shell command, as words; None if there is none."""
    found = re.search(r"halfstep .*?(?=2>&1)", shell.replace("\\\n", " "), re.DOTALL)
    return shlex.split(found[0]) if found else None


def _is_command(words: object) -> bool:
    """Are these the words of a call: halfstep, its command, its flags?"""
    if not isinstance(words, list) or len(words) < 2:
        return False
    return all(isinstance(word, str) for word in words)


def flag_values(command: Sequence[str]) -> dict[str, str]:
    """The flags of a command with their first values."""
    pairs = zip(command, [*command[1:], "--"], strict=True)
    return {
        flag.removeprefix("--").replace("-", "_"): value
        for flag, value in pairs
        if flag.startswith("--") and not value.startswith("--")
    }


def flag_lists(command: Sequence[str]) -> dict[str, list[str]]:
    """The flags of a command with all their values."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if word.startswith("--"):
            values = found.setdefault(word.removeprefix("--").replace("-", "_"), [])
        else:
            values.append(word)
    return found


def num_processes(command: Sequence[str]) -> int:
    """Number of processes that share a command's work evenly: `--processes`, or one."""
    return int(flag_values(command).get("processes", 1))


VOCABULARY = 50_258  # GPT-2's tokens and the mask


def num_weights(size: str, vocabulary: int = VOCABULARY) -> int:
    """Weights that every token is multiplied with: those of the blocks and of the output layer."""
    blocks, width, *_ = shape_of_size(size)
    return blocks * 12 * width**2 + width * vocabulary


class PlannedFields(BaseModel):
    """What plan.json says about one job."""

    rule: str
    gpu: int
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    source: str


class Planned(BaseModel):
    """The whole plan.json, by record."""

    jobs: dict[str, PlannedFields]


class Prices:
    """Seconds and bytes of jobs, from the speed of finished jobs of the same kind.

    A job's work is counted in floating-point operations: 2 per weight and token forward, 6 with
    the gradient (arXiv 2001.08361, table 1). The speed of one process comes from the provenance
    records of finished jobs with the same command and network size. Several processes are assumed
    to share a job without loss.
    """

    def __init__(self, jobs: list[PlannedJob], results: Path):
        self.sizes: dict[str, str] = {}  # of networks, by teacher
        self.lengths: dict[str, int] = {}  # tokens in a window, by corpus
        self.vocabularies: dict[str, int] = {}  # sizes of trained tokenizers, by corpus
        self.corpora: dict[str, str] = {}  # by teacher
        self.took: dict[str, float] = {}  # seconds of finished jobs, by record
        self.speed: dict[tuple, list[float]] = defaultdict(list)  # FLOP/s per process, by kind
        self.seconds: dict[tuple, list[float]] = defaultdict(list)  # of one process, by kind
        finished = self._read_records(results)
        for command in [job.command for job in jobs] + [command for command, _ in finished]:
            self._note_flags(command)
        self._note_models(results)
        for command, seconds in finished:
            self.seconds[self.kind(command)].append(seconds * num_processes(command))
            if work := self.work(command):
                speed = work / seconds / num_processes(command)
                self.speed[self.kind(command)].append(speed)

    def _read_records(self, results: Path) -> list[tuple[list[str], float]]:
        """Commands of finished jobs with their seconds, at least one. Broken records are skipped:
        a price never stops a run."""
        finished = []
        for file in sorted(results.rglob(f"*{provenance.NAME}")):
            try:
                record: Any = read_json(file)
                started = datetime.fromisoformat(record["started"])
                ended = datetime.fromisoformat(record["ended"])
                seconds = (ended - started).total_seconds()
            except (HalfstepError, KeyError, TypeError, ValueError):
                continue
            command = record.get("command")
            if provenance.is_record(file) and _is_command(command):
                finished.append((command, max(seconds, 1.0)))
                self.took[str(file)] = seconds
        return finished

    def _note_flags(self, command: Sequence[str]) -> None:
        """Note network size and window length from flags; a printed command omits defaults."""
        given = flag_values(command)
        if "output" not in given:
            return
        if "size" in given or command[1] in ("pretrain", "train-baseline"):
            size = given.get("size", Network.model_fields["size"].default)
            self.sizes[Path(given["output"]).parent.name] = size
        if command[1] == "prepare-corpus":
            length = given.get("length", Corpus.model_fields["length"].default)
            name = Path(given["output"]).name
            self.lengths[name] = int(length)
            if given.get("tokenizer", "bpe") == "bpe":
                size = given.get("vocab_size", Corpus.model_fields["vocab_size"].default)
                self.vocabularies[name] = int(size)
        elif "corpus" in given and (teacher := self._teacher(command)):
            self.corpora[teacher] = Path(given["corpus"]).name

    def _note_models(self, results: Path) -> None:
        """Note size and length from finished models, where no command has them."""
        for meta in (results / "models").glob("*/*/meta.json"):
            try:
                about: Any = read_json(meta)
                self.sizes.setdefault(meta.parts[-3], about["network"]["size"])
                self.lengths.setdefault(about["corpus"], about["length"])
            except (HalfstepError, KeyError, TypeError):
                continue  # the command that reads this model reports what is wrong with it

    def size(self, command: Sequence[str]) -> str | None:
        """Network size of the models in a command's paths; None if there is none."""
        return self.sizes.get(self._teacher(command))

    def num_weights(self, command: Sequence[str]) -> int | None:
        """Weights of the network in a command's paths; None if its size is unknown."""
        size = self.size(command)
        vocabulary = self.vocabularies.get(self._corpus(command), VOCABULARY)
        return num_weights(size, vocabulary) if size else None

    def _teacher(self, command: Sequence[str]) -> str:
        """The teacher in a command's paths; "" if there is none."""
        found = re.search(r"\b(?:models|samples)/([^/\s]+)", " ".join(command))
        return found[1] if found else ""

    def _corpus(self, command: Sequence[str]) -> str:
        """The corpus of the models in a command's paths; "" if it is unknown."""
        return self.corpora.get(self._teacher(command), "")

    def kind(self, command: Sequence[str]) -> tuple[str, str | None]:
        """Work and network size of a command: jobs that agree in both run at the same speed."""
        return command[1], self.size(command)

    def work(self, command: Sequence[str]) -> float | None:
        """Floating-point operations of a command; None if its time depends on something else."""
        weights = self.num_weights(command)
        if weights is None:
            return None
        forward = 2.0 * weights  # per token
        if command[1] in ("pretrain", "train-baseline", "distill-round"):
            return self._training_work(command, forward)
        if command[1] == "generate":
            return self._sampling_work(command, forward)
        return None

    def _training_work(self, command: Sequence[str], forward: float) -> float:
        given = flag_values(command)
        section = Distillation if command[1] == "distill-round" else Training
        passes = 3  # forward, and backward at twice its cost
        if section is Distillation:
            passes += int(given.get("substeps", 2))  # passes of the teacher
        num_steps = int(given.get("num_steps", section.model_fields["num_steps"].default))
        batch_size = int(given.get("batch_size", section.model_fields["batch_size"].default))
        length = self.lengths.get(Path(given["corpus"]).name, 1024)
        return forward * passes * num_steps * batch_size * length

    def _sampling_work(self, command: Sequence[str], forward: float) -> float:
        given = flag_values(command)
        default = GenerateOptions.model_fields["num_samples"].default
        num_samples = int(given.get("num_samples", default))
        lengths = set(self.lengths.values())
        length = lengths.pop() if len(lengths) == 1 else 1024
        length = self.lengths.get(self._corpus(command), length)
        # With its KV cache the baseline reads every token once. A step of a denoiser that reveals
        # no token takes no pass.
        values = flag_lists(command)
        swept = values.get("frontier_steps", values["steps"])
        counts = values["steps"] + swept * len(values.get("temperatures", []))
        steps = [min(int(count), length) for count in counts]
        if "/baseline" in given["checkpoint"]:
            steps = [1 for _ in steps]
        return forward * num_samples * length * sum(steps)

    def price(self, job: PlannedJob) -> Estimate:
        """Seconds of a job: from measured speed, else assumed speed, else its time limit."""
        work, kind = self.work(job.command), self.kind(job.command)
        processes = num_processes(job.command)
        if work and self.speed[kind]:
            return Estimate(work / processes / median(self.speed[kind]), "measured")
        if work:
            return Estimate(work / processes / (GPU_SPEED if job.gpu else CPU_SPEED), "assumed")
        if self.seconds[kind]:
            return Estimate(median(self.seconds[kind]) / processes, "measured")
        return Estimate(job.runtime * 60, "limit")

    def disk(self, job: PlannedJob) -> float:
        """Bytes of a checkpoint in float32; 0 for other outputs, which are small or unknown.

        Each file holds one set of weights, optimizer.safetensors two (AdamW's moments).
        """
        num_weights = self.num_weights(job.command)
        if num_weights is None:
            return 0.0
        weights = [path for path in job.output if path.endswith(".safetensors")]
        doubles = [path for path in weights if path.endswith("optimizer.safetensors")]
        return 4.0 * num_weights * (len(weights) + len(doubles))


def longest_path(jobs: list[PlannedJob], seconds: list[float]) -> tuple[float, list[int]]:
    """The path through the graph that takes longest: its seconds and the indices of its jobs."""
    maker = {path: i for i, job in enumerate(jobs) for path in job.output}
    before = [
        sorted({maker[path] for path in job.input if path in maker} - {i})
        for i, job in enumerate(jobs)
    ]
    best: dict[int, tuple[float, list[int]]] = {}

    def path_to(i: int) -> tuple[float, list[int]]:
        if i not in best:
            time, path = max(map(path_to, before[i]), default=(0.0, []))
            best[i] = (time + seconds[i], [*path, i])
        return best[i]

    return max(map(path_to, range(len(jobs))), default=(0.0, []))


def clock(seconds: float) -> str:
    """Seconds as text, in years, days, hours, minutes or seconds."""
    if seconds >= 2 * 365 * A_DAY:
        return f"{seconds / (365 * A_DAY):,.0f} years"
    if seconds >= 4 * A_DAY:
        return f"{seconds / A_DAY:,.0f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.0f} s"


def price_lines(jobs: list[PlannedJob], results: Path) -> list[str]:
    """The price of these jobs, one line for each rule, and what finished jobs took.

    Writes the estimates to {results}/plan.json, where an earlier estimate of a job is kept.
    """
    jobs = [job for job in jobs if job.rule not in LOCAL]
    prices = Prices(jobs, results)
    estimates = [prices.price(job) for job in jobs]
    seconds = [estimate.seconds for estimate in estimates]
    gpu_hours = [s * job.gpu / 3600 for s, job in zip(seconds, jobs, strict=True)]
    gigabytes = [prices.disk(job) / 1e9 for job in jobs]
    total, path = longest_path(jobs, seconds)
    lines = [
        f"{'rule':22}{'jobs':>5}{'GPU-hours':>11}{'CPU-only':>11}{'disk':>9}"
        f"{'on longest path':>17}  estimated from"
    ]
    for rule in dict.fromkeys(job.rule for job in jobs):
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
    lines += [
        f"{'together':22}{len(jobs):5}{sum(gpu_hours):11.1f}{'':11}{sum(gigabytes):6.1f} GB"
        f"{clock(total):>17}",
        f"measured: speed of finished jobs of the same kind; "
        f"assumed: {GPU_SPEED / 1e12:.0f} TFLOP/s on each GPU, {CPU_SPEED / 1e9:.0f} GFLOP/s "
        "without, until such a job has finished; limit: the job's time limit, an upper bound",
    ]
    planned = keep_estimates(jobs, estimates, prices, results)
    return lines + finished_lines(planned, prices, results)


def slow_lines(jobs: list[PlannedJob], results: Path) -> list[str]:
    """A warning for each rule whose longest job would take more than a day on this machine."""
    jobs = [job for job in jobs if job.rule not in LOCAL]
    prices = Prices(jobs, results)
    longest: dict[str, float] = {}
    for job in jobs:
        if prices.work(job.command):
            seconds = prices.price(job).seconds
            longest[job.rule] = max(seconds, longest.get(job.rule, 0.0))
    lines = []
    for rule, seconds in longest.items():
        if seconds > A_DAY:
            device = "GPU" if any(job.gpu for job in jobs if job.rule == rule) else "CPU"
            lines.append(
                f"warning: on the {device} of this machine a job of {rule} takes about "
                f"{clock(seconds)}; lower num_steps, batch_size or the network's size, or use a "
                "cluster (docs/cluster.md)"
            )
    return lines


def keep_estimates(
    jobs: list[PlannedJob], estimates: list[Estimate], prices: Prices, results: Path
) -> dict[str, dict]:
    """Write and return {results}/plan.json: the first estimate of each job, by its record.

    Until the job has finished, a measured estimate replaces another one.
    """
    file = results / "plan.json"
    planned = _read_estimates(file) if file.exists() else {}
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


def _read_estimates(file: Path) -> dict[str, dict]:
    """plan.json, checked."""
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
    lines = [f"finished: {'rule':22}{'jobs':>5}{'estimated':>12}{'took':>12}"]
    for rule in dict.fromkeys(about["rule"] for about in done.values()):
        mine = [path for path, about in done.items() if about["rule"] == rule]
        estimated = clock(sum(done[path]["seconds"] for path in mine))
        actual = clock(sum(took[path] for path in mine))
        lines.append(f"          {rule:22}{len(mine):5}{estimated:>12}{actual:>12}")
    return lines

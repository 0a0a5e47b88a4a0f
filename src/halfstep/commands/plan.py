"""`halfstep plan`: what a graph will cost, before anything is submitted, and what it did cost beside that."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Annotated

import tyro

from halfstep.config import SIZES, Corpus, Distillation, GenerateOptions, Network, Training
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.records import provenance

ASSUMED = {
    True: 100e12,
    False: 20e9,
}  # FLOP/s of each GPU of a job, or of a job without, where nothing was measured yet
SOURCES = (
    "measured",
    "assumed",
    "limit",
)  # of an estimate: the job's own kind here; ASSUMED; its time limit, an upper bound
LOCAL = {
    "fetch",
    "tabulate",
    "plot",
    "track",
    "merge_provenance",
}  # run where snakemake runs, and cost no job
Job = dict  # {"rule", "input": [paths], "output": [paths], "gpu", "runtime" in minutes, "command": [words]}


def plan(
    arguments: Annotated[list[str], tyro.conf.Positional] = [],  # noqa: B006
    results: Path = Path("results"),
) -> None:
    """Price the graph that `snakemake --profile slurm all <arguments>` would run; nothing is submitted.

    Args:
        arguments: more words for snakemake, after `--`: halfstep plan -- --config preset=owt-scaling
        results: where finished jobs left their records, whose speed is the best estimate
    """
    call = [sys.executable, "-m", "snakemake", "-np", "--profile", "slurm", "all", *arguments]
    done = subprocess.run(call, capture_output=True, text=True)
    if done.returncode:
        raise HalfstepError(
            f"snakemake cannot plan this: {(done.stdout + done.stderr).strip().splitlines()[-1][:300]}; mend it, and call again"
        )
    print("\n".join(lines(jobs_of(done.stdout), results)))


def jobs_of(text: str) -> list[Job]:
    """The jobs in what `snakemake -np` prints."""
    jobs = []
    for block in re.split(r"^(?:local)?rule ", text, flags=re.MULTILINE)[1:]:
        rule = block.split(":", 1)[0]
        fact = dict(re.findall(r"^ {4}(\w+): (.*)", block.split("Shell command:")[0], re.MULTILINE))
        asked = dict(re.findall(r"(\w+)=([^,]*)", fact.get("resources", "")))
        shell = re.search(r"halfstep .*?(?=2>&1)", block.replace("\\\n", " "), re.DOTALL)
        if shell:
            jobs.append({
                "rule": rule, "input": fact.get("input", "").split(", "), "output": fact.get("output", "").split(", "),
                "gpu": int(asked.get("gpu") or 0), "runtime": float(asked.get("runtime") or 0), "command": shlex.split(shell[0]),
            })  # fmt: skip
    return jobs


def options(command: list[str]) -> dict[str, str]:
    """Flags of a command with their first values."""
    return {
        w[2:].replace("-", "_"): v
        for w, v in zip(command, [*command[1:], "--"], strict=True)
        if w.startswith("--") and not v.startswith("--")
    }


def processes(command: list[str]) -> int:
    """How many share a command's work, evenly; one without `--processes`."""
    return int(options(command).get("processes", 1))


def parameters(size: str, vocabulary: int = 50_258) -> int:
    """Weights of a network that take part in a multiplication for each token: blocks and output layer."""
    blocks, width, _ = SIZES[size]
    return blocks * 12 * width**2 + width * vocabulary


class Prices:
    """Seconds of jobs, by the floating-point operations of their commands and the speed of finished ones of their kind.

    Operations are 2 per weight and token forward, 6 with the gradient (arXiv 2001.08361, table 1). Speed, of one process, comes from the records
    beside the outputs, of jobs of the same command and size; several processes are taken to share a job without loss.
    """

    def __init__(self, jobs: list[Job], results: Path):
        self.sizes, self.lengths, self.speed, self.seconds, self.took = (
            {},
            {},
            defaultdict(list),
            defaultdict(list),
            {},
        )
        done = []
        for file in sorted(results.rglob(f"*{provenance.NAME}")) if results.is_dir() else []:
            try:
                record = read_json(file)
                seconds = (
                    datetime.fromisoformat(record["ended"])
                    - datetime.fromisoformat(record["started"])
                ).total_seconds()
            except (HalfstepError, KeyError, TypeError, ValueError):
                continue
            if provenance.is_record(file) and record.get("command"):
                done.append((record["command"], max(seconds, 1.0)))
                self.took[str(file)] = seconds
        for command in [job["command"] for job in jobs] + [command for command, _ in done]:
            given = options(command)
            if "output" in given and (
                "size" in given or command[1] in ("pretrain", "train-baseline")
            ):  # a default is not in a printed command
                self.sizes[Path(given["output"]).parent.name] = given.get(
                    "size", Network.model_fields["size"].default
                )
            if command[1] == "prepare-corpus":
                self.lengths[Path(given["output"]).name] = int(
                    given.get("length", Corpus.model_fields["length"].default)
                )
        for meta in (results / "models").glob("*/*/meta.json") if results.is_dir() else []:
            try:
                about = read_json(meta)
                self.sizes.setdefault(meta.parts[-3], about["network"]["size"])
                self.lengths.setdefault(about["corpus"], about["length"])
            except (
                HalfstepError,
                KeyError,
                TypeError,
            ):  # whoever needs the model will say what is wrong with it
                continue
        for command, seconds in done:
            self.seconds[self.kind(command)].append(seconds * processes(command))
            if work := self.work(command):
                self.speed[self.kind(command)].append(work / seconds / processes(command))

    def teacher(self, command: list[str]) -> str | None:
        found = re.search(r"\b(?:models|samples)/([^/\s]+)", " ".join(command))
        return found[1] if found else None

    def kind(self, command: list[str]) -> tuple[str, str | None]:
        return command[1], self.sizes.get(self.teacher(command))

    def work(self, command: list[str]) -> float | None:
        """Floating-point operations of a command, None where they do not tell its time."""
        given, size = options(command), self.sizes.get(self.teacher(command))
        if size is None:
            return None
        each = 2.0 * parameters(size)
        if command[1] in ("pretrain", "train-baseline", "distill-round"):
            section = Distillation if command[1] == "distill-round" else Training
            value = {
                k: int(given.get(k, section.model_fields[k].default))
                for k in ("num_steps", "batch_size")
            }
            length = self.lengths.get(Path(given["corpus"]).name, 1024)
            passes = 3 + (int(given.get("substeps", 2)) if section is Distillation else 0)
            return each * passes * value["num_steps"] * value["batch_size"] * length
        if command[1] == "generate":
            samples = int(
                given.get("num_samples", GenerateOptions.model_fields["num_samples"].default)
            )
            length = (
                next(iter(self.lengths.values()), 1024)
                if len(set(self.lengths.values())) == 1
                else 1024
            )
            steps = (
                1 if "/baseline" in given["checkpoint"] else int(given["steps"])
            )  # with its cache it reads every token once
            return each * samples * length * steps
        return None

    def price(self, job: Job) -> tuple[float, str]:
        """(seconds, one of SOURCES)"""
        work, kind, n = (
            self.work(job["command"]),
            self.kind(job["command"]),
            processes(job["command"]),
        )
        if work:
            return (
                (work / n / median(self.speed[kind]), "measured")
                if self.speed[kind]
                else (work / n / ASSUMED[job["gpu"] > 0], "assumed")
            )
        return (
            (median(self.seconds[kind]) / n, "measured")
            if self.seconds[kind]
            else (job["runtime"] * 60, "limit")
        )

    def disk(self, job: Job) -> float:
        """Bytes of a checkpoint: weights, average, best and two moments in float32; of anything else next to nothing, or not known."""
        size = self.sizes.get(self.teacher(job["command"]))
        held = sum(path.endswith(".safetensors") for path in job["output"]) + any(
            path.endswith("optimizer.safetensors") for path in job["output"]
        )
        return 4.0 * parameters(size) * held if size else 0.0


def longest(jobs: list[Job], seconds: list[float]) -> tuple[float, list[int]]:
    """The path through the graph that takes longest: (seconds, indices of its jobs)."""
    maker = {path: i for i, job in enumerate(jobs) for path in job["output"]}
    before = [
        sorted({maker[path] for path in job["input"] if path in maker} - {i})
        for i, job in enumerate(jobs)
    ]
    best: dict[int, tuple[float, list[int]]] = {}

    def path(i: int) -> tuple[float, list[int]]:
        if i not in best:
            ahead = max((path(j) for j in before[i]), default=(0.0, []))
            best[i] = (ahead[0] + seconds[i], [*ahead[1], i])
        return best[i]

    return max(map(path, range(len(jobs))), default=(0.0, []))


def clock(seconds: float) -> str:
    return (
        f"{seconds / 3600:.1f} h"
        if seconds >= 3600
        else f"{seconds / 60:.1f} min"
        if seconds >= 60
        else f"{seconds:.0f} s"
    )


def lines(jobs: list[Job], results: Path) -> list[str]:
    """The price of these jobs, a line for each rule; and, where `results` holds an earlier plan, what its finished jobs took.

    The estimates go to {results}/plan.json, the oldest one of each job kept.
    """
    jobs = [job for job in jobs if job["rule"] not in LOCAL]
    prices = Prices(jobs, results)
    found = [prices.price(job) for job in jobs]
    seconds = [s for s, _ in found]
    total, critical = longest(jobs, seconds)
    out = [
        f"{'rule':22}{'jobs':>5}{'GPU-hours':>11}{'CPU-only':>11}{'disk':>9}{'on longest path':>17}  estimated from"
    ]
    for rule in dict.fromkeys(job["rule"] for job in jobs):
        mine = [i for i, job in enumerate(jobs) if job["rule"] == rule]
        gpu = sum(seconds[i] * jobs[i]["gpu"] for i in mine) / 3600
        cpu = sum(seconds[i] for i in mine if not jobs[i]["gpu"])
        disk = sum(prices.disk(jobs[i]) for i in mine) / 1e9
        how = ", ".join(source for source in SOURCES if any(found[i][1] == source for i in mine))
        out.append(
            f"{rule:22}{len(mine):5}{gpu:11.1f}{clock(cpu):>11}{disk:6.1f} GB{clock(sum(seconds[i] for i in critical if i in mine)):>17}  {how}"
        )
    gpu = sum(s * job["gpu"] for s, job in zip(seconds, jobs, strict=True)) / 3600
    out.append(
        f"{'together':22}{len(jobs):5}{gpu:11.1f}{'':11}{sum(map(prices.disk, jobs)) / 1e9:6.1f} GB{clock(total):>17}"
    )
    out.append(
        f"measured: speed of finished jobs of this kind here; assumed: {ASSUMED[True] / 1e12:.0f} TFLOP/s on each GPU, {ASSUMED[False] / 1e9:.0f} GFLOP/s "
        "without, until one is finished; limit: the job's time limit, an upper bound"
    )
    return out + beside(jobs, found, prices, results)


def beside(
    jobs: list[Job], found: list[tuple[float, str]], prices: Prices, results: Path
) -> list[str]:
    """Actual cost beside the estimate, per rule, of the planned jobs that have finished."""
    file = results / "plan.json"
    planned = read_json(file) if file.is_file() else {}
    for job, (seconds, source) in zip(jobs, found, strict=True):
        record = next((path for path in job["output"] if provenance.is_record(Path(path))), None)
        if record and (
            record not in planned
            or source == "measured"
            and planned[record]["source"] != "measured"
            and record not in prices.took
        ):
            planned[record] = {
                "rule": job["rule"],
                "gpu": job["gpu"],
                "seconds": seconds,
                "source": source,
            }
    if planned:
        write_json(file, planned)
    took = {
        str(Path("results") / Path(path).relative_to(results)): s for path, s in prices.took.items()
    }
    done = {path: about for path, about in planned.items() if path in took}
    out = [f"finished: {'rule':22}{'jobs':>5}{'estimated':>12}{'took':>12}"] if done else []
    for rule in dict.fromkeys(about["rule"] for about in done.values()):
        mine = [path for path, about in done.items() if about["rule"] == rule]
        out.append(
            f"          {rule:22}{len(mine):5}{clock(sum(done[p]['seconds'] for p in mine)):>12}{clock(sum(took[p] for p in mine)):>12}"
        )
    return out

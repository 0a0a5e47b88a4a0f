"""Prices of jobs: seconds from their work, corrected by how long jobs of their kind took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.records import provenance
from halfstep.workflow.calls import Call, Facts, teacher_of
from halfstep.workflow.graph import PlannedJob
from halfstep.workflow.networks import UnknownWork
from halfstep.workflow.rates import Rates
from halfstep.workflow.work import BYTES_PER_TOKEN, WORK, corpus_tokens

A_DAY = 86400.0  # seconds
SOURCES = ("measured", "assumed", "limit")
"""Of an estimate: finished jobs of the same kind, the assumed speed, or the job's time limit."""
START_S = 2.3
"""Seconds until a command computes: Python, torch, and the files it reads; measured on 2 cores"""
STARTS = {
    "prepare-corpus": 2.0,
    "draw-naive": 2.3,
    "score-samples": 6.0,
    "score-corpus": 8.0,
    "score-frontier": 6.0,
    "score-continuations": 8.0,
    "score-lambada": 4.0,
    "tabulate": 1.7,
    "track": 6.0,
    "start-page": 2.2,
    "merge-provenance": 1.0,
}
"""The same of commands that import more or less, with what they compute without a network"""


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


class Estimate(NamedTuple):
    """Seconds that a job will take, and where the number comes from: one of SOURCES."""

    seconds: float
    source: str


class Prices:
    """Seconds and bytes of jobs.

    A job takes its command's start and its work (WORK) at assumed speeds. Finished jobs with the
    same command and network correct the speed of their kind: the median of their time over the
    assumed time. Without a known work, the median of their times counts.
    """

    def __init__(self, jobs: list[PlannedJob], results: Path, rates: Rates | None = None):
        self.rates = rates or Rates()
        self.facts = Facts()
        self.took: dict[str, float] = {}  # seconds of finished jobs, by record
        self.finished: dict[tuple, list[tuple[list[str], float]]] = defaultdict(list)  # by kind
        self.ratios: dict[tuple, float | None] = {}  # of times, by kind and number of GPUs
        finished = self._read_records(results)
        for command, _ in finished:
            self.facts.note(command)
        self.facts.note_results(results)
        for job in jobs:
            self.facts.note(job.command)
        for command, seconds in finished:
            self.finished[self.kind(command)].append((command, seconds))

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

    def kind(self, command: Sequence[str]) -> tuple[str, str | None, bool]:
        """Command, network size, and whether it is a baseline: such jobs run at one speed."""
        size = self.facts.sizes.get(teacher_of(command))
        is_baseline = Call(command, self.facts, self.rates).is_baseline
        return command[1], size, is_baseline

    def call(self, job: PlannedJob) -> Call:
        """A job's call, with what is known about its network and texts."""
        return Call(job.command, self.facts, self.rates, job.gpu, job.input)

    def compute_seconds(self, call: Call) -> float | None:
        """Seconds of a call's work at assumed speeds, without its start; None if it is unknown."""
        work = WORK.get(call.name)
        try:
            return call.seconds(*work(call)) if work else None
        except (UnknownWork, ValueError):
            return None

    def price(self, job: PlannedJob) -> Estimate:
        """Seconds of a job: from measured speed, else assumed speed, else its time limit."""
        call, kind = self.call(job), self.kind(job.command)
        computes, start = self.compute_seconds(call), STARTS.get(call.name, START_S)
        if computes is None:
            times = [seconds * _processes(command) for command, seconds in self.finished[kind]]
            if times:
                return Estimate(median(times) / call.processes, "measured")
            return Estimate(job.runtime * 60, "limit")
        key = (*kind, bool(job.gpu))
        if key not in self.ratios:
            self.ratios[key] = self._measured_ratio(kind, job.gpu, start)
        ratio = self.ratios[key]
        if ratio is None:
            return Estimate(start + computes, "assumed")
        return Estimate(start + computes * ratio, "measured")

    def _measured_ratio(self, kind: tuple, gpu: int, start: float) -> float | None:
        """Time of finished jobs of a kind over its assumption, without starts; None without any.

        A job that computes for less time than it starts, as in the preset ci, measures no speed.
        """
        ratios = []
        for command, seconds in self.finished[kind]:
            assumed = self.compute_seconds(Call(command, self.facts, self.rates, gpu))
            if assumed and assumed > start:
                ratios.append(max(seconds - start, seconds / 10) / assumed)
        return median(ratios) if ratios else None

    def disk(self, job: PlannedJob) -> float:
        """Bytes of a checkpoint in float32, and of a corpus; 0 for other outputs, which are small.

        Each file of weights holds one set, optimizer.safetensors two (AdamW's moments). A corpus
        has two bytes a token, and while it is prepared its text, about BYTES_PER_TOKEN a token.
        """
        if job.command[1:2] == ["prepare-corpus"]:
            return (2 + BYTES_PER_TOKEN) * corpus_tokens(self.call(job))
        weights = [path for path in job.output if path.endswith(".safetensors")]
        doubles = [path for path in weights if path.endswith("optimizer.safetensors")]
        try:
            parameters = self.call(job).network.parameters if weights else 0
        except UnknownWork:
            parameters = 0
        return 4.0 * parameters * (len(weights) + len(doubles))


def _processes(command: Sequence[str]) -> int:
    return Call(command, Facts(), Rates()).processes


def _is_command(words: object) -> bool:
    """Are these the words of a call: halfstep, its command, its flags?"""
    if not isinstance(words, list) or len(words) < 2:
        return False
    return all(isinstance(word, str) for word in words)

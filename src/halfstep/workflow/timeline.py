"""A running graph for its terminal: the jobs in words, which are done, and the time left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from halfstep.workflow.graph import PlannedJob, longest_paths
from halfstep.workflow.prices import clock

QUICK_S = 5.0  # a job that takes less has no line when it ends
WORDS = {
    "continue_prompts": "continue prompts with {model}",
    "distill_round": "train round {round} of {teacher}/{run}",
    "draw_naive": "draw texts without a network, for {teacher}",
    "fetch": "download what the hub has",
    "generate": "draw samples of {model}",
    "generate_frontier": "draw samples of {model} at other temperatures",
    "import_baseline": "import the baseline of {teacher}",
    "import_round": "import {model}",
    "import_teacher": "import the teacher of {teacher}",
    "latency": "time how fast {teacher} and its baselines write",
    "list_sizes": "list the sizes of the paper",
    "merge_provenance": "merge the records of all jobs",
    "paper": "all of the paper",
    "paper_figure": "draw {item} of the paper",
    "paper_report": "compare the paper's numbers with ours",
    "paper_table": "write {item} of the paper",
    "plot": "draw the figure {figure}",
    "prepare_corpus": "prepare the corpus {corpus}",
    "pretrain": "train the teacher of {teacher}",
    "score_continuations": "score continuations of {model}",
    "score_corpus": "score held-out text for {teacher}",
    "score_frontier": "score all samples of {model}",
    "score_infilling": "fill in masked positions with {model}",
    "score_lambada": "last words by {model}",
    "score_perplexity": "perplexity of other texts under {model}",
    "score_samples": "score samples of {model}",
    "score_tasks": "answer tasks with {model}",
    "start_page": "write the page to open first",
    "tabulate": "write the table {table}",
    "track": "send curves and results to MLflow",
    "train_baseline": "train the baseline of {teacher}",
}
"""Rules as a person says them; a rule that is not here goes by its name."""


class Expected(NamedTuple):
    """A job of the graph that takes time, and how many seconds it is expected to take."""

    job: PlannedJob
    seconds: float


class Timeline:
    """The jobs of one run of Snakemake, from its start to now. All times are in seconds.

    expected: by Snakemake's number of the job; jobs without an entry take no time
    total: number of jobs that run
    cores, gpus: of this machine; None for a cluster, where the longest path alone counts
    """

    def __init__(
        self, expected: Mapping[int, Expected], total: int, cores: int | None, gpus: int = 0
    ):
        self.expected, self.total, self.cores, self.gpus = expected, total, cores, gpus
        self.numbers: dict[int, int] = {}  # of the jobs that started, in their order
        self.began: dict[int, float] = {}
        self.took: dict[int, float] = {}

    def start(self, job: int, rule: str, wildcards: Mapping[str, str], now: float) -> str:
        """Note that a job starts, also for another time; its line."""
        self.numbers.setdefault(job, len(self.numbers) + 1)
        self.began[job] = now
        return f"{self._number(job)} {describe_job(rule, wildcards)}"

    def finish(self, job: int, now: float) -> str | None:
        """Note that a job has ended; its line, None for a quick one and for the last one."""
        self.took[job] = now - self.began.get(job, now)
        if self.took[job] < QUICK_S or len(self.took) == self.total:
            return None
        return (
            f"{self._number(job)} done in {clock(self.took[job])}; "
            f"about {clock(self.left(now))} left"
        )

    def fail(self, job: int) -> str:
        """The line of a job that failed; its log comes at the end of the run."""
        return f"{self._number(job)} failed"

    def left(self, now: float) -> float:
        """Seconds until the last job ends: as expected, times how far the ended jobs were off."""
        known = [(self.took[job], self.expected[job].seconds) for job in self._ended()]
        expected = sum(seconds for _, seconds in known)
        ratio = sum(took for took, _ in known) / expected if expected else 1.0
        jobs, seconds = [], []
        for number, (job, planned) in self.expected.items():
            if number not in self.took:
                gone = now - self.began[number] if number in self.began else 0.0
                jobs.append(job)
                seconds.append(max(0.0, planned * ratio - gone))
        return seconds_of_graph(jobs, seconds, self.cores, self.gpus)

    def _ended(self) -> list[int]:
        return [job for job in self.took if job in self.expected]

    def _number(self, job: int) -> str:
        width = len(str(self.total))
        return f"[{self.numbers.get(job, 0):{width}}/{self.total}]"


CURRENT: Timeline | None = None
"""The run of this process: the Snakefile sets it, the logger reads it."""


def describe_job(rule: str, wildcards: Mapping[str, str]) -> str:
    """A job as a person says it."""
    known = dict(wildcards.items())
    try:
        return WORDS[rule].format(**known)
    except KeyError:  # a rule of another workflow, or other wildcards
        return " ".join([rule.replace("_", " "), *map(str, known.values())])


def seconds_of_graph(
    jobs: list[PlannedJob], seconds: list[float], cores: int | None, gpus: int
) -> float:
    """Seconds of these jobs on one machine: the longest path, or the load of its devices.

    Without `cores` there are as many of them as the jobs want.
    """
    path, _ = max(longest_paths(jobs, seconds), default=(0.0, []))
    if cores is None:
        return path
    both = list(zip(jobs, seconds, strict=True))
    of_cores = sum(s * min(job.threads, cores) for job, s in both) / cores
    of_gpus = sum(s * job.gpu for job, s in both) / max(1, gpus)
    return max(path, of_cores, of_gpus)

"""Slurm as Snakemake's plugin (2.x) meets it, made patient: a controller that is away delays a run and ends none of its jobs.

Unchanged, the plugin drops all its jobs and waits for ever once it was refused an answer often enough; takes `CANCELLED by 0` for a running
job; asks accounting that a site may not have; waits for ever for jobs that Slurm has forgotten; and fails a job that cannot be submitted, or that
has been started but not yet its step.
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Callable

WAIT_S = 10.0  # between two questions to a controller that is away
LONGEST_POLL_S = 200  # the plugin's polls are at most so far apart


def ask(*words: str, timeout: float = 20) -> str | None:
    """What a command prints, None where there is no such command, or it fails, or does not end in `timeout` seconds."""
    try:
        return subprocess.run(
            words, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def say(line: str) -> None:
    print(f"  halfstep | {line}", file=sys.stderr, flush=True)


def patient_query(query: Callable, known: set[str]) -> Callable:
    """The plugin's `query_job_status`, asked again until it answers. `known` collects the jobs seen so far; one of them that is
    gone is UNKNOWN, which Snakemake takes for ended: whether well, its outputs tell."""

    async def answer(command: str, logger) -> tuple[dict[str, str], float]:
        away = 0.0
        while (found := await query(command, logger))[0] is None:
            if not away:
                away = time.monotonic()
                say("Slurm does not answer; its jobs go on, and it is asked again until it does")
            await asyncio.sleep(WAIT_S)
        if away:
            say(f"Slurm answers again after {time.monotonic() - away:.0f} s")
        status = {
            job: (words.split() or ["UNKNOWN"])[0].rstrip("+") for job, words in found[0].items()
        }
        gone = {job: "UNKNOWN" for job in known - status.keys()}
        known.update(status)
        return status | gone, found[1]

    return answer


def patient_submit(submit: Callable) -> Callable:
    """The plugin's `run_job`, or its jobstep's within a job, which waits for a controller that is away."""

    @functools.wraps(submit)
    def run_job(self, job) -> None:
        said = False
        while ask("sinfo", "--noheader") is None:
            if not said:
                say("Slurm does not answer; what is to be started waits until it does")
            said = True
            time.sleep(WAIT_S)
        submit(self, job)

    return run_job


def lasting_age(age: Callable[[], int | None]) -> Callable[[], int | None]:
    """The plugin's `get_min_job_age`, which holds it against three polls of the first length and then asks sacct instead of squeue:
    so scaled that the longest poll counts, and remembered while the controller is away."""
    last: list[int] = []

    def min_job_age(first_poll: int = 20) -> int | None:
        if not last and (found := age()) is not None:
            last.append(found)
        return (
            last[0] * 3 * first_poll // LONGEST_POLL_S if last else 10**6
        )  # no answer yet: stay with squeue

    return min_job_age


def patch_plugin() -> None:
    """Mend Snakemake's Slurm plugin in this process, where it is loaded."""
    plugin, jobstep = (
        sys.modules.get(f"snakemake_executor_plugin_slurm{name}") for name in ("", "_jobstep")
    )
    if plugin is None or getattr(plugin, "patient", False):
        return
    jobstep.Executor.run_job = patient_submit(jobstep.Executor.run_job)
    plugin.query_job_status = patient_query(plugin.query_job_status, set())
    plugin.get_min_job_age = lasting_age(plugin.get_min_job_age)
    plugin.Executor.run_job = patient_submit(plugin.Executor.run_job)
    plugin.patient = True

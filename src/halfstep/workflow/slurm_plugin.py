"""Patches for Snakemake's Slurm plugin (2.x): an absent controller delays a run and ends no job.

The unchanged plugin has five faults. It drops all its jobs and waits forever after several failed
queries. It takes `CANCELLED by 0` for a running job. It asks for accounting that a site may not
have. It waits forever for jobs that Slurm has forgotten. It fails a job that cannot be submitted,
or a started job whose step cannot be started.
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from halfstep.sanitize import one_line

WAIT_S = 10.0  # between two queries to a controller that does not answer
UNREACHABLE = "Unable to contact slurm controller"  # sbatch's words
LONGEST_POLL_S = 200  # longest time between two polls of the plugin


def ask(*words: str, timeout: float = 20) -> str | None:
    """Output of a command; None if it is missing, fails, or takes more than `timeout` seconds."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def say(line: str) -> None:
    """Print a line to stderr, marked as halfstep's own."""
    print(f"  halfstep | {one_line(line)}", file=sys.stderr, flush=True)


def patient_query(query: Callable, known: set[str]) -> Callable:
    """The plugin's `query_job_status`, repeated until the controller answers.

    Args:
        query: the unchanged function
        known: collects the jobs seen so far. One of them that Slurm has forgotten gets the status
            UNKNOWN. Snakemake then takes it as ended, and its outputs show whether it succeeded.
    """

    async def answer(command: str, logger: Any) -> tuple[dict[str, str], float]:
        absent_since = None
        while (found := await query(command, logger))[0] is None:
            if absent_since is None:
                absent_since = time.monotonic()
                say("Slurm does not answer; its jobs go on, and queries are repeated until it does")
            await asyncio.sleep(WAIT_S)
        if absent_since is not None:
            say(f"Slurm answers again after {time.monotonic() - absent_since:.0f} s")
        status = {
            job: (words.split() or ["UNKNOWN"])[0].rstrip("+") for job, words in found[0].items()
        }
        gone = dict.fromkeys(known - status.keys(), "UNKNOWN")
        known.update(status)
        return status | gone, found[1]

    return answer


def patient_submit(submit: Callable) -> Callable:
    """The `run_job` of the plugin or its jobstep executor, delayed until the controller answers."""

    @functools.wraps(submit)
    def run_job(self: Any, job: Any) -> None:
        waited = False
        while ask("sinfo", "--noheader") is None:
            if not waited:
                say("Slurm does not answer; new jobs wait until it does")
            waited = True
            time.sleep(WAIT_S)
        submit(self, job)

    return run_job


def patient_report(report: Callable) -> Callable:
    """The plugin's report of a failed job, which submits again where the controller was absent.

    A controller may go away between our question and sbatch. That is no failed try of the job.
    """

    @functools.wraps(report)
    def answer(self: Any, job_info: Any, msg: str) -> None:
        if "sbatch failed" in msg and UNREACHABLE in msg:
            self.run_job(job_info.job)  # waits for the controller
        else:
            report(self, job_info, msg)

    return answer


def lasting_age(age: Callable[[], int | None]) -> Callable[[], int | None]:
    """The plugin's `get_min_job_age`: seconds for which squeue remembers an ended job.

    The plugin compares it with three polls of the first length, and uses sacct where it is shorter.
    It is scaled here so that the longest poll decides, and remembered while the controller is
    absent.
    """
    last: list[int] = []

    def min_job_age(first_poll: int = 20) -> int | None:
        if not last and (found := age()) is not None:
            last.append(found)
        if not last:
            return 10**6  # no answer yet: stay with squeue
        return last[0] * 3 * first_poll // LONGEST_POLL_S

    return min_job_age


def patch_plugin() -> None:
    """Patch Snakemake's Slurm plugin in this process, where it is loaded."""
    plugin: Any = sys.modules.get("snakemake_executor_plugin_slurm")
    jobstep: Any = sys.modules.get("snakemake_executor_plugin_slurm_jobstep")
    if plugin is None or jobstep is None or getattr(plugin, "patient", False):
        return
    jobstep.Executor.run_job = patient_submit(jobstep.Executor.run_job)
    plugin.query_job_status = patient_query(plugin.query_job_status, set())
    plugin.get_min_job_age = lasting_age(plugin.get_min_job_age)
    plugin.Executor.run_job = patient_submit(plugin.Executor.run_job)
    name = "_report_job_error_threadsafe"
    setattr(plugin.Executor, name, patient_report(getattr(plugin.Executor, name)))
    plugin.patient = True

"""Where squeue forgets ended jobs within seconds (MinJobAge), the profile asks sacct instead."""

import re
import time

from dryrun import copy
from test_cluster import finish, running, snakemake, workers

WRAPPER = """#!/bin/sh
printf '%s\\n' "$*" >> {log}
exec {real} "$@"
"""


def test_jobs_that_squeue_forgets_are_followed_by_sacct(accounting, tmp_path):
    """The second of two jobs is cancelled once while it trains; a new job takes its place.

    sacct gives the state of the cancelled job as `CANCELLED by` a user.
    """
    folder, log, cancelled = copy(tmp_path).folder, tmp_path / "asked", []
    for command in ("sacct", "squeue"):
        bin, real = accounting.home / "bin" / command, accounting.home / "bin" / f"real-{command}"
        bin.rename(real)
        bin.write_text(WRAPPER.format(log=f"{log}-{command}", real=real))
        bin.chmod(0o755)

    def cancel() -> None:
        for rule, (job, _) in running(accounting).items():
            if rule.startswith("pretrain") and not cancelled and workers(job):
                accounting.call("scancel", job)
                cancelled.append(job)

    meta = "results/models/stories-ci/teacher/meta.json"
    code = finish(
        accounting,
        snakemake(accounting, folder, meta, "--latency-wait", "5", "--config", "preset=ci"),
        cancel,
    )
    said = (folder / "out").read_text()
    assert code == 0 and (folder / meta).exists(), said[-6000:]
    jobs = re.findall(r"SLURM jobid (\d+) ", said)
    states = dict(
        line.split("|")[:2]
        for line in accounting.call("sacct", "-X", "-n", "-P", "-o", "JobIdRaw,State").splitlines()
    )
    found = [states[job].split()[0] for job in jobs]
    assert found == ["COMPLETED", "CANCELLED", "COMPLETED"], (states, said[-3000:])
    assert jobs[1:2] == cancelled
    assert " by " in states[jobs[1]]
    time.sleep(10)
    assert accounting.call("squeue", "-h", "-t", "all") == ""  # all jobs are forgotten
    name = re.search(r"--name (\S+)", (tmp_path / "asked-sacct").read_text())[1]
    # The status of the run's jobs came from sacct alone.
    assert name not in (tmp_path / "asked-squeue").read_text()

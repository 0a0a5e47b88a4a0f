"""Where squeue forgets an ended job within seconds (MinJobAge), the same profile asks sacct, of a real slurmdbd."""

import re
import time

from dryrun import copy
from test_cluster import finish, running, snakemake, workers

WRAPPER = """#!/bin/sh
printf '%s\\n' "$*" >> {log}
exec {real} "$@"
"""


def test_jobs_that_squeue_forgets_are_followed_by_sacct(accounting, tmp_path):
    """Two jobs, the second cancelled once while it trains, which sacct calls `CANCELLED by` someone: a new job takes its place, and the run ends well."""
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
    assert [states[job].split()[0] for job in jobs] == [
        "COMPLETED",
        "CANCELLED",
        "COMPLETED",
    ] and jobs[1:2] == cancelled, (states, said[-3000:])
    assert " by " in states[jobs[1]]
    time.sleep(10)
    assert accounting.call("squeue", "-h", "-t", "all") == ""  # it knows of none of them any more
    name = re.search(r"--name (\S+)", (tmp_path / "asked-sacct").read_text())[1]
    assert (
        name not in (tmp_path / "asked-squeue").read_text()
    )  # the run's status was asked of sacct alone

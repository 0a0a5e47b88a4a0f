"""The real profile on a real, local Slurm: the `ci` preset to its figures, through a preemption, a time limit, a dead node and a lost controller."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from dryrun import copy

FAST = """
import asyncio, sys
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor
async def second(self): await asyncio.sleep(1)  # the plugin's own waits are for clusters
RemoteExecutor.sleep = second
from snakemake.cli import main
sys.exit(main())
"""
SMALL = ["preset=ci", 'teachers={"stories-ci": {"distillation": {"rounds": 2, "teacher_steps": 32}}}', "continuations=null"]
LIMIT_S = 420


def snakemake(cluster, folder, *words: str) -> subprocess.Popen:
    """`snakemake --profile slurm ...` in the folder, its output in the file `out` there."""
    with open(folder / "out", "w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", FAST, "--profile", "slurm", *words],
            cwd=folder, env=cluster.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip


def running(cluster) -> dict[str, tuple[str, str]]:
    """Rule of every running job: its id and node."""
    lines = [line.split("|") for line in cluster.call("squeue", "-h", "-t", "RUNNING", "-p", "low", "-o", "%k|%i|%N").splitlines()]
    return {re.split("_wildcards", rule.removeprefix("rule_"))[0]: (job, node) for rule, job, node in lines}


def workers(job: str) -> list[int]:
    """The processes of `halfstep` itself in a job."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_JOB_ID={job}\0".encode() in (process / "environ").read_bytes() and b"bin/halfstep\0" in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            pass
    return found


class Faults:
    """Each happens once, to the first job of its rule that runs; `done` names the jobs struck."""

    def __init__(self, cluster):
        self.cluster, self.done = cluster, {}

    def strike(self) -> None:
        now = running(self.cluster)
        for rule, fault in (("pretrain", self.preempt), ("train_baseline", self.time_limit), ("distill_round", self.node_down), ("generate", self.no_controller)):
            if rule in now and rule not in self.done and (rule == "generate" or workers(now[rule][0])):
                fault(*now[rule])
                self.done[rule] = now[rule][0]

    def preempt(self, job: str, node: str) -> None:
        self.cluster.call("sbatch", "-p", "main", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")

    def time_limit(self, job: str, node: str) -> None:
        """It hangs, and its limit is over in a moment."""
        for process in workers(job):
            os.kill(process, signal.SIGSTOP)
        self.cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+1")

    def node_down(self, job: str, node: str) -> None:
        self.cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        time.sleep(3)
        self.cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def no_controller(self, job: str, node: str) -> None:
        self.cluster.stop_controller()
        time.sleep(15)
        self.cluster.start_controller()


def finish(cluster, process, each=lambda: None) -> int:
    end = time.monotonic() + LIMIT_S
    try:
        while process.poll() is None and time.monotonic() < end:
            each()
            time.sleep(0.5)
        return process.wait(timeout=max(1, end - time.monotonic()))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """The graph, run to its end while the faults happen: (folder, output, faults)."""
    folder = copy(tmp_path_factory.mktemp("clone")).folder
    faults = Faults(cluster)
    gpus = ["--set-resources", "pretrain:gpu=1", "distill_round:gpu=2", "--jobs", "4", "--latency-wait", "5"]
    code = finish(cluster, snakemake(cluster, folder, "all", *gpus, "--config", *SMALL), faults.strike)
    said = (folder / "out").read_text()
    assert code == 0, said[-6000:]
    return folder, said, faults


def test_the_graph_reaches_its_figures_through_every_fault(run):
    folder, said, faults = run
    assert set(faults.done) == {"pretrain", "train_baseline", "distill_round", "generate"}
    for kind in ("pdf", "svg", "csv"):
        assert (folder / f"results/figures/ppl_vs_steps.{kind}").stat().st_size > 0
    assert len((folder / "results/tables/steps.csv").read_text().splitlines()) > 4 and (folder / "results/mlflow.synced").exists()
    print(said)


def test_preemption_and_node_failure_start_the_same_job_again(run, cluster):
    for rule in ("pretrain", "distill_round"):
        about = cluster.call("scontrol", "show", "job", run[2].done[rule])
        assert "JobState=COMPLETED" in about and "Restarts=1" in about, about


def test_a_time_limit_is_a_new_job_that_asks_for_more(run, cluster):
    old = run[2].done["train_baseline"]
    assert "JobState=TIMEOUT" in cluster.call("scontrol", "show", "job", old)
    lines = cluster.call("squeue", "-h", "-t", "all", "-o", "%k|%i|%m|%T").splitlines()
    (new,) = [line.split("|") for line in lines if "rule_train_baseline" in line and line.split("|")[1] != old]
    (was,) = [line.split("|") for line in lines if line.split("|")[1] == old]
    assert new[3] == "COMPLETED" and (was[2], new[2]) == ("3000M", "4500M")


def test_jobs_ask_for_what_they_need(run, cluster):
    gpus = {rule: cluster.call("scontrol", "show", "job", run[2].done[rule]) for rule in ("pretrain", "train_baseline", "distill_round")}
    asked = {rule: re.search(r"gres/gpu=(\d)", text) for rule, text in gpus.items()}
    assert (asked["pretrain"][1], asked["distill_round"][1], asked["train_baseline"]) == ("1", "2", None)
    rules = cluster.call("squeue", "-h", "-t", "all", "-o", "%k")
    assert "prepare_corpus" in rules and not re.search("rule_(plot|tabulate|track|merge_provenance)", rules)


def test_a_lost_controller_is_waited_for(run):
    assert "Slurm does not answer" in run[1] and "Slurm answers again" in run[1]

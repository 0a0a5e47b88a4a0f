"""The real profile on a real, local Slurm: preset ci to its figures, through four faults.

They are a preemption, a dead node, a time limit and an absent controller. After the run, damaged
files let jobs fail.
"""

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
SMALL = [
    "preset=ci",
    'teachers={"stories-ci": {"distillation": {"rounds": 2, "teacher_steps": 32}}}',
    'sampling={"rounds": [0, 2]}',
    'evaluation={"lambada": null}',
    "continuations=null",
]
LIMIT_S = 1200  # of a graph on two busy cores


def snakemake(cluster, folder, *words: str) -> subprocess.Popen:
    """Start `snakemake --profile slurm ...` in the folder; its output goes to the file `out`."""
    with open(folder / "out", "w") as out:
        return subprocess.Popen(
            [sys.executable, "-c", FAST, "--profile", "slurm", *words],
            cwd=folder,
            env=cluster.environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def running(cluster) -> dict[str, tuple[str, str]]:
    """The running jobs, by rule and wildcards: (job id, node)."""
    said = cluster.call("squeue", "-h", "-t", "RUNNING", "-p", "low", "-o", "%k|%i|%N")
    lines = [line.split("|") for line in said.splitlines()]
    return {about.removeprefix("rule_"): (job, node) for about, job, node in lines}


def workers(job: str) -> list[int]:
    """The processes of `halfstep` in a job, the launcher included."""
    name, found = rb"bin/halfstep\0|halfstep\.cli\0", []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            its = f"SLURM_JOB_ID={job}\0".encode() in (process / "environ").read_bytes()
            if its and re.search(name, (process / "cmdline").read_bytes()):
                found.append(int(process.name))
        except OSError:
            pass
    return found


def steps(jobs: list[str]) -> list[int]:
    """The processes with which Slurm's daemon on a node runs these jobs."""
    name, found = rb"slurmstepd: \[(%s)\." % "|".join(jobs).encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if re.match(name, (process / "cmdline").read_bytes()):
                found.append(int(process.name))
        except OSError:
            pass
    return found


class Faults:
    """Each fault strikes one running job, after the job that was struck before has ended."""

    def __init__(self, cluster):
        self.cluster = cluster
        self.done: dict[str, str] = {}  # job by fault
        self.left = [
            ("pretrain", self.preempt),
            ("distill_round.*_1$", self.node_down),
            ("distill_round.*_2$", self.time_limit),
            (".", self.no_controller),
        ]

    def strike(self) -> None:
        """Let the next fault happen, if its job runs."""
        ended = "JobState=(COMPLETED|TIMEOUT)"
        if not self.left or not all(re.search(ended, self.about(fault)) for fault in self.done):
            return
        pattern, fault = self.left[0]
        for rule, (job, node) in running(self.cluster).items():
            if re.match(pattern, rule) and workers(job):
                self.left.pop(0)
                self.done[fault.__name__] = job
                fault(job, node)
                return

    def about(self, fault: str) -> str:
        return self.cluster.call("scontrol", "show", "job", self.done[fault])

    def preempt(self, job: str, node: str) -> None:
        """A job of partition main takes the whole node."""
        words = ["-p", "main", "-w", node, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
        self.cluster.call("sbatch", *words)

    def time_limit(self, job: str, node: str) -> None:
        """The job hangs, and its limit ends in a moment."""
        for process in workers(job):
            os.kill(process, signal.SIGSTOP)
        self.cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+1")

    def node_down(self, job: str, node: str) -> None:
        """The node returns when no process of its jobs is left, as after a boot.

        Earlier, Slurm would find a job there that it has already started again elsewhere.
        """
        left = steps([other for other, where in running(self.cluster).values() if where == node])
        self.cluster.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        end = time.monotonic() + 60
        while any(Path(f"/proc/{process}").exists() for process in left) and time.monotonic() < end:
            time.sleep(0.5)
        self.cluster.call("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def no_controller(self, job: str, node: str) -> None:
        self.cluster.stop_controller()
        time.sleep(15)
        self.cluster.start_controller()


def finish(cluster, process, each=lambda: None) -> int:
    """Wait for the process and return its exit code; call `each` twice a second."""
    end = time.monotonic() + LIMIT_S
    try:
        while process.poll() is None and time.monotonic() < end:
            each()
            time.sleep(0.5)
        return process.wait(timeout=max(1, end - time.monotonic()))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """The graph, run to its end while the faults happen: (folder, output, faults)."""
    folder = copy(tmp_path_factory.mktemp("clone")).folder
    faults = Faults(cluster)
    words = ["--set-resources", "pretrain:gpu=1", "distill_round:gpu=2", "--jobs", "4"]
    words += ["--latency-wait", "5", "--config", *SMALL]
    code = finish(cluster, snakemake(cluster, folder, "all", *words), faults.strike)
    said = (folder / "out").read_text()
    assert code == 0, said[-6000:]
    return folder, said, faults


def test_the_graph_reaches_its_figures_through_every_fault(run):
    folder, _, faults = run
    assert list(faults.done) == ["preempt", "node_down", "time_limit", "no_controller"]
    for kind in ("pdf", "svg", "csv"):
        assert (folder / f"results/figures/ppl_vs_steps.{kind}").stat().st_size > 0
    assert len((folder / "results/tables/steps.csv").read_text().splitlines()) > 4
    assert (folder / "results/mlflow.synced").exists()


@pytest.mark.parametrize("fault", ["preempt", "node_down"])
def test_preemption_and_node_failure_start_the_same_job_again(run, fault):
    about = run[2].about(fault)
    assert "JobState=COMPLETED" in about and "Restarts=1" in about, about


def test_a_time_limit_is_a_new_job_that_asks_for_more(run, cluster):
    old = run[2].done["time_limit"]
    assert "JobState=TIMEOUT" in run[2].about("time_limit")
    said = cluster.call("squeue", "-h", "-t", "all", "-o", "%k|%i|%m|%T")
    lines = [line.split("|") for line in said.splitlines()]
    second_round = [line for line in lines if re.match("rule_distill_round.*_2$", line[0])]
    was, new = sorted(second_round, key=lambda line: int(line[1]))
    assert was[1:] == [old, "3000M", "TIMEOUT"] and new[2:] == ["4500M", "COMPLETED"]


def test_jobs_ask_for_what_they_need(run, cluster):
    for fault, gpus in (("preempt", "1"), ("node_down", "2")):
        about = run[2].about(fault)
        assert re.search(r"gres.gpu[=:](\d)", about)[1] == gpus, about
    jobs = cluster.call("squeue", "-h", "-t", "all", "-o", "%k|%b")
    assert re.search(r"rule_prepare_corpus\S*\|N/A", jobs), jobs
    assert not re.search("rule_(plot|tabulate|track|start_page|merge_provenance|fetch)", jobs), jobs


def test_the_run_waits_for_an_absent_controller(run):
    assert "Slurm does not answer" in run[1] and "Slurm answers again" in run[1]


def test_the_price_is_printed_before_and_after(run):
    before, after = run[1].split("Submitted batch job", 1)[0], run[1].rsplit("halfstep | ", 40)
    assert re.search(r"halfstep \| pretrain +1 ", before), before[-3000:]
    assert any("finished:" in line for line in after), run[1][-3000:]


def test_a_failure_shows_its_reason_and_how_to_continue(run, cluster):
    """After the run the teacher is damaged. The end of snakemake's output names the job that reads
    it, and the reason."""
    folder, target = run[0], "results/models/stories-ci/kl_backward/round-1/meta.json"
    config = [word.replace('"rounds": 2', '"rounds": 2, "lr": 0.1') for word in SMALL]
    meta = folder / "results/models/stories-ci/teacher/meta.json"
    when, good = meta.stat(), meta.read_text()
    meta.write_text("{}")
    os.utime(meta, ns=(when.st_atime_ns, when.st_mtime_ns))
    try:
        process = snakemake(cluster, folder, target, "--retries", "0", "--config", *config)
        assert finish(cluster, process) == 1
    finally:
        meta.write_text(good)
    end = (folder / "out").read_text().split("stopped; what failed:")[1]
    assert "rule distill_round" in end, end
    assert "log: results/logs/distill_round/stories-ci/kl_backward/round-1.log" in end, end
    assert "meta.json" in end.split("Slurm's log:")[0] and "halfstep distill-round:" in end, end
    assert re.search(r"Slurm's log: \S+/rule_distill_round/\S+\.log", end), end
    assert "to continue: snakemake --profile slurm" in end, end


def test_a_group_is_one_submission_and_keeps_what_its_first_job_wrote(run, cluster):
    """The judge of the continuations is damaged, so their scores fail. A later call draws no
    continuation again."""
    folder = run[0]
    judge = folder / "results/models/stories-ci/baseline/hf/model.safetensors"
    target = "results/metrics/stories-ci/teacher/continuations.json"
    continuations = 'continuations={"continuation_steps": [4, 8], "continuation_rounds": [0]}'
    config = [*SMALL[:-1], continuations]
    rules = ("continue_prompts", "score_continuations")
    words = [target, "--set-resources", *(f"{rule}:gpu=1" for rule in rules), "--config", *config]
    when, good = judge.stat(), judge.read_bytes()
    judge.write_bytes(b"")
    os.utime(judge, ns=(when.st_atime_ns, when.st_mtime_ns))
    try:
        assert finish(cluster, snakemake(cluster, folder, *words, "--retries", "0")) == 1
    finally:
        judge.write_bytes(good)
        os.utime(judge, ns=(when.st_atime_ns, when.st_mtime_ns))
    end = (folder / "out").read_text().split("stopped; what failed:")[1]
    assert "rule score_continuations" in end, end
    assert "group continuations-stories-ci/teacher" in end, end
    assert re.search(r"Slurm's log: \S+/group_continuations-stories-ci/\S+\.log", end), end
    drawn = sorted(folder.glob("results/continuations/stories-ci/teacher/steps-*/samples.npy"))
    times = [file.stat().st_mtime_ns for file in drawn]
    assert len(drawn) == 2 and not (folder / target).exists()

    assert finish(cluster, snakemake(cluster, folder, *words)) == 0, (folder / "out").read_text()
    assert [file.stat().st_mtime_ns for file in drawn] == times and (folder / target).exists()
    said = cluster.call("squeue", "-h", "-t", "all", "-o", "%i|%T|%l|%k")
    lines = [line.split("|") for line in said.splitlines() if "score_continuations" in line]
    failed, repeated = sorted(lines, key=lambda line: int(line[0]))
    assert failed[1:3] == ["FAILED", "1:00:00"] and repeated[1:3] == ["COMPLETED", "1:00:00"]
    for job in (failed[0], repeated[0]):
        assert "TresPerJob=gres:gpu:1\n" in cluster.call("scontrol", "show", "job", job) + "\n"

"""The jobs of Snakemake's graph, built without running any, and paths through them."""

import fcntl
import itertools
import random
import re

import pytest
from dryrun import copy

from halfstep.errors import HalfstepError
from halfstep.workflow.graph import PlannedJob, halfstep_command, longest_paths
from halfstep.workflow.locks import MARK

ROUND = "results/models/stories-ci/kl_backward/round-1/meta.json"


def test_jobs_are_those_of_a_dry_run(workflow):
    """Every printed command is that of a job, with its time limit and threads."""
    arguments = ["all", "--config", "preset=ci"]
    graph, printed = workflow.graph(*arguments), workflow.plan("-p", *arguments)
    blocks = re.split(r"^(?:local)?rule ", printed, flags=re.MULTILINE)[1:]
    expected = set()
    for block in blocks:
        command = halfstep_command(block)
        if command:
            runtime = re.search(r"runtime=(\d+)", block)
            threads = re.search(r"threads: (\d+)", block)
            limit = float(runtime[1]) if runtime else 0.0
            expected.add((block.split(":")[0], *command, limit, int(threads[1]) if threads else 1))
    found = {(job.rule, *job.command, float(job.runtime), job.threads) for job in graph.jobs}
    assert found == expected and len(graph.jobs) == len(expected) > 40
    assert graph.cores >= 1 and not any(job.gpu for job in graph.jobs)
    assert {job.rule for job in graph.jobs if job.resumes} == {
        "pretrain",
        "train_baseline",
        "distill_round",
    }


def test_a_cluster_gives_jobs_their_threads_and_gpus(workflow):
    target = "results/models/owt-small/kl_backward/round-1/meta.json"
    jobs = workflow.graph(target, "--profile", "slurm").jobs
    found = {job.rule: (job.gpu, job.threads) for job in jobs}
    assert found.pop("fetch") == (0, 1)
    assert found == {"prepare_corpus": (0, 8), "pretrain": (8, 8), "distill_round": (4, 8)}


@pytest.mark.parametrize("arguments, fault", [
    (["--config", "preset=nothing"], "configuration: preset.*nothing"),
    (["results/nothing.txt"], "No rule to produce results/nothing.txt|MissingRule"),
    (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
])  # fmt: skip
def test_a_graph_that_cannot_be_planned_is_one_sentence(workflow, capfd, arguments, fault):
    with pytest.raises(HalfstepError, match=f"snakemake cannot plan this graph: .*({fault})") as at:
        workflow.graph(*arguments)
    assert "\n" not in str(at.value) and str(at.value).endswith("; correct it, and call again")
    assert capfd.readouterr() == ("", "")


def test_a_run_that_is_going_on_is_not_disturbed(tmp_path, capfd):
    """Locks of another run neither stop a plan nor go away, and its mark keeps its words."""
    own = copy(tmp_path)
    locks = tmp_path / ".snakemake/locks"
    locks.mkdir(parents=True)
    lock, mark = locks / "0.output.lock", tmp_path / ".snakemake" / MARK
    lock.write_text(ROUND)
    with open(mark, "a+") as held:
        held.write("cluster elsewhere")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        jobs = own.graph(ROUND, "--config", "preset=ci").jobs
    assert {job.rule for job in jobs} >= {"prepare_corpus", "distill_round"}
    assert lock.read_text() == ROUND and mark.read_text() == "cluster elsewhere"
    assert not (tmp_path / "results").exists() or not any((tmp_path / "results").rglob("*.json"))
    assert capfd.readouterr() == ("", "")


def test_the_longest_path_is_that_of_all_paths():
    rng = random.Random(1)
    for _ in range(20):
        n = 7
        edges = {(i, j) for i, j in itertools.combinations(range(n), 2) if rng.random() < 0.4}
        jobs = [
            PlannedJob("rule", [f"o{j}" for j in range(n) if (j, i) in edges], [f"o{i}"])
            for i in range(n)
        ]
        seconds = [rng.random() for _ in range(n)]
        ways = (
            path
            for length in range(1, n + 1)
            for path in itertools.combinations(range(n), length)
            if all(edge in edges for edge in itertools.pairwise(path))
        )
        best = max(ways, key=lambda path: sum(seconds[i] for i in path))
        total, path = max(longest_paths(jobs, seconds))
        assert total == pytest.approx(sum(seconds[i] for i in best)) and path == list(best)

"""`halfstep plan`: prices computed by hand, the longest path, and measured cost after the run."""

import itertools
import random
from types import SimpleNamespace

import pytest

from halfstep.commands import plan as module
from halfstep.commands.plan import (
    CPU_SPEED,
    GPU_SPEED,
    PlannedJob,
    Prices,
    clock,
    graph_jobs,
    longest_path,
    num_weights,
    price_lines,
    printed_jobs,
    slow_lines,
)
from halfstep.files import read_json, write_json

TEACHER = "results/models/t/teacher"
WEIGHTS = [f"{TEACHER}/{name}.safetensors" for name in ("model", "optimizer")]
SCORES = "results/metrics/t/teacher/lambada"
SPREAD = "nodes=2, srun=srun --nodes=2 --gpus-per-node=1 , processes=--processes 2"
PRINTED = rf"""
[Sat Nov 21 07:22:56 2026]
rule pretrain:
    input: results/data/c/manifest.json
    output: {", ".join(WEIGHTS)}, {TEACHER}/provenance.json
    wildcards: teacher=t
    resources: tmpdir=/tmp, mem_mb=3000, runtime=60, gpu=2, gpu_model=, {SPREAD}
Shell command:{" "}
        srun --nodes=2 --gpus-per-node=1 halfstep pretrain \
            --corpus results/data/c \
            --output {TEACHER} \
            --size small \
            --num-steps 1000 --batch-size 512 --lr 0.002 \
            --threads 8 --micro-batch 32 --processes 2  \
            2>&1 | tee results/logs/pretrain/t.log
        {""}

[Sat Nov 21 07:22:56 2026]
rule score_lambada:
    input: {TEACHER}/provenance.json
    output: {SCORES}.json, {SCORES}.provenance.json
    resources: tmpdir=/tmp, mem_mb=3000, runtime=120, gpu=1, gpu_model=
Shell command:{" "}
        halfstep score-lambada \
            --checkpoint {TEACHER} \
            2>&1 | tee results/logs/score_lambada/t.log

[Sat Nov 21 07:22:56 2026]
rule all:
    input: {SCORES}.json
Shell command: None
"""


def record(results, output, seconds, command):
    """Write the provenance record of a finished job."""
    hours, rest = divmod(seconds, 3600)
    content = {
        "format": 1,
        "outputs": {},
        "inputs": {},
        "command": command,
        "started": "2026-11-21T00:00:00+00:00",
        "ended": f"2026-11-21T{hours:02d}:{rest // 60:02d}:{rest % 60:02d}+00:00",
    }
    write_json(results / output, content)


def test_jobs_are_read_from_print_as_from_the_graph():
    train, score = printed_jobs(PRINTED)
    assert (train.rule, train.gpu, train.runtime) == ("pretrain", 2, 60)
    assert (score.rule, score.gpu, score.runtime) == ("score_lambada", 1, 120)
    assert train.output == [*WEIGHTS, f"{TEACHER}/provenance.json"]
    assert train.command[:4] == ["halfstep", "pretrain", "--corpus", "results/data/c"]
    assert train.command[-2:] == ["--processes", "2"]
    shells = [block.split("Shell command:")[1] for block in PRINTED.split("\nrule ")[1:]]
    graph = [
        SimpleNamespace(
            rule=SimpleNamespace(name=job.rule),
            input=job.input,
            output=job.output,
            resources={"gpu": job.gpu, "runtime": job.runtime},
            shellcmd=shell,
        )
        for job, shell in zip([train, score], shells, strict=False)
    ]
    graph.append(SimpleNamespace(shellcmd=None))  # rule all
    assert graph_jobs(graph) == [train, score]


def test_jobs_are_priced_as_by_hand(tmp_path):
    train, score = jobs = printed_jobs(PRINTED)
    prices = Prices(jobs, tmp_path)
    weights = 12 * 12 * 768**2 + 768 * 50258
    assert num_weights("small") == weights
    # Windows of 1,024 tokens; 6 operations per weight and token.
    by_hand = 6 * weights * 1000 * 512 * 1024 / GPU_SPEED / 2
    seconds, source = prices.price(train)
    assert source == "assumed" and seconds == pytest.approx(by_hand)
    assert prices.price(score) == (7200, "limit")
    without_size = printed_jobs(PRINTED.replace("            --size small \\\n", ""))
    assert Prices(without_size, tmp_path).price(without_size[0]) == (seconds, source)


def test_a_checkpoint_is_its_weights_and_two_moments(tmp_path):
    train, score = jobs = printed_jobs(PRINTED)
    prices = Prices(jobs, tmp_path)
    assert prices.disk(train) == 4 * 3 * num_weights("small") and prices.disk(score) == 0
    rows = "results/metrics/t/reset_optimizer/round-1/lambada.json"
    assert prices.disk(PlannedJob("score_lambada", [], [rows], command=train.command)) == 0


def test_a_finished_job_is_the_measure_of_its_kind(tmp_path):
    """Training for a tenth of the steps took 1,000 s on four GPUs, so this one takes 20,000 s on
    two. A scoring job takes as long as another one took."""
    jobs = printed_jobs(PRINTED)
    models = tmp_path / "models"
    for broken in ("u/teacher/meta.json", "v/teacher/meta.json", "v/provenance.json"):
        write_json(models / broken, {})  # a price never stops a run
    shorter = "halfstep pretrain --corpus results/data/c --output results/models/u/teacher "
    shorter += "--size small --num-steps 100 --processes 4"
    scored = "halfstep score-lambada --checkpoint results/models/u/teacher"
    record(tmp_path, "models/u/teacher/provenance.json", 1000, shorter.split())
    record(tmp_path, "metrics/u/teacher/lambada.provenance.json", 77, scored.split())
    prices = Prices(jobs, tmp_path)
    assert [prices.price(job) for job in jobs] == [
        (pytest.approx(20_000), "measured"),
        (77, "measured"),
    ]


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
        paths = (
            path
            for length in range(1, n + 1)
            for path in itertools.combinations(range(n), length)
            if all(edge in edges for edge in itertools.pairwise(path))
        )
        best = max(paths, key=lambda path: sum(seconds[i] for i in path))
        total, path = longest_path(jobs, seconds)
        assert total == pytest.approx(sum(seconds[i] for i in best)) and path == list(best)


def test_measured_cost_is_printed_next_to_the_estimate(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    jobs = printed_jobs(PRINTED)
    first = price_lines(jobs, results)
    assert "finished:" not in "".join(first) and len(read_json(results / "plan.json")) == 2
    gpu_hours = Prices(jobs, results).price(jobs[0]).seconds * 2 / 3600
    assert first[1].split()[:3] == ["pretrain", "1", f"{gpu_hours:.1f}"]
    record(results, "models/t/teacher/provenance.json", 7200, list(jobs[0].command))
    last = price_lines(jobs[1:], results)[-1].split()
    assert last[0] == "pretrain" and last[-2:] == ["2.0", "h"]
    # The estimate of before is kept, not one that knows the end.
    assert price_lines([], results)[-1].split() == last


PREPARED = """
rule prepare_corpus:
    output: results/data/c/manifest.json
    resources: gpu=0, runtime=360
Shell command:
        halfstep prepare-corpus --output results/data/c --kind files --length 128 \\
            --vocab-size 1000 2>&1 | tee log
"""
TRAINED = """
rule distill_round:
    input: results/data/c/manifest.json
    output: results/models/t/kl_backward/round-1/provenance.json
    resources: gpu=0, runtime=60
Shell command:
        halfstep distill-round --teacher results/models/t/teacher --corpus results/data/c \\
            --output results/models/t/kl_backward/round-1 --num-steps {steps} --batch-size 64 \\
            2>&1 | tee log

rule pretrain:
    output: results/models/t/teacher/provenance.json
    resources: gpu=0, runtime=60
Shell command:
        halfstep pretrain --corpus results/data/c --output results/models/t/teacher \\
            --size mini --num-steps 1 --batch-size 1 2>&1 | tee log
"""


def test_a_job_without_a_gpu_is_priced_as_by_hand(tmp_path):
    """The corpus names the vocabulary and the window; a round has two passes of the teacher."""
    jobs = printed_jobs(PREPARED + TRAINED.format(steps=1000))
    prices = Prices(jobs, tmp_path)
    weights = 6 * 12 * 384**2 + 384 * 1000
    by_hand = 2 * weights * (3 + 2) * 1000 * 64 * 128 / CPU_SPEED
    assert prices.price(jobs[1]) == (pytest.approx(by_hand), "assumed")


def test_days_on_this_machine_are_said_before_they_begin(tmp_path):
    short = printed_jobs(PREPARED + TRAINED.format(steps=100))
    assert slow_lines(short, tmp_path) == []
    (line,) = slow_lines(printed_jobs(PREPARED + TRAINED.format(steps=100_000)), tmp_path)
    assert "on the CPU of this machine a job of distill_round takes about 52 days" in line


def test_the_clock_takes_the_largest_unit():
    seconds = [5, 90, 5400, 86_400 * 3, 86_400 * 30, 86_400 * 365 * 600]
    assert [clock(s) for s in seconds] == [
        "5 s",
        "1.5 min",
        "1.5 h",
        "72.0 h",
        "30 days",
        "600 years",
    ]


@pytest.mark.parametrize("arguments", [[], ["--config", "preset=ci"]])
def test_a_plan_is_for_this_machine_unless_slurm_answers(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    calls = []

    def snakemake(call, **_):
        calls.append(call)
        return SimpleNamespace(returncode=0, stdout=PREPARED, stderr="")

    monkeypatch.setattr(module.subprocess, "run", snakemake)
    for answer, where in (None, "this machine"), ("gpu up", "the cluster"):
        monkeypatch.setattr(module, "ask", lambda *words, timeout, answer=answer: answer)
        module.plan(arguments)
        assert capsys.readouterr().out.startswith(f"planned for {where}")
        assert ("--profile" in calls[-1]) == (answer is not None)
        assert calls[-1][len(calls[-1]) - len(arguments) :] == arguments
    module.plan(["--profile", "slurm"])
    assert calls[-1].count("--profile") == 1


def test_a_frontier_costs_its_sets(tmp_path):
    """Three step counts and two temperatures; a step that reveals no token takes no pass."""
    common = ["--checkpoint", TEACHER, "--num-samples", "16"]
    one = ["halfstep", "generate", *common, "--steps", "8"]
    size = ["halfstep", "pretrain", "--size", "small", "--output", TEACHER]
    sweep = ["halfstep", "generate", *common, "--steps", "8", "16", "4096"]
    sweep += ["--temperatures", "0.7", "0.8", "--frontier-steps", "8", "4096", "--threads", "8"]
    jobs = [PlannedJob("pretrain", [], [], command=size)]
    prices = Prices(jobs, tmp_path)
    assert prices.work(sweep) == prices.work(one) * (8 + 16 + 1024 + 2 * (8 + 1024)) / 8
    everywhere = [*one, "16", "--temperatures", "0.7", "0.8"]
    assert prices.work(everywhere) == prices.work(one) * 3 * (8 + 16) / 8
    baseline = [word.replace("teacher", "baseline") for word in one]
    baseline += ["--temperatures", "0.7", "0.8"]
    assert prices.work(baseline) == prices.work(one) * 3 / 8

"""`halfstep plan`: prices that can be checked by hand, the longest path, and actual cost beside the estimate."""

import itertools
import random

import pytest

from halfstep.commands.plan import ASSUMED, Prices, jobs_of, lines, longest, parameters
from halfstep.files import read_json, write_json

PRINTED = r"""
[Sat Nov 21 07:22:56 2026]
rule pretrain:
    input: results/data/c/manifest.json
    output: results/models/t/teacher/model.safetensors, results/models/t/teacher/optimizer.safetensors, results/models/t/teacher/provenance.json
    wildcards: teacher=t
    resources: tmpdir=/tmp, mem_mb=3000, runtime=60, gpu=2, gpu_model=, nodes=2, srun=srun --nodes=2 --gpus-per-node=1 , processes=--processes 2
Shell command: 
        srun --nodes=2 --gpus-per-node=1 halfstep pretrain \
            --corpus results/data/c \
            --output results/models/t/teacher \
            --size small \
            --num-steps 1000 --batch-size 512 --lr 0.002 \
            --threads 8 --micro-batch 32 --processes 2  \
            2>&1 | tee results/logs/pretrain/t.log
        

[Sat Nov 21 07:22:56 2026]
rule score_lambada:
    input: results/models/t/teacher/provenance.json
    output: results/metrics/t/teacher/lambada.json, results/metrics/t/teacher/lambada.provenance.json
    resources: tmpdir=/tmp, mem_mb=3000, runtime=120, gpu=1, gpu_model=
Shell command: 
        halfstep score-lambada \
            --checkpoint results/models/t/teacher \
            2>&1 | tee results/logs/score_lambada/t.log
"""  # noqa: W291


def record(results, output, seconds, command):
    write_json(results / output, {
        "format": 1, "outputs": {}, "inputs": {}, "command": command,
        "started": "2026-11-21T00:00:00+00:00", "ended": f"2026-11-21T{seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}+00:00",
    })  # fmt: skip


def test_jobs_are_read_and_priced_as_by_hand(tmp_path):
    train, score = jobs = jobs_of(PRINTED)
    assert (train["gpu"], train["runtime"], score["gpu"], score["runtime"]) == (2, 60, 1, 120)
    prices = Prices(jobs, tmp_path)
    weights = 12 * 12 * 768**2 + 768 * 50258
    assert parameters("small") == weights
    seconds, source = prices.price(
        train
    )  # windows of 1,024 tokens; 6 operations per weight and token
    assert source == "assumed" and seconds == pytest.approx(
        6 * weights * 1000 * 512 * 1024 / ASSUMED[True] / 2
    )
    assert Prices(
        unsaid := jobs_of(PRINTED.replace("            --size small \\\n", "")), tmp_path
    ).price(unsaid[0]) == (seconds, source)  # the default
    assert prices.price(score) == (7200, "limit")
    assert (
        prices.disk(train) == 4 * 3 * weights and prices.disk(score) == 0
    )  # one set of weights, two moments
    named = {
        **score,
        "output": ["results/metrics/t/reset_optimizer/round-1/lambada.json"],
        "command": train["command"],
    }
    assert prices.disk(named) == 0


def test_a_finished_job_is_the_measure_of_its_kind(tmp_path):
    """A job of a tenth of the steps took 1,000 s on four GPUs, so this one takes 20,000 s on two; a scoring job takes what another took."""
    jobs = jobs_of(PRINTED)
    for spoiled in (
        "models/u/teacher/meta.json",
        "models/v/teacher/meta.json",
        "models/v/provenance.json",
    ):
        write_json(tmp_path / spoiled, {})  # a price never stops a run
    shorter = [
        "halfstep",
        "pretrain",
        "--corpus",
        "results/data/c",
        "--output",
        "results/models/u/teacher",
        "--size",
        "small",
        "--num-steps",
        "100",
    ]
    shorter += ["--processes", "4"]
    record(tmp_path, "models/u/teacher/provenance.json", 1000, shorter)
    record(
        tmp_path,
        "metrics/u/teacher/lambada.provenance.json",
        77,
        ["halfstep", "score-lambada", "--checkpoint", "results/models/u/teacher"],
    )
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
            {"output": [f"o{i}"], "input": [f"o{j}" for j in range(n) if (j, i) in edges]}
            for i in range(n)
        ]
        seconds = [rng.random() for _ in range(n)]
        paths = (
            c
            for k in range(1, n + 1)
            for c in itertools.combinations(range(n), k)
            if all(e in edges for e in itertools.pairwise(c))
        )
        best = max(paths, key=lambda path: sum(seconds[i] for i in path))
        total, path = longest(jobs, seconds)
        assert total == pytest.approx(sum(seconds[i] for i in best)) and path == list(best)


def test_what_it_took_stands_beside_what_was_expected(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    jobs = jobs_of(PRINTED)
    first = lines(jobs, results)
    assert "finished:" not in "".join(first) and len(read_json(results / "plan.json")) == 2
    assert [word for word in first[1].split()][:3] == [
        "pretrain",
        "1",
        f"{Prices(jobs, results).price(jobs[0])[0] * 2 / 3600:.1f}",
    ]
    record(results, "models/t/teacher/provenance.json", 7200, jobs[0]["command"])
    last = lines(jobs[1:], results)[-1].split()
    assert last[0] == "pretrain" and last[-2:] == ["2.0", "h"]
    assert (
        lines([], results)[-1].split() == last
    )  # the estimate of before, not one that knows the end

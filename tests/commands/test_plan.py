"""`halfstep plan`: its table, the time on this machine, warnings, and measured cost after a run."""

import re

import pytest

from halfstep.commands import plan as module
from halfstep.commands.plan import (
    PricedJobs,
    cheaper_presets,
    clock,
    late_lines,
    machine_line,
    price_lines,
    slow_lines,
)
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.workflow.graph import Graph, PlannedJob
from halfstep.workflow.prices import Prices
from halfstep.workflow.rates import Rates

TEACHER = "results/models/t/teacher"
CORPUS = PlannedJob(
    "prepare_corpus",
    [],
    ["results/data/c/manifest.json", "results/data/c/provenance.json"],
    runtime=360,
    command="halfstep prepare-corpus --output results/data/c --kind docs --length 128".split(),
)


def training(steps: int, gpu: int = 0, runtime: float = 60, threads: int = 1) -> PlannedJob:
    line = f"halfstep pretrain --corpus results/data/c --output {TEACHER} --size small "
    line += f"--num-steps {steps} --batch-size 512 --threads {threads} --processes {max(1, gpu)}"
    return PlannedJob(
        "pretrain",
        ["results/data/c/manifest.json"],
        [f"{TEACHER}/model.safetensors", f"{TEACHER}/provenance.json"],
        gpu,
        runtime,
        threads,
        [*line.split(), "${SLURM_JOB_ID:+--time-limit", "60}"],
    )


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


def test_measured_cost_is_printed_next_to_the_estimate(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    jobs = [CORPUS, training(1000, gpu=2)]
    first = price_lines(PricedJobs(jobs, results))
    assert "finished:" not in "".join(first) and len(read_json(results / "plan.json")) == 2
    seconds = Prices(jobs, results).price(jobs[1]).seconds
    assert [line.split()[0] for line in first[1:4]] == ["prepare_corpus", "pretrain", "together"]
    assert first[2].split()[:3] == ["pretrain", "1", f"{seconds * 2 / 3600:.1f}"]
    record(results, "models/t/teacher/provenance.json", 7200, list(jobs[1].command))
    last = price_lines(PricedJobs(jobs[:1], results))[-1].split()
    assert last[0] == "pretrain" and last[-3:-1] == ["2.0", "h"]
    assert float(last[-1]) == pytest.approx(7200 / seconds, abs=0.005)
    # The estimate of before is kept, not one that knows the end.
    assert price_lines(PricedJobs([], results))[-1].split() == last


def test_nothing_to_do_is_said(tmp_path, monkeypatch, capsys):
    """And not as an empty table; what finished jobs took is still there."""
    jobs = [training(1000)]
    price_lines(PricedJobs(jobs, tmp_path))
    record(tmp_path, "models/t/teacher/provenance.json", 60, list(jobs[0].command))
    monkeypatch.setattr(module, "plan_graph", lambda words: Graph([], 2, 0, "laptop"))
    module.plan(results=tmp_path)
    first, *rest = capsys.readouterr().out.strip().splitlines()
    assert first == "nothing to do: all results of the preset laptop are there"
    assert rest[-1].split()[0] == "pretrain" and "together" not in "".join(rest)


def test_a_gpu_without_a_job_on_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "plan_graph", lambda words: Graph([training(9)], 2, 0, "laptop"))
    with pytest.raises(HalfstepError, match="--gpu a100: no job of this graph has a GPU"):
        module.plan(results=tmp_path, gpu="a100")


def test_the_table_says_which_gpu_is_assumed(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFSTEP_SLURM_GPU_MODEL", "a100")
    table = price_lines(PricedJobs([CORPUS, training(1000, gpu=2)], tmp_path))
    assert any("assumed: a100 with 125 TFLOP/s in bfloat16" in line for line in table)
    table = price_lines(PricedJobs([CORPUS, training(1000, gpu=2)], tmp_path, Rates("h200")))
    assert any("assumed: h200 with 396 TFLOP/s" in line for line in table)
    table = price_lines(PricedJobs([CORPUS, training(1000)], tmp_path))
    assert any("GFLOP/s on a CPU thread" in line for line in table)


def test_this_machine_takes_its_longest_path_or_the_load_of_its_cores(tmp_path):
    """Three trainings at the same time, on one thread each: the load of four or two cores."""
    jobs = [training(10) for _ in range(3)]
    seconds = Prices(jobs, tmp_path).price(jobs[0]).seconds
    lines = [machine_line(PricedJobs(jobs, tmp_path), cores, 0) for cores in (4, 2)]
    assert lines[0] == f"on 4 cores of this machine: {clock(seconds)}"
    assert lines[1] == f"on 2 cores of this machine: {clock(1.5 * seconds)}"
    on_gpu = [training(1000, gpu=1) for _ in range(3)]
    each = Prices(on_gpu, tmp_path).price(on_gpu[0]).seconds
    line = machine_line(PricedJobs(on_gpu, tmp_path), 8, 1)
    assert line == f"on 8 cores and 1 GPU of this machine: {clock(3 * each)}"


def test_days_on_this_machine_are_said_before_they_begin(tmp_path):
    assert slow_lines(PricedJobs([CORPUS, training(1)], tmp_path)) == []
    (line,) = slow_lines(PricedJobs([CORPUS, training(10_000)], tmp_path))
    assert re.search("on the CPU of this machine a job of pretrain takes about .* days", line)


def test_a_job_that_cannot_end_within_its_limit_is_named(tmp_path):
    """A training resumes, so it may take the time of four submissions."""
    train = training(100_000, gpu=8)
    hours = Prices([CORPUS, train], tmp_path).price(train).seconds / 3600
    for limit, late in (2 * hours, False), (hours / 3.9, False), (hours / 4.1, True):
        found = late_lines(PricedJobs([CORPUS, training(100_000, 8, 60 * limit)], tmp_path))
        assert bool(found) == late
    assert "--set-resources pretrain:runtime=<minutes>" in found[0]
    scored = ["halfstep", "score-lambada", "--checkpoint", TEACHER, "--threads", "1"]
    slow = PlannedJob("score_lambada", [], [], 0, 1, command=scored)
    assert (
        "a job of score_lambada takes" in late_lines(PricedJobs([training(1), slow], tmp_path))[0]
    )


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


def test_cheaper_presets_are_those_that_exist(tmp_path):
    assert cheaper_presets("owt-small", tmp_path) == []
    for name in ("sdtt-small", "owt-adapted", "owt-small"):
        (tmp_path / f"{name}.yaml").touch()
    (line,) = cheaper_presets("owt-small", tmp_path)
    assert line.startswith("cheaper presets: sdtt-small, owt-adapted; ")
    assert cheaper_presets("sdtt-small", tmp_path) == []


@pytest.mark.parametrize("arguments", [[], ["--config", "preset=ci"]])
def test_a_plan_is_for_this_machine_unless_slurm_answers(monkeypatch, capsys, tmp_path, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("preset: laptop\n")
    calls = []

    def plan_graph(call):
        calls.append(call)
        return Graph([CORPUS], 2, 0, "laptop")

    monkeypatch.setattr(module, "plan_graph", plan_graph)
    for answer, where in (None, "this machine"), ("gpu up", "the cluster"):
        monkeypatch.setattr(module, "ask", lambda *words, timeout, answer=answer: answer)
        module.plan(arguments)
        printed = capsys.readouterr().out
        assert printed.startswith(f"planned for {where}: preset laptop\n")
        assert ("\non 2 cores of this machine: " in printed) == (answer is None)
        assert ("--profile" in calls[-1]) == (answer is not None)
        assert calls[-1][len(calls[-1]) - len(arguments) :] == arguments
    module.plan(["--profile", "slurm"])
    assert calls[-1].count("--profile") == 1
    module.plan(arguments, preset="own-model")
    assert calls[-1][calls[-1].index("--config") + 1] == "preset=own-model"


def test_an_unknown_gpu_is_refused_before_anything_is_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "plan_graph", None)
    with pytest.raises(HalfstepError, match="--gpu: found 'abacus', expected one of b200"):
        module.plan(gpu="abacus", results=tmp_path)

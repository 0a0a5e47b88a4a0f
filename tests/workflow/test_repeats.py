"""Repeated trainings: the jobs of the graph and their price, and two trainings for real."""

import json
import re
import shutil

import numpy
import pytest
from safetensors.numpy import load_file
from small import MACHINE, TRAINING, done

from halfstep.commands.plan import PricedJobs, price_lines
from halfstep.report.rows import read_table
from halfstep.report.trainings import pool_trainings
from halfstep.workflow.calls import flag_values
from halfstep.workflow.prices import Prices

TEACHERS = {
    "stories-ci": {"seeds": [1, 2], "distillation": {"rounds": 1}},
    "other": {
        "corpus": "stories-ci",
        "network": {"size": "tiny"},
        "distillation": {"rounds": 1, "num_steps": 3, "warmup_steps": 1},
        "runs": {"mse": {"divergence": "mse", "seeds": [1, 3]}},
    },
}
SEEDS = {  # model: seed of its training, seed of its samples
    "stories-ci/teacher": ("1", "1"),
    "stories-ci/kl_backward/round-1": ("1", "1"),
    "stories-ci-seed-2/teacher": ("2", "3"),
    "stories-ci-seed-2/kl_backward/round-1": ("2", "3"),
    "other/teacher": ("1", "1"),
    "other/mse/round-1": ("1", "1"),
    "other/mse-seed-3/round-1": ("3", "4"),
}


@pytest.fixture(scope="module")
def planned(workflow):
    """The jobs of a graph in which one teacher and another one's run are repeated."""
    teachers = f"teachers={json.dumps(TEACHERS)}"
    prompts = 'continuations={"continuation_rounds": [0, 1]}'
    return workflow.graph("--config", "preset=ci", teachers, prompts).jobs


def by_output(planned, rule: str, folder: str) -> dict[str, dict[str, str]]:
    """The flags of each job of a rule, by its output below a folder of results/."""
    found = {}
    for job in planned:
        if job.rule == rule:
            flags = flag_values(job.command)
            found[flags["output"].removeprefix(f"results/{folder}/")] = flags
    return found


def test_every_training_is_repeated_sampled_scored_and_continued(planned):
    trained = by_output(planned, "pretrain", "models") | by_output(
        planned, "distill_round", "models"
    )
    assert {name: flags.get("seed", "1") for name, flags in trained.items()} == {
        name: seed for name, (seed, _) in SEEDS.items()
    }
    before = trained["stories-ci-seed-2/kl_backward/round-1"]["teacher"]
    assert before == "results/models/stories-ci-seed-2/teacher"
    for rule, folder in (("generate", "samples"), ("continue_prompts", "continuations")):
        drawn = by_output(planned, rule, folder)
        seeds = {
            re.sub(r"/steps-(\d+|{steps})$", "", name): flags.get("sampling_seed", "1")
            for name, flags in drawn.items()
        }
        assert seeds == {name: seed for name, (_, seed) in SEEDS.items()} | {
            "stories-ci/baseline": "1",
            "other/baseline": "1",
        }
    runs = {name.rpartition("/round-")[0] or name for name in SEEDS}
    asked = {name.rpartition("/")[0] for name in by_output(planned, "score_lambada", "metrics")}
    assert asked == {*runs, "stories-ci/baseline", "other/baseline"}
    for rule in ("score_samples", "score_continuations"):
        scored = by_output(planned, rule, "metrics")
        models = {name.rpartition("/")[0] for name in scored}
        if rule == "score_samples":
            models |= by_output(planned, "score_frontier", "metrics").keys()
        of_teachers = {"stories-ci/baseline", "other/baseline"}
        if rule == "score_samples":
            of_teachers |= {"stories-ci/naive", "other/naive"}
        assert models == {*SEEDS, *of_teachers}


def test_repeats_have_the_baseline_and_the_judge_of_the_first_training(planned):
    names = {rule: by_output(planned, rule, "models") for rule in ("train_baseline", "latency")}
    assert names["train_baseline"].keys() == {"stories-ci/baseline", "other/baseline"}
    assert len(names["latency"]) == 2 == len(by_output(planned, "score_corpus", "metrics"))
    scored = by_output(planned, "score_frontier", "metrics")
    for name in ("stories-ci-seed-2/teacher", "stories-ci-seed-2/kl_backward/round-1"):
        judge = scored[name]["judge"]
        assert judge == "results/models/stories-ci/baseline/hf"


def test_the_plan_prices_every_repeat(planned, tmp_path):
    """A repeat costs what its first training costs."""
    prices = Prices(planned, tmp_path)
    cost = {
        flag_values(job.command)["output"]: prices.price(job).seconds
        for job in planned
        if job.rule in ("pretrain", "distill_round", "generate")
    }
    folder = "results/models/stories-ci"
    assert cost[f"{folder}/teacher"] == cost[f"{folder}-seed-2/teacher"] > 0
    mse = "results/models/other/mse"
    assert cost[f"{mse}/round-1"] == cost[f"{mse}-seed-3/round-1"] > 0
    lines = {
        line.split()[0]: line.split()[1] for line in price_lines(PricedJobs(planned, tmp_path))
    }
    assert (lines["pretrain"], lines["distill_round"], lines["generate"]) == ("3", "4", "9")


def test_two_trainings_differ_and_share_a_cell(pipeline, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(pipeline.results, results)
    corpus, models = results / "data/stories", results / "models"
    repeat, samples = models / "stories-tiny-seed-2/teacher", results / "samples/seed-2"
    rows = results / "metrics/stories-tiny-seed-2/teacher/samples.json"
    judge = f"--judge {models}/stories-tiny/baseline/hf --bootstrap 100"
    done(f"pretrain --corpus {corpus} --size tiny --output {repeat} --seed 2 {TRAINING} {MACHINE}")
    drawing = f"--steps 8 --num-samples 4 --sampling-seed 3 {MACHINE}"
    done(f"generate --checkpoint {repeat} --output {samples} {drawing}")
    done(f"score-samples --samples {samples} --corpus {corpus} --output {rows} {judge} {MACHINE}")
    done(f"tabulate --table steps --metrics {results}/metrics --output {results}/tables/steps")

    first = load_file(models / "stories-tiny/teacher/model.safetensors")
    second = load_file(repeat / "model.safetensors")
    assert any(not numpy.array_equal(first[name], second[name]) for name in first)
    table = read_table(results / "tables/steps.csv")
    entropy = table.query("run == 'teacher' and metric == 'entropy'")
    assert entropy["training_seed"].fillna(1).tolist() == [1, 2]
    assert entropy["checkpoint"].nunique() == 2 and entropy["seed"].tolist() == [1, 3]
    (cell,) = pool_trainings(table).query("run == 'teacher' and metric == 'entropy'")["value"]
    assert cell == pytest.approx(entropy["value"].mean())
    text = (results / "tables/steps.md").read_text()
    assert "| teacher | " in re.sub(" +", " ", text) and "Models with 2 trainings" in text

"""What a change makes stale, and what it must not: dry runs over a finished tree."""

import re

import pytest
import yaml
from dryrun import copy

CONFIG = {
    "preset": "ci",
    "teachers": {
        "stories-ci": {
            "distillation": {"rounds": 2, "teacher_steps": 64},
            "runs": {"kl_backward": {}, "mse": {"divergence": "mse"}},
        }
    },
    "sampling": {"steps": [8]},
}
REPORT = {
    "tabulate steps",
    "track",
    "all",
    *(f"plot {name}" for name in ("ppl_vs_steps", "entropy_vs_steps", "ppl_vs_latency")),
}


def configure(tree, **changes):
    (tree.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Snakemake has made every output, by rules that only touch them; then the real rules take their place."""
    tree = copy(tmp_path_factory.mktemp("finished"))
    configure(tree)
    rules = {file: file.read_text() for file in (tree.folder / "rules").glob("*.smk")}
    for file, text in rules.items():
        file.write_text(re.sub(r"\bhalfstep (?=[a-z-]+ \\\n)", "touch {output}; : ", text))
    done = tree.run("--cores", "64", "--quiet")
    assert done.returncode == 0, done.stderr
    for file, text in rules.items():
        file.write_text(text)
    return tree


@pytest.fixture
def finished(tree):
    yield tree
    configure(tree)


def trained(jobs: set[str]) -> set[str]:
    return {
        job
        for job in jobs
        if job.split()[0] in ("prepare_corpus", "pretrain", "train_baseline", "distill_round")
    }


def test_rules_written_otherwise_make_nothing_again(finished):
    assert finished.jobs() == set()


def test_what_mlflow_did_not_take_is_sent_by_the_next_call(finished):
    """The marker holds a warning then; looking (-n) leaves it there, working sends again and makes nothing else."""
    marker, rules = finished.folder / "results/mlflow.synced", finished.folder / "rules/report.smk"
    before = rules.read_text()
    marker.write_text("WARNING: not sent")
    assert finished.jobs() == set() and marker.read_text() == "WARNING: not sent"
    rules.write_text(re.sub(r"\bhalfstep (?=track)", "echo sent > {output}; : ", before))
    done = finished.run("--cores", "2")
    rules.write_text(before)
    assert (
        done.returncode == 0
        and marker.read_text() == "sent\n"
        and re.findall(r"^(\w+) +\d+$", done.stdout + done.stderr, re.MULTILINE)
        == ["track", "all", "total"]
    )
    assert "halfstep | sent" in done.stderr + done.stdout
    marker.write_text("")


def test_learning_rate_of_one_run(finished):
    configure(
        finished,
        teachers={
            "stories-ci": CONFIG["teachers"]["stories-ci"]
            | {"runs": {"kl_backward": {}, "mse": {"divergence": "mse", "lr": 1e-4}}}
        },
    )
    jobs = finished.jobs()
    assert trained(jobs) == {"distill_round stories-ci mse 1", "distill_round stories-ci mse 2"}
    assert {job for job in jobs if "kl_backward" in job} == set()
    assert {
        "generate stories-ci/mse/round-1 8",
        "score_samples stories-ci/mse/round-2",
    } | REPORT <= jobs
    assert not any(job.startswith("latency") for job in jobs)


def test_one_more_step_count_trains_nothing(finished):
    configure(finished, sampling={"steps": [8, 16]})
    jobs = finished.jobs()
    models = [
        f"stories-ci/{name}"
        for name in (
            "teacher",
            "kl_backward/round-1",
            "kl_backward/round-2",
            "mse/round-1",
            "mse/round-2",
        )
    ]
    assert {job for job in jobs if job.startswith("generate")} == {
        f"generate {model} 16" for model in models
    }
    assert {job for job in jobs if job.startswith("score")} == {
        f"score_samples {model}" for model in models
    }
    assert trained(jobs) == set() and REPORT <= jobs


def test_one_more_round_trains_that_round(finished):
    configure(
        finished,
        teachers={
            "stories-ci": CONFIG["teachers"]["stories-ci"]
            | {"distillation": {"rounds": 3, "teacher_steps": 64}}
        },
    )
    assert trained(finished.jobs()) == {
        "distill_round stories-ci kl_backward 3",
        "distill_round stories-ci mse 3",
    }


def test_other_threads_and_resources_make_nothing_again(finished):
    common = finished.folder / "rules/common.smk"
    kept = common.read_text()
    try:
        finished.edit(
            "rules/common.smk",
            lambda text: re.sub(
                r'"tiny": .*', '"tiny": (2, 5000, 16, 4, "2h", 4, "2h", 4, "2h"),', text
            ),
        )
        assert finished.jobs() == finished.jobs("--resources", "gpu=4") == set()
        finished.edit(
            "rules/common.smk", lambda text: re.sub(r"generate=\d+", "generate=99", text)
        )  # the stage now writes something else
        jobs = finished.jobs()
    finally:
        common.write_text(kept)
    assert "generate stories-ci/baseline 64" in jobs and trained(jobs) == set()

"""What a change makes stale, and what it must not: dry runs over a finished tree."""

import re

import pytest
import yaml
from dryrun import TOUCH, copy

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
OTHER_MACHINE = """
from halfstep.workflow.machine import MACHINE

tiny = MACHINE["tiny"]
MACHINE["tiny"] = tiny._replace(
    threads=2, mem_mb=5000, micro_batch=16, pretrain=(4, 2), round=(4, 2), sample=(4, 2)
)
"""


def configure(tree, **changes):
    (tree.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | changes))


def teacher(**changes) -> dict:
    """The section `teachers` of CONFIG with changes of its only teacher."""
    return {"stories-ci": CONFIG["teachers"]["stories-ci"] | changes}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Snakemake has made every output with rules that only touch files; the real rules are back."""
    tree = copy(tmp_path_factory.mktemp("finished"))
    configure(tree)
    rules = {file: file.read_text() for file in (tree.folder / "rules").glob("*.smk")}
    for file, text in rules.items():
        file.write_text(
            re.sub(
                r"\bhalfstep (?=[a-z-]+ \\\n)",
                TOUCH,
                text,
            )
        )
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
    rules = ("prepare_corpus", "pretrain", "train_baseline", "distill_round")
    return {job for job in jobs if job.split()[0] in rules}


def test_a_rule_with_another_text_makes_nothing_again(finished):
    assert finished.jobs() == set()


def test_what_mlflow_did_not_take_is_sent_by_the_next_call(finished):
    """The marker then holds a warning. A dry run leaves it; a real run sends again, and no more."""
    marker, rules = finished.folder / "results/mlflow.synced", finished.folder / "rules/report.smk"
    before = rules.read_text()
    marker.write_text("WARNING: not sent")
    assert finished.jobs() == set() and marker.read_text() == "WARNING: not sent"
    rules.write_text(re.sub(r"\bhalfstep (?=track)", "echo sent > {output}; : ", before))
    done = finished.run("--cores", "2")
    rules.write_text(before)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and marker.read_text() == "sent\n"
    assert re.findall(r"^(\w+) +\d+$", said, re.MULTILINE) == ["track", "all", "total"]
    assert "halfstep | sent" in said
    marker.write_text("")


def test_learning_rate_of_one_run(finished):
    runs = {"kl_backward": {}, "mse": {"divergence": "mse", "lr": 1e-4}}
    configure(finished, teachers=teacher(runs=runs))
    jobs = finished.jobs()
    assert trained(jobs) == {"distill_round stories-ci mse 1", "distill_round stories-ci mse 2"}
    assert {job for job in jobs if "kl_backward" in job} == set()
    assert {"generate stories-ci/mse/round-1", "score_frontier stories-ci/mse/round-2"} <= jobs
    assert REPORT <= jobs
    assert not any(job.startswith("latency") for job in jobs)


def test_one_more_step_count_trains_nothing(finished):
    configure(finished, sampling={"steps": [8, 16]})
    jobs = finished.jobs()
    rounds = [f"{run}/round-{number}" for run in ("kl_backward", "mse") for number in (1, 2)]
    models = [f"stories-ci/{name}" for name in ("teacher", *rounds)]
    generated = {job for job in jobs if job.startswith("generate")}
    last = [model for model in models if not model.endswith("round-1")]  # on the frontier
    swept = {f"generate_frontier {model}" for model in last}
    assert generated == swept | {f"generate {model}" for model in models}
    scored = {job for job in jobs if job.startswith("score")}
    read = {f"score_frontier {model}" for model in last}
    assert scored == read | {f"score_samples {model}" for model in models if model not in last}
    assert trained(jobs) == set() and REPORT <= jobs


def test_one_more_round_trains_that_round(finished):
    configure(finished, teachers=teacher(distillation={"rounds": 3, "teacher_steps": 64}))
    assert trained(finished.jobs()) == {
        "distill_round stories-ci kl_backward 3",
        "distill_round stories-ci mse 3",
    }


def test_other_threads_and_resources_make_nothing_again(finished):
    common = finished.folder / "rules/common.smk"
    kept = common.read_text()
    try:
        finished.edit("rules/common.smk", lambda text: text + OTHER_MACHINE)
        plan = finished.plan("-F", "results/models/stories-ci/teacher/meta.json")
        assert "threads: 2" in plan and "mem_mb=5000" in plan and "micro_batch=16" in plan
        assert finished.jobs() == finished.jobs("--resources", "gpu=4") == set()
        # A stage with a new version writes something else.
        finished.edit(
            "rules/common.smk", lambda text: text.replace("generate=GENERATE_STAGE", "generate=99")
        )
        jobs = finished.jobs()
    finally:
        common.write_text(kept)
    assert "generate stories-ci/baseline" in jobs and trained(jobs) == set()

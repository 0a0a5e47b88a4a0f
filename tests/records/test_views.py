"""The view of a teacher: which three trainings it shows, and that tags keep its name."""

import json

import pytest

from halfstep.records.jobs import Job
from halfstep.records.views import choose_jobs, view_name, view_page, view_state, view_tag


@pytest.fixture
def jobs(tmp_path):
    """jobs(names): trainings of the teacher `t` with a journal, in this order of time."""

    def make(names: str) -> list[Job]:
        found = []
        for started, name in enumerate(names.split()):
            folder = tmp_path / name
            folder.mkdir(parents=True)
            (folder / "journal.jsonl").write_text("")
            found.append(Job(f"t/{name}", {"name": name, "started": float(started)}, folder))
        return found

    return make


@pytest.mark.parametrize(
    ("trained", "chosen"),
    [
        ("baseline teacher", "baseline teacher"),
        ("baseline teacher kl/round-1", "baseline teacher kl/round-1"),
        ("baseline teacher kl/round-1 kl/round-2", "teacher kl/round-1 kl/round-2"),
        ("teacher kl/round-9 kl/round-10 kl/round-2", "teacher kl/round-10 kl/round-2"),
        ("teacher a/round-1 a/round-2 b/round-1 b/round-2", "a/round-1 a/round-2 b/round-2"),
        ("teacher c/round-1 b/round-1 a/round-1 d/round-1", "c/round-1 b/round-1 a/round-1"),
        ("teacher a/round-1 a-seed-2/round-1", "teacher a/round-1"),
        ("teacher", "teacher"),
    ],
)
def test_last_rounds_come_first_then_the_first_round_then_teacher_and_baseline(
    jobs, trained, chosen
):
    made = jobs(trained)
    assert [job.model for job in choose_jobs(made)] == [f"t/{name}" for name in chosen.split()]


def test_what_was_not_trained_here_has_no_curves(jobs, tmp_path):
    scores = Job("t/kl/round-1", {"name": "kl/round-1", "started": 0.0})
    published = Job("t/teacher", {"name": "teacher", "started": 1.0}, tmp_path / "empty")
    assert choose_jobs([scores, published]) == []


def test_a_round_that_failed_is_not_the_last_one(jobs):
    first, second, third = jobs("kl/round-1 kl/round-2 kl/round-3")
    third.run["status"], second.run["status"] = "failed", "running"
    assert choose_jobs([first, second, third]) == [first, second]


@pytest.mark.parametrize("teacher", ["stories-tiny", "a b/c:%", "été", "x" * 255])
def test_the_name_of_a_view_is_safe_in_a_tag_and_in_an_address(teacher):
    tag = view_tag(teacher, "0123456789abcdef" * 2)
    name = view_name(tag)
    assert tag.isascii() and len(tag) < 250 and name.endswith("-01234567")
    assert f"viewStateShareKey={name}&" in view_page("7", name)


def test_views_of_the_user_are_none_of_ours():
    """MLflow's button names a view by a checksum."""
    assert view_name("mlflow.sharedViewState." + "0f" * 32) == ""
    assert view_name("mlflow.note.content") == ""


def test_a_view_of_losses_and_perplexity_fits_into_a_tag():
    """MLflow takes 5000 characters."""
    keys = ("eval/x", "by_steps/entropy_unigram", "by_steps/generative_perplexity_ids_gpt2-large")
    job = Job("t/x/round-1", {}, evaluations={(key, 8): 1.0 for key in keys})
    state = view_state(["f" * 32] * 3, [job] * 3)
    assert len(state) < 5000 and json.loads(state)["searchFilter"].count("f" * 32) == 3
    charts = [chart["metricKey"] for chart in json.loads(state)["compareRunCharts"]]
    assert charts == ["train/loss", keys[-1]]

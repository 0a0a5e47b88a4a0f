"""`halfstep track`, counted in MLflow: each point once, one run per job, old runs superseded."""

import contextlib
import json
import re
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
import synthetic
import yaml

from halfstep.commands import COMMANDS
from halfstep.commands.report import summary, tabulate
from halfstep.commands.track import sync_once, track
from halfstep.commands.tracked import _metrics, gather_jobs
from halfstep.errors import HalfstepError
from halfstep.records import mlflow as mlflow_records
from halfstep.records.jobs import run_color
from halfstep.records.journal import Journal, read_journal
from halfstep.records.mlflow import Tracker

mlflow = pytest.importorskip("mlflow")
DELETED, ACTIVE = mlflow.entities.ViewType.DELETED_ONLY, mlflow.entities.ViewType.ACTIVE_ONLY


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One database for all tests (opening it takes seconds), and a results folder to copy."""
    folder = tmp_path_factory.mktemp("track")
    results = synthetic.write(
        folder / "results", runs=("kl_backward", "mse"), rounds=2, steps=[8, 16], points=10
    )
    return f"sqlite:///{folder}/mlflow.db", results


@pytest.fixture
def world(place, tmp_path, request):
    """(sync, client, runs, results): sync() returns the number of points added."""
    uri, template = place
    results = shutil.copytree(template, tmp_path / "results")
    experiment = request.node.name
    client = mlflow.MlflowClient(uri)

    def sync():
        return sync_once(results, uri, experiment)[0]

    def runs(view=ACTIVE):
        experiment_id = client.get_experiment_by_name(experiment).experiment_id
        found = client.search_runs([experiment_id], run_view_type=view)
        return {run.data.tags["halfstep.model"]: run for run in found}

    return sync, client, runs, results


def points(client, run):
    return {
        key: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }


def test_every_point_is_sent_once_and_nothing_the_second_time(world):
    sync, client, runs, results = world
    jobs = gather_jobs(results)
    expected = sum(len(point["metrics"]) for job in jobs for point in job.points)
    expected += sum(len(job.evaluations) for job in jobs)
    assert sync() == expected > 300
    before = {model: points(client, run) for model, run in runs().items()}
    assert sync() == 0
    assert {model: points(client, run) for model, run in runs().items()} == before
    assert sum(len(history) for run in before.values() for history in run.values()) == expected

    _, journal = read_journal(results / "models/stories-tiny/mse/round-2")
    losses = [
        (point["step"], point["metrics"]["train/loss"])
        for point in journal
        if "train/loss" in point["metrics"]
    ]
    sent = before["stories-tiny/mse/round-2"]
    assert sent["train/loss"] == losses
    curve = sent["by_steps/generative_perplexity_ids"]
    assert [step for step, _ in curve] == [8, 16]
    assert [sent[f"eval/generative_perplexity_ids_at_{step}_steps"] for step, _ in curve] == [
        [(0, value)] for _, value in curve
    ]


def test_runs_are_children_of_their_teacher_with_the_same_keys(world):
    sync, client, runs, results = world
    (results / "figures").mkdir()
    (results / "figures" / "ppl_vs_steps.svg").write_text("<svg/>")
    sync()
    children = runs()
    parent = children.pop("stories-tiny").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent}
    figures = [file.path for file in client.list_artifacts(parent, "figures")]
    assert figures == ["figures/ppl_vs_steps.svg"]
    rounds = {m: frozenset(run.data.metrics) for m, run in children.items() if "round-" in m}
    assert len(rounds) == 4
    first, last = (
        {rounds[f"stories-tiny/{name}/round-{n}"] for name in ("kl_backward", "mse")}
        for n in (1, 2)
    )
    assert len(first) == len(last) == 1  # frontier and tasks have the last rounds alone
    added = last.pop() - first.pop()
    assert "by_steps/frontier_perplexity_ids_temperature_0.7" in added
    assert "eval/task_score_elbo_piqa_acc" in added
    of_last = "frontier|equal_entropy|at_data_entropy|task_score|zero_shot"
    assert all(re.search(of_last, key) for key in added)

    data = children["stories-tiny/data"].data.metrics
    assert data["eval/generative_perplexity_ids"] == 7.2
    timings = children["stories-tiny/benchmark"].data.metrics
    assert any(key.startswith("speed/latency_s_baseline") for key in timings)


def test_a_run_holds_params_datasets_files_and_the_logged_model(world):
    sync, client, runs, results = world
    sync()
    run = runs()["stories-tiny/mse/round-2"]
    assert run.data.params["distillation.divergence"] == "mse"
    assert run.info.status == "FINISHED"
    assert run.data.tags["rule"] == "distill_round"
    assert run.inputs.dataset_inputs[0].dataset.name == "stories"
    found = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert found == {"meta.json", "samples"}
    models = client.search_logged_models(
        [run.info.experiment_id], filter_string=f"source_run_id = '{run.info.run_id}'"
    )
    journal, _ = read_journal(results / "models/stories-tiny/mse/round-2")
    expected = journal["checkpoint"]["sha256"]["ema"]
    assert [model.tags["sha256.ema"] for model in models] == [expected]
    assert {metric.key for metric in models[0].metrics} >= {
        "eval/generative_perplexity_ids_at_8_steps",
        "eval/lambada_accuracy_parallel",
    }


def test_a_run_holds_the_first_texts_of_its_samples(world):
    sync, client, runs, results = world
    folder = results / "samples/stories-tiny/mse/round-2"
    texts = "".join(f"=== {i}\nText {i} of Mira.\n" for i in range(50))
    (folder / "steps-8/samples.txt").write_text(texts)
    sync()
    run = runs()["stories-tiny/mse/round-2"].info.run_id
    found = [file.path for file in client.list_artifacts(run, "samples")]
    assert found == ["samples/steps-16.txt", "samples/steps-8.txt"]
    text = mlflow.artifacts.load_text(f"runs:/{run}/samples/steps-8.txt")
    assert text.endswith("\n\n" + texts[: texts.index("=== 3\n")])


def test_the_parent_shows_what_summary_says_first(world, capsys):
    sync, _, runs, results = world
    tabulate("steps", [results / "metrics"], results / "tables" / "steps")
    summary(results)
    printed = capsys.readouterr().out.splitlines()
    sync()
    parent = runs()["stories-tiny"]
    *sentences, links = parent.data.tags["mlflow.note.content"].split("\n\n")
    assert len(sentences) == 2 and set(sentences) <= set(printed)
    for run, in_words in {"kl_backward": "reverse KL", "mse": "squared error"}.items():
        [sentence] = [text for text in sentences if f" {in_words} round 2 with" in text]
        value = parent.data.metrics[f"summary/perplexity_{run}"]
        assert f"has perplexity {value:.3g} [" in sentence
        assert f" with {parent.data.metrics[f'summary/steps_{run}']:g} steps" in sentence
    pages = re.findall(r"\((#[^)]*)/artifacts/([^)]*)\)", links)
    assert {page for page, _ in pages} == {f"#/experiments/{parent.info.experiment_id}/runs/"
                                          f"{parent.info.run_id}"}  # fmt: skip
    for _, name in pages:
        assert mlflow.artifacts.load_text(f"runs:/{parent.info.run_id}/{name}")
    assert {name for _, name in pages} == {"tables/steps.md", "configuration.yaml"}


def test_the_configuration_of_a_parent_holds_the_options_of_each_training(world):
    sync, _, runs, results = world
    sync()
    parent = runs()["stories-tiny"].info.run_id
    text = mlflow.artifacts.load_text(f"runs:/{parent}/configuration.yaml")
    trained = {job.model: job.run for job in gather_jobs(results) if job.folder}
    found = yaml.safe_load(text)
    assert len(found) == 6
    assert {model: about["options"] for model, about in found.items()} == {
        model: run["params"] for model, run in trained.items()
    }


@pytest.mark.parametrize("trained", [True, False])
def test_a_second_sync_leaves_database_and_files_as_they_are(world, place, trained):
    """Also where all models come from elsewhere, without a journal."""
    sync, _, _, results = world
    if not trained:
        shutil.rmtree(results / "models")
    tabulate("steps", [results / "metrics"], results / "tables" / "steps")
    file = Path(place[0].removeprefix("sqlite:///"))

    def content():
        with contextlib.closing(sqlite3.connect(file)) as database:
            return [*database.iterdump()], [
                (path, path.stat().st_mtime_ns) for path in sorted(file.parent.rglob("*.*"))
                if path.name != file.name
            ]  # fmt: skip

    sync()
    before = content()
    assert sync() == 0
    assert content() == before


def test_runs_are_sorted_as_they_began_and_scores_without_a_training_come_last(world):
    """By MLflow's default: the latest start is first."""
    sync, client, runs, results = world
    sync()
    experiment = runs()["stories-tiny"].info.experiment_id
    found = client.search_runs([experiment], order_by=["start_time DESC"])
    order = [run.data.tags["halfstep.model"] for run in found]
    started = {job.model: job.run["started"] for job in gather_jobs(results) if job.folder}
    assert order[:6] == sorted(started, key=started.get, reverse=True)
    assert order[:6] != sorted(order[:6])
    assert set(order[6:]) == {"stories-tiny/data", "stories-tiny/benchmark", "stories-tiny"}
    by_model = {run.data.tags["halfstep.model"]: run.info for run in found}
    parent = by_model.pop("stories-tiny")
    assert parent.start_time == min(run.start_time for run in by_model.values())
    assert parent.end_time == max(run.end_time for run in by_model.values())


def test_every_run_names_its_command_user_and_commit(world, monkeypatch):
    monkeypatch.setenv("LOGNAME", "ada")
    sync, _, runs, results = world
    file = results / "models/stories-tiny/mse/round-1/run.json"
    about = json.loads(file.read_text())
    about["tags"]["git_commit"] = "0123456789ab+dirty"
    file.write_text(json.dumps(about))
    sync()
    tags = {model: run.data.tags for model, run in runs().items()}
    commands = {model: found["mlflow.source.name"] for model, found in tags.items()}
    assert commands["stories-tiny/mse/round-1"] == "halfstep distill-round"
    assert {name.partition(" ")[2] for name in commands.values()} <= COMMANDS.keys()
    assert {found["mlflow.user"] for found in tags.values()} == {"ada"}
    mine = tags["stories-tiny/mse/round-1"]
    assert mine["mlflow.source.git.commit"] == "0123456789ab"
    assert mine["mlflow.source.git.dirty"] == "true"


def test_a_changed_experiment_supersedes_the_run(world):
    sync, client, runs, results = world
    sync()
    old = runs()["stories-tiny/mse/round-1"].info.run_id
    folder = results / "models/stories-tiny/mse/round-1"
    with Journal(folder, name="mse/round-1", node="n", params={"lr": 1.0}) as journal:
        journal.log({"train/loss": 0.5}, 50)
        (folder / "ema.safetensors").write_bytes(b"other weights")
        journal.close(checkpoint=folder)
    assert sync() == 1  # measurements of the old weights do not belong to the new run
    new = runs()["stories-tiny/mse/round-1"]
    assert new.info.run_id != old
    assert points(client, new) == {"train/loss": [(50, 0.5)]}
    deleted = client.get_run(old)
    assert deleted.info.lifecycle_stage == "deleted"
    assert deleted.data.tags["superseded_by"] == new.info.run_id
    assert not client.search_logged_models(
        [new.info.experiment_id], filter_string=f"source_run_id = '{old}'"
    )
    assert sync() == 0
    assert len(runs(DELETED)) == 1


def test_a_resumed_job_continues_its_run(world):
    sync, client, runs, results = world
    model = "stories-tiny/kl_backward/round-9"
    about = {"name": "kl_backward/round-9", "node": "n", "params": {}}
    with pytest.raises(SystemExit), Journal(results / "models" / model, **about) as journal:
        for step in (50, 100, 150):
            journal.log({"train/loss": 1.0, "train/tokens_per_s": 7.0}, step)
        sync()
        assert runs()[model].info.status == "RUNNING"
        raise SystemExit(85)
    assert sync() == 0
    assert runs()[model].info.status == "KILLED"
    first = runs()[model].info.run_id
    with Journal(results / "models" / model, **about) as journal:
        journal.rewind(100)
        for step in (150, 200):
            journal.log({"train/loss": 1.0, "train/tokens_per_s": 8.0}, step)
    assert sync() == 2
    run = runs()[model]
    assert run.info.run_id == first
    assert run.info.status == "FINISHED"
    sent = {key: [step for step, _ in history] for key, history in points(client, run).items()}
    assert sent == {
        "train/loss": [50, 100, 150, 200],
        "train/tokens_per_s": [50, 100, 150, 200],
    }


def test_a_sync_reads_only_the_new_lines_of_a_journal(world, monkeypatch):
    sync, client, runs, results = world
    model, read = "stories-tiny/kl_backward/round-9", []
    real = mlflow_records.points_between

    def noted(file, start, end):
        for place, point in real(file, start, end):
            read.append(point["step"])
            yield place, point

    monkeypatch.setattr(mlflow_records, "points_between", noted)
    monkeypatch.setattr(mlflow_records, "BATCH", 7)
    folder = results / "models" / model
    with Journal(folder, name="kl_backward/round-9", node="n", params={}) as journal:
        for step in range(1, 21):
            journal.log({"train/loss": 1.0, "train/lr": 2.0}, step)
        sync()
        read.clear()
        for step in (21, 22):
            journal.log({"train/loss": 1.0}, step)
        assert sync() == 2
        assert read == [21, 22]
        assert sync() == 0
        journal.rewind(18)
        journal.log({"train/loss": 5.0}, 19)
        journal.log({"train/loss": 5.0}, 23)
        assert sync() == 1  # steps 19 and 20 keep the values that were sent first
    sent = points(client, runs()[model])
    assert sent["train/loss"] == [*((step, 1.0) for step in range(1, 23)), (23, 5.0)]
    assert sent["train/lr"] == [(step, 2.0) for step in range(1, 21)]


def test_a_sync_that_ends_within_a_journal_is_continued(world, monkeypatch):
    sync, client, runs, results = world
    model = "stories-tiny/kl_backward/round-9"
    with Journal(
        results / "models" / model, name="kl_backward/round-9", node="n", params={}
    ) as journal:
        for step in range(1, 41):
            journal.log({"train/loss": float(step)}, step)
    monkeypatch.setattr(mlflow_records, "BATCH", 10)
    real, calls = Tracker._log_metrics, []

    def stops(self, run_id, metrics, sent=""):
        if len(metrics) == 10:
            calls.append(sent)
            if len(calls) == 3:
                raise KeyboardInterrupt
        real(self, run_id, metrics, sent)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tracker, "_log_metrics", stops)
        sync()
    sync()
    expected = [(step, float(step)) for step in range(1, 41)]
    assert points(client, runs()[model])["train/loss"] == expected
    assert not runs(DELETED)


def test_a_new_evaluation_of_the_same_weights_replaces_the_old(world):
    sync, client, runs, results = world
    sync()
    file = results / "metrics/stories-tiny/mse/round-1/samples.json"
    rows = json.loads(file.read_text())
    rows[0]["value"] = 33.0
    file.write_text(json.dumps(rows))
    sync()
    sent = points(client, runs()["stories-tiny/mse/round-1"])
    assert sent["by_steps/generative_perplexity_ids"][0] == (8, 33.0)
    assert sent["eval/generative_perplexity_ids_at_8_steps"] == [(0, 33.0)]
    assert len(sent["train/loss"]) == 10
    assert len(runs(DELETED)) == 1
    assert sync() == 0


def test_the_next_sync_completes_an_interrupted_one(world, monkeypatch):
    sync, _, runs, results = world

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        # After a run was created, and before its points are sent.
        patch.setattr(Tracker, "_logged_model", stop)
        with pytest.raises(Stop):
            sync()
    sync()
    assert runs().keys() == {job.model for job in gather_jobs(results)} | {"stories-tiny"}
    assert not runs(DELETED)
    assert sync() == 0


def test_two_rows_that_disagree_are_named(world):
    sync, _, _, results = world
    file = results / "metrics/stories-tiny/teacher/samples.json"
    rows = json.loads(file.read_text())
    (file.parent / "again.json").write_text(json.dumps([rows[0] | {"value": 1.0}]))
    expected = "by_steps/generative_perplexity_ids of stories-tiny/teacher at 8 steps"
    with pytest.raises(HalfstepError, match=expected):
        sync()


def test_a_dead_server_fails_fast_in_one_sentence(world):
    _, _, _, results = world
    start = time.monotonic()
    with pytest.raises(HalfstepError, match="no server answers.*nothing is lost") as error:
        track(results, "http://127.0.0.1:9")
    assert time.monotonic() - start < 20
    assert "\n" not in str(error.value)


def test_no_results_folder_is_a_clear_error(tmp_path):
    with pytest.raises(HalfstepError, match="no such folder"):
        track(tmp_path / "nothing")


@pytest.mark.parametrize("protocol", ["ids", "retokenized"])
@pytest.mark.parametrize(
    ("judge", "suffix"),
    [
        (None, ""),
        ("results/models/t/baseline/hf@0123456789ab", ""),
        ("gpt2-large@0123456789ab", "_gpt2-large"),
        ("meta-llama/Meta-Llama-3-8B@0123456789ab", "_Meta-Llama-3-8B"),
        ("/my/judge@0123456789ab", "_judge"),
    ],
)
def test_every_judge_and_protocol_has_its_own_curve(judge, suffix, protocol):
    row = {
        "metric": "generative_perplexity",
        "value": 1.0,
        "model": "t/teacher",
        "protocol": protocol,
        "judge": judge,
    }
    name = f"generative_perplexity_{protocol}{suffix}"
    assert list(_metrics(row)) == [(f"eval/{name}", 0)]
    assert list(_metrics(row | {"steps": 8}, own_steps=8)) == [
        (f"by_steps/{name}", 8),
        (f"eval/{name}_at_8_steps", 0),
        (f"eval/{name}_at_own_steps", 0),
    ]


def test_another_temperature_or_variant_is_a_curve_alone():
    row = {"metric": "entropy", "protocol": "unigram", "value": 1.0, "model": "t/teacher"}
    cold, noise = {"temperature": 0.7}, {"variant": "noise"}
    curves = [list(_metrics(row | {"steps": 8} | more, own_steps=8)) for more in (cold, noise)]
    assert curves == [
        [("by_steps/entropy_unigram_temperature_0.7", 8)],
        [("by_steps/entropy_unigram_noise", 8)],
    ]


def test_colors_tell_rounds_apart_and_leave_all_else_gray():
    rounds = [run_color(f"a/kl_backward/round-{number}") for number in range(1, 8)]
    assert len(set(rounds)) == 7
    grays = [run_color(f"a/{name}") for name in ("teacher", "baseline", "data", "benchmark")]
    assert all(color[1:3] == color[3:5] == color[5:7] for color in grays)
    assert not any(color[1:3] == color[3:5] == color[5:7] for color in rounds)

"""`halfstep track`, counted in MLflow: every point once, one run a job, superseded runs marked, faults that lose nothing."""

import json
import shutil
import time

import pytest
import synthetic

from halfstep.commands.track import _metrics, gather, sync_once, track
from halfstep.errors import HalfstepError
from halfstep.records.journal import Journal, read_journal

mlflow = pytest.importorskip("mlflow")
DELETED, ACTIVE = mlflow.entities.ViewType.DELETED_ONLY, mlflow.entities.ViewType.ACTIVE_ONLY


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One database for all tests (the first opening takes seconds), and one results folder to copy."""
    folder = tmp_path_factory.mktemp("track")
    return f"sqlite:///{folder}/mlflow.db", synthetic.write(
        folder / "results", runs=("kl_backward", "mse"), rounds=2, steps=[8, 16], points=10
    )


@pytest.fixture
def world(place, tmp_path, request):
    """(sync, client, results): sync() returns the points added."""
    uri, template = place
    results = shutil.copytree(template, tmp_path / "results")
    experiment = request.node.name
    client = mlflow.MlflowClient(uri)

    def runs(view=ACTIVE):
        return {
            run.data.tags["halfstep.model"]: run
            for run in client.search_runs(
                [client.get_experiment_by_name(experiment).experiment_id], run_view_type=view
            )
        }

    return lambda: sync_once(results, uri, experiment)[0], client, runs, results


def points(client, run):
    return {
        key: [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }


def test_every_point_once_and_nothing_the_second_time(world):
    sync, client, runs, results = world
    expected = sum(len(p["metrics"]) for job in gather(results) for p in job.points) + sum(
        len(job.evaluations) for job in gather(results)
    )
    assert sync() == expected > 300
    before = {model: points(client, run) for model, run in runs().items()}
    assert sync() == 0
    assert {model: points(client, run) for model, run in runs().items()} == before
    assert sum(len(history) for run in before.values() for history in run.values()) == expected
    journal = [
        (p["step"], p["metrics"]["train/loss"])
        for p in read_journal(results / "models/stories-tiny/mse/round-2")[1]
        if "train/loss" in p["metrics"]
    ]
    assert before["stories-tiny/mse/round-2"]["train/loss"] == journal
    assert [
        step for step, _ in before["stories-tiny/mse/round-2"]["eval/generative_perplexity_ids"]
    ] == [8, 16]


def test_runs_are_children_of_their_teacher_with_the_same_keys(world):
    sync, client, runs, results = world
    (results / "figures").mkdir()
    (results / "figures" / "ppl_vs_steps.svg").write_text("<svg/>")
    sync()
    found = runs()
    parent = found.pop("stories-tiny")
    assert {run.data.tags["mlflow.parentRunId"] for run in found.values()} == {parent.info.run_id}
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "figures")] == [
        "figures/ppl_vs_steps.svg"
    ]
    rounds = [run for model, run in found.items() if "round-" in model]
    assert len(rounds) == 4 and len({frozenset(run.data.metrics) for run in rounds}) == 1
    one = found["stories-tiny/mse/round-2"]
    assert (
        one.data.params["distillation.divergence"] == "mse"
        and one.info.status == "FINISHED"
        and one.data.tags["rule"] == "distill_round"
    )
    assert one.inputs.dataset_inputs[0].dataset.name == "stories"
    assert {file.path for file in client.list_artifacts(one.info.run_id)} == {"meta.json"}
    models = client.search_logged_models(
        [one.info.experiment_id], filter_string=f"source_run_id = '{one.info.run_id}'"
    )
    assert [model.tags["sha256.ema"] for model in models] == [
        read_journal(results / "models/stories-tiny/mse/round-2")[0]["checkpoint"]["sha256"]["ema"]
    ]
    assert {metric.key for metric in models[0].metrics} >= {
        "eval/generative_perplexity_ids",
        "eval/lambada_accuracy_parallel",
    }
    assert found["stories-tiny/data"].data.metrics["eval/generative_perplexity_ids"] == 7.2
    assert any(
        key.startswith("speed/latency_s_baseline")
        for key in found["stories-tiny/benchmark"].data.metrics
    )


def test_a_changed_experiment_supersedes_the_run(world):
    sync, client, runs, results = world
    sync()
    old = runs()["stories-tiny/mse/round-1"].info.run_id
    folder = results / "models/stories-tiny/mse/round-1"
    with Journal(folder, name="mse/round-1", node="n", params={"lr": 1.0}) as journal:
        journal.log({"train/loss": 0.5}, 50)
        (folder / "ema.safetensors").write_bytes(b"other weights")
        journal.close(checkpoint=folder)
    assert sync() == 1  # measurements of the old weights are not the new run's
    new = runs()["stories-tiny/mse/round-1"]
    assert new.info.run_id != old and points(client, new) == {"train/loss": [(50, 0.5)]}
    deleted = client.get_run(old)
    assert (
        deleted.info.lifecycle_stage == "deleted"
        and deleted.data.tags["superseded_by"] == new.info.run_id
    )
    assert not client.search_logged_models(
        [new.info.experiment_id], filter_string=f"source_run_id = '{old}'"
    )
    assert sync() == 0 and len(runs(DELETED)) == 1


def test_a_resumed_job_goes_on_in_its_run(world):
    sync, client, runs, results = world
    folder = results / "models/stories-tiny/kl_backward/round-9"
    with (
        pytest.raises(SystemExit),
        Journal(folder, name="kl_backward/round-9", node="n", params={}) as journal,
    ):
        for step in (50, 100, 150):
            journal.log({"train/loss": 1.0, "train/tokens_per_s": 7.0}, step)
        sync()
        assert runs()["stories-tiny/kl_backward/round-9"].info.status == "RUNNING"
        raise SystemExit(85)
    assert sync() == 0 and runs()["stories-tiny/kl_backward/round-9"].info.status == "KILLED"
    first = runs()["stories-tiny/kl_backward/round-9"].info.run_id
    with Journal(folder, name="kl_backward/round-9", node="n", params={}) as journal:
        journal.rewind(100)
        for step in (150, 200):
            journal.log({"train/loss": 1.0, "train/tokens_per_s": 8.0}, step)
    assert sync() == 2
    run = runs()["stories-tiny/kl_backward/round-9"]
    assert run.info.run_id == first and run.info.status == "FINISHED"
    assert {key: [step for step, _ in history] for key, history in points(client, run).items()} == {
        "train/loss": [50, 100, 150, 200], "train/tokens_per_s": [50, 100, 150, 200]}  # fmt: skip


def test_a_new_evaluation_of_the_same_weights_replaces_the_old(world):
    sync, client, runs, results = world
    sync()
    file = results / "metrics/stories-tiny/mse/round-1/samples.json"
    rows = json.loads(file.read_text())
    rows[0]["value"] = 33.0
    file.write_text(json.dumps(rows))
    sync()
    run = runs()["stories-tiny/mse/round-1"]
    assert (
        points(client, run)["eval/generative_perplexity_ids"][0] == (8, 33.0)
        and len(points(client, run)["train/loss"]) == 10
    )
    assert len(runs(DELETED)) == 1 and sync() == 0


def test_an_interrupted_sync_is_mended_by_the_next(world, monkeypatch):
    sync, client, runs, results = world
    from halfstep.records.mlflow import Tracker

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(
            Tracker, "_logged_model", stop
        )  # after a run was made and before its points are sent
        with pytest.raises(Stop):
            sync()
    sync()
    expected = {job.model for job in gather(results)} | {"stories-tiny"}
    assert runs().keys() == expected and not runs(DELETED) and sync() == 0


def test_two_rows_that_disagree_are_named(world):
    sync, _, _, results = world
    file = results / "metrics/stories-tiny/teacher/samples.json"
    rows = json.loads(file.read_text())
    (file.parent / "again.json").write_text(json.dumps([rows[0] | {"value": 1.0}]))
    with pytest.raises(
        HalfstepError, match="eval/generative_perplexity_ids of stories-tiny/teacher at 8 steps"
    ):
        sync()


def test_a_dead_server_fails_fast_in_one_sentence(world):
    results = world[3]
    start = time.monotonic()
    with pytest.raises(HalfstepError, match="no server answers.*nothing is lost") as error:
        track(results, "http://127.0.0.1:9")
    assert time.monotonic() - start < 20 and "\n" not in str(error.value)


def test_no_results_folder_is_a_clear_error(tmp_path):
    with pytest.raises(HalfstepError, match="no such folder"):
        track(tmp_path / "nothing")


def test_every_judge_and_protocol_has_its_own_curve():
    base = {"metric": "generative_perplexity", "value": 1.0, "model": "t/teacher"}
    judges = (
        None,
        "results/models/t/baseline/hf@0123456789ab",
        "gpt2-large@0123456789ab",
        "meta-llama/Meta-Llama-3-8B@0123456789ab",
        "/my/judge@0123456789ab",
    )
    keys = [
        key
        for judge in judges
        for protocol in ("ids", "retokenized")
        for key in _metrics(base | {"protocol": protocol, "judge": judge})
    ]
    names = ("", "", "_gpt2-large", "_Meta-Llama-3-8B", "_judge")
    assert keys == [
        f"eval/generative_perplexity_{protocol}{name}"
        for name in names
        for protocol in ("ids", "retokenized")
    ]

"""The database: killed and full disks leave none or a whole one; it is shared, moved and copied."""

import contextlib
import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import synthetic
from test_mlflow_faults import assert_complete_and_none_deleted, store

from halfstep.commands import track as command
from halfstep.commands.track import sync_once, track
from halfstep.errors import HalfstepError
from halfstep.records.database import _create_tables, prepare_sqlite

mlflow = pytest.importorskip("mlflow")
DELETED, ACTIVE = mlflow.entities.ViewType.DELETED_ONLY, mlflow.entities.ViewType.ACTIVE_ONLY


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A small results folder, and an empty database, to copy."""
    folder = tmp_path_factory.mktemp("template")
    results = folder / "results"
    synthetic.write(results, runs=("kl_backward",), rounds=1, steps=[8], points=5, benchmark=False)
    (results / "tables").mkdir()
    (results / "tables" / "steps.csv").write_text("model,steps\n")
    prepare_sqlite(folder / "mlflow.db")
    return results, folder / "mlflow.db"


@pytest.fixture
def results(template, tmp_path):
    """A results folder without a database."""
    return shutil.copytree(template[0], tmp_path / "results")


@pytest.fixture
def shared(template, tmp_path):
    """The address of a database outside of all results folders."""
    return f"sqlite:///{shutil.copy(template[1], tmp_path / 'shared.db')}"


def in_child(act) -> int:
    """The id of a fork that calls `act` and exits with 0, or 1 on any error."""
    child = os.fork()
    if child:
        return child
    code = 1
    with contextlib.suppress(BaseException):
        act()
        code = 0
    os._exit(code)


def sync_in_child(results: Path, uri: str) -> None:
    """Within a process, MLflow remembers where a run keeps its files."""
    child = in_child(lambda: sync_once(results, uri, "x"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def runs_of(uri: str, experiment: str, view=ACTIVE) -> list:
    client = mlflow.MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([experiment_id], run_view_type=view)


def schema_of(file: Path) -> list:
    """Every table and index, and the number of the schema."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        tables = database.execute("SELECT type, name FROM sqlite_master ORDER BY type, name")
        return [*tables, *database.execute("SELECT * FROM alembic_version")]


def test_a_first_sync_that_is_killed_leaves_no_half_database(template, results, tmp_path):
    """At any moment there is no database, or one with every table; the next sync completes it."""
    start = time.monotonic()
    prepare_sqlite(tmp_path / "measured.db")
    whole_s = time.monotonic() - start
    file = results / "mlflow.db"
    for part in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1):
        child = in_child(lambda: prepare_sqlite(file))
        time.sleep(part * whole_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.exists():
            assert schema_of(file) == schema_of(template[1])
            file.unlink()
    uri = f"sqlite:///{file}"
    sync_once(results, uri, "x")
    assert_complete_and_none_deleted(uri, results, "x")


def test_a_database_that_mlflow_left_half_made_is_made_anew(template, results):
    """`mlflow ui` or an older halfstep was killed while it created the tables."""
    start = time.monotonic()
    _create_tables(results / "measured.db")
    whole_s = time.monotonic() - start
    halves = 0
    file = results / "mlflow.db"
    for part in (0.3, 0.6, 0.8, 0.9):
        child = in_child(lambda: _create_tables(file))
        time.sleep(part * whole_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if file.exists():
            halves += 1
            prepare_sqlite(file)
            assert schema_of(file) == schema_of(template[1])
            file.unlink()
    assert halves >= 2


@pytest.mark.parametrize("size", [1, 500_000, 960_000])
def test_a_full_disk_while_the_database_is_created_or_filled(results, size, capfd):
    """The sync says so, in the graph as a warning; with room again it completes."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        with pytest.raises(HalfstepError, match="nothing is lost"):
            track(results, f"sqlite:///{results}/mlflow.db", "x")

    child = in_child(limited)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, capfd.readouterr()
    uri = f"sqlite:///{results}/mlflow.db"
    sync_once(results, uri, "x")
    assert_complete_and_none_deleted(uri, results, "x")
    assert not list(results.glob(".*.part*"))


def test_two_processes_create_one_database(results, tmp_path):
    other = shutil.copytree(results, tmp_path / "other")
    uri = f"sqlite:///{tmp_path}/shared.db"
    children = [
        in_child(lambda: sync_once(results, uri, "results")),
        in_child(lambda: sync_once(other, uri, "other")),
    ]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0]
    assert_complete_and_none_deleted(uri, results, "results")
    assert_complete_and_none_deleted(uri, other, "other")
    assert not (tmp_path / ".shared.db.lock").exists()


def test_a_database_that_is_locked_for_a_while(results, shared):
    file = shared.removeprefix("sqlite:///")
    code = "import sqlite3, sys, time; database = sqlite3.connect(sys.argv[1]); "
    code += "database.execute('BEGIN EXCLUSIVE'); print(flush=True); time.sleep(3)"
    call = [sys.executable, "-c", code, file]
    with subprocess.Popen(call, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        sync_once(results, shared, "x")
    assert_complete_and_none_deleted(shared, results, "x")


@pytest.mark.parametrize("experiments", [("ann", "bob"), ("x", "x")])
def test_two_results_folders_leave_each_other_alone(results, shared, tmp_path, experiments):
    """Their models have the same names, and other trainings."""
    ann, bob = results, tmp_path / "bob"
    synthetic.write(bob, runs=("kl_backward",), rounds=1, steps=[8], points=7, benchmark=False)
    for _ in range(2):
        sync_once(ann, shared, experiments[0])
        sync_once(bob, shared, experiments[1])
    assert sync_once(ann, shared, experiments[0]).added == 0
    found = {run.info.run_id: run for name in experiments for run in runs_of(shared, name)}
    folders = [run.data.tags["halfstep.results"] for run in found.values()]
    assert sorted(map(folders.count, set(folders))) == [5, 5]
    assert not [run for name in experiments for run in runs_of(shared, name, DELETED)]


def test_runs_and_models_that_imitate_ours_are_left_alone(results, shared):
    """A copy of a run with all its tags, the same name and metrics is another one's."""
    sync_once(results, shared, "x")
    client = mlflow.MlflowClient(shared)
    ours = runs_of(shared, "x")
    copies, models = [], []
    for run in ours:
        copy = client.create_run(run.info.experiment_id, tags=run.data.tags)
        client.log_metric(copy.info.run_id, "train/loss", 7.0, step=1)
        copies.append(copy.info.run_id)
        own = {"experiment_id": run.info.experiment_id, "source_run_id": run.info.run_id}
        tags = {"halfstep.model": run.data.tags["halfstep.model"]}
        models.append(client.create_logged_model(name="mine", tags=tags, **own).model_id)
    before = {run: client.get_run(run).to_dictionary() for run in copies}
    folder = results / "models/stories-tiny/teacher"
    for lr in (2.0, 3.0):  # each supersedes our run
        with command_journal(folder, lr) as journal:
            journal.log({"train/loss": 0.5}, 50)
        sync_once(results, shared, "x")
    assert {run: client.get_run(run).to_dictionary() for run in copies} == before
    assert len(runs_of(shared, "x", DELETED)) == 2
    assert all(client.get_logged_model(model).model_id == model for model in models)


def command_journal(folder: Path, lr: float):
    from halfstep.records.journal import Journal

    return Journal(folder, name="teacher", node="n", params={"lr": lr})


def test_the_experiment_is_named_by_flag_or_environment(results, shared, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from environment")
    track(results, shared)
    track(results, shared, "from flag")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    track(results, shared)
    names = {found.name for found in mlflow.MlflowClient(shared).search_experiments()}
    assert names == {"Default", "from environment", "from flag", "halfstep"}
    for name in names - {"Default"}:
        assert len(runs_of(shared, name)) == 5


@pytest.mark.parametrize("move", ["move", "copy"])
def test_a_results_folder_that_was_moved_or_copied_writes_into_its_new_place(
    template, results, tmp_path, move
):
    shutil.copy(template[1], results / "mlflow.db")
    uri = f"sqlite:///{results}/mlflow.db"
    sync_in_child(results, uri)
    before = store(uri, "x")
    new = tmp_path / "elsewhere" / "results"
    new.parent.mkdir()
    if move == "move":
        results.rename(new)
    else:
        shutil.copytree(results, new)
    old_files = sorted(results.rglob("*"))
    old_times = [file.stat().st_mtime_ns for file in old_files]
    with open(new / "tables" / "steps.csv", "a") as table:
        table.write("x,1\n")
    uri = f"sqlite:///{new}/mlflow.db"
    sync_in_child(new, uri)
    assert sync_once(new, uri, "x").added == 0
    assert sorted(results.rglob("*")) == old_files
    assert [file.stat().st_mtime_ns for file in old_files] == old_times
    [uploaded] = (new / "mlflow-artifacts").rglob("steps.csv")
    assert uploaded.read_text() == "model,steps\nx,1\n"
    assert store(uri, "x").keys() == before.keys()
    client = mlflow.MlflowClient(uri)
    for run in runs_of(uri, "x"):
        if run.data.tags["halfstep.model"] not in ("stories-tiny", "stories-tiny/data"):
            downloaded = client.download_artifacts(run.info.run_id, "meta.json", str(tmp_path))
            assert Path(downloaded).is_file()
        for model in client.search_logged_models([run.info.experiment_id]):
            assert model.artifact_location.startswith(new.as_uri())


def test_a_graph_is_red_for_a_database_that_no_later_call_can_use(results, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow.set_tracking_uri sets it
    marker = results / "mlflow.synced"
    (results / "mlflow.db").write_text("not a database")
    with pytest.raises(HalfstepError, match="not an intact SQLite database; move it away"):
        track(results, output=marker)
    assert not marker.exists()
    (results / "mlflow.db").unlink()
    track(results, output=marker)
    assert marker.read_text() == ""


@pytest.mark.parametrize("value", ["rubbish", "-5"])
def test_a_time_limit_that_is_no_number_is_a_sentence(results, monkeypatch, value):
    monkeypatch.setattr(command, "WAITS_S", (0,))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", value)
    with pytest.raises(HalfstepError, match=r"MLflow at http.*nothing is lost"):
        track(results, "http://127.0.0.1:9")

"""Faults of tracking: nothing is lost, and no job fails.

A real `mlflow server` is stopped, started, slowed down or made to refuse, and a sync is killed at
any moment. Servers are behind a small proxy, so that a test decides what happens to which request.
The result is read from the server's own database.
"""

import contextlib
import glob
import http.client
import importlib.util
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import synthetic

from halfstep.commands import track as command
from halfstep.commands.track import MlflowUnreachable, sync_once, track
from halfstep.commands.tracked import gather_jobs
from halfstep.errors import HalfstepError
from halfstep.records import database
from halfstep.records.journal import Journal

mlflow = pytest.importorskip("mlflow")
DELETED, ACTIVE = mlflow.entities.ViewType.DELETED_ONLY, mlflow.entities.ViewType.ACTIVE_ONLY
SECONDS = 240  # for a server to start, or a curve to arrive, on a busy machine


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


class Server:
    """`mlflow server` on a database, which can be started and stopped."""

    def __init__(self, store: str, folder: Path):
        self.store, self.folder = store, folder
        self.port = free_port()
        self.process = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        call = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        call += ["--backend-store-uri", self.store]
        call += ["--artifacts-destination", str(self.folder / "artifacts")]
        call += ["--host", "127.0.0.1", "--port", str(self.port)]
        env = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                call, env=env, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if self.is_healthy():
                return self
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError(f"mlflow server did not start within {SECONDS} s")

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def stop(self):
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                # It has its own session: this reaches the server and its worker.
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Proxy:
    """Forwards requests, except those for which `fault(number, "POST /path")` returns a fault.

    A fault is an HTTP status, which is the answer; "close": close the connection; "lose": forward
    the request and lose its answer; or "stall": close after 3 s.
    """

    def __init__(self, port: int):
        self.fault = lambda number, request: None
        self.count = self.busy = 0
        self.lock, self.busy_lock = threading.Lock(), threading.Lock()  # faults sleep in the first
        self.server = QuietServer(("127.0.0.1", 0), ProxyHandler)
        self.server.proxy, self.server.target = self, port
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def next_fault(self, request: str):
        with self.lock:
            self.count += 1
            return self.fault(self.count, request)

    def wait(self):
        """Until no request is on its way, not even of a client that has given up."""
        while self.busy:
            time.sleep(0.01)


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):  # clients that are killed leave broken pipes
        pass


class ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def serve(self):
        proxy = self.server.proxy
        with proxy.busy_lock:
            proxy.busy += 1
        try:
            self.forward()
        finally:
            with proxy.busy_lock:
                proxy.busy -= 1

    def forward(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.proxy.next_fault(f"{self.command} {self.path.partition('?')[0]}")
        if isinstance(fault, int):
            content = b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "not now"}'
            return self.answer(fault, content)
        if fault == "stall":
            time.sleep(3)
        if fault in ("stall", "close"):
            self.close_connection = True
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        dropped = ("host", "connection")
        headers = {key: value for key, value in self.headers.items() if key.lower() not in dropped}
        try:
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            connection.close()
        if fault == "lose":
            self.close_connection = True
        else:
            self.answer(answer.status, content)

    def answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Retry-After", "3600")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A running server, and a results folder to copy."""
    folder = tmp_path_factory.mktemp("server")
    results = synthetic.write(
        folder / "results",
        runs=("kl_backward",),
        rounds=1,
        steps=[8],
        points=5,
        benchmark=False,
    )
    server = Server(f"sqlite:///{folder}/mlflow.db", folder).start()
    yield server, results
    server.stop()


@pytest.fixture
def world(place, tmp_path):
    server, template = place
    proxy = Proxy(server.port)
    yield server, proxy, shutil.copytree(template, tmp_path / "results")
    proxy.server.shutdown()
    proxy.server.server_close()


@pytest.fixture
def hurried(monkeypatch):
    """Short waits and timeouts."""
    monkeypatch.setattr(command, "WAITS_S", (0, 0.1, 0.1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def search(uri: str, experiment: str, view) -> list:
    """All runs of an experiment, read from the database."""
    client = mlflow.MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([experiment_id], run_view_type=view)


def store(uri: str, experiment: str) -> dict:
    """Everything in an experiment except ids and times.

    {model: (name, status, params, tags, points, datasets, number of logged models, parent's model)}
    """
    client = mlflow.MlflowClient(uri)
    runs = search(uri, experiment, ACTIVE)
    models = {run.info.run_id: run.data.tags["halfstep.model"] for run in runs}
    content = {}
    for run in runs:
        run_id, model = run.info.run_id, models[run.info.run_id]
        assert model not in content, f"two runs of {model}"
        tags = dict(run.data.tags)
        tags.pop("halfstep.key")  # an id
        if note := tags.get("mlflow.note.content"):  # with ids in its links
            tags["mlflow.note.content"] = re.sub(r"/\d+/runs(/[0-9a-f]{32})?", "", note)
        parent = models.get(tags.pop("mlflow.parentRunId", None))
        points = {
            key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)]
            for key in sorted(run.data.metrics)
        }
        logged = client.search_logged_models(
            [run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        datasets = sorted(data.dataset.name for data in run.inputs.dataset_inputs)
        content[model] = (
            run.info.run_name,
            run.info.status,
            run.data.params,
            tags,
            points,
            datasets,
            len(logged),
            parent,
        )
    return content


def points_of(uri: str, experiment: str, model: str, key: str = "train/loss") -> list[int]:
    """The steps of one curve."""
    if mlflow.MlflowClient(uri).get_experiment_by_name(experiment) is None:
        return []
    content = store(uri, experiment)
    return [step for step, _ in content[model][4].get(key, [])] if model in content else []


def assert_complete(uri: str, results: Path, experiment: str) -> None:
    """The database holds everything that is on disk, and each step once."""
    content = store(uri, experiment)
    jobs = gather_jobs(results)
    for job in jobs:
        points: dict[str, list] = {}
        for point in job.points:
            for key, value in point["metrics"].items():
                points.setdefault(key, []).append((point["step"], value))
        for (key, step), value in sorted(job.evaluations.items()):
            points.setdefault(key, []).append((step, value))
        assert content[job.model][4] == points, job.model
        assert content[job.model][7] == job.teacher, job.model
    assert len(content) == len(jobs) + 1  # and the parent


def assert_complete_and_none_deleted(uri: str, results: Path, experiment: str) -> None:
    assert_complete(uri, results, experiment)
    assert not search(uri, experiment, DELETED)


def assert_complete_but_for_superseded(uri: str, results: Path, experiment: str) -> list[str]:
    """Deleted runs are allowed if they are marked as superseded. Returns their names."""
    assert_complete(uri, results, experiment)
    deleted = search(uri, experiment, DELETED)
    for run in deleted:
        assert "superseded_by" in run.data.tags
        assert run.info.run_name.endswith("(superseded)")
    return [run.info.run_name for run in deleted]


@pytest.mark.parametrize("fault", [500, 429, 503, "close", "lose", "stall"])
def test_every_kind_of_fault_is_a_warning_and_repaired_later(world, hurried, fault, capsys):
    server, proxy, results = world
    name, marker = f"fault {fault}", results / "mlflow.synced"
    proxy.fault = lambda number, _: fault if number > 20 else None  # in the middle of a pass
    start = time.monotonic()
    track(results, proxy.uri, name, output=marker)
    assert time.monotonic() - start < SECONDS  # and not the hour that the proxy asks for
    warning = capsys.readouterr().err
    assert warning.count("WARNING") == 1
    assert "hold everything" in warning
    assert f"halfstep track --results {results} --uri {proxy.uri}" in warning
    assert marker.read_text() == warning  # not empty: the next graph tries again
    with pytest.raises(HalfstepError, match="nothing is lost"):
        track(results, proxy.uri, name)

    random_ = random.Random(5)
    proxy.count = 0
    proxy.fault = lambda *_: fault if fault != "stall" and random_.random() < 0.01 else None
    for _ in range(20):
        track(results, proxy.uri, name, output=marker)
        if not marker.read_text():
            break
    proxy.fault = lambda *_: None
    track(results, proxy.uri, name, output=marker)
    assert marker.read_text() == ""
    assert_complete_but_for_superseded(server.store, results, name)


def test_a_lost_answer_leaves_nothing_twice(world, hurried):
    """The server carries out each kind of request once without the sender receiving the answer."""
    server, proxy, results = world
    lost = set()

    def lose_the_first(_, request):
        if request in lost:
            return None
        lost.add(request)
        return "lose"

    proxy.fault = lose_the_first
    for _ in range(20):
        with contextlib.suppress(HalfstepError):
            sync_once(results, proxy.uri, "lost answers")
            break
    assert len(lost) > 8
    assert any(request.endswith("runs/create") for request in lost)
    assert_complete_but_for_superseded(server.store, results, "lost answers")


def test_a_sync_killed_twenty_times_leaves_the_same_as_an_undisturbed_one(world):
    server, proxy, results = world
    draw = random.Random(7)
    start = time.monotonic()
    sync_once(results, server.uri, "undisturbed")
    whole_s = time.monotonic() - start
    kills, names = 0, ["killed 0"]
    while kills < 20:
        # Fork, because a new interpreter would spend seconds on imports. Only the child connects to
        # the proxy's port, so parent and child share no connection.
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                sync_once(results, proxy.uri, names[-1])
            os._exit(0)
        time.sleep(draw.uniform(0, 0.4) * whole_s)
        if os.waitpid(child, os.WNOHANG)[0]:  # it was done: the next one gets a new experiment
            names.append(f"killed {len(names)}")
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    undisturbed = store(server.store, "undisturbed")
    for name in names:
        sync_once(results, server.uri, name)
        assert_complete_but_for_superseded(server.store, results, name)
        assert store(server.store, name) == undisturbed
        assert sync_once(results, server.uri, name)[0] == 0


def test_a_server_stopped_and_started_during_a_watch(world, hurried):
    """Curves arrive late. A signal ends the watch at once; the graph ends it after a last pass."""
    server, proxy, results = world
    model = "stories-tiny/kl_backward/round-9"
    folder = results / "models" / model
    call = [sys.executable, "-m", "halfstep.cli", "track", "--results", str(results)]
    call += ["--uri", proxy.uri, "--experiment", "watch", "--watch"]

    def start_watch(every):
        words = [*call, "--every", every]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def steps():
        return points_of(server.store, "watch", model)

    def wait_for(expected):
        end = time.monotonic() + SECONDS
        while steps() != expected:
            assert child.poll() is None, child.stdout.read()
            assert time.monotonic() < end, "too late"
            time.sleep(0.1)

    child = start_watch("0.2")
    with Journal(folder, name="kl_backward/round-9", node="n", params={}) as journal:
        journal.log({"train/loss": 2.0}, 50)
        wait_for([50])
        server.stop()
        for step in (100, 150):  # the job does not notice
            journal.log({"train/loss": 2.0}, step)
        time.sleep(1)
        server.start()
        wait_for([50, 100, 150])
        with open(folder / "journal.jsonl", "ab") as torn:
            torn.write(b'{"step": 200, "ti')
    (results / "mlflow.synced").write_text("")
    printed, _ = child.communicate(timeout=SECONDS)
    assert child.returncode == 0
    assert printed.count("nothing is lost") == 1
    assert_complete_but_for_superseded(server.store, results, "watch")
    assert steps() == [50, 100, 150]

    child = start_watch("3600")
    time.sleep(4)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=SECONDS)  # far less than it waits between two passes
    assert child.returncode in (0, -signal.SIGTERM)


def test_rewound_resumed_and_trained_again(world):
    server, proxy, results = world
    model, name = "stories-tiny/kl_backward/round-9", "again"
    folder = results / "models" / model

    def train(rewind, steps, **params):
        with (
            contextlib.suppress(SystemExit),
            Journal(folder, name="kl_backward/round-9", node="n", params=params) as journal,
        ):
            journal.rewind(rewind)
            for step in steps:
                journal.log({"train/loss": float(step)}, step)
                sync_once(results, proxy.uri, name)
            raise SystemExit(85)

    train(0, (50, 100, 150))
    train(100, (150, 200))  # resumed from step 100
    assert points_of(server.store, name, model) == [50, 100, 150, 200]
    assert_complete_and_none_deleted(server.store, results, name)
    train(-1, (50,))  # from nothing
    train(0, (100,), lr=2.0)  # another fingerprint
    assert points_of(server.store, name, model) == [100]
    deleted = assert_complete_but_for_superseded(server.store, results, name)
    assert deleted == 2 * ["kl_backward r9 (superseded)"]


def test_two_parallel_syncs_take_turns(world):
    server, proxy, results = world
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                sync_once(results, proxy.uri, "two")
                code = 0
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0]
    assert_complete_and_none_deleted(server.store, results, "two")


def test_patience_ends_with_a_server_that_is_only_slow(world, monkeypatch):
    server, proxy, results = world
    monkeypatch.setattr(command, "PATIENCE_S", 2)
    proxy.fault = lambda *_: time.sleep(0.5)
    start = time.monotonic()
    with pytest.raises(HalfstepError, match="nothing is lost"):
        sync_once(results, proxy.uri, "slow")
    assert time.monotonic() - start < 6
    proxy.fault = lambda *_: None
    monkeypatch.setattr(command, "PATIENCE_S", 600)
    proxy.wait()  # a run that the server makes only now would be unknown to the next sync
    sync_once(results, proxy.uri, "slow")
    assert_complete_but_for_superseded(server.store, results, "slow")


class Postgres:
    """A PostgreSQL server in a folder. Root runs it as the user postgres, as initdb requires."""

    def __init__(self, pg_ctl: str, folder: Path):
        self.pg_ctl, self.folder, self.port = pg_ctl, folder, free_port()
        self.uri = f"postgresql+psycopg2://halfstep@127.0.0.1:{self.port}/postgres"

    def create(self):
        self.folder.mkdir()
        if os.getuid() == 0:
            shutil.chown(self.folder, "postgres")
        initdb = str(Path(self.pg_ctl).parent / "initdb")
        self._call(initdb, "-D", self._data, "-U", "halfstep", "--auth=trust", "--no-sync")

    @property
    def _data(self) -> str:
        return str(self.folder / "data")

    def start(self):
        listen = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = str(self.folder / "log")
        self._call(self.pg_ctl, "-w", "-D", self._data, "-l", log, "-o", listen, "start")

    def stop(self):
        self._call(self.pg_ctl, "-w", "-D", self._data, "-m", "immediate", "stop")

    def processes(self) -> list[int]:
        first = int((Path(self._data) / "postmaster.pid").read_text().split()[0])
        return [first, *(child.pid for child in psutil.Process(first).children(recursive=True))]

    def _call(self, *arguments: str) -> None:
        user = []
        if os.getuid() == 0:
            user = ["su", "postgres", "-s", "/bin/sh", "-c", 'exec "$0" "$@"', "--"]
        done = subprocess.run(
            [*user, *arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_postgresql_can_be_the_store(place, tmp_path, monkeypatch):
    pg_ctl = sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))
    if not pg_ctl or importlib.util.find_spec("psycopg2") is None:
        pytest.skip(
            "needs PostgreSQL (apt-get install postgresql) "
            "and its driver (pip install psycopg2-binary)"
        )
    results = shutil.copytree(place[1], tmp_path / "results")
    folder = Path("/tmp") / f"halfstep-postgres-{os.getpid()}"  # a socket's path must be short
    postgres = Postgres(pg_ctl[-1], folder)
    try:
        postgres.create()
        postgres.start()
        assert sync_once(results, postgres.uri, "postgres")[0] > 50
        assert sync_once(results, postgres.uri, "postgres")[0] == 0
        assert_complete_and_none_deleted(postgres.uri, results, "postgres")
        monkeypatch.setattr(command, "WAITS_S", (0,))
        postgres.stop()
        with pytest.raises(HalfstepError, match="nothing is lost"):
            sync_once(results, postgres.uri, "postgres")
        postgres.start()
        round_9 = results / "models/stories-tiny/kl_backward/round-9"
        with Journal(round_9, name="kl_backward/round-9", node="n", params={}) as journal:
            journal.log({"train/loss": 2.0}, 50)
        assert sync_once(results, postgres.uri, "postgres")[0] == 1
        assert_complete_and_none_deleted(postgres.uri, results, "postgres")
    finally:
        with contextlib.suppress(AssertionError):
            postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_postgresql_that_stops_answering_is_given_up(place, tmp_path, monkeypatch):
    """A frozen server keeps its connections open; without a limit, track waits for ever."""
    pg_ctl = sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))
    if not pg_ctl or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL and psycopg2, as the test above")
    monkeypatch.setattr(database, "ANSWER_S", 2)
    monkeypatch.setattr(command, "WAITS_S", (0, 0.1))
    results = shutil.copytree(place[1], tmp_path / "results")
    folder = Path("/tmp") / f"halfstep-postgres-frozen-{os.getpid()}"
    postgres = Postgres(pg_ctl[-1], folder)
    frozen = []
    try:
        postgres.create()
        postgres.start()
        assert sync_once(results, postgres.uri, "postgres").added > 50
        frozen = postgres.processes()
        for process in frozen:
            os.kill(process, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(MlflowUnreachable, match=r"no answer within 2 s.*nothing is lost"):
            sync_once(results, postgres.uri, "postgres")
        assert time.monotonic() - start < 60
    finally:
        for process in frozen:
            os.kill(process, signal.SIGCONT)
        with contextlib.suppress(AssertionError):
            postgres.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_server_that_takes_connections_and_never_answers(place, tmp_path, monkeypatch, scheme):
    monkeypatch.setattr(database, "ANSWER_S", 1)
    monkeypatch.setattr(command, "WAITS_S", (0, 0.1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    results = shutil.copytree(place[1], tmp_path / "results")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(MlflowUnreachable, match="nothing is lost"):
            sync_once(results, f"{scheme}://{address}/x", "silent")
        assert time.monotonic() - start < 30


def test_a_dead_postgresql_does_not_hold_track_for_minutes(place, tmp_path):
    """MLflow itself tries ten times, for 100 seconds, and track repeated that three times."""
    results = shutil.copytree(place[1], tmp_path / "results")
    start = time.monotonic()
    with pytest.raises(MlflowUnreachable, match="Connection refused"):
        sync_once(results, f"postgresql://u@127.0.0.1:{free_port()}/x", "dead")
    assert time.monotonic() - start < 60


def test_two_results_folders_on_one_server(world, tmp_path):
    """Both have the same names of models in the same experiment."""
    server, proxy, ann = world
    bob = tmp_path / "bob"
    synthetic.write(bob, runs=("kl_backward",), rounds=1, steps=[8], points=7, benchmark=False)
    asked = []
    proxy.fault = lambda _, request: asked.append(request)
    for _ in range(2):
        sync_once(ann, proxy.uri, "both")
        sync_once(bob, proxy.uri, "both")
    assert not [request for request in asked if "delete" in request.lower()]
    runs = search(server.store, "both", ACTIVE)
    folders = [run.data.tags["halfstep.results"] for run in runs]
    assert sorted(map(folders.count, set(folders))) == [5, 5]
    assert not search(server.store, "both", DELETED)
    moved = tmp_path / "moved"
    ann.rename(moved)
    assert sync_once(moved, proxy.uri, "both").added == 0
    assert len(search(server.store, "both", ACTIVE)) == 10

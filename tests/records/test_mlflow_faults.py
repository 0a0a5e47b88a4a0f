"""Tracking cannot kill, and loses nothing: a real `mlflow server` that is stopped, started, slow or refusing, and a sync killed anywhere.

Servers stand behind a small proxy, so that a test decides what happens to which request. The truth is read from the server's own database.
"""

import contextlib
import glob
import http.client
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import synthetic

from halfstep.commands import track as command
from halfstep.commands.track import gather, sync_once, track
from halfstep.errors import HalfstepError
from halfstep.records.journal import Journal

mlflow = pytest.importorskip("mlflow")
DELETED, ACTIVE = mlflow.entities.ViewType.DELETED_ONLY, mlflow.entities.ViewType.ACTIVE_ONLY


def free_port() -> int:
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        return end.getsockname()[1]


class Server:
    """`mlflow server` over a database, and its life."""

    def __init__(self, store: str, folder: Path):
        self.store, self.folder, self.port, self.process = store, folder, free_port(), None

    def start(self):
        words = ["server", "--backend-store-uri", self.store, "--artifacts-destination", str(self.folder / "artifacts"), "--workers", "1",
                 "--host", "127.0.0.1", "--port", str(self.port)]  # fmt: skip
        env = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        for _ in range(600):
            with contextlib.suppress(OSError, http.client.HTTPException):
                there = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                there.request("GET", "/health")
                if there.getresponse().status == 200:
                    return self
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)
        raise AssertionError("mlflow server did not start within a minute")

    def stop(self):
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(
                    self.process.pid, signal.SIGKILL
                )  # its own session: the server and its worker
            self.process.wait()
            self.process = None


class Proxy:
    """Hands requests on, unless `fault(number, "POST /path")` names what befalls this one: a status, "close", "lose" (do it, lose the answer), "stall"."""

    def __init__(self, port: int):
        proxy, self.fault, self.count, self.lock = self, lambda *_: None, 0, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def serve(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with proxy.lock:
                    proxy.count += 1
                    what = proxy.fault(proxy.count, f"{self.command} {self.path.partition('?')[0]}")
                if isinstance(what, int):
                    return self.answer(
                        what, b'{"error_code": "TEMPORARILY_UNAVAILABLE", "message": "not now"}'
                    )
                if what == "stall":
                    time.sleep(3)
                if what in ("stall", "close"):
                    self.close_connection = True
                    return
                there = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    there.request(
                        self.command,
                        self.path,
                        body,
                        {
                            k: v
                            for k, v in self.headers.items()
                            if k.lower() not in ("host", "connection")
                        },
                    )
                    answer = there.getresponse()
                    content = answer.read()
                except OSError:
                    self.close_connection = True
                    return
                finally:
                    there.close()
                if what == "lose":
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

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # clients that are killed leave broken pipes
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = Server(f"sqlite:///{folder}/mlflow.db", folder).start()
    yield (
        server,
        synthetic.write(
            folder / "results",
            runs=("kl_backward",),
            rounds=1,
            steps=[8],
            points=5,
            benchmark=False,
        ),
    )
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
    monkeypatch.setattr(command, "WAITS_S", (0, 0.1, 0.1))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def store(uri: str, experiment: str, view=ACTIVE) -> dict:
    """All of an experiment but ids and clock: {model: (name, status, params, tags, points, datasets, number of logged models, parent's model)}"""
    client = mlflow.MlflowClient(uri)
    number = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([number], run_view_type=view)
    names = {run.info.run_id: run.data.tags["halfstep.model"] for run in runs}
    found = {}
    for run in runs:
        tags, run_id = dict(run.data.tags), run.info.run_id
        parent = names.get(tags.pop("mlflow.parentRunId", None))
        history = {
            key: [(p.step, p.value) for p in client.get_metric_history(run_id, key)]
            for key in sorted(run.data.metrics)
        }
        models = client.search_logged_models([number], filter_string=f"source_run_id = '{run_id}'")
        data = sorted(one.dataset.name for one in run.inputs.dataset_inputs)
        assert names[run_id] not in found, f"two runs of {names[run_id]}"
        found[names[run_id]] = (
            run.info.run_name,
            run.info.status,
            run.data.params,
            tags,
            history,
            data,
            len(models),
            parent,
        )
    return found


def complete(server, results: Path, experiment: str, deleted: int = 0) -> bool:
    """The store holds what lies on disk, each step once."""
    found = store(server.store, experiment)
    for job in gather(results):
        points = {}
        for point in job.points:
            for key, value in point["metrics"].items():
                points.setdefault(key, []).append((point["step"], value))
        for (key, step), value in sorted(job.evaluations.items()):
            points.setdefault(key, []).append((step, value))
        assert found[job.model][4] == points and found[job.model][7] == job.teacher, job.model
    assert len(found) == len(gather(results)) + 1  # and the parent
    assert len(mlflow.MlflowClient(server.store).search_runs([mlflow.MlflowClient(server.store).get_experiment_by_name(experiment).experiment_id],
                                                             run_view_type=DELETED)) == deleted  # fmt: skip
    return True


@pytest.mark.parametrize("fault", [500, 429, 503, "close", "lose", "stall"])
def test_every_kind_of_fault_is_a_warning_and_mended_later(world, hurried, fault, capsys):
    server, proxy, results = world
    name, mark = f"fault {fault}", results / "mlflow.synced"
    draw = random.Random(5)
    proxy.fault = lambda number, _: (
        fault if number > 20 else None
    )  # in the midst of a pass it begins, and does not end
    start = time.monotonic()
    track(results, proxy.uri, name, output=mark)
    assert time.monotonic() - start < 20
    said = capsys.readouterr().err
    assert (
        said.count("WARNING") == 1
        and "hold everything" in said
        and f"halfstep track --results {results} --uri {proxy.uri}" in said
    )
    assert mark.read_text() == said  # not empty: the next graph tries again
    with pytest.raises(HalfstepError, match="nothing is lost"):
        track(results, proxy.uri, name)
    proxy.count, proxy.fault = (
        0,
        lambda *_: fault if fault != "stall" and draw.random() < 0.01 else None,
    )
    for _ in range(20):
        track(results, proxy.uri, name, output=mark)
        if not mark.read_text():
            break
    proxy.fault = lambda *_: None
    track(results, proxy.uri, name, output=mark)
    assert mark.read_text() == "" and complete_but_for_doubles(server, results, name)


def complete_but_for_doubles(server, results, name) -> bool:
    client = mlflow.MlflowClient(server.store)
    gone = client.search_runs(
        [client.get_experiment_by_name(name).experiment_id], run_view_type=DELETED
    )
    assert all(
        "superseded_by" in run.data.tags and run.info.run_name.endswith("(superseded)")
        for run in gone
    )
    return complete(server, results, name, deleted=len(gone))


def test_a_lost_answer_leaves_nothing_twice(world, hurried):
    """Every kind of request is carried out once without its sender hearing of it."""
    server, proxy, results = world
    seen = set()
    proxy.fault = lambda _, request: (
        "lose" if request not in seen and not seen.add(request) else None
    )
    for _ in range(20):
        with contextlib.suppress(HalfstepError):
            sync_once(results, proxy.uri, "lost answers")
            break
    assert len(seen) > 8 and any(request.endswith("runs/create") for request in seen)
    assert complete_but_for_doubles(server, results, "lost answers")


def test_a_sync_killed_twenty_times_leaves_what_an_undisturbed_one_leaves(world):
    server, proxy, results = world
    draw = random.Random(7)
    start = time.monotonic()
    sync_once(results, f"http://127.0.0.1:{server.port}", "undisturbed")
    whole_s = time.monotonic() - start
    kills, names = 0, ["killed 0"]
    while (
        kills < 20
    ):  # a sync that came to its end between two kills makes room for another experiment
        child = os.fork()  # a new interpreter would spend seconds on imports; the proxy's port is the child's alone, no connection is shared
        if child == 0:
            with contextlib.suppress(BaseException):
                sync_once(results, proxy.uri, names[-1])
            os._exit(0)
        time.sleep(draw.uniform(0, 0.4) * whole_s)
        if os.waitpid(child, os.WNOHANG)[0]:
            names.append(f"killed {len(names)}")
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    undisturbed = store(server.store, "undisturbed")
    for name in names:
        sync_once(results, f"http://127.0.0.1:{server.port}", name)
        assert (
            complete_but_for_doubles(server, results, name)
            and store(server.store, name) == undisturbed
        )
        assert sync_once(results, f"http://127.0.0.1:{server.port}", name)[0] == 0


def test_a_server_stopped_and_started_during_a_watch(world, hurried, tmp_path):
    """Curves come late; a signal ends the watch at once; the graph's end ends it after a last pass."""
    server, proxy, results = world
    folder = results / "models/stories-tiny/kl_backward/round-9"
    words = [
        "halfstep.cli",
        "track",
        "--results",
        str(results),
        "--uri",
        proxy.uri,
        "--experiment",
        "watch",
        "--watch",
        "--every",
        "0.2",
    ]

    def watch():
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def until(what, seconds=30):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end and child.poll() is None, (
                child.stdout.read() if child.poll() is not None else "too late"
            )
            time.sleep(0.1)

    def steps():
        if mlflow.MlflowClient(server.store).get_experiment_by_name("watch") is None:
            return []
        return [
            step
            for step, _ in store(server.store, "watch")
            .get("stories-tiny/kl_backward/round-9", [{}] * 5)[4]
            .get("train/loss", [])
        ]

    child = watch()
    with Journal(folder, name="kl_backward/round-9", node="n", params={}) as journal:
        journal.log({"train/loss": 2.0}, 50)
        until(lambda: steps() == [50])
        server.stop()
        for step in (100, 150):  # the job does not know
            journal.log({"train/loss": 2.0}, step)
        time.sleep(1)
        server.start()
        until(lambda: steps() == [50, 100, 150])
        with open(folder / "journal.jsonl", "ab") as torn:
            torn.write(b'{"step": 200, "ti')
    (results / "mlflow.synced").write_text("")
    said, _ = child.communicate(timeout=30)
    assert child.returncode == 0 and said.count("nothing is lost") == 1
    assert complete_but_for_doubles(server, results, "watch") and steps() == [50, 100, 150]
    child = watch()
    time.sleep(4)
    child.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert child.wait(timeout=5) in (0, -signal.SIGTERM) and time.monotonic() - start < 3


def test_rewound_resumed_and_trained_again(world):
    server, proxy, results = world
    folder, name = results / "models/stories-tiny/kl_backward/round-9", "again"

    def part(rewind, steps, **params):
        with (
            contextlib.suppress(SystemExit),
            Journal(folder, name="kl_backward/round-9", node="n", params=params) as journal,
        ):
            journal.rewind(rewind)
            for step in steps:
                journal.log({"train/loss": float(step)}, step)
                sync_once(results, proxy.uri, name)
            raise SystemExit(85)

    def losses():
        return [
            step
            for step, _ in store(server.store, name)["stories-tiny/kl_backward/round-9"][4][
                "train/loss"
            ]
        ]

    part(0, (50, 100, 150))
    part(100, (150, 200))  # resumed from step 100
    assert losses() == [50, 100, 150, 200] and complete(server, results, name)
    part(-1, (50,))  # from nothing
    part(0, (100,), lr=2.0)  # another fingerprint
    assert losses() == [100] and complete_but_for_doubles(server, results, name)
    gone = mlflow.MlflowClient(server.store).search_runs(
        [mlflow.MlflowClient(server.store).get_experiment_by_name(name).experiment_id],
        run_view_type=DELETED,
    )
    assert [run.info.run_name for run in gone] == 2 * ["kl_backward r9 (superseded)"]


def test_two_syncs_at_once_take_turns(world):
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
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert complete(server, results, "two")


def test_patience_ends_a_server_that_is_only_slow(world, monkeypatch):
    server, proxy, results = world
    monkeypatch.setattr(command, "PATIENCE_S", 2)
    proxy.fault = lambda *_: time.sleep(0.5)
    start = time.monotonic()
    with pytest.raises(HalfstepError, match="nothing is lost"):
        sync_once(results, proxy.uri, "slow")
    assert time.monotonic() - start < 6
    proxy.fault = lambda *_: None
    monkeypatch.setattr(command, "PATIENCE_S", 600)
    sync_once(results, proxy.uri, "slow")
    assert complete_but_for_doubles(server, results, "slow")


def test_postgresql_is_a_store_like_another(place, tmp_path, monkeypatch):
    tools = sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_ctl"))
    if not tools or importlib.util.find_spec("psycopg2") is None:
        pytest.skip(
            "needs PostgreSQL (apt-get install postgresql) and its driver (pip install psycopg2-binary)"
        )
    folder, port = Path("/tmp") / f"halfstep-postgres-{os.getpid()}", free_port()
    folder.mkdir()
    if os.getuid() == 0:  # initdb refuses root
        shutil.chown(folder, "postgres")

    def call(*words):
        user = (
            ["su", "postgres", "-s", "/bin/sh", "-c", 'exec "$0" "$@"', "--"]
            if os.getuid() == 0
            else []
        )
        done = subprocess.run(
            [*user, *words],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    binary = Path(tools[-1]).parent
    results = shutil.copytree(place[1], tmp_path / "results")
    try:
        call(
            str(binary / "initdb"),
            "-D",
            str(folder / "data"),
            "-U",
            "halfstep",
            "--auth=trust",
            "--no-sync",
        )
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        call(
            tools[-1],
            "-w",
            "-D",
            str(folder / "data"),
            "-l",
            str(folder / "log"),
            "-o",
            options,
            "start",
        )
        uri = f"postgresql+psycopg2://halfstep@127.0.0.1:{port}/postgres"
        assert sync_once(results, uri, "postgres")[0] > 50
        assert sync_once(results, uri, "postgres")[0] == 0
        assert complete(Server(uri, tmp_path), results, "postgres")
        monkeypatch.setattr(command, "WAITS_S", (0,))
        call(tools[-1], "-w", "-m", "immediate", "-D", str(folder / "data"), "stop")
        with pytest.raises(HalfstepError, match="nothing is lost"):
            sync_once(results, uri, "postgres")
        call(
            tools[-1],
            "-w",
            "-D",
            str(folder / "data"),
            "-l",
            str(folder / "log"),
            "-o",
            options,
            "start",
        )
        with Journal(
            results / "models/stories-tiny/kl_backward/round-9",
            name="kl_backward/round-9",
            node="n",
            params={},
        ) as journal:
            journal.log({"train/loss": 2.0}, 50)
        assert sync_once(results, uri, "postgres")[0] == 1 and complete(
            Server(uri, tmp_path), results, "postgres"
        )
    finally:
        with contextlib.suppress(AssertionError):
            call(tools[-1], "-m", "immediate", "-D", str(folder / "data"), "stop")
        shutil.rmtree(folder, ignore_errors=True)

"""`halfstep ui`: MLflow's pages on loopback, the curves that they show, and no process left."""

import html
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import synthetic
from dryrun import clean_environment
from PIL import Image

from halfstep.commands.report import tabulate
from halfstep.commands.track import sync_once
from halfstep.commands.ui import ui
from halfstep.errors import HalfstepError

pytest.importorskip("mlflow")

SECONDS = 240  # for a server to start on a busy machine
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


class Shown:
    """A running `halfstep ui`, its lines up to the last one, and all its processes."""

    def __init__(self, results: Path, *flags: str, **environment: str):
        call = [sys.executable, "-m", "halfstep.cli", "ui", "--results", str(results), *flags]
        self.process = subprocess.Popen(
            call,
            env=clean_environment() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                break
        own = psutil.Process(self.process.pid)
        self.processes = [own, *own.children(recursive=True)]

    @property
    def port(self) -> int:
        return int(re.fullmatch(r"MLflow starts on 127\.0\.0\.1:(\d+)", self.lines[0])[1])

    @property
    def page(self) -> str:
        """The loss curves of the only teacher."""
        [line] = [line for line in self.lines if line.startswith("loss curves")]
        return line.partition(": ")[2]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self.process.stdout.close()
        return code


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A tracked results folder that was copied elsewhere; the first place is gone."""
    folder = tmp_path_factory.mktemp("ui")
    first = synthetic.write(folder / "results", rounds=2, steps=[8, 16], points=20)
    tabulate("steps", [first / "metrics"], first / "tables" / "steps")
    sync_once(first, f"sqlite:///{first}/mlflow.db", "halfstep")
    other = folder / "somewhere else" / "results"
    shutil.copytree(first, other)
    shutil.rmtree(first)
    return other


@pytest.fixture(scope="module")
def shown(copied, tmp_path_factory):
    """The pages, while the environment asks MLflow for everything that it must not do."""
    opened = tmp_path_factory.mktemp("browser") / "opened.txt"
    script = opened.with_name("browser")
    script.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    script.chmod(0o755)
    found = Shown(
        copied,
        BROWSER=f"{script} %s",
        MLFLOW_HOST="0.0.0.0",
        MLFLOW_SERVER_ALLOWED_HOSTS="*",
        MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE="true",
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
    )
    found.opened = opened
    yield found
    if found.process.poll() is None:
        found.end(signal.SIGTERM)


def ask(shown: Shown, path: str, **headers: str) -> bytes:
    request = urllib.request.Request(f"http://127.0.0.1:{shown.port}/{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def search(shown: Shown, what: str, **query: object) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{shown.port}/api/2.0/mlflow/{what}/search",
        json.dumps(query).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def runs(shown: Shown) -> dict[str, dict]:
    found = search(shown, "runs", experiment_ids=["1"], max_results=1000)["runs"]
    tags = {
        run["info"]["run_id"]: {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        for run in found
    }
    return {tags[run["info"]["run_id"]]["halfstep.model"]: run["info"] for run in found}


def test_the_server_listens_on_loopback_alone_and_checks_the_host(shown):
    """Also where the user's environment says otherwise."""
    ends = []
    for process in shown.processes:
        with suppress(psutil.NoSuchProcess):  # a worker may have ended
            found = process.net_connections("inet")
            ends += [end.laddr for end in found if end.status == psutil.CONN_LISTEN]
    assert {(end.ip, end.port) for end in ends} == {("127.0.0.1", shown.port)}
    with pytest.raises(urllib.error.HTTPError, match="403"):
        ask(shown, "api/2.0/mlflow/experiments/search?max_results=1", Host="evil.example")


def test_files_of_a_copied_folder_are_shown(shown, copied):
    found = runs(shown)
    for model, path in {
        "stories-tiny": "tables/steps.md",
        "stories-tiny/mse/round-2": "samples/steps-8.txt",
    }.items():
        run = found[model]
        assert run["artifact_uri"].startswith(copied.as_uri())
        text = ask(shown, f"get-artifact?path={path}&run_uuid={run['run_id']}").decode()
        kept = copied / "mlflow-artifacts" / run["run_id"] / "artifacts" / path
        assert text == kept.read_text()


def test_the_browser_opens_the_printed_page_of_the_last_rounds(shown):
    assert shown.opened.read_text().strip() == shown.page
    name = re.search(r"viewStateShareKey=([^&]+)&", shown.page)[1]
    [experiment] = [
        one for one in search(shown, "experiments", max_results=9)["experiments"]
        if one["name"] == "halfstep"
    ]  # fmt: skip
    tags = {tag["key"]: tag["value"] for tag in experiment["tags"]}
    view = json.loads(tags[f"mlflow.sharedViewState.{name}"])
    found = {run["run_id"]: model for model, run in runs(shown).items()}
    chosen = [found[run_id] for run_id in re.findall("'(.{32})'", view["searchFilter"])]
    assert chosen == [f"stories-tiny/{run}/round-2" for run in ("kl_backward", "mse", "tvd")]


def chromium(*flags: str) -> str:
    """The output of Chromium without a window, with a fresh profile."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        call = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        call += [f"--user-data-dir={profile}", "--window-size=1500,900"]
        call += ["--virtual-time-budget=60000", *flags]
        done = subprocess.run(call, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, to look at MLflow's pages")
def test_chromium_shows_a_curve_of_each_run_in_one_chart_of_a_shared_key(shown, tmp_path):
    page = html.unescape(chromium("--dump-dom", shown.page))
    names = [f"{run} r2 ({key})" for key in ("train/loss", "by_steps/generative_perplexity_ids")
             for run in ("kl_backward", "mse", "tvd")]  # fmt: skip
    assert sorted(set(re.findall(r"\w+ r\d \([\w/]+\)", page)) & set(names)) == sorted(names)
    strokes = re.findall(r'js-line"[^>]*stroke: rgb\((\d+), (\d+), (\d+)\)', page)
    colors = {tuple(map(int, stroke)) for stroke in strokes}
    assert len(colors) == 3
    chromium(f"--screenshot={tmp_path / 'page.png'}", shown.page)
    with Image.open(tmp_path / "page.png") as image:
        counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 24)}
    assert min(counts.get(color, 0) for color in colors) > 20, counts


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_no_process_is_left_after_a_signal(copied, name):
    if name == "SIGKILL" and sys.platform != "linux":
        pytest.skip("only Linux ends the server of a command that was killed")
    found = Shown(copied, "--no-browser")
    assert len(found.processes) > 1, found.lines
    code = found.end(getattr(signal, name))
    assert code == (-signal.SIGKILL if name == "SIGKILL" else 0)
    _, alive = psutil.wait_procs(found.processes, 0 if code == 0 else 30)
    assert alive == []
    with socket.socket() as end:
        assert end.connect_ex(("127.0.0.1", found.port)) != 0


def test_a_signal_while_the_server_starts_ends_it(copied):
    call = [sys.executable, "-m", "halfstep.cli", "ui", "--results", str(copied), "--no-browser"]
    with subprocess.Popen(call, env=clean_environment(), stdout=subprocess.PIPE) as process:
        own = psutil.Process(process.pid)
        deadline = time.monotonic() + SECONDS
        while not (children := own.children(recursive=True)) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert children and not any(child.is_running() for child in children)


def test_without_a_database_the_sentence_says_how_to_make_one(tmp_path):
    expected = f"there are trainings, call halfstep track --results {tmp_path} --uri sqlite:///"
    with pytest.raises(HalfstepError, match=re.escape(expected)):
        ui(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_port_that_is_taken_is_a_sentence(copied):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HalfstepError, match=rf"--port {port}: cannot be used \(Address"):
            ui(copied, port, browser=False)


def test_without_mlflow_the_sentence_names_the_extra(copied, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HalfstepError, match=r"pip install 'halfstep\[track\]'"):
        ui(copied)


def test_a_database_that_is_none_is_a_sentence(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database")
    with pytest.raises(HalfstepError, match="not an intact SQLite database"):
        ui(tmp_path, browser=False)


def test_a_server_that_cannot_start_says_why(copied, monkeypatch):
    """Another program took the port after it was found free."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("halfstep.commands.ui._free_port", lambda wanted: port)
        with pytest.raises(HalfstepError, match=rf"server on port {port} did not start \(.+\)"):
            ui(copied, browser=False)

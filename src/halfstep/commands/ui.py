"""`halfstep ui`: MLflow's pages of a results folder, opened at the loss curves of three runs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

from pydantic import Field

from halfstep.config import Whole
from halfstep.errors import HalfstepError, reason
from halfstep.records.database import ARTIFACTS, DATABASE, open_database
from halfstep.records.views import view_name, view_page

Port = Annotated[Whole, Field(ge=1, le=65535)]

HOST = "127.0.0.1"  # no other machine can reach it
START_S = 180  # for the server to answer; a busy machine takes half a minute
END_S = 10  # for the server to end by itself
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # past http_proxy


def ui(results: Path = Path("results"), port: Port | None = None, browser: bool = True) -> None:
    """Show the runs of a results folder in MLflow's pages, until Ctrl-C.

    The browser opens at the loss curves of three trainings: the last rounds of a teacher's runs, or
    the teacher, its first and its last round. The pages are on 127.0.0.1 alone. No other machine
    can reach them, but other users of this machine can, and MLflow asks for no password. To look
    from another machine, give --no-browser here, and there `ssh -L PORT:127.0.0.1:PORT`.

    Args:
        results: the folder with mlflow.db
        port: of the pages (default: a free one)
        browser: open the pages in the browser
    """
    if importlib.util.find_spec("mlflow") is None:
        raise HalfstepError("needs mlflow, which is not installed: pip install 'halfstep[track]'")
    file = results / DATABASE
    uri = f"sqlite:///{file}"
    if not file.exists():
        call = shlex.join(["halfstep", "track", "--results", str(results), "--uri", uri])
        raise HalfstepError(
            f"{file}: no such database; train something first, as by `make demo` or `halfstep "
            f"run`, name another --results, or, where there are trainings, call {call}"
        )
    port = _free_port(port)
    with _until_signal():
        print(f"MLflow starts on {HOST}:{port}", flush=True)
        open_database(uri)
        with _server(file.resolve(), port) as server:
            address = f"http://{HOST}:{port}"
            page = _print_pages(address)
            if browser:
                webbrowser.open(page)
            server.wait()
            raise HalfstepError("MLflow's server ended by itself; call halfstep ui again")


def _print_pages(address: str) -> str:
    """Print the addresses of the pages. Returns that of the first loss curves, or of all runs."""
    found = _ask(address, "experiments/search", {"max_results": 1000}).get("experiments", [])
    pages = {"experiments": f"{address}/#/experiments"}
    for experiment in found:
        for tag in experiment.get("tags", []):
            if name := view_name(tag["key"]):
                page = view_page(experiment["experiment_id"], name)
                pages[f"loss curves of {name.rpartition('-')[0]}"] = f"{address}/{page}"
    for name, page in pages.items():
        print(f"{name}: {page}")
    print("Ctrl-C ends it", flush=True)
    return [*pages.values()][:2][-1]


def _ask(address: str, what: str, query: dict[str, Any]) -> dict[str, Any]:
    """The answer of the server to a search."""
    request = urllib.request.Request(
        f"{address}/api/2.0/mlflow/{what}",
        json.dumps(query).encode(),
        {"Content-Type": "application/json"},
    )
    with DIRECT.open(request, timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


def _free_port(wanted: int | None) -> int:
    """The port, if nobody listens there; without one any free port."""
    try:
        with socket.socket() as end:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind((HOST, wanted or 0))
            port: int = end.getsockname()[1]
            return port
    except OSError as error:
        raise HalfstepError(
            f"--port {wanted}: cannot be used ({error.strerror}); "
            "name another port, or none to get a free one"
        ) from None


@contextlib.contextmanager
def _until_signal() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end the block, and are no fault."""
    former = {number: signal.signal(number, signal.default_int_handler) for number in ENDS}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _server(file: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's server on a database, which answers; it ends with the block.

    It has its own session, so Ctrl-C reaches this process alone, which then ends all of it.
    """
    call = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    call += ["--workers", "1", "--backend-store-uri", f"sqlite:///{file}"]
    call += ["--default-artifact-root", (file.parent / ARTIFACTS).as_uri(), "--no-serve-artifacts"]
    # None of the user's settings: they may open the server to others or switch its checks off.
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    kept |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            call,
            env=kept,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            _wait_for_answer(server, port, log)
            yield server
        finally:
            _end(server)


def _end_with_parent() -> None:
    """In the server, on Linux: end when this command ends, even if it is killed."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _wait_for_answer(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError), DIRECT.open(f"http://{HOST}:{port}/health", timeout=5):
            if server.poll() is None:
                return
        time.sleep(0.2)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines() or ["it says nothing"]
    fault = f"does not answer within {START_S} s" if server.poll() is None else "did not start"
    raise HalfstepError(
        f"MLflow's server on port {port} {fault} ({reason(Exception(lines[-1]))}); "
        "name another --port, or try `mlflow server` by hand"
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and all its processes. From here on no signal interrupts."""
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(END_S)

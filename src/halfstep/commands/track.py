"""`halfstep track`: send journals, measurements, tables and figures to MLflow; safe to repeat."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from halfstep.commands.tracked import gather_jobs, gather_overviews
from halfstep.errors import HalfstepError, reason
from halfstep.files import write_atomic
from halfstep.records.database import DATABASE, check_uri, lasting_fault, sqlite_file
from halfstep.records.exclusive import exclusive
from halfstep.records.mlflow import Tracker
from halfstep.sanitize import one_line

# Seconds before each pass of a sync. A pass can be repeated safely; one request to MLflow cannot.
WAITS_S = (0, 1, 4)
# For all passes of a sync: a slow server must not hold up a graph. Points that were sent stay sent.
PATIENCE_S = 600
# Modules whose errors mean that MLflow, or something below it, failed.
FAULTS = tuple("mlflow sqlalchemy alembic requests urllib3 json http psycopg pymysql".split())
# Errors of these modules may pass by themselves: nobody answers, a lock is held, a disk is full.
PASSING = tuple("mlflow requests urllib3 json http psycopg pymysql".split())


class MlflowUnreachable(HalfstepError):
    """MLflow did not take the data, but may take them later."""


class Synced(NamedTuple):
    """What a sync did."""

    added: int  # points
    jobs: int
    experiment_id: str
    warning: str = ""


def track(
    results: Path = Path("results"),
    uri: str | None = None,
    experiment: str | None = None,
    watch: bool = False,
    every: float = 15.0,
    output: Path | None = None,
) -> None:
    """Bring MLflow up to date with `results`; a second call adds nothing.

    Jobs that run at the same time are not disturbed. --watch ends with Ctrl-C, SIGTERM or the end
    of the graph (when {results}/mlflow.synced is written). With --output, an MLflow that may take
    the data later is a warning, which is also written to that file, and the exit code is 0. What no
    later call can send (a broken journal, a database that is none) is an error in any case.

    Args:
        results: the folder with models, metrics, tables and figures
        uri: database or server (default: $MLFLOW_TRACKING_URI, else sqlite:///{results}/mlflow.db)
        experiment: MLflow's experiment (default: $MLFLOW_EXPERIMENT_NAME, else halfstep)
        watch: repeat the sync, for live curves
        every: seconds between two passes of --watch
        output: for the graph: file to write when done; it is empty unless MLflow failed
    """
    if not results.is_dir():
        raise HalfstepError(
            f"--results {results}: no such folder; run the pipeline first, "
            "or name the folder that holds models/ and metrics/"
        )
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/{DATABASE}"
    experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "halfstep"
    check_uri(uri)
    if watch:
        _watch(results, uri, experiment, every)
    elif output is None:
        _sync_and_print(results, uri, experiment)
    else:
        write_atomic(output, _sync_or_warn(results, uri, experiment))


def _sync_or_warn(results: Path, uri: str, experiment: str) -> str:
    """Sync once. Returns "", or the warning that was printed."""
    try:
        return _sync_and_print(results, uri, experiment)
    except MlflowUnreachable as error:
        again = ["halfstep", "track", "--results", str(results)]
        again += ["--uri", uri, "--experiment", experiment]
        warning = one_line(
            f"WARNING: not sent to MLflow: {error}. The journals under {results}/models "
            f"hold everything; to send it later: {shlex.join(again)}"
        )
        warning += "\n"
        print(warning, end="", file=sys.stderr, flush=True)
        return warning


def _watch(results: Path, uri: str, experiment: str, every: float) -> None:
    """Sync again and again until a signal arrives or the graph ends.

    A signal ends the watch at once, even in the middle of a pass: MLflow has each request whole or
    not at all, and the next sync, from any process, sends the rest.
    """
    marker = results / "mlflow.synced"
    before, reported = _mtime(marker), ""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            # Look before the pass, so that the last pass sends the last points.
            ended = _mtime(marker) not in (before, None)
            reported = _sync_and_report(results, uri, experiment, reported)
            if ended:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, former)


def _sync_and_report(results: Path, uri: str, experiment: str, reported: str) -> str:
    """Sync once. Returns the error message, which is printed unless it was just `reported`."""
    try:
        _sync_and_print(results, uri, experiment, only_if_added=True)
    except HalfstepError as error:
        if str(error) != reported:
            print(f"halfstep track: {error}", file=sys.stderr, flush=True)
        return str(error)
    return ""


def _sync_and_print(results: Path, uri: str, experiment: str, only_if_added: bool = False) -> str:
    """Sync once, and say what was sent. Returns the warning of the sync."""
    done = sync_once(results, uri, experiment)
    if done.added or not only_if_added:
        print(f"{done.jobs} runs, {done.added} points added", flush=True)
        print(how_to_look(uri, done.experiment_id), flush=True)
        print(done.warning, end="", file=sys.stderr, flush=True)
    return done.warning


def _mtime(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def how_to_look(uri: str, experiment_id: str = "1") -> str:
    """The page of the runs on a server, or the command that starts MLflow's pages here."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    if uri.startswith("http"):
        hint = "  (open a teacher's row with +, choose the symbol of a chart)"
        return f"{uri.rstrip('/')}/{page}\n{hint}"
    file = sqlite_file(uri)
    if file and file.name == DATABASE:
        return f"halfstep ui --results {shlex.quote(str(file.parent))}"
    command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return f"{command}\n  then http://localhost:5000/{page}"


def sync_once(results: Path, uri: str, experiment: str) -> Synced:
    """Bring MLflow up to date with `results`.

    Parallel syncs of one folder take turns. A sync makes at most len(WAITS_S) passes and takes at
    most PATIENCE_S seconds. Raises MlflowUnreachable for a fault that may pass by itself.
    """
    jobs = gather_jobs(results)
    overviews = gather_overviews(results, jobs)
    deadline = time.monotonic() + PATIENCE_S
    added = 0
    fault: Exception = TimeoutError()
    try:
        with _alarm(PATIENCE_S), exclusive(results / ".track.lock", PATIENCE_S) as warning:
            for wait in WAITS_S:
                time.sleep(wait)
                tracker = None
                try:
                    tracker = Tracker(uri, experiment, results)
                    tracker.sync(jobs, overviews)
                    added += tracker.added
                    return Synced(added, len(jobs), tracker.experiment_id, warning)
                except Exception as error:
                    fault = _passing_fault(error, uri)
                    added += tracker.added if tracker else 0
                if time.monotonic() > deadline:  # MLflow may have hidden the alarm's TimeoutError
                    break
    except TimeoutError as error:
        fault = error
    cause = "no server answers" if "Max retries exceeded" in str(fault) else reason(fault)
    raise MlflowUnreachable(
        f"MLflow at {uri} does not take the data ({cause}); nothing is lost: "
        "repair it, or name another place with --uri, and call again"
    ) from fault


def _passing_fault(error: Exception, uri: str) -> Exception:
    """The error, if MLflow or what is below it failed and may work later. Raises any other one."""
    if isinstance(error, HalfstepError | TimeoutError):
        raise error
    lasting = lasting_fault(uri, error)
    if lasting:
        raise HalfstepError(lasting) from error
    is_passing = isinstance(error, OSError) or type(error).__module__.startswith(PASSING)
    is_passing |= hasattr(error, "orig")  # sqlalchemy's name for an error of a database
    if is_passing and getattr(error, "error_code", "") != "INVALID_PARAMETER_VALUE":
        return error
    if not is_passing and not _is_raised_by_mlflow(error):
        raise error
    raise HalfstepError(
        f"MLflow at {uri} cannot take the data ({reason(error)}); nothing is lost: "
        "change what it names, or name another place with --uri, and call again"
    ) from error


def _is_raised_by_mlflow(error: Exception) -> bool:
    """Was the error raised inside of MLflow, or of something below it?"""
    if type(error).__module__.startswith(FAULTS):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).startswith((*FAULTS, "importlib", "_"))


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, also while waiting for a lock or for an answer.

    Works in the main thread only; in another thread there is no time limit.
    """

    def ring(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s; the next call continues")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # repeated, in case a library catches it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)

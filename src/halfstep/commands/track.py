"""`halfstep track`: send journals, measurements, tables and figures to MLflow; safe to repeat."""

from __future__ import annotations

import contextlib
import math
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

from halfstep.config import NAIVE
from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, write_atomic
from halfstep.records.database import check_uri, lasting_fault
from halfstep.records.exclusive import exclusive
from halfstep.records.mlflow import Job, Tracker
from halfstep.records.shapes import check_row, check_run, student_steps
from halfstep.sanitize import mask_secrets, one_line
from halfstep.seeds import first_training, repeat_seed

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
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
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
    """The command that starts MLflow's web page (none for a server), and the page of the runs."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    hint = "  (open a teacher's row with +, tick runs, press Compare)"
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/{page}\n{hint}"
    command = f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
    return f"{command}\n  then http://localhost:5000/{page}\n{hint}"


def sync_once(results: Path, uri: str, experiment: str) -> Synced:
    """Bring MLflow up to date with `results`.

    Parallel syncs of one folder take turns. A sync makes at most len(WAITS_S) passes and takes at
    most PATIENCE_S seconds. Raises MlflowUnreachable for a fault that may pass by itself.
    """
    jobs = gather_jobs(results)
    artifacts = _tables_and_figures(results)
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
                    tracker.sync(jobs, artifacts)
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


def _tables_and_figures(results: Path) -> list[Path]:
    kinds = (".svg", ".pdf", ".csv", ".md", ".json")
    files = [file for kind in ("tables", "figures") for file in (results / kind).glob("*")]
    return sorted(file for file in files if file.suffix in kinds and file.is_file())


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


def gather_jobs(results: Path) -> list[Job]:
    """Every model with a journal or a measurement; of each teacher, the rounds come last.

    Naive samplers are no models: only the tables have them.
    """
    jobs: dict[str, Job] = {}
    for file in sorted((results / "models").rglob("run.json")):
        # If the job starts anew meanwhile, a few new points reach its old run. That does no harm:
        # the next sync replaces the old run.
        model = file.parent.relative_to(results / "models").as_posix()
        run = check_run(mask_secrets(read_json(file)), file)
        steps = student_steps(file.parent)
        jobs[model] = Job(model, _with_seed(run, model), file.parent, own_steps=steps)
    measurements = [
        *(results / "metrics").rglob("*.json"),
        *(results / "benchmarks").rglob("*.json"),
    ]
    for file in sorted(measurements):
        rows = read_json(file)
        for number, row in enumerate(rows if isinstance(rows, list) else [], start=1):
            checked = check_row(row, file, number)
            if checked.get("run") not in NAIVE:
                _add_row(jobs, checked, file)
    order = sorted(jobs, key=lambda model: (model.split("/")[0], "round-" in model, model))
    return [jobs[model] for model in order]


def _with_seed(run: dict, model: str) -> dict:
    """run.json of a repeat with its seed in the name and in the tags; others stay the same."""
    seed = repeat_seed(model)
    if seed is None:
        return run
    name = f"{first_training(run['name'])} seed {seed}"
    return run | {"name": name, "tags": run.get("tags", {}) | {"training_seed": seed}}


def _add_row(jobs: dict[str, Job], row: dict, file: Path) -> None:
    """Add a metric row to the job of its model; skip it if the job's checkpoint is another one."""
    model = _model_of(row)
    if model not in jobs:
        jobs[model] = _untrained_job(model, row)
    job = jobs[model]
    digests = (job.run.get("checkpoint") or {}).get("sha256", {}).values()
    measured = row.get("checkpoint")
    if measured and digests and not any(digest.startswith(measured) for digest in digests):
        return
    steps = int(row.get("steps") or 0)
    for (key, step), value in _metrics(row, job.own_steps).items():
        if value is None or not math.isfinite(value):
            continue
        known = job.evaluations.setdefault((key, step), value)
        if known != value:
            raise HalfstepError(
                f"{file}: {key} of {model} at {steps} steps is {value:g}, "
                f"but {known:g} in another row; keep one of them"
            )


def _is_timing(row: dict) -> bool:
    return row["metric"] == "latency_s"


def _model_of(row: dict) -> str:
    """The model of a row. All timings of a teacher's models belong to one run."""
    if _is_timing(row):
        return f"{row['teacher']}/benchmark"
    return row["model"] if "/" in row["model"] else f"{row['teacher']}/{row['model']}"


def _untrained_job(model: str, row: dict) -> Job:
    """A job without a journal: held-out text, timings, or weights from elsewhere."""
    checkpoint = None
    if row.get("checkpoint") and not _is_timing(row):
        checkpoint = {"folder": "", "sha256": {row.get("weights") or "model": row["checkpoint"]}}
    name = model.split("/", 1)[1]
    run = {"name": name, "node": f"score/{model}", "started": 0.0, "checkpoint": checkpoint}
    return Job(model, run)


def _metrics(row: dict, own_steps: int | None = None) -> dict[tuple[str, int], float | None]:
    """The values of a row by MLflow's keys and steps.

    What is measured at several step counts has a curve over them, `by_steps/...`, and a key for
    each count, `eval/..._at_8_steps`. MLflow shows one number for each key: of a curve it is that
    of the largest count, by which runs must not be sorted. `at_own_steps` is the count that a
    student was made for. The keys are the same for every model, so that MLflow can compare runs.
    Each judge has its own curve, and so have each task, each variant of the draws, and each
    temperature but 1, which have no further keys.
    """
    if _is_timing(row):
        name = row["model"].split("/", 1)[-1].replace("/", "-")
        if not row.get("steps") and row.get("sampler") not in (None, "kv_cache"):
            name += f"-{row['sampler']}"  # another decoder of the same baseline
        case = f"{name}_length_{row['length']}_batch_{row['batch_size']}"
        steps = int(row.get("steps") or 0)
        return {
            (f"speed/latency_s_{case}", steps): row["value"],
            (f"speed/tokens_per_s_{case}", steps): row.get("tokens_per_s"),
        }
    judge = (row.get("judge") or "").partition("@")[0]
    suffix = f"_{judge.rpartition('/')[2]}" if judge and "/baseline" not in judge else ""
    if task := row.get("task"):
        suffix += f"_{task}" + (f"_{row['measure']}" if row.get("measure") else "")
    if variant := row.get("variant"):
        suffix += f"_{variant}"
    if temperature := row.get("temperature"):
        suffix += f"_temperature_{temperature:g}"
    name, value = f"{row['metric']}_{row['protocol']}{suffix}", row["value"]
    steps = row.get("steps")
    if steps is None:
        return {(f"eval/{name}", 0): value}
    found = {(f"by_steps/{name}", steps): value}
    if not (row.get("temperature") or row.get("variant")):
        found[f"eval/{name}_at_{steps}_steps", 0] = value
        if steps == own_steps:
            found[f"eval/{name}_at_own_steps", 0] = value
    return found

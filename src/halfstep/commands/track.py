"""`halfstep track`: send journals, measurements, tables and figures to MLflow; repeat it as often as you like."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, write_atomic
from halfstep.records import journal
from halfstep.records.mlflow import Job, Tracker

WAITS_S = (
    0,
    1,
    4,
)  # before each pass of a call; a pass is idempotent, a single request of MLflow's is not
PATIENCE_S = 600  # for all attempts of a call: a server that answers, but slowly, must not hold up a graph; what was sent stays
FAULTS = (
    "mlflow",
    "sqlalchemy",
    "alembic",
    "requests",
    "urllib3",
    "json",
    "http",
    "psycopg",
    "pymysql",
)


def track(
    results: Path = Path("results"),
    uri: str | None = None,
    experiment: str = "halfstep",
    watch: bool = False,
    every: float = 15.0,
    output: Path | None = None,
) -> None:
    """Bring MLflow to what lies under `results`; a second call adds nothing. Jobs that run meanwhile are not disturbed.

    Args:
        results: the folder with models, metrics, tables and figures
        uri: a database or server of MLflow; default: $MLFLOW_TRACKING_URI, else sqlite:///{results}/mlflow.db
        experiment: MLflow's experiment; people who share a server choose different ones
        watch: do it again and again, for live curves, until Ctrl-C, SIGTERM or the end of the graph (when {results}/mlflow.synced is written)
        every: seconds between two passes of --watch
        output: for the graph: the file that tells it was done. What cannot be sent is then a warning, the exit code 0, and the warning's text in the file
    """
    if not results.is_dir():
        raise HalfstepError(
            f"--results {results}: no such folder; run the pipeline first, or name the folder that holds models/ and metrics/"
        )
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
    if watch:
        return _watch(results, uri, experiment, every)
    warning = ""
    try:
        added, jobs, experiment_id = sync_once(results, uri, experiment)
        print(f"{jobs} runs, {added} points added\n{how_to_look(uri, experiment_id)}", flush=True)
    except HalfstepError as error:
        if output is None:  # somebody asked for just this: say that it failed
            raise
        again = shlex.join(
            [
                "halfstep",
                "track",
                "--results",
                str(results),
                "--uri",
                uri,
                "--experiment",
                experiment,
            ]
        )
        warning = f"WARNING: not sent to MLflow: {error}. The journals under {results}/models hold everything; to send it later: {again}\n"
        print(warning, end="", file=sys.stderr, flush=True)
    if output is not None:
        write_atomic(output, warning.encode())


def _watch(results: Path, uri: str, experiment: str, every: float) -> None:
    """Leaves at once on a signal: each request is whole or absent at MLflow's, and the next pass, whoever makes it, does the rest."""

    def leave(*_):
        raise KeyboardInterrupt

    done, said = results / "mlflow.synced", ""
    before, former = _changed(done), signal.signal(signal.SIGTERM, leave)
    try:
        while True:
            ended = _changed(done) not in (
                before,
                None,
            )  # looked at before the pass, so that the last pass sends the last points
            try:
                added, jobs, experiment_id = sync_once(results, uri, experiment)
                said = ""
                if added:
                    print(
                        f"{jobs} runs, {added} points added\n{how_to_look(uri, experiment_id)}",
                        flush=True,
                    )
            except HalfstepError as error:
                if str(error) != said:  # once for a fault, not for every pass
                    print(f"halfstep track: {error}", file=sys.stderr, flush=True)
                said = str(error)
            if ended:
                return
            time.sleep(every)
    except KeyboardInterrupt:
        return
    finally:
        signal.signal(signal.SIGTERM, former)


def _changed(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.exists() else None


def how_to_look(uri: str, experiment_id: str = "1") -> str:
    """The one command that opens MLflow, and the page of the runs."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    hint = "  (open a teacher's row with +, tick runs, press Compare)"
    return (
        f"{uri.rstrip('/')}/{page}\n{hint}"
        if uri.startswith("http")
        else f"mlflow ui --backend-store-uri {uri}\n  then http://localhost:5000/{page}\n{hint}"
    )


def sync_once(results: Path, uri: str, experiment: str) -> tuple[int, int, str]:
    """Points added, number of jobs, id of the experiment. Two syncs at once take turns. At most len(WAITS_S) passes and PATIENCE_S seconds."""
    jobs = gather(results)
    artifacts = sorted(
        file
        for kind in ("tables", "figures")
        for file in (results / kind).glob("*")
        if file.suffix in (".svg", ".pdf", ".csv", ".md", ".json")
    )
    fault, added, start = None, 0, time.monotonic()
    try:
        with open(results / ".track.lock", "w") as lock, _alarm(PATIENCE_S):
            fcntl.flock(lock, fcntl.LOCK_EX)
            for wait in WAITS_S:
                time.sleep(wait)
                tracker = None
                try:
                    tracker = Tracker(uri, experiment, results / "mlflow-artifacts")
                    tracker.sync(jobs, artifacts)
                    return added + tracker.added, len(jobs), tracker.experiment_id
                except (HalfstepError, TimeoutError):
                    raise
                except Exception as error:  # whatever MLflow or what is below it raises, the journals are whole and can be sent later
                    if not isinstance(error, OSError) and not type(error).__module__.startswith(
                        FAULTS
                    ):
                        raise
                    fault, added = error, added + (tracker.added if tracker else 0)
                if (
                    time.monotonic() > start + PATIENCE_S
                ):  # MLflow may have wrapped the alarm in an error of its own
                    break
    except TimeoutError as error:
        fault = error
    why = "no server answers" if "Max retries exceeded" in str(fault) else reason(fault)
    raise HalfstepError(
        f"MLflow at {uri} does not take the data ({why}); nothing is lost: mend it, or name another place with --uri, and call again"
    ) from fault


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds, in the main thread; it reaches into a lock or an answer that one waits for."""

    def ring(*_):
        raise TimeoutError(f"it was not done after {seconds:g} s")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)  # and again, should somebody swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def gather(results: Path) -> list[Job]:
    """Every model with a journal or a measurement, in the order teacher, baseline, rounds."""
    jobs = {}
    for file in sorted((results / "models").rglob("run.json")):
        run, points = journal.read_journal(file.parent)
        while (
            read_json(file) != run
        ):  # a job began anew between the two reads: its points are not the former run's
            run, points = journal.read_journal(file.parent)
        model = file.parent.relative_to(results / "models").as_posix()
        jobs[model] = Job(model, run, points, folder=file.parent)
    for file in sorted(
        [*(results / "metrics").rglob("*.json"), *(results / "benchmarks").rglob("*.json")]
    ):
        rows = read_json(file)
        for row in rows if isinstance(rows, list) else []:
            _measure(jobs, row, file)
    return [
        jobs[model]
        for model in sorted(jobs, key=lambda name: (name.split("/")[0], "round-" in name, name))
    ]


def _measure(jobs: dict[str, Job], row: dict, file: Path) -> None:
    """Put a metric row on the job of its model; a row of an older checkpoint than the journal's is left out."""
    speed = row["metric"] == "latency_s"  # all timings of one machine are one run
    model = (
        f"{row['teacher']}/benchmark"
        if speed
        else row["model"]
        if "/" in row["model"]
        else f"{row['teacher']}/{row['model']}"
    )
    if model not in jobs:  # not trained here: held-out text, timings, or weights from elsewhere
        found = (
            {"folder": "", "sha256": {row.get("weights") or "model": row["checkpoint"]}}
            if row.get("checkpoint") and not speed
            else None
        )
        node = f"score/{model}"
        jobs[model] = Job(
            model,
            {"name": model.split("/", 1)[1], "node": node, "started": 0.0, "checkpoint": found},
        )
    job = jobs[model]
    made = (job.run.get("checkpoint") or {}).get("sha256", {}).values()
    if (
        row.get("checkpoint")
        and made
        and not any(value.startswith(row["checkpoint"]) for value in made)
    ):
        return
    for key, value in _metrics(row).items():
        step = int(row.get("steps") or 0)
        if value is None or not math.isfinite(value):
            continue
        if job.evaluations.setdefault((key, step), value) != value:
            raise HalfstepError(
                f"{file}: {key} of {model} at {step} steps is {value:g}, and {job.evaluations[key, step]:g} in another row; keep one"
            )


def _metrics(row: dict) -> dict[str, float | None]:
    """MLflow's keys: the same for every model, so that runs compare; the step is the number of sampling steps."""
    if row["metric"] == "latency_s":
        who = row["model"].split("/", 1)[-1].replace("/", "-")
        case = f"{who}_length_{row['length']}_batch_{row['batch_size']}"
        return {
            f"speed/latency_s_{case}": row["value"],
            f"speed/tokens_per_s_{case}": row.get("tokens_per_s"),
        }
    judge = (row.get("judge") or "").partition("@")[0]
    named = (
        f"_{judge.rpartition('/')[2]}" if judge and "/baseline" not in judge else ""
    )  # several judges of one model are several curves
    return {f"eval/{row['metric']}_{row['protocol']}{named}": row["value"]}

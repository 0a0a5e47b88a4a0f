"""`halfstep track`: send journals, measurements, tables and figures to MLflow; repeat it as often as you like."""

from __future__ import annotations

import fcntl
import math
import os
import sys
import time
from pathlib import Path

from halfstep import tracking
from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.sync import Job, Tracker


def track(results: Path = Path("results"), uri: str | None = None, experiment: str = "halfstep", watch: bool = False) -> None:
    """Bring MLflow to what lies under `results`; a second call adds nothing. Jobs that run meanwhile are not disturbed.

    Args:
        results: the folder with models, metrics, tables and figures
        uri: a database or server of MLflow; default: $MLFLOW_TRACKING_URI, else sqlite:///{results}/mlflow.db
        experiment: MLflow's experiment; people who share a server choose different ones
        watch: do it again every 15 seconds until Ctrl-C, for live curves
    """
    if not results.is_dir():
        raise HalfstepError(f"--results {results}: no such folder; run the pipeline first, or name the folder that holds models/ and metrics/")
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
    while True:
        try:
            added, jobs, experiment_id = once(results, uri, experiment)
            if added or not watch:
                print(f"{jobs} runs, {added} points added\n{how_to_look(uri, experiment_id)}", flush=True)
            if not watch:
                return
        except HalfstepError as error:
            if not watch:
                raise
            print(f"halfstep track: {error}", file=sys.stderr, flush=True)
        try:
            time.sleep(15)
        except KeyboardInterrupt:
            return


def how_to_look(uri: str, experiment_id: str = "1") -> str:
    """The one command that opens MLflow, and the page of the runs."""
    page = f"#/experiments/{experiment_id}/runs?workflowType=machine_learning"
    hint = "  (open a teacher's row with +, tick runs, press Compare)"
    return f"{uri.rstrip('/')}/{page}\n{hint}" if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}\n  then http://localhost:5000/{page}\n{hint}"


def once(results: Path, uri: str, experiment: str) -> tuple[int, int, str]:
    """One pass: points added, number of jobs, id of the experiment. Two passes at once take turns."""
    jobs = gather(results)
    artifacts = sorted(file for kind in ("tables", "figures") for file in (results / kind).glob("*") if file.suffix in (".svg", ".pdf", ".csv", ".md", ".json"))
    with open(results / ".track.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            tracker = Tracker(uri, experiment, results / "mlflow-artifacts")
            tracker.sync(jobs, artifacts)
        except HalfstepError:
            raise
        except Exception as error:  # whatever MLflow, SQLAlchemy or requests raise, the journals are whole and can be sent later
            if not type(error).__module__.startswith(("mlflow", "sqlalchemy", "alembic", "requests", "urllib3")):
                raise
            reason = "no server answers" if "Max retries exceeded" in str(error) else str(error).split("\n")[0][:300]
            raise HalfstepError(
                f"MLflow at {uri} does not take the data ({reason}); nothing is lost: mend it, or name another place with --uri, and call again"
            ) from error
    return tracker.added, len(jobs), tracker.experiment_id


def gather(results: Path) -> list[Job]:
    """Every model with a journal or a measurement, in the order teacher, baseline, rounds."""
    jobs = {}
    for file in sorted((results / "models").rglob("run.json")):
        run, points = tracking.read(file.parent)
        model = file.parent.relative_to(results / "models").as_posix()
        jobs[model] = Job(model, run, points, folder=file.parent)
    for file in sorted([*(results / "metrics").rglob("*.json"), *(results / "benchmarks").rglob("*.json")]):
        rows = read_json(file)
        for row in rows if isinstance(rows, list) else []:
            _measure(jobs, row, file)
    return [jobs[model] for model in sorted(jobs, key=lambda name: (name.split("/")[0], "round-" in name, name))]


def _measure(jobs: dict[str, Job], row: dict, file: Path) -> None:
    """Put a metric row on the job of its model; a row of an older checkpoint than the journal's is left out."""
    speed = row["metric"] == "latency_s"  # all timings of one machine are one run
    model = f"{row['teacher']}/benchmark" if speed else row["model"] if "/" in row["model"] else f"{row['teacher']}/{row['model']}"
    if model not in jobs:  # not trained here: held-out text, timings, or weights from elsewhere
        found = {"folder": "", "sha256": {row.get("weights") or "model": row["checkpoint"]}} if row.get("checkpoint") and not speed else None
        node = f"score/{model}"
        jobs[model] = Job(model, {"name": model.split("/", 1)[1], "node": node, "started": 0.0, "checkpoint": found})
    job = jobs[model]
    made = (job.run.get("checkpoint") or {}).get("sha256", {}).values()
    if row.get("checkpoint") and made and not any(value.startswith(row["checkpoint"]) for value in made):
        return
    for key, value in _metrics(row).items():
        step = int(row.get("steps") or 0)
        if value is None or not math.isfinite(value):
            continue
        if job.evaluations.setdefault((key, step), value) != value:
            raise HalfstepError(f"{file}: {key} of {model} at {step} steps is {value:g}, and {job.evaluations[key, step]:g} in another row; keep one")


def _metrics(row: dict) -> dict[str, float | None]:
    """MLflow's keys: the same for every model, so that runs compare; the step is the number of sampling steps."""
    if row["metric"] == "latency_s":
        who = row["model"].split("/", 1)[-1].replace("/", "-")
        case = f"{who}_length_{row['length']}_batch_{row['batch_size']}"
        return {f"speed/latency_s_{case}": row["value"], f"speed/tokens_per_s_{case}": row.get("tokens_per_s")}
    judge = (row.get("judge") or "").partition("@")[0]
    named = f"_{judge.rpartition('/')[2]}" if judge and "/baseline" not in judge else ""  # several judges of one model are several curves
    return {f"eval/{row['metric']}_{row['protocol']}{named}": row["value"]}

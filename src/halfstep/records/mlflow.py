"""From journals and metric rows to MLflow: one writer, any number of times, the same result.

    parent run    one for each teacher: holds the tables and figures
      child run   one for each job (teacher, baseline, every round): params, tags, datasets, curves, evaluations, logged model

All state lies in MLflow itself, so an interrupted pass is mended by the next. A run is recognised by its tags `halfstep.model`,
`halfstep.fingerprint` and `halfstep.started`; when what lies on disk contradicts it (another experiment, a start from nothing, another
evaluation), a new run takes its place; the old one is tagged `superseded_by`, renamed "... (superseded)" and soft-deleted (in MLflow's page:
State, Deleted). Of two runs of one model, left by a request whose answer was lost, one goes the same way. A point once sent stays: when a resumed
job repeats some steps, its later points at those steps are not sent again.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from halfstep.errors import HalfstepError

STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


@dataclass
class Job:
    """What lies on disk of one model: its journal, and what was measured of it."""

    model: str  # "stories-tiny/kl_backward/round-3", the folder under results/models
    run: dict  # run.json; for a model that was not trained here, its name and nothing else
    points: list[dict] = field(default_factory=list)
    evaluations: dict[tuple[str, int], float] = field(default_factory=dict)  # (key, step): value
    folder: Path | None = None

    @property
    def teacher(self) -> str:
        return self.model.split("/")[0]

    @property
    def state(self) -> str:
        """A digest of all that would be sent: a run that bears it needs nothing."""
        content = [
            self.run,
            len(self.points),
            self.points[-1:],
            sorted([*key, value] for key, value in self.evaluations.items()),
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Tracker:
    """An MLflow experiment, opened or created. The only code that imports mlflow."""

    def __init__(self, uri: str, experiment: str, artifacts: Path):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow would send a request again whose answer was lost, and so make a run twice; and it blocks for minutes. `once` repeats whole passes.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        try:
            import mlflow
        except ImportError:
            raise HalfstepError(
                "tracking needs mlflow, which is not installed: pip install 'halfstep[track]'"
            ) from None
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        mlflow.set_tracking_uri(uri)
        self.client, self.uri = mlflow.MlflowClient(uri), uri
        found = self.client.get_experiment_by_name(experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise HalfstepError(
                f"experiment {experiment!r} at {uri} was deleted; restore it there, or choose another name with --experiment"
            )
        # a server keeps artifacts where it likes; a database of ours keeps them beside itself, not in ./mlruns
        where = None if uri.startswith("http") else artifacts.resolve().as_uri()
        self.experiment_id = (
            found.experiment_id if found else self.client.create_experiment(experiment, where)
        )
        self.added = 0  # points sent

    def sync(self, jobs: list[Job], artifacts: list[Path]) -> None:
        """Bring MLflow to what lies on disk. Files in `artifacts` belong to every parent run."""
        runs = self._active_runs()
        for teacher in dict.fromkeys(job.teacher for job in jobs):
            mine = [job for job in jobs if job.teacher == teacher]
            parent, *doubles = runs.get(teacher) or [
                self._create(Job(teacher, {"name": teacher, "started": 0.0}))
            ]
            for job in mine:
                self._sync_job(job, runs.get(job.model, []), parent.info.run_id)
            for double in doubles:
                self._supersede(double, parent.info.run_id)
            self._sync_parent(
                parent, artifacts, {job.run.get("status", "finished") for job in mine}
            )

    def _active_runs(self) -> dict[str, list]:
        """Runs of ours by model, those marked deleted left out."""
        found, token = {}, None
        while True:
            page = self.client.search_runs([self.experiment_id], max_results=1000, page_token=token)
            for run in page:
                if "halfstep.model" in run.data.tags:
                    found.setdefault(run.data.tags["halfstep.model"], []).append(run)
            token = page.token
            if not token:
                return found

    def _create(self, job: Job, parent: str | None = None):
        tags = {
            "halfstep.model": job.model,
            **{
                f"halfstep.{key}": str(job.run.get(key, ""))
                for key in ("node", "fingerprint", "started")
            },
        }
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        tags["mlflow.runColor"] = colour(job.model)
        started = int(1000 * job.run["started"]) or None
        return self.client.create_run(
            self.experiment_id,
            start_time=started,
            tags=tags,
            run_name=job.run["name"].replace("/round-", " r"),
        )

    def _sync_job(self, job: Job, active: list, parent: str) -> None:
        """One job into one run; every other active run of the same model is superseded."""
        whole = [
            run for run in active if "superseded_by" not in run.data.tags
        ]  # a killed pass may have left one marked and not deleted
        same = [
            run
            for run in whole
            if all(
                run.data.tags.get(f"halfstep.{k}") == str(job.run.get(k, ""))
                for k in ("fingerprint", "started")
            )
        ]
        run = next((run for run in same if run.data.tags.get("halfstep.state") == job.state), None)
        if run is None:
            history = {run.info.run_id: self._history(run, job) for run in same}
            run = next(
                (run for run in same if not _contradicts(history[run.info.run_id], job)), None
            )
            sent = history[run.info.run_id] if run else {}
            run = run or self._create(job, parent)
            self._fill(run.info.run_id, job, sent)
        if run.data.tags.get("mlflow.parentRunId") != parent:
            self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        for other in active:
            if other.info.run_id != run.info.run_id:
                self._supersede(other, run.info.run_id)

    def _history(self, run, job: Job) -> dict[tuple[str, int], float]:
        keys = {key for point in job.points for key in point["metrics"]} | {
            key for key, _ in job.evaluations
        }
        return {
            (key, point.step): point.value
            for key in sorted(keys & run.data.metrics.keys())
            for point in self.client.get_metric_history(run.info.run_id, key)
        }

    def _fill(self, run_id: str, job: Job, sent: dict[tuple[str, int], float]) -> None:
        from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag

        run = job.run
        params = [Param(key, str(value)) for key, value in flatten(run.get("params", {})).items()]
        tags = [RunTag(key, str(value)) for key, value in run.get("tags", {}).items()]
        for some in chunks(params, 100):
            self.client.log_batch(run_id, params=some)
        self.client.log_batch(run_id, tags=tags)
        self.client.log_inputs(run_id, [DatasetInput(_dataset(data), [InputTag("mlflow.data.context", data.get("context", "training"))])
                                        for data in run.get("datasets", [])])  # fmt: skip
        metrics = [
            Metric(key, value, int(1000 * point["time"]), point["step"])
            for point in job.points for key, value in point["metrics"].items() if (key, point["step"]) not in sent
        ]  # fmt: skip
        model = self._logged_model(run_id, job)
        stamp = int(1000 * (run.get("ended") or run["started"] or time.time()))
        metrics += [
            Metric(key, value, stamp, step, model_id=model)
            for (key, step), value in job.evaluations.items()
            if (key, step) not in sent
        ]
        for some in chunks(metrics, 1000):
            self.client.log_batch(run_id, metrics=some)
            self.added += len(some)
        for name in run.get("artifacts", []):
            if (job.folder / name).is_file():
                self.client.log_artifact(run_id, str(job.folder / name))
        if run.get("status", "finished") == "running":
            self.client.update_run(run_id, status="RUNNING")
        else:
            self.client.set_terminated(
                run_id, STATUS[run.get("status", "finished")], end_time=stamp
            )
        self.client.set_tag(
            run_id, "halfstep.state", job.state
        )  # last: only a complete run bears it

    def _logged_model(self, run_id: str, job: Job) -> str | None:
        """The id of the checkpoint's logged model: its weights stay where they are, its measurements are linked to it."""
        import mlflow

        checkpoint = job.run.get("checkpoint")
        if not checkpoint:
            return None
        kind = "student" if "/round-" in job.model else job.model.split("/")[-1]
        tags = {
            "folder": str(job.folder / checkpoint["folder"]) if job.folder else "",
            "halfstep.model": job.model,
        }
        tags |= {f"sha256.{name}": value for name, value in checkpoint["sha256"].items()}
        known = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        same = [
            model
            for model in known
            if all(
                model.tags.get(key) == value
                for key, value in tags.items()
                if key.startswith("sha256.")
            )
        ]
        for model in known:
            if model not in same[:1]:
                self.client.delete_logged_model(model.model_id)
        if same:
            return same[0].model_id
        name = "".join("-" if letter in "/:.%\"'" else letter for letter in job.model)
        params = {key: str(value) for key, value in flatten(job.run.get("params", {})).items()}
        model = mlflow.create_external_model(name, run_id, tags, params, kind, self.experiment_id)
        self.client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def _supersede(self, old, new: str) -> None:
        run_id, name = old.info.run_id, old.info.run_name
        self.client.set_tag(run_id, "superseded_by", new)
        if not name.endswith(" (superseded)"):
            self.client.update_run(run_id, name=f"{name} (superseded)")
        for model in self.client.search_logged_models(
            [self.experiment_id], filter_string=f"source_run_id = '{run_id}'"
        ):
            self.client.delete_logged_model(model.model_id)
        self.client.delete_run(
            run_id
        )  # last: only a run that is wholly marked is out of sight of the next pass

    def _sync_parent(self, parent, artifacts: list[Path], statuses: set[str]) -> None:
        content = hashlib.sha256(
            b"".join(
                str(file).encode() + hashlib.sha256(file.read_bytes()).digest()
                for file in artifacts
            )
        ).hexdigest()
        if parent.data.tags.get("halfstep.state") != content:
            for file in artifacts:
                self.client.log_artifact(parent.info.run_id, str(file), file.parent.name)
            self.client.set_tag(parent.info.run_id, "halfstep.state", content)
        status = "RUNNING" if "running" in statuses else "FINISHED"
        if parent.info.status != status:
            self.client.update_run(parent.info.run_id, status=status)


def _contradicts(sent: dict[tuple[str, int], float], job: Job) -> bool:
    """Does the run hold an evaluation whose value on disk is another one?"""
    return any(sent.get(key, value) != value for key, value in job.evaluations.items())


def _dataset(data: dict):
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    source = HTTPDatasetSource(
        str(data.get("source") or data["name"])
    )  # a place and no more: nothing is ever loaded through it
    return MetaDataset(
        source, name=str(data["name"]), digest=str(data["digest"])[:12]
    )._to_mlflow_entity()  # MLflow takes 36, pages show 12


def colour(model: str) -> str:
    """For MLflow's charts: a hue for each run of distillation (MLflow's own may be nearly alike), paler for earlier rounds."""
    run = model.split("/")[1] if "/" in model else ""
    grey = {"": 0.3, "teacher": 0.0, "baseline": 0.45, "data": 0.65, "benchmark": 0.3}.get(run)
    if grey is not None:
        return "#" + 3 * f"{round(255 * grey):02x}"
    hues = {"kl_backward": 0.58, "mse": 0.06, "tvd": 0.38, "kl_forward": 0.86}
    hue = hues.get(run, int(hashlib.sha256(run.encode()).hexdigest(), 16) % 360 / 360)
    later = min(int(model.rpartition("-")[2]) / 7, 1)
    return "#" + "".join(
        f"{round(255 * part):02x}" for part in colorsys.hls_to_rgb(hue, 0.82 - 0.44 * later, 0.75)
    )


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"training": {"lr": 1}} -> {"training.lr": 1}"""
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def chunks(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))

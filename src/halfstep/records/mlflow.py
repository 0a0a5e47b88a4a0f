"""Write journals and metric rows to MLflow, so that a repeated sync changes nothing.

    parent run    one for each teacher: holds the tables and figures
      child run   one for each job (teacher, baseline, every round): params, tags, datasets, curves,
                  evaluations, logged model

MLflow itself holds what was sent, so the next sync completes an interrupted one. The tags
`halfstep.model`, `halfstep.fingerprint` and `halfstep.started` identify a run. A new run replaces
it if the files contradict it: another experiment, a start from nothing, or another evaluation. The
old run is tagged `superseded_by`, renamed "... (superseded)" and soft-deleted. (MLflow lists it
under State, Deleted.) A request whose answer was lost may leave two runs of one model; then one of
them is superseded too. Runs that another results folder created are never touched (ownership.py).

A journal is read once. The tag `halfstep.sent` says up to which line MLflow has it, and the next
sync begins there. Each curve only grows: a point is sent if its step is beyond the last one that
MLflow has. So if a resumed job repeats some steps, the earlier points stay.
"""

from __future__ import annotations

import colorsys
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError
from halfstep.records import database
from halfstep.records.journal import complete_size, mark, points_between, read_points
from halfstep.records.ownership import FOLDER_TAG, KEY_TAG, OwnRuns
from halfstep.seeds import first_training

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModel, Metric, Run

BATCH = 999  # metrics of one request; MLflow takes 1000 entries, and one is the tag below
SENT_TAG = "halfstep.sent"  # the mark of the last line that was sent
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}

Evaluations = dict[tuple[str, int], float]  # (metric key, step) -> value


@dataclass
class Job:
    """Everything on disk about one model: its journal and its measurements."""

    model: str  # the folder under results/models, "stories-tiny/kl_backward/round-3"
    run: dict  # run.json; of a model that was not trained here: name, node, started, checkpoint
    folder: Path | None = None  # with the journal
    evaluations: Evaluations = field(default_factory=dict)
    own_steps: int | None = None  # sampling steps that a student was made for

    def __post_init__(self) -> None:
        # A job that runs appends lines meanwhile: the next sync sends them.
        self.size = complete_size(self.journal) if self.journal else 0
        self.mark = mark(self.journal, self.size) if self.journal else ""

    @property
    def journal(self) -> Path | None:
        file = self.folder / "journal.jsonl" if self.folder else None
        return file if file and file.exists() else None

    @property
    def points(self) -> Iterator[dict]:
        """The points of the journal, which is read line by line."""
        return read_points(self.journal) if self.journal else iter(())

    @property
    def teacher(self) -> str:
        return first_training(self.model).split("/")[0]

    @property
    def status(self) -> str:
        return self.run.get("status", "finished")

    @property
    def state(self) -> str:
        """Digest of everything to send; a run with this digest in its tags is up to date."""
        evaluations = sorted([*key, value] for key, value in self.evaluations.items())
        content = [self.run, self.mark, evaluations]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Tracker:
    """An MLflow experiment, opened or created. Only it and database.py import mlflow."""

    def __init__(self, uri: str, experiment: str, results: Path):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # MLflow would repeat a request whose answer was lost and so create a run twice, and it
        # would block for minutes. `sync_once` repeats whole passes instead.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(database.ANSWER_S))
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        try:
            import mlflow
        except ImportError:
            raise HalfstepError(
                "tracking needs mlflow, which is not installed: pip install 'halfstep[track]'"
            ) from None
        logging.getLogger("alembic").setLevel(logging.WARNING)
        # A sync that failed is repeated, and its fault is one sentence of `halfstep track`.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        self.added = 0  # points sent
        self.uri = self._open_database(uri)
        self._own = OwnRuns(results)
        mlflow.set_tracking_uri(self.uri)
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment_id = self._open_experiment(experiment, results)

    def _open_database(self, uri: str) -> str:
        """Make sure that a database is there and whole. Returns its address, with time limits."""
        file = database.sqlite_file(uri)
        if file:
            database.prepare_sqlite(file)
            database.follow_move(file)
        elif not _is_web_server(uri):
            uri = database.with_timeouts(uri)
            database.try_connection(uri)
        return uri

    def _open_experiment(self, name: str, results: Path) -> str:
        """The experiment's id. A server chooses where it keeps artifacts; a database uses ours."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            return self.client.create_experiment(name, self._new_artifact_folder(results))
        if experiment.lifecycle_stage != "active":
            raise HalfstepError(
                f"experiment {name!r} at {self.uri} was deleted; "
                "restore it there, or choose another name with --experiment"
            )
        place = experiment.artifact_location
        is_folder = place.startswith("file:") and not _is_web_server(self.uri)
        if is_folder and not database.local_folder(place).is_dir():
            raise HalfstepError(
                f"experiment {name!r} at {self.uri} keeps its files in {place}, which is not "
                "there; move it back, or choose another name with --experiment"
            )
        return experiment.experiment_id

    def _new_artifact_folder(self, results: Path) -> str | None:
        """A new folder next to a SQLite file, or in the results; None for a server."""
        if _is_web_server(self.uri):
            return None
        file = database.sqlite_file(self.uri)
        folder = (file.parent if file else results).resolve() / database.ARTIFACTS
        folder.mkdir(exist_ok=True)
        return folder.as_uri()

    def sync(self, jobs: list[Job], artifacts: list[Path]) -> None:
        """Bring MLflow up to date with the files. `artifacts` belong to every parent run."""
        runs = self._active_runs()
        for teacher in dict.fromkeys(job.teacher for job in jobs):
            children = [job for job in jobs if job.teacher == teacher]
            parents = runs.get(teacher)
            if not parents:
                parents = [self._create(Job(teacher, {"name": teacher, "started": 0.0}))]
            parent, *doubles = parents
            for job in children:
                self._sync_job(job, runs.get(job.model, []), parent.info.run_id)
            for double in doubles:
                self._supersede(double, parent.info.run_id)
            running = any(job.status == "running" for job in children)
            self._sync_parent(parent, artifacts, "RUNNING" if running else "FINISHED")

    def _active_runs(self) -> dict[str, list[Run]]:
        """The runs that this results folder created, by model, without the deleted ones."""
        runs: dict[str, list[Run]] = {}
        token = None
        ours = f"tags.`{FOLDER_TAG}` = '{self._own.folder_id}'"
        while True:
            page = self.client.search_runs(
                [self.experiment_id], ours, max_results=1000, page_token=token
            )
            for run in page:
                tags = run.data.tags
                if "halfstep.model" in tags and self._own.owns(run.info.run_id, tags):
                    runs.setdefault(tags["halfstep.model"], []).append(run)
            token = page.token
            if not token:
                return runs

    def _create(self, job: Job, parent: str | None = None) -> Run:
        key = self._own.new_key()
        tags = {"halfstep.model": job.model, "mlflow.runColor": run_color(job.model)}
        tags |= {FOLDER_TAG: self._own.folder_id, KEY_TAG: key}
        for name in ("node", "fingerprint", "started"):
            tags[f"halfstep.{name}"] = str(job.run.get(name, ""))
        if parent:
            tags["mlflow.parentRunId"] = parent
        run = self.client.create_run(
            self.experiment_id,
            start_time=int(1000 * job.run["started"]) or None,
            tags=tags,
            run_name=job.run["name"].replace("/round-", " r"),
        )
        self._own.confirm(key, run.info.run_id)
        return run

    def _sync_job(self, job: Job, active: list[Run], parent: str) -> None:
        """Write one job into one run, and supersede every other active run of the same model."""
        candidates = [run for run in active if _is_run_of(run, job)]
        complete = [run for run in candidates if run.data.tags.get("halfstep.state") == job.state]
        run = complete[0] if complete else self._update_or_create(candidates, job, parent)
        if run.data.tags.get("mlflow.parentRunId") != parent:
            self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        for other in active:
            if other.info.run_id != run.info.run_id:
                self._supersede(other, run.info.run_id)

    def _update_or_create(self, candidates: list[Run], job: Job, parent: str) -> Run:
        """Complete the first candidate that the files do not contradict, else a new run."""
        for run in candidates:
            sent = self._sent_evaluations(run, job)
            if all(sent.get(key, value) == value for key, value in job.evaluations.items()):
                break
        else:
            run, sent = self._create(job, parent), {}
        self._fill(run, job, sent)
        return run

    def _sent_evaluations(self, run: Run, job: Job) -> Evaluations:
        """The evaluations that the run already has, of the metrics that the job has."""
        keys = {key for key, _ in job.evaluations}
        return {
            (key, point.step): point.value
            for key in sorted(keys & run.data.metrics.keys())
            for point in self.client.get_metric_history(run.info.run_id, key)
        }

    def _fill(self, run: Run, job: Job, sent: Evaluations) -> None:
        """Send everything that the run lacks."""
        run_id = run.info.run_id
        self._log_description(run_id, job.run)
        model_id = self._logged_model(run_id, job)
        ended_ms = int(1000 * (job.run.get("ended") or job.run["started"] or time.time()))
        self._log_journal(run, job)
        self._log_evaluations(run_id, job, sent, model_id, ended_ms)
        for name in job.run.get("artifacts", []):
            if (job.folder / name).is_file():
                self.client.log_artifact(run_id, str(job.folder / name))
        if job.status == "running":
            self.client.update_run(run_id, status="RUNNING")
        else:
            self.client.set_terminated(run_id, STATUS[job.status], end_time=ended_ms)
        # Last, so that only a complete run has this tag.
        self.client.set_tag(run_id, "halfstep.state", job.state)

    def _log_description(self, run_id: str, run: dict) -> None:
        """Send params, tags and datasets."""
        from mlflow.entities import Param, RunTag

        params = [Param(key, str(value)) for key, value in flatten(run.get("params", {})).items()]
        tags = [RunTag(key, str(value)) for key, value in run.get("tags", {}).items()]
        for batch in _batches(params, 100):
            self.client.log_batch(run_id, params=batch)
        self.client.log_batch(run_id, tags=tags)
        self.client.log_inputs(run_id, [_dataset_input(data) for data in run.get("datasets", [])])

    def _log_journal(self, run: Run, job: Job) -> None:
        """Send the points of the journal that the run lacks, in batches."""
        from mlflow.entities import Metric

        if job.journal is None or run.data.tags.get(SENT_TAG) == job.mark:
            return
        last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        batch: list[Metric] = []
        end = 0
        for end, point in points_between(job.journal, _sent_bytes(run, job.journal), job.size):
            for key, value in point["metrics"].items():
                if point["step"] > last_steps.get(key, -1):
                    last_steps[key] = point["step"]
                    batch.append(Metric(key, value, int(1000 * point["time"]), point["step"]))
            if len(batch) >= BATCH:
                self._log_metrics(run.info.run_id, batch, mark(job.journal, end))
                batch = []
        self._log_metrics(run.info.run_id, batch, mark(job.journal, end))

    def _log_evaluations(
        self, run_id: str, job: Job, sent: Evaluations, model_id: str | None, ended_ms: int
    ) -> None:
        """Send the evaluations that are not in `sent`."""
        from mlflow.entities import Metric

        evaluations = [
            Metric(key, value, ended_ms, step, model_id=model_id)
            for (key, step), value in job.evaluations.items()
            if (key, step) not in sent
        ]
        self._log_metrics(run_id, evaluations)

    def _log_metrics(self, run_id: str, metrics: list[Metric], sent: str = "") -> None:
        """Send metrics and count them in `added`. The last request brings the mark `sent`."""
        from mlflow.entities import RunTag

        batches = list(_batches(metrics, BATCH)) or [[]]
        for batch in batches[:-1]:
            self.client.log_batch(run_id, metrics=batch)
            self.added += len(batch)
        if batches[-1] or sent:
            tags = [RunTag(SENT_TAG, sent)] if sent else []
            self.client.log_batch(run_id, metrics=batches[-1], tags=tags)
            self.added += len(batches[-1])

    def _logged_model(self, run_id: str, job: Job) -> str | None:
        """The id of the checkpoint's logged model, created if needed; None without a checkpoint.

        The weights stay where they are. The measurements of the checkpoint link to the model.
        """
        import mlflow

        checkpoint = job.run.get("checkpoint")
        if not checkpoint:
            return None
        sums = {f"sha256.{name}": value for name, value in checkpoint["sha256"].items()}
        models = self._models_of(run_id)
        same = [model for model in models if _agrees(sums, model.tags)]
        for model in models:
            if model not in same[:1]:
                self.client.delete_logged_model(model.model_id)
        if same:
            return same[0].model_id
        folder = str(job.folder / checkpoint["folder"]) if job.folder else ""
        model = mlflow.create_external_model(
            name="".join("-" if letter in "/:.%\"'" else letter for letter in job.model),
            source_run_id=run_id,
            tags={
                "folder": folder,
                "halfstep.model": job.model,
                FOLDER_TAG: self._own.folder_id,
                **sums,
            },
            params={key: str(value) for key, value in flatten(job.run.get("params", {})).items()},
            model_type="student" if "/round-" in job.model else job.model.split("/")[-1],
            experiment_id=self.experiment_id,
        )
        self.client.log_outputs(run_id, [mlflow.entities.LoggedModelOutput(model.model_id, step=0)])
        return model.model_id

    def _models_of(self, run_id: str) -> list[LoggedModel]:
        """The logged models of our run that this results folder created."""
        models = self.client.search_logged_models(
            [self.experiment_id], filter_string=f"source_run_id = '{run_id}'"
        )
        return [model for model in models if model.tags.get(FOLDER_TAG) == self._own.folder_id]

    def _supersede(self, old: Run, new: str) -> None:
        """Mark, rename and soft-delete a run that the run with id `new` replaces."""
        run_id, name = old.info.run_id, old.info.run_name
        self.client.set_tag(run_id, "superseded_by", new)
        if not name.endswith(" (superseded)"):
            self.client.update_run(run_id, name=f"{name} (superseded)")
        for model in self._models_of(run_id):
            self.client.delete_logged_model(model.model_id)
        # Last, because the next sync does not see a deleted run and so could not finish the above.
        self.client.delete_run(run_id)

    def _sync_parent(self, parent: Run, artifacts: list[Path], status: str) -> None:
        digest = hashlib.sha256()
        for file in artifacts:
            digest.update(str(file).encode() + hashlib.sha256(file.read_bytes()).digest())
        state = digest.hexdigest()
        if parent.data.tags.get("halfstep.state") != state:
            for file in artifacts:
                self.client.log_artifact(parent.info.run_id, str(file), file.parent.name)
            self.client.set_tag(parent.info.run_id, "halfstep.state", state)
        if parent.info.status != status:
            self.client.update_run(parent.info.run_id, status=status)


def _is_web_server(uri: str) -> bool:
    """Does the address name a server that keeps artifacts itself, and not a database?"""
    return uri.partition(":")[0] in database.SERVERS


def _sent_bytes(run: Run, journal: Path) -> int:
    """The byte of the journal up to which the run has its points; 0 if the journal was changed."""
    sent = run.data.tags.get(SENT_TAG, "")
    size = sent.partition("-")[0]
    return int(size) if size.isdecimal() and mark(journal, int(size)) == sent else 0


def _is_run_of(run: Run, job: Job) -> bool:
    """Is this a run of the job's own training?

    An interrupted sync may have left a run that is marked as superseded but not deleted.
    """
    tags = run.data.tags
    if "superseded_by" in tags:
        return False
    identity = {f"halfstep.{key}": str(job.run.get(key, "")) for key in ("fingerprint", "started")}
    return _agrees(identity, tags)


def _agrees(expected: Mapping[str, str], tags: Mapping[str, str]) -> bool:
    return all(tags.get(key) == value for key, value in expected.items())


def _dataset_input(data: dict) -> DatasetInput:
    from mlflow.data.http_dataset_source import HTTPDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    # The source only names the place; nothing is loaded through it.
    source = HTTPDatasetSource(str(data.get("source") or data["name"]))
    # MLflow stores up to 36 characters of a digest; its pages show 12.
    digest = str(data["digest"])[:12]
    dataset = MetaDataset(source, name=str(data["name"]), digest=digest)._to_mlflow_entity()
    context = InputTag("mlflow.data.context", data.get("context", "training"))
    return DatasetInput(dataset, [context])


def run_color(model: str) -> str:
    """Color of a run in MLflow's charts, "#rrggbb".

    One hue for each run of a distillation, because MLflow's own colors may be nearly alike; the
    earlier a round, the paler. Everything else is a shade of gray.
    """
    run = model.split("/")[1] if "/" in model else ""
    grays = {"": 0.3, "teacher": 0.0, "baseline": 0.45, "data": 0.65, "benchmark": 0.3}
    if run in grays:
        return _hex((grays[run],) * 3)
    hues = {"kl_backward": 0.58, "mse": 0.06, "tvd": 0.38, "kl_forward": 0.86}
    hashed = int(hashlib.sha256(run.encode()).hexdigest(), 16) % 360 / 360
    later = min(int(model.rpartition("-")[2]) / 7, 1)
    return _hex(colorsys.hls_to_rgb(hues.get(run, hashed), 0.82 - 0.44 * later, 0.75))


def _hex(rgb: Iterable[float]) -> str:
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """Join the keys of nested dicts by dots: {"training": {"lr": 1}} -> {"training.lr": 1}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _batches(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))

"""Write journals and metric rows to MLflow, so that a repeated sync changes nothing.

    parent run    one for each teacher: description, summary, configuration, tables and figures
      child run   one for each job (teacher, baseline, every round): params, tags, datasets, curves,
                  evaluations, texts, logged model

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

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError
from halfstep.records import database
from halfstep.records.jobs import (
    CONFIGURATION,
    Evaluations,
    Job,
    Overview,
    describe_origin,
    flatten,
    parent_job,
    run_color,
    start_times,
)
from halfstep.records.journal import mark, points_between
from halfstep.records.ownership import FOLDER_TAG, KEY_TAG, OwnRuns
from halfstep.records.views import choose_jobs, view_name, view_page, view_state, view_tag

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, LoggedModel, Metric, Run

BATCH = 999  # metrics of one request; MLflow takes 1000 entries, and one is the tag below
SENT_TAG = "halfstep.sent"  # the mark of the last line that was sent
KIND = {"mlflow.experimentKind": "custom_model_development"}  # MLflow then shows no chat pages
STATUS = {"running": "RUNNING", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


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
        self.uri = database.open_database(uri)
        self._own = OwnRuns(results)
        mlflow.set_tracking_uri(self.uri)
        self.client = mlflow.MlflowClient(self.uri)
        self.experiment_id = self._open_experiment(experiment, results)

    def _open_experiment(self, name: str, results: Path) -> str:
        """The experiment's id. A server chooses where it keeps artifacts; a database uses ours."""
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            folder = database.new_artifact_folder(self.uri, results)
            return self.client.create_experiment(name, folder, KIND)
        if experiment.lifecycle_stage != "active":
            raise HalfstepError(
                f"experiment {name!r} at {self.uri} was deleted; "
                "restore it there, or choose another name with --experiment"
            )
        place = experiment.artifact_location
        is_folder = place.startswith("file:") and not database.is_web_server(self.uri)
        if is_folder and not database.local_folder(place).is_dir():
            raise HalfstepError(
                f"experiment {name!r} at {self.uri} keeps its files in {place}, which is not "
                "there; move it back, or choose another name with --experiment"
            )
        return experiment.experiment_id

    def sync(self, jobs: list[Job], overviews: Mapping[str, Overview]) -> None:
        """Bring MLflow up to date with the files. Each teacher has an overview."""
        runs = self._active_runs()
        for teacher in dict.fromkeys(job.teacher for job in jobs):
            children = [job for job in jobs if job.teacher == teacher]
            for job, start_s in zip(children, start_times(children), strict=True):
                job.start_s = start_s
            parents = runs.get(teacher) or [self._create(parent_job(teacher, children))]
            parent, *doubles = parents
            ids = {
                job.model: self._sync_job(job, runs.get(job.model, []), parent.info.run_id)
                for job in children
            }
            for double in doubles:
                self._supersede(double, parent.info.run_id)
            view = self._share_view(teacher, ids, choose_jobs(children))
            self._sync_parent(parent, overviews[teacher], children, view)

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
            start_time=int(1000 * job.start_s),
            tags=tags,
            run_name=job.run["name"].replace("/round-", " r"),
        )
        self._own.confirm(key, run.info.run_id)
        return run

    def _sync_job(self, job: Job, active: list[Run], parent: str) -> str:
        """Write one job into one run, and supersede every other active run of the same model.

        Returns the id of the run.
        """
        candidates = [run for run in active if _is_run_of(run, job)]
        complete = [run for run in candidates if run.data.tags.get("halfstep.state") == job.state]
        run = complete[0] if complete else self._update_or_create(candidates, job, parent)
        if run.data.tags.get("mlflow.parentRunId") != parent:
            self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        for other in active:
            if other.info.run_id != run.info.run_id:
                self._supersede(other, run.info.run_id)
        return run.info.run_id

    def _share_view(self, teacher: str, ids: Mapping[str, str], chosen: list[Job]) -> str:
        """Write the view of a teacher, unless it is there.

        Returns its address in the pages, or "" without trainings. ids: of the run of each model.
        """
        if not chosen:
            return ""
        tag = view_tag(teacher, self._own.folder_id)
        state = view_state([ids[job.model] for job in chosen], chosen)
        if self.client.get_experiment(self.experiment_id).tags.get(tag) != state:
            self.client.set_experiment_tag(self.experiment_id, tag, state)
        return view_page(self.experiment_id, view_name(tag))

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
        ended_ms = max(job.ended_ms, run.info.start_time)
        self._log_journal(run, job)
        self._log_evaluations(run_id, job, sent, model_id, ended_ms)
        for name in job.run.get("artifacts", []):
            if (job.folder / name).is_file():
                self.client.log_artifact(run_id, str(job.folder / name))
        for name, text in job.texts.items():
            self.client.log_text(run_id, text, name)
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
        described = run.get("tags", {}) | describe_origin(run)
        tags = [RunTag(key, str(value)) for key, value in described.items()]
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

    def _sync_parent(self, parent: Run, overview: Overview, children: list[Job], view: str) -> None:
        """Send the overview, and set the state and the end of the parent run."""
        from mlflow.entities import Metric, RunTag

        run_id, known = parent.info.run_id, parent.data.metrics
        ends = [job.ended_ms for job in children if job.run.get("ended")]
        ended_ms = max(ends, default=parent.info.end_time or parent.info.start_time)
        metrics = [
            Metric(key, value, int(1000 * time.time()), 0)
            for key, value in overview.metrics.items()
            if known.get(key) != value
        ]
        self._log_metrics(run_id, metrics)
        if parent.data.tags.get("halfstep.state") != overview.state:
            for file in overview.files:
                self.client.log_artifact(run_id, str(file), file.parent.name)
            self.client.log_text(run_id, overview.configuration, CONFIGURATION)
            note = overview.note(f"#/experiments/{self.experiment_id}/runs/{run_id}", view)
            tags = describe_origin(parent_job("", children).run) | {"mlflow.note.content": note}
            tags["halfstep.state"] = overview.state
            self.client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()])
        if any(job.status == "running" for job in children):
            if parent.info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
        elif (parent.info.status, parent.info.end_time) != ("FINISHED", ended_ms):
            self.client.set_terminated(run_id, "FINISHED", end_time=ended_ms)


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


def _batches(items: list, size: int) -> Iterable[list]:
    return (items[start : start + size] for start in range(0, len(items), size))

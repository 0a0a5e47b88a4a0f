"""What MLflow gets of one model: its journal, its measurements and a few of its texts."""

from __future__ import annotations

import colorsys
import contextlib
import getpass
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from halfstep.records.journal import commit, complete_size, mark, read_points
from halfstep.seeds import first_training

SHOWN = 2  # raise it when what a run shows changes, and every run is completed by the next sync
CONFIGURATION = "configuration.yaml"  # of all trainings of a teacher
LONGEST = 5000  # characters of the sentences in a description; MLflow takes 8000 in all

Evaluations = dict[tuple[str, int], float]  # (metric key, step) -> value


@dataclass
class Job:
    """Everything on disk about one model: its journal and its measurements."""

    model: str  # the folder under results/models, "stories-tiny/kl_backward/round-3"
    run: dict  # run.json; of a model that was not trained here: name, node, started, checkpoint
    folder: Path | None = None  # with the journal
    evaluations: Evaluations = field(default_factory=dict)
    own_steps: int | None = None  # sampling steps that a student was made for
    texts: dict[str, str] = field(default_factory=dict)  # name of a file: what it holds
    start_s: float = 0.0  # what MLflow gets, which sorts the runs by it

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
    def ended_ms(self) -> int:
        return int(1000 * (self.run.get("ended") or self.start_s))

    @property
    def state(self) -> str:
        """Digest of everything to send; a run with this digest in its tags is up to date."""
        evaluations = sorted([*key, value] for key, value in self.evaluations.items())
        content = [SHOWN, self.run, self.mark, evaluations, self.texts]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def start_times(jobs: list[Job]) -> list[float]:
    """The start of each run in MLflow, which shows the latest one first.

    A job without a training gets one before all trainings: its scores may be the last to come, but
    teacher and rounds belong above them.
    """
    trained = [job.run["started"] for job in jobs if job.run["started"]]
    first_s = min(trained, default=time.time())
    others = [job for job in reversed(jobs) if not job.run["started"]]
    others.sort(key=lambda job: job.model.endswith(("/data", "/benchmark")))  # stable
    earlier_s = {job.model: max(first_s - i, 0.0) for i, job in enumerate(others, start=1)}
    return [earlier_s.get(job.model, job.run["started"]) for job in jobs]


@dataclass
class Overview:
    """What the parent run of a teacher shows."""

    sentences: list[str]  # what `halfstep summary` says first, for each run
    linked: list[str]  # names of files that the description links to, "tables/steps.md"
    metrics: dict[str, float]
    files: list[Path]  # tables and figures; the name of their folder is kept
    configuration: str

    @property
    def state(self) -> str:
        """Digest of all but the metrics."""
        content = [SHOWN, self.sentences, self.linked, self.configuration]
        digest = hashlib.sha256(json.dumps(content).encode())
        for file in self.files:
            digest.update(str(file).encode() + hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def note(self, run_page: str, view: str) -> str:
        """The description as Markdown.

        run_page and view are addresses within MLflow's pages: of the run, and of loss curves or "".
        """
        text = "\n\n".join(self.sentences)
        if len(text) > LONGEST:
            text = text[:LONGEST].rsplit(" ", 1)[0] + " …"
        names = [*self.linked, CONFIGURATION]
        pages = {"loss curves": view} if view else {}
        pages |= {name: f"{run_page}/artifacts/{name}" for name in names}
        links = " · ".join(f"[{name}]({page})" for name, page in pages.items())
        return f"{text}\n\n{links}" if text else links


def parent_job(teacher: str, children: list[Job]) -> Job:
    """What creates the parent run: it begins with its first child."""
    run = {"name": teacher, "node": "track", "started": 0.0, "tags": {"git_commit": commit()}}
    return Job(teacher, run, start_s=min(job.start_s for job in children))


def describe_origin(run: dict) -> dict[str, str]:
    """Tags by which MLflow shows where a run comes from: its command, commit and user."""
    tags = {"mlflow.source.name": "halfstep " + str(run.get("node", "")).partition("/")[0]}
    tags["mlflow.source.type"] = "LOCAL"
    code = str(run.get("tags", {}).get("git_commit", "unknown"))
    if code != "unknown":
        tags["mlflow.source.git.commit"] = code.removesuffix("+dirty")
        tags["mlflow.source.git.dirty"] = str(code.endswith("+dirty")).lower()
    with contextlib.suppress(KeyError, OSError):  # a user without a name
        tags["mlflow.user"] = getpass.getuser()
    return tags


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

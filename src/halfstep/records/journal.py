"""The journal of a run: run.json and an append-only journal.jsonl beside the output, with no server and no network.

Jobs never talk to MLflow. The process of rank 0 writes two small files and `halfstep track` sends them on later, as often as one likes:

    run.json       {"name", "node", "fingerprint", "started", "status", "params", "tags", "datasets", "artifacts", "checkpoint"}
    journal.jsonl  {"step": 50, "time": 1700000000.0, "metrics": {"train/loss": 1.2}}      one line per call of `log`

A line is one os.write, so a killed writer leaves at most one torn last line, and readers drop it. The fingerprint is the sha256 of
params and input digests: the same one continues the journal (a resumed job), another one begins it anew (another experiment).
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_atomic, write_json

WEIGHTS = (
    "model",
    "ema",
    "best",
)  # files of a checkpoint whose checksums tell which measurements are of this training


class Journal:
    """Begin or continue the journal of `folder`. As a context manager it closes itself: `failed` on an error, `killed` on an exit or Ctrl-C.

    name: for people, "kl_backward/round-3"; node: the job, "distill-round/stories-tiny/kl_backward/3"; params: what changes the result
    (a nested dict of plain values); datasets: [{"name", "digest", "source"}], everything the job read; tags: anything else worth finding.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        node: str,
        params: dict,
        tags: Mapping[str, object] = {},
        datasets: Sequence[dict] = (),
        writes: bool = True,
    ):
        self.folder = Path(folder)
        self._file, self._fd = self.folder / "journal.jsonl", None
        stamp = fingerprint(params, datasets)
        if not writes:  # one of several processes writes; the others only know which run it is
            self.run = {"fingerprint": stamp}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        former = read_json(self.folder / "run.json") if (self.folder / "run.json").exists() else {}
        resumed = former.get("fingerprint") == stamp
        self.run = {
            "name": name, "node": node, "fingerprint": stamp, "started": former["started"] if resumed else time.time(), "status": "running",
            "params": params, "tags": environment() | dict(tags), "datasets": list(datasets), "artifacts": [], "checkpoint": None,
        }  # fmt: skip
        if resumed:
            self._drop_torn_line()
        else:  # the old points go first: a crash here leaves an empty old run, never old points under a new fingerprint
            write_atomic(self._file, b"")
        write_json(self.folder / "run.json", self.run)
        self._open()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """One point for each metric at this step."""
        line = {
            "step": int(step),
            "time": time.time(),
            "metrics": {key: float(value) for key, value in metrics.items()},
        }
        content = (json.dumps(line) + "\n").encode()
        if self._fd is not None and (written := os.write(self._fd, content)) < len(
            content
        ):  # the disk is full: what was torn off goes
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))

    def rewind(self, step: int) -> None:
        """Training goes on from a checkpoint at `step`: forget later points. `rewind(-1)` is a start from nothing, and a new run."""
        if self._fd is None:
            return
        points = list(_points(self._file))
        kept = [point for point in points if point["step"] <= step]
        if len(kept) == len(points):
            return
        os.close(self._fd)
        self._fd = None
        write_atomic(self._file, "".join(json.dumps(point) + "\n" for point in kept))
        self._open()
        if not kept:
            self.run["started"] = time.time()
            write_json(self.folder / "run.json", self.run)

    def artifact(self, path: Path) -> None:
        """A small file that `halfstep track` uploads with the run."""
        name = os.path.relpath(path, self.folder)
        if name not in self.run["artifacts"]:
            self.run["artifacts"].append(name)
            write_json(self.folder / "run.json", self.run)

    def close(self, status: str = "finished", checkpoint: Path | None = None) -> None:
        """Write the final status (finished, failed, killed) and, of the checkpoint folder, the checksums of its weights."""
        if self._fd is None:
            return
        if checkpoint is not None:
            files = {name: Path(checkpoint) / f"{name}.safetensors" for name in WEIGHTS}
            sums = {name: sha256(file) for name, file in files.items() if file.exists()}
            self.run["checkpoint"] = {
                "folder": os.path.relpath(checkpoint, self.folder),
                "sha256": sums,
            }
        self.run |= {"status": status, "ended": time.time()}
        write_json(self.folder / "run.json", self.run)
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind, *_) -> None:
        self.close(
            "finished" if kind is None else "failed" if issubclass(kind, Exception) else "killed"
        )

    def _open(self) -> None:
        self._fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _drop_torn_line(self) -> None:
        content = self._file.read_bytes() if self._file.exists() else b""
        if content and not content.endswith(b"\n"):
            os.truncate(self._file, content.rfind(b"\n") + 1)


def read_journal(folder: Path) -> tuple[dict, list[dict]]:
    """run.json and the points of journal.jsonl, in the order written; a torn last line is dropped."""
    return read_json(Path(folder) / "run.json"), list(_points(Path(folder) / "journal.jsonl"))


def _points(file: Path) -> Iterator[dict]:
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate(
        lines[:-1], start=1
    ):  # what follows the last newline is empty, or torn
        try:
            yield json.loads(line)
        except ValueError:
            raise HalfstepError(
                f"{file}:{number}: not a line of JSON; delete the line, or the file and run the job again"
            ) from None


def fingerprint(params: dict, datasets: Sequence[dict]) -> str:
    """sha256 of what decides the result: the params, and name and digest of every input."""
    inputs = sorted([str(data["name"]), str(data["digest"])] for data in datasets)
    return hashlib.sha256(json.dumps([params, inputs], sort_keys=True).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Where and with which code a run was made, as tags."""
    tags = {
        "git_commit": commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "command": " ".join(sys.argv),
    }
    for package in ("halfstep", "torch", "numpy"):
        try:
            tags[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    job = os.environ.get("SLURM_JOB_ID")
    return tags | ({"slurm_job_id": job} if job else {})


@functools.cache
def commit() -> str:
    """The commit of the source tree, `+dirty` when tracked files differ from it, `unknown` outside a checkout."""

    def git(*words: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(
            call, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"

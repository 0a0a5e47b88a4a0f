"""The journal of a run: run.json and an append-only journal.jsonl in the run's output folder.

Jobs never talk to MLflow. Rank 0 writes two small files, without a server or a network;
`halfstep track` sends them to MLflow later, as often as needed:

    run.json       {"name", "node", "fingerprint", "started", "status", "params", "tags",
                    "datasets", "artifacts", "checkpoint"}
    journal.jsonl  {"step": 50, "time": 1700000000.0, "metrics": {"train/loss": 1.2}}
                   one line for each call of `log`

A line is one os.write, so a killed writer leaves at most one torn last line, and readers drop it.
Readers hold one line at a time, so a journal may have millions of them.
The fingerprint is the sha256 of the params and the input digests. The same fingerprint continues
the journal (a resumed job); another fingerprint starts a new one (another experiment).
"""

from __future__ import annotations

import contextlib
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
from typing import Any, BinaryIO

from halfstep.errors import HalfstepError
from halfstep.files import open_file, read_json, sha256, write_atomic, write_json
from halfstep.records.shapes import check_run
from halfstep.sanitize import mask_secrets

# The weights of a checkpoint. Their checksums decide which measurements belong to this training.
HASHED_WEIGHTS = ("model", "ema", "best")
LONGEST_LINE = 1 << 20  # bytes


class Journal:
    """Start or continue the journal in `folder`.

    As a context manager it closes itself: `failed` on an error, `killed` on an exit or Ctrl-C.

    Args:
        folder: the run's output folder, where run.json and journal.jsonl are written
        name: display name, "kl_backward/round-3"
        node: the job, "distill-round/stories-tiny/kl_backward/3"
        params: everything that changes the result, a nested dict of plain values
        tags: anything else worth searching for
        datasets: every input of the job, [{"name", "digest", "source"}]
        writes: False on every rank but 0; such a journal only knows its fingerprint
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        node: str,
        params: dict,
        tags: Mapping[str, object] | None = None,
        datasets: Sequence[dict] = (),
        writes: bool = True,
    ):
        self.folder = Path(folder)
        self._file = self.folder / "journal.jsonl"
        self._fd: int | None = None
        self.run: dict
        stamp = fingerprint(params, datasets)
        if not writes:
            self.run = {"fingerprint": stamp}
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        former = read_run(self.folder) if (self.folder / "run.json").exists() else {}
        resumed = former.get("fingerprint") == stamp
        self.run = {
            "name": name,
            "node": node,
            "fingerprint": stamp,
            "started": former["started"] if resumed else time.time(),
            "status": "running",
            "params": params,
            "tags": environment() | dict(tags or {}),
            "datasets": list(datasets),
            "artifacts": [],
            "checkpoint": None,
        }
        if resumed:
            self._drop_torn_line()
        else:
            # Old points first: a crash here leaves an empty old run, never old points in a new run.
            write_atomic(self._file, b"")
        self._write_run()
        self._open()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line: the value of each metric at this step."""
        if self._fd is None:
            return
        values = {key: float(value) for key, value in metrics.items()}
        line = {"step": int(step), "time": time.time(), "metrics": values}
        content = (json.dumps(line) + "\n").encode()
        written = os.write(self._fd, content)
        if written < len(content):  # the disk is full: remove the torn line
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._file))

    def rewind(self, step: int) -> None:
        """Drop all points after `step`: training continues from a checkpoint at `step`.

        `rewind(-1)` drops every point: training starts from nothing, which counts as a new run.
        """
        if self._fd is None:
            return
        if all(point["step"] <= step for point in read_points(self._file)):
            return
        os.close(self._fd)
        self._fd = None
        write_atomic(self._file, lambda part: self._copy_points(part, step))
        self._open()
        if self._file.stat().st_size == 0:
            self.run["started"] = time.time()
            self._write_run()

    def artifact(self, path: Path) -> None:
        """Add a small file that `halfstep track` uploads with the run."""
        name = os.path.relpath(path, self.folder)
        if name not in self.run["artifacts"]:
            self.run["artifacts"].append(name)
            self._write_run()

    def close(self, status: str = "finished", checkpoint: Path | None = None) -> None:
        """Write the final status: finished, failed or killed.

        If `checkpoint` (a folder) is given, also write its path and the checksums of its weights.
        """
        if self._fd is None:
            return
        if checkpoint is not None:
            files = {name: Path(checkpoint) / f"{name}.safetensors" for name in HASHED_WEIGHTS}
            self.run["checkpoint"] = {
                "folder": os.path.relpath(checkpoint, self.folder),
                "sha256": {name: sha256(file) for name, file in files.items() if file.exists()},
            }
        self.run |= {"status": status, "ended": time.time()}
        self._write_run()
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("finished")
        else:
            self.close("failed" if issubclass(kind, Exception) else "killed")

    def _copy_points(self, target: Path, last_step: int) -> None:
        """Write the points up to a step to another file."""
        with open(target, "w") as file:
            for point in read_points(self._file):
                if point["step"] <= last_step:
                    file.write(json.dumps(point) + "\n")

    def _write_run(self) -> None:
        write_json(self.folder / "run.json", mask_secrets(self.run))

    def _open(self) -> None:
        self._fd = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _drop_torn_line(self) -> None:
        if self._file.exists():
            os.truncate(self._file, complete_size(self._file))


def read_run(folder: Path) -> dict:
    """run.json of a journal, checked and without secrets."""
    file = Path(folder) / "run.json"
    return mask_secrets(check_run(read_json(file), file))


def read_journal(folder: Path) -> tuple[dict, list[dict]]:
    """Read run.json, and the points of journal.jsonl in the order written.

    A torn last line is dropped. Any other line that is not a point is a HalfstepError.
    """
    return read_run(folder), list(read_points(Path(folder) / "journal.jsonl"))


def read_points(file: Path) -> Iterator[dict]:
    """The points of a journal file, one after another; none if there is no file."""
    if file.exists():
        for _, point in points_between(file, 0, complete_size(file)):
            yield point


def points_between(file: Path, start: int, end: int) -> Iterator[tuple[int, dict]]:
    """(byte after its line, point) of each line between two bytes, at which lines begin."""
    place = start
    with open_file(file) as lines:
        lines.seek(start)
        while place < end and (line := lines.readline(LONGEST_LINE)):
            place += len(line)
            yield place, _point(line, file, place)


def complete_size(file: Path) -> int:
    """Number of bytes up to the end of the last complete line."""
    with open_file(file) as lines:
        end = os.fstat(lines.fileno()).st_size
        while end > 0:
            start = max(0, end - LONGEST_LINE)
            lines.seek(start)
            found = lines.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def mark(file: Path, end: int) -> str:
    """Names the lines before the byte `end`: by their size and the digest of the last line.

    Each line holds the time at which it was written. So two journals have the same mark only if the
    longer one continues the other. Empty if no line ends there.
    """
    if end == 0 or not file.exists():
        return ""
    with open_file(file) as lines:
        start = max(0, end - LONGEST_LINE - 1)
        lines.seek(start)
        last = lines.read(end - start)
    if start + len(last) < end or not last.endswith(b"\n"):
        return ""
    line = last[last.rfind(b"\n", 0, -1) + 1 :]
    return f"{end}-{hashlib.sha256(line).hexdigest()[:16]}"


def _point(line: bytes, file: Path, end: int) -> dict:
    """The point of a line that ends at the byte `end`."""
    try:
        point = json.loads(line)
        fault = _fault(point)
    except (ValueError, RecursionError):
        fault = "not a line of JSON"
    if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
        fault = f"a line longer than {LONGEST_LINE:,} bytes"
    if not fault:
        return point
    with open_file(file) as lines:
        number = sum(1 for _ in _lines_before(lines, end))
    raise HalfstepError(
        f"{file}:{number}: {fault}; delete the line, or delete the file and run the job again"
    )


def _lines_before(lines: BinaryIO, end: int) -> Iterator[int]:
    """The lengths of the lines that begin before the byte `end`."""
    place = 0
    while place < end and (line := lines.readline(LONGEST_LINE)):
        place += len(line)
        yield len(line)


def _fault(point: Any) -> str:
    """What is wrong with a point; "" if it is whole."""
    if not isinstance(point, dict) or not {"step", "time", "metrics"} <= point.keys():
        return "no point with step, time and metrics"
    step, seconds, metrics = point["step"], point["time"], point["metrics"]
    if type(step) is not int or not 0 <= step < 2**63:
        return "step is not a whole number between 0 and 2^63"
    if not _is_number(seconds) or not 0 <= seconds < 2**43:
        return "time is not a number of seconds since 1970"
    if not isinstance(metrics, dict) or not all(map(_is_number, metrics.values())):
        return "metrics is not a table of numbers"
    return ""


def _is_number(value: object) -> bool:
    """Is it a float, NaN and infinity included, or a whole number that a float can hold?"""
    is_whole = type(value) is int and abs(value) < 2**1023
    return is_whole or isinstance(value, float)


def fingerprint(params: dict, datasets: Sequence[dict]) -> str:
    """sha256 of everything that decides the result: params, and name and digest of each input."""
    inputs = sorted([str(data["name"]), str(data["digest"])] for data in datasets)
    return hashlib.sha256(json.dumps([params, inputs], sort_keys=True).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Tags that name the machine, the code and the command of a run."""
    tags = {
        "git_commit": commit(),
        "host": platform.node(),
        "python": platform.python_version(),
        "command": mask_secrets(" ".join(sys.argv)),
    }
    for package in ("halfstep", "torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            tags[package] = metadata.version(package)
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm_job_id"] = job
    return tags


CODE = ("src", "rules", "workflow/report", "Snakefile")  # config.yaml and presets are no code


@functools.cache
def commit() -> str:
    """Commit of halfstep's own source tree, with `+dirty` if its tracked code was changed.

    Of installed code it is the one that pip fetched. `unknown` where pip fetched none, or where the
    code was unpacked from an archive: a repository around it that does not track it says nothing.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        head = _git("rev-parse", "--short=12", "HEAD")
        root = Path(__file__).parents[3]
        code = [str(root / name) for name in CODE if (root / name).exists()]
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", *code)
    except (OSError, subprocess.SubprocessError):
        return direct_url().get("vcs_info", {}).get("commit_id", "unknown")[:12]
    return f"{head}+dirty" if changes else head


def direct_url() -> dict:
    """What pip recorded about where it got this halfstep (PEP 610); {} if from an index, or if
    it installed none."""
    try:
        found = metadata.distribution("halfstep")
        if not Path(str(found.locate_file("halfstep"))).samefile(Path(__file__).parents[1]):
            return {}
        return json.loads(found.read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, OSError, ValueError):
        return {}


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(Path(__file__).parent), *arguments]
    # Inside of a hook, GIT_DIR and its like name the repository of the hook.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    done = subprocess.run(
        call, capture_output=True, text=True, check=True, timeout=30, env=environment
    )
    return done.stdout.strip()

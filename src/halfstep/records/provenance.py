"""Provenance: a record of every output that says how it was made, and the check of all records.

    results/models/T/teacher/provenance.json
        the record of a job that wrote a whole folder
    results/metrics/T/teacher/samples.provenance.json
        the record of one file, or of files that differ in their suffix (steps.csv and steps.md)

    {"format": 1, "outputs": {path: sha256}, "inputs": {path: sha256}, "command": ["halfstep", ...],
     "versions": {"python": ...}, "commit", "started", "ended"}

Paths are relative to the record's folder, so that results/ can be moved as a whole. Every job
writes a separate record, so parallel jobs never write the same file. `merge_records` combines them.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, sha256_once, write_json
from halfstep.records.journal import commit
from halfstep.sanitize import mask_secrets

FORMAT = 1
NAME = "provenance.json"
COPIES = "mlflow-artifacts"  # MLflow's copies of figures and tables, and of their records
OF_SNAKEMAKE = ".snakemake_timestamp"  # Snakemake's own file in a folder that a rule declares
PACKAGES = (  # a record holds the version of each that was imported
    *("halfstep", "torch", "numpy", "tokenizers", "safetensors", "transformers", "lm_eval"),
    *("datasets", "pandas", "matplotlib", "mauve", "faiss", "sklearn", "nltk"),
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_call = {"command": sys.argv, "started": _now()}


def begin_record(command: list[str]) -> None:
    """Set the command, and the start time, of all records that this process writes from now on."""
    _call.update(command=command, started=_now())


def is_record(path: Path) -> bool:
    """Is this the file name of a record?"""
    return path.name == NAME or path.name.endswith(f".{NAME}")


def write_record(file: Path, outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Write the record `file`; the last thing that a command does.

    A folder stands for the files in it. A name that is not a path (a model on the hub) is skipped.
    A file that this process has hashed, and that has not changed since, is not read again.
    """

    def sums(paths: Iterable[Path]) -> dict[str, str]:
        files = {file for path in paths for file in _files(Path(path))}
        return {os.path.relpath(path, file.parent): sha256_once(path) for path in sorted(files)}

    imported = [name for name in PACKAGES if name in sys.modules]
    versions = {name: getattr(sys.modules[name], "__version__", "unknown") for name in imported}
    record = {
        "format": FORMAT,
        "outputs": sums(outputs),
        "inputs": sums(inputs),
        "command": _call["command"],
        "versions": {"python": platform.python_version(), **versions},
        "commit": commit(),
        "started": _call["started"],
        "ended": _now(),
    }
    write_json(file, mask_secrets(record))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [file for file in path.glob("[!.]*") if file.is_file() and not is_record(file)]


def read_record(file: Path, top: Path) -> dict:
    """Read a record without secrets, with its paths made relative to the folder `top`.

    HalfstepError if the file is not a record.
    """
    record = mask_secrets(read_json(file))
    if not _is_valid(record):
        raise HalfstepError(
            f"{file}: not a record of format {FORMAT} with outputs and inputs; "
            "run the step that makes it again"
        )

    def moved(sums: dict[str, str]) -> dict[str, str]:
        return {
            os.path.relpath(os.path.normpath(file.parent / path), top): digest
            for path, digest in sums.items()
        }

    return record | {"outputs": moved(record["outputs"]), "inputs": moved(record["inputs"])}


def _is_valid(record: object) -> bool:
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return False
    sums = [record.get("outputs"), record.get("inputs")]
    if not all(isinstance(of_files, dict) for of_files in sums):
        return False
    return all(isinstance(digest, str) for of_files in sums for digest in of_files.values())


def find_records(results: Path) -> tuple[list[Path], list[Path]]:
    """All records below `results`, at least one, and all other files."""
    files = sorted(_walk(results))
    merged = results / NAME
    named = [path for path in files if is_record(path)]
    records = [path for path in named if path != merged or _is_of_one_job(path)]
    if not records:
        raise HalfstepError(
            f"{results}: no {NAME} in it or below it; "
            "name the folder that the pipeline wrote, or run the pipeline first"
        )
    return records, [path for path in files if not is_record(path)]


def _walk(top: Path) -> Iterator[Path]:
    """All files below a folder but MLflow's copies and Snakemake's; links are followed once."""
    seen = set()
    for folder, folders, names in os.walk(top, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(set(folders) - {COPIES})
        yield from (Path(folder) / name for name in names if name != OF_SNAKEMAKE)


def _is_of_one_job(file: Path) -> bool:
    """Is {results}/provenance.json the record of a job that wrote this very folder?

    If not, it is the file that `halfstep merge-provenance` writes.
    """
    try:
        record = read_json(file)
    except HalfstepError:
        return False
    return isinstance(record, dict) and "outputs" in record


def merge_records(results: Path) -> dict:
    """All records below `results` in one dict, every path relative to `results`.

    {"format": 1, "records": {path of a record: the record}}
    """
    files, _ = find_records(results)
    records = {os.path.relpath(file, results): read_record(file, results) for file in files}
    return {"format": FORMAT, "records": records}


class Verification:
    """A check of all records below a folder against the files.

    An output is compared with its bytes. An input is compared with the record of the job that made
    it, or with its bytes if it is no job's output. So a flipped bit is reported once, and an output
    that was made before its input was remade is reported as stale.

    Attributes:
        recorded: number of files that have a record
        unrecorded: the other files
        size: bytes of all files that `faults` reads
    """

    def __init__(self, results: Path):
        self._results = results
        self._files, others = find_records(results)
        self._records, self._unreadable = _read_all(self._files, results)
        records = self._records.values()
        self._owners = {path: sha for one in records for path, sha in one["outputs"].items()}
        inputs = {path for one in records for path in one["inputs"]}
        paths = {path: self._path(path) for path in self._owners.keys() | inputs}
        self._sizes = {path: file.stat().st_size for path, file in paths.items() if file.is_file()}
        self.recorded = len(self._owners)
        self.unrecorded = [
            path for path in others if os.path.relpath(path, results) not in self._owners
        ]
        self.size = sum(self._sizes.values())

    def _path(self, name: str) -> Path:
        return Path(os.path.normpath(self._results / name))

    def faults(self, tick: Callable[[int], None] = lambda size: None) -> list[str]:
        """The faults, one sentence each; calls tick(bytes) for every file that was read."""

        @functools.cache
        def digest(name: str) -> str | None:
            if name not in self._sizes:
                return None
            found = sha256(self._path(name))
            tick(self._sizes[name])
            return found

        def recorded_digest(name: str) -> str | None:
            return self._owners.get(name) or digest(name)

        faults = [*self._unreadable]
        for name, record in self._records.items():
            faults += _changed_outputs(name, record, self._results, digest)
            faults += _stale_inputs(name, record, self._results, recorded_digest)
        merged = self._results / NAME
        return faults if merged in self._files else faults + _merged_faults(merged, self._records)


def _read_all(files: list[Path], results: Path) -> tuple[dict[str, dict], list[str]]:
    """The records by path relative to `results`, and a sentence for each that cannot be read."""
    records, faults = {}, []
    for file in files:
        try:
            records[os.path.relpath(file, results)] = read_record(file, results)
        except HalfstepError as error:
            faults.append(str(error))
    return records, faults


Digest = Callable[[str], str | None]  # sha256 of a path relative to results; None: no such file


def _changed_outputs(name: str, record: dict, results: Path, digest: Digest) -> list[str]:
    faults = []
    for path, expected in record["outputs"].items():
        found = digest(path)
        if found is None:
            faults.append(f"{results / path}: missing, though {name} lists it; make it again")
        elif found != expected:
            faults.append(
                f"{results / path}: changed: its sha256 is {found[:12]}, "
                f"{name} says {expected[:12]}; make it again"
            )
    return faults


def _stale_inputs(name: str, record: dict, results: Path, digest: Digest) -> list[str]:
    """One sentence at most: the first input that changed, and the number of others."""
    stale = []
    for path, expected in record["inputs"].items():
        found = digest(path)
        if found is None and not path.startswith(".."):
            stale.append(f"{path}, which is gone")
        elif found not in (None, expected):  # None: outside of results, and not on this machine
            stale.append(f"{path} of sha256 {expected[:12]}, which is now {found[:12]}")
    if not stale:
        return []
    more = f" (and {len(stale) - 1} more inputs)" if len(stale) > 1 else ""
    outputs = results / name.removesuffix(NAME).rstrip("./")
    return [f"{outputs}: stale: made from {stale[0]}{more}; make it again"]


def _merged_faults(file: Path, records: dict[str, dict]) -> list[str]:
    """The records that differ from their copy in the merged file.

    That file must be there once there are tables: it is the only trace of a record that is lost.
    """
    if not file.exists():
        finished = any(name.startswith("tables") for name in records)
        return [f"{file}: missing; run halfstep merge-provenance"] if finished else []
    try:
        merged = read_json(file)["records"]
        names = sorted(merged.keys() | records.keys())
        differing = [name for name in names if merged.get(name) != records.get(name)]
    except (HalfstepError, KeyError, TypeError, AttributeError):
        return [f"{file}: not what halfstep merge-provenance writes; run it again"]
    faults = []
    for name in differing:
        if name not in records:
            faults.append(f"{file}: lists the record {name}, which is gone; make its files again")
        else:
            problem = "an older" if name in merged else "no"
            faults.append(
                f"{file}: has {problem} record {name}; if the job ran again since, run halfstep "
                "merge-provenance, otherwise run the job again"
            )
    return faults

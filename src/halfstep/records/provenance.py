"""Where an artefact comes from: a record beside every output, and what of it still holds.

    results/models/T/teacher/provenance.json              of what a job wrote into a folder of its own
    results/metrics/T/teacher/samples.provenance.json     of a file, or of files that differ in their suffix (steps.csv and steps.md)

    {"format": 1, "outputs": {path: sha256}, "inputs": {path: sha256}, "command": ["halfstep", ...], "versions": {"python": ...},
     "commit", "started", "ended"}                        paths start at the record's own folder, so that results/ can be moved as a whole

Every job writes its own record, so jobs at once never meet in a file. `merge` gathers all of them in one.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, sha256_once, write_json
from halfstep.records.journal import commit

FORMAT = 1
NAME = "provenance.json"
COPIES = "mlflow-artifacts"  # MLflow's, of figures and tables and their records
PACKAGES = (
    "halfstep",
    "torch",
    "numpy",
    "tokenizers",
    "safetensors",
    "transformers",
    "lm_eval",
    "datasets",
    "pandas",
    "matplotlib",
    "mauve",
    "faiss",
    "sklearn",
    "nltk",
)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


_call = {"command": sys.argv, "started": _now()}


def begin_record(command: list[str]) -> None:
    """What the records of this process name as their command, from now on."""
    _call.update(command=command, started=_now())


def is_record(path: Path) -> bool:
    return path.name == NAME or path.name.endswith(f".{NAME}")


def write_record(file: Path, outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Write the record `file` of these outputs; the last thing that a command does.

    A folder among them stands for the files in it, and among the inputs a name that is no path (of the hub) for nothing. What this
    process has hashed already, and nobody has touched since, is not read again.
    """

    def sums(paths: Iterable[Path]) -> dict[str, str]:
        every = {path for given in paths for path in _files(Path(given))}
        return {os.path.relpath(path, file.parent): sha256_once(path) for path in sorted(every)}

    versions = {
        name: getattr(sys.modules[name], "__version__", "unknown")
        for name in PACKAGES
        if name in sys.modules
    }
    write_json(file, {
        "format": FORMAT, "outputs": sums(outputs), "inputs": sums(inputs), "command": _call["command"],
        "versions": {"python": platform.python_version(), **versions}, "commit": commit(), "started": _call["started"], "ended": _now(),
    })  # fmt: skip


def _files(given: Path) -> Iterator[Path]:
    yield from (
        [given]
        if given.is_file()
        else (path for path in given.glob("[!.]*") if path.is_file() and not is_record(path))
    )


def read_record(file: Path, top: Path) -> dict:
    """A record, its paths made relative to the folder `top`; HalfstepError when it is none."""
    found = read_json(file)
    if (
        not isinstance(found, dict)
        or found.get("format") != FORMAT
        or not all(isinstance(found.get(k), dict) for k in ("outputs", "inputs"))
    ):
        raise HalfstepError(
            f"{file}: not a record of format {FORMAT}, with outputs and inputs; run the step that makes it again"
        )

    def moved(sums: dict[str, str]) -> dict[str, str]:
        return {
            os.path.relpath(os.path.normpath(file.parent / path), top): digest
            for path, digest in sums.items()
        }

    return found | {"outputs": moved(found["outputs"]), "inputs": moved(found["inputs"])}


def walk(results: Path) -> tuple[list[Path], list[Path]]:
    """The records below `results`, at least one, and all other files."""
    found = sorted(
        Path(folder) / name
        for folder, _, names in os.walk(results)
        for name in names
        if COPIES not in Path(folder).parts
    )
    records = [
        path for path in found if is_record(path) and (path != results / NAME or _of_one_job(path))
    ]
    if not records:
        raise HalfstepError(
            f"{results}: no {NAME} below it; name the folder that the pipeline wrote, or run it first"
        )
    return records, [path for path in found if not is_record(path)]


def _of_one_job(file: Path) -> bool:
    """Is the file that bears the merged one's name the record of a job that wrote this very folder?"""
    try:
        found = read_json(file)
    except HalfstepError:
        return False
    return isinstance(found, dict) and "outputs" in found


def merge_records(results: Path) -> dict:
    """All records below `results` in one: {"format", "records": {path of a record: the record}}, every path relative to `results`."""
    records, _ = walk(results)
    return {
        "format": FORMAT,
        "records": {os.path.relpath(file, results): read_record(file, results) for file in records},
    }


def verify_records(results: Path, tick=lambda size: None) -> tuple[list[str], int, int]:
    """(what does not fit, a sentence each; number of files recorded; number of files that no record names).

    An output is compared with its bytes. An input is compared with what the record of its own maker says, or with its bytes where
    nobody's record lists it: a flipped bit is named once, and what was made before its input was made anew is stale.
    """
    files, others = walk(results)
    faults, records, owners = [], {}, {}
    for file in files:
        try:
            records[os.path.relpath(file, results)] = read_record(file, results)
        except HalfstepError as error:
            faults.append(str(error))
    for found in records.values():
        owners |= found["outputs"]
    digests: dict[str, str | None] = {}

    def digest(path: str) -> str | None:
        if path not in digests:
            file = Path(os.path.normpath(results / path))
            digests[path] = sha256(file) if file.is_file() else None
            tick(file.stat().st_size if digests[path] else 0)
        return digests[path]

    for name, found in records.items():
        for path, expected in found["outputs"].items():
            if (now := digest(path)) is None:
                faults.append(f"{results / path}: missing, though {name} lists it; make it again")
            elif now != expected:
                faults.append(
                    f"{results / path}: changed: its sha256 is {now[:12]}, {name} says {expected[:12]}; make it again"
                )
        stale = []
        for path, expected in found["inputs"].items():
            now = owners.get(path) or digest(path)
            if now is None and not path.startswith(".."):
                stale.append(f"{path}, which is gone")
            elif now not in (
                None,
                expected,
            ):  # what lay outside and is not on this machine cannot be compared
                stale.append(f"{path} of sha256 {expected[:12]}, which is now {now[:12]}")
        if stale:
            more = f" (and {len(stale) - 1} more inputs)" if len(stale) > 1 else ""
            faults.append(
                f"{results / name.removesuffix(NAME).rstrip('./')}: stale: made from {stale[0]}{more}; make it again"
            )
    if (results / NAME).is_file() and results / NAME not in files:
        try:
            merged = read_json(results / NAME)["records"]
            for name in sorted(merged.keys() | records.keys()):
                if merged.get(name) != records.get(name):
                    what = (
                        "has no record"
                        if name not in merged
                        else "still has the record"
                        if name not in records
                        else "has an older record"
                    )
                    faults.append(
                        f"{results / NAME}: {what} {name}; run halfstep merge-provenance again"
                    )
        except (HalfstepError, KeyError, TypeError, AttributeError):
            faults.append(
                f"{results / NAME}: not what halfstep merge-provenance writes; run it again"
            )
    return faults, len(owners), sum(os.path.relpath(path, results) not in owners for path in others)

"""What a run of Snakemake prints at its start and end, and how it reads its command line."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from halfstep.sanitize import one_line

LAST_LINES = 8  # of a failed job's log


def typed(value: Any) -> Any:
    """The value with numbers, true, false and null in place of their texts.

    Snakemake passes what is nested in `--config 'sampling={"steps": [8]}'` as text.
    """
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # text, and what only looks like JSON
        return value


def banner(*lines: str) -> None:
    """Print these lines to stderr, marked as halfstep's own."""
    shown = (f"  halfstep | {one_line(line)}" for line in lines)
    print("", *shown, "", sep="\n", file=sys.stderr)


def only_looks(arguments: list[str]) -> bool:
    """Does a call of snakemake with these arguments run no job (-n, --report, --lint)?"""
    pattern = r"-\w*n\w*|--dry-?run|--report.*|--lint.*"
    return any(re.fullmatch(pattern, word) for word in arguments)


def unsent(marker: Path = Path("results/mlflow.synced")) -> list[str]:
    """The warning that `halfstep track` left when MLflow could not be brought up to date."""
    return marker.read_text().splitlines() if marker.exists() else []


def curves(environment: Mapping[str, str], store: Path = Path("results/mlflow.db")) -> list[str]:
    """Where the training curves are: the MLflow server, or how to look at the local store."""
    uri = environment.get("MLFLOW_TRACKING_URI")
    if not uri and not store.exists():
        return []
    uri = uri or f"sqlite:///{store}"
    if uri.startswith("http"):
        return [f"curves: {uri}"]
    if uri == f"sqlite:///{store}":
        return [f"curves: halfstep ui --results {shlex.quote(str(store.parent))}"]
    return [f"curves: mlflow ui --backend-store-uri {shlex.quote(uri)}"]


def failures(log: Path) -> Iterator[str]:
    """Lines about each failed job in snakemake's log: rule, its log's last lines, Slurm's log.

    Jobs of a group share a log of Slurm, which is named after all rules.
    """
    text = log.read_text(errors="replace")
    pattern = r"^Error in rule\s(\w+)[^\n]*:\n((?: .*\n?)+)"
    slurm_logs: dict[tuple[str, str], list[str]] = {}  # a job that was retried has several
    for rule, facts in re.findall(pattern, text, re.MULTILINE):
        own = re.search(r"^ +log: ([^\s,]+)", facts, re.MULTILINE)
        found = re.findall(r"\S*logs/slurm/\S+\.log", facts)
        slurm_logs.setdefault((rule, own[1] if own else ""), []).extend(found)
    for (rule, own_log), names in slurm_logs.items():
        yield f"rule {rule}"
        if own_log:
            yield f"  log: {own_log}"
            yield from (f"  | {line}" for line in _last_lines(Path(own_log)))
        yield from (f"  Slurm's log: {name}" for name in names[-1:])
    groups = re.findall(r"^ +message: Error in group (\S+)\n +log: (\S+)", text, re.MULTILINE)
    for group, name in dict(groups).items():
        yield f"group {group}"
        yield f"  Slurm's log: {name}"


def _last_lines(file: Path) -> list[str]:
    if not file.is_file():
        return ["no such file: the job did not start"]
    return file.read_text(errors="replace").splitlines()[-LAST_LINES:]

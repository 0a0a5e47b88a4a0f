"""Snakemake's locks after a run that was killed: removed where nothing of that run is alive."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from halfstep.workflow.packaged import caller

MARK = "halfstep.run"  # in .snakemake: locked by each run while it lives; holds its host
_held: list[IO[str]] = []  # the open mark: the system gives the lock back when this process ends


def take_over(folder: Path = Path(".snakemake"), on_cluster: bool = False) -> str | None:
    """Mark this process as a run of Snakemake, and remove the locks that a killed run left.

    They are removed only if no other run and no job of this folder is alive, and if the killed run
    was on this host alone. Returns a sentence for the user, or None if there was nothing to do.
    """
    folder.mkdir(exist_ok=True)
    mark = open(folder / MARK, "a+")  # noqa: SIM115  open until this process ends
    _held.append(mark)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another run is alive, or this file system has no such locks
        _share(mark)
        return None
    mark.seek(0)
    before = mark.read()
    said = _remove_locks(folder / "locks", before) if any(folder.glob("locks/*.lock")) else None
    if not any(folder.glob("locks/*.lock")):  # else the mark says whose locks they are
        mark.truncate(0)
        mark.write(f"cluster {socket.gethostname()}" if on_cluster else _this_host())
        mark.flush()
    _share(mark)
    return said


def _share(mark: IO[str]) -> None:
    """Hold the mark together with other runs, whose locks Snakemake itself compares."""
    with suppress(OSError):
        fcntl.flock(mark, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _this_host() -> str:
    return f"local {socket.gethostname()}"


def _remove_locks(locks: Path, before: str) -> str:
    if before != _this_host():
        return (
            f"{locks} has locks of a run that may be alive elsewhere ({before or 'unknown'}); "
            f"if it is not, call: {caller()} --unlock"
        )
    jobs = _processes_here()
    if jobs:
        return (
            f"{locks} has locks of a run that was killed, but its processes {jobs} are alive; "
            "wait for them or end them, and give the same command again"
        )
    for lock in locks.glob("*.lock"):
        lock.unlink()
    return "removed the locks of a run that was killed; its unfinished jobs start again"


def _processes_here() -> str:
    """Numbers of the other processes of Snakemake and halfstep that work in this folder."""
    here, own = os.getcwd(), {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter(["pid", "cwd", "cmdline"]):
        facts = process.info
        words = " ".join(facts["cmdline"] or [])
        ours = "snakemake" in words or "halfstep" in words
        if ours and facts["cwd"] == here and facts["pid"] not in own:
            found.append(facts["pid"])
    return ", ".join(map(str, sorted(found)))

"""Every write of a command fails in turn, and the command is killed before every one of them."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections import defaultdict
from pathlib import Path

import forked
import safetensors.torch

from halfstep.files import PART

VOLATILE = {"run.json", "samples.json", "provenance.json", "seconds.json"}  # they hold times
SECONDS = 30  # for the end of a command whose write fails


class Faults:
    """One run of a command that writes below `out`, seen at each of its writes.

    Before a write, a copy of `out` is what a kill would leave. A fork of the process goes on with a
    full disk; what it leaves is copied too.
    """

    def __init__(self, out: Path, log: Path):
        self.out, self.log = out.resolve(), log
        self.versions: dict[str, set[str]] = defaultdict(set)  # whole files, by name
        for name in files(self.out):
            self.versions[name].add(digest(self.out / name))
        self.left: dict[tuple, Path] = {}  # what was left, by the visible files
        self.writes = 0
        self.full = self.watching = False
        self.problems: list[str] = []
        self.here: Path | None = None
        sys.addaudithook(self.audit)
        self.fsync, self.write, self.save_file = os.fsync, os.write, safetensors.torch.save_file
        os.fsync = self.of_descriptor(os.fsync)
        os.write = self.of_descriptor(os.write)
        safetensors.torch.save_file = self.of_save_file

    def audit(self, event: str, given: tuple) -> None:
        if not self.watching:
            return
        if event == "open":
            path, _, flags = given
            if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR):
                self.note(event, path)
        elif event == "os.rename":
            self.note(event, given[1], source=Path(given[0]))
        elif event in ("os.mkdir", "os.truncate", "os.remove"):
            self.note(event, given[0])

    def of_descriptor(self, real):
        def called(descriptor, *more):
            if self.watching:
                self.note(real.__name__, os.readlink(f"/proc/self/fd/{descriptor}"))
            return real(descriptor, *more)

        return called

    def of_save_file(self, tensors, path, *more):
        if self.watching:
            self.note("save_file", path)
        self.save_file(tensors, path, *more)

    def note(self, event: str, path, source: Path | None = None) -> None:
        """A write is about to happen."""
        path = Path(os.fsdecode(path)).absolute()
        if path != self.out and self.out not in path.parents:
            return
        if self.full:
            if event != "os.remove":  # which takes no space
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return
        self.watching = False
        self.writes += 1
        self.keep(self.out, f"killed before {event} of {path.name}")
        if event != "os.remove":
            self.fork(event, path)
        if source is not None:
            self.versions[os.path.relpath(path, self.out)].add(digest(source))
        self.watching = True

    def fork(self, event: str, path: Path) -> None:
        """Let a copy of this process go on with a full disk; keep what it leaves.

        It works on a copy of the folder, so that the open files of this process stay as they are.
        """
        ours = self.out.with_name("ours")
        self.out.rename(ours) if self.out.exists() else ours.mkdir()
        copy(ours, self.out)
        errors = self.log / "errors"
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            self.full = True
            reopen(ours, self.out)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            self.watching = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        _, status = os.waitpid(child, 0)
        where = f"full at {event} of {path.name}"
        text = errors.read_text()
        said = text.splitlines()[-1] if text else ""
        if os.waitstatus_to_exitcode(status) != 1 or "Traceback" in text:
            self.problems.append(f"{where}: status {status}: {text}")
        elif "No space left on device; free some space" not in said:
            self.problems.append(f"{where}: it says {said!r}")
        if parts := [file for file in files(self.out) if PART.search(f"/{file}")]:
            self.problems.append(f"{where}: left {parts}")
        self.keep(self.out, where)
        shutil.rmtree(self.out)
        ours.rename(self.out)

    def keep(self, folder: Path, where: str) -> None:
        """Keep a copy of what was left, one for each set of visible files."""
        found = {name: digest(folder / name) for name in files(folder) if ".part/" not in name}
        for name in found:
            if problem := self.torn(folder / name, found[name]):
                self.problems.append(f"{where}: {name}: {problem}")
        whole = {name: sha for name, sha in found.items() if Path(name).name not in VOLATILE}
        key = tuple(sorted(whole.items()))
        if key not in self.left:
            self.left[key] = self.log / f"left-{len(self.left)}"
            copy(folder, self.left[key])

    def torn(self, file: Path, sha: str) -> str:
        """What is wrong with a file; "" if it is whole."""
        if file.name == "journal.jsonl":
            lines = file.read_bytes().split(b"\n")[:-1]
            return "" if all(map(json.loads, lines)) else "a torn line"
        if file.name == "run.json":
            return "" if json.loads(file.read_bytes()) else "empty"
        whole = sha in self.versions[os.path.relpath(file, self.out)]
        return "" if whole else "not one of the versions that were written"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def digest(file: Path) -> str:
    facts = file.stat()
    return _digest(file, facts.st_ino, facts.st_size, facts.st_mtime_ns)


@functools.cache
def _digest(file: Path, *facts: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def copy(source: Path, target: Path) -> None:
    """Copy a folder. Only what is written in place needs new bytes; other files are linked."""
    shutil.rmtree(target, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, target, copy_function=_copy_file)


def _copy_file(source: str, target: str) -> None:
    if ".part/" in source or source.endswith("journal.jsonl"):
        shutil.copy2(source, target)
    else:
        os.link(source, target)


def reopen(below: Path, instead: Path) -> None:
    """Turn every open file below a folder into the same one below another folder."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the one that listed the folder
            continue
        if below not in path.parents or not path.exists():  # a deleted file is only read
            continue
        facts = Path(f"/proc/self/fdinfo/{number}").read_text().split()
        place, flags = int(facts[1]), int(facts[3], 8)
        new = os.open(instead / path.relative_to(below), flags & ~(os.O_EXCL | os.O_TRUNC))
        os.lseek(new, place, os.SEEK_SET)
        os.dup2(new, number)
        os.close(new)


def result(out: Path) -> dict[str, object]:
    """All that a command wrote, without times."""
    found: dict[str, object] = {}
    for name in files(out):
        base = Path(name).name
        if base == "journal.jsonl":
            points = map(json.loads, (out / name).read_text().splitlines())
            found[name] = [
                (point["step"], key, value)
                for point in points
                for key, value in point["metrics"].items()
                if "per_s" not in key and "system" not in key
            ]
        elif base in VOLATILE or base.endswith(".provenance.json"):
            found[name] = ""
        else:
            found[name] = digest(out / name)
    return found


def run_all(line: str, out: Path, log: Path, before=None) -> None:
    """Run the command with all faults, then again from everything that they left."""
    forked.torch.set_num_threads(1)
    if before:
        before()
    out.parent.mkdir(parents=True, exist_ok=True)
    log.mkdir()
    errors = os.open(log / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    faults = Faults(out, log)
    faults.watching = True
    code = forked.main(line.split())
    if faults.full:  # a fork
        sys.stderr.flush()
        os._exit(code)
    faults.watching = False
    assert code == 0, (log / "stderr").read_text()
    expected = result(out)
    for left in faults.left.values():
        copy(left, out)
        if forked.main(line.split()) != 0 or result(out) != expected:
            faults.problems.append(f"the next run after {files(left)}: {files(out)}")
    (log / "report").write_text(json.dumps([faults.writes, len(faults.left), faults.problems]))


def try_all(line: str, out: Path, log: Path, before=None) -> tuple[int, int, list[str]]:
    """(number of writes, of different things left, problems) of `halfstep <line>`."""
    child = forked._context.Process(target=run_all, args=(line, out, log, before))
    child.start()
    child.join()
    assert child.exitcode == 0, (log / "stderr").read_text()
    return json.loads((log / "report").read_text())

"""Killed, stopped, out of time, out of space: no incomplete file is ever taken for a complete one.

A training that continues ends with the bits of one that was never disturbed.
"""

import ctypes
import hashlib
import os
import random
import resource
import signal
import threading
import time

import pytest
from forked import launch, start
from safetensors import safe_open
from small import MACHINE

from halfstep.distributed import group
from halfstep.distributed.group import OUT_OF_TIME
from halfstep.records import journal
from halfstep.records.journal import Journal
from halfstep.training import loop

KILLS, SECONDS = 50, 50  # of the test that kills at random, and about how long it takes
TRAINING = (
    "--num-steps 40 --validate-every 15 --batch-size 4 --warmup-steps 2 --dropout 0.1 "
    "--lr-decay cosine --precision float32 --seed 4"
)
STOPPED = "the state is saved, and the same command continues from it"
WEIGHTS = ("model", "ema", "best", "optimizer")


def save_every(seconds: float) -> None:
    loop.SAVE_EVERY_S = seconds
    journal.commit = lambda: "unknown"  # git would run three times in each process


def file_limit(size: int, every: float) -> None:
    """No file grows beyond `size` bytes, as if the disk were full."""
    save_every(every)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def hashes(folder):
    files = {name: folder / f"{name}.safetensors" for name in WEIGHTS}
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}


def curve(folder):
    """Every figure of the journal that does not depend on time or memory."""
    return [
        (point["step"], name, value)
        for point in journal.read_journal(folder)[1]
        for name, value in point["metrics"].items()
        if "per_s" not in name and "system" not in name
    ]


def assert_same(folder, undisturbed):
    assert hashes(folder) == hashes(undisturbed) and curve(folder) == curve(undisturbed)


@pytest.fixture(scope="module")
def line(pipeline):
    return f"pretrain --corpus {pipeline.corpus} --size tiny {TRAINING} {MACHINE}"


@pytest.fixture(scope="module")
def undisturbed(line, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "t" / "out"
    child = start(f"{line} --output {folder}", folder.parents[1] / "errors", save_every, 1e9)
    child.join()
    assert child.exitcode == 0, (folder.parents[1] / "errors").read_text()
    return folder


def wait_for(what, child, seconds=300):
    until = time.monotonic() + seconds
    while not what():
        assert child.is_alive() and time.monotonic() < until
        time.sleep(0.01)


def steps_done(folder):
    file = folder / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_killed_fifty_times(line, undisturbed, tmp_path):
    """kill -9 and SIGTERM at random moments, from the first instant of a process on.

    Whenever a training comes to its end it is compared, and the next one begins.
    """
    chance, began, kills, ended, codes = random.Random(5), time.monotonic(), 0, 0, []
    errors = tmp_path / "errors"
    while kills < KILLS or not ended:
        folder = tmp_path / str(ended) / "out"
        child = start(f"{line} --output {folder}", errors, save_every, 0.2)
        child.join(chance.uniform(0, 1.2) if kills < KILLS else None)
        if child.is_alive():
            child.kill() if chance.random() < 0.7 else child.terminate()
            child.join(20)
            kills += 1
            codes.append(child.exitcode)
        # -SIGTERM: it came before the training began.
        expected = -signal.SIGKILL, -signal.SIGTERM, 143, 0
        assert child.exitcode in expected, errors.read_text()
        if child.exitcode == 0:
            assert_same(folder, undisturbed)
            assert not (folder / "state").exists() and not list(folder.glob(".*"))
            ended += 1
        elif (folder / "meta.json").exists():  # killed after the last step
            assert hashes(folder) == hashes(undisturbed)
        assert time.monotonic() - began < 10 * SECONDS
    print(f"{kills} kills, {ended} trainings ended, exits {sorted(set(codes))}")
    assert {-signal.SIGKILL, 143} <= set(codes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(line, undisturbed, tmp_path, number, code):
    """It finishes its step, saves its state and says so; the same command continues there."""
    folder, errors = tmp_path / "t" / "out", tmp_path / "errors"
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    wait_for(lambda: steps_done(folder) > 5, child)
    os.kill(child.pid, number)
    asked = time.monotonic()
    child.join(120)
    assert child.exitcode == code and time.monotonic() - asked < 60, errors.read_text()
    assert f"received {number.name}; {STOPPED}" in errors.read_text()
    assert journal.read_journal(folder)[0]["status"] == "killed"
    reached = curve(folder)[-1][0]
    assert f"stopped after step {reached}:" in errors.read_text() and reached < 40
    with safe_open(folder / "state" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(reached)
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    child.join()
    assert child.exitcode == 0
    assert_same(folder, undisturbed)


def test_the_time_limit(line, undisturbed, tmp_path):
    """Each start does at least one step and exits with its code, until one comes to the end."""
    folder, errors, codes = tmp_path / "t" / "out", tmp_path / "errors", []
    while not codes or codes[-1]:
        limit = 1e-6 if len(codes) < 3 else 60
        child = start(f"{line} --time-limit {limit} --output {folder}", errors, save_every, 1e9)
        child.join()
        codes.append(child.exitcode)
        assert child.exitcode in (0, OUT_OF_TIME), errors.read_text()
    assert codes == [OUT_OF_TIME] * 3 + [0] and OUT_OF_TIME == 75
    assert errors.read_text().count(f"the time limit is near; {STOPPED}") == 3
    assert "stopped after step 3:" in errors.read_text()
    assert_same(folder, undisturbed)


def test_several_processes_stop_together(line, pipeline, tmp_path):
    """Two ranks agree on the step at which the time is over, and two others continue from it."""
    two = line.replace("--dropout 0.1", "--dropout 0").replace("--num-steps 40", "--num-steps 8")
    stopped, whole = tmp_path / "t/out", tmp_path / "u/out"
    options = f"--output {stopped} --time-limit 1e-6"
    first = launch(f"{two} {options}", 2, tmp_path / "first", save_every, 1e9)
    assert [code for code, _ in first] == [OUT_OF_TIME] * 2, first
    assert {err.split("stopped after step ")[1].split(":")[0] for _, err in first} == {"1"}
    for folder in (stopped, whole):
        log = tmp_path / f"log-{folder.parent.name}"
        done = launch(f"{two} --output {folder}", 2, log, save_every, 1e9)
        assert [code for code, _ in done] == [0, 0], done
    assert_same(stopped, whole)


def hang(holds_lock: bool) -> None:
    """To leave the group takes for ever, with Python's global lock or without it."""
    save_every(1e9)
    group.EXIT_S = 2.0
    wait = ctypes.PyDLL(None).pause if holds_lock else threading.Event().wait
    group.leave_group = lambda: wait()


@pytest.mark.parametrize("holds_lock", [False, True])
def test_a_stopped_process_that_hangs_is_ended(line, tmp_path, holds_lock):
    """With its own code, or with 1 and the stacks of its threads if Python itself hangs."""
    options = f"--output {tmp_path}/t/out --time-limit 1e-6"
    stopped = launch(f"{line} {options}", 2, tmp_path, hang, holds_lock)
    assert [code for code, _ in stopped] == [1 if holds_lock else OUT_OF_TIME] * 2, stopped
    for _, err in stopped:
        assert f"the time limit is near; {STOPPED}" in err
        assert ("in exit_stopped" in err) == holds_lock
    assert (tmp_path / "t/out/state/state.safetensors").exists()


@pytest.mark.parametrize(("size", "every"), [(1_000_000, 0.0), (1_000_000, 1e9), (700, 1e9)])
def test_no_room_on_the_disk(line, undisturbed, tmp_path, size, every):
    """While the rolling checkpoint, the checkpoint or a line of the journal is written.

    It prints one sentence and leaves nothing incomplete; with room again it continues.
    """
    folder, errors = tmp_path / "t" / "out", tmp_path / "errors"
    child = start(f"{line} --output {folder}", errors, file_limit, size, every)
    child.join()
    err = errors.read_text()
    assert child.exitcode == 1 and "Traceback" not in err
    assert "File too large" in err or "No space left" in err, err
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.safetensors"))
    assert not (folder / "meta.json").exists()
    if (folder / "run.json").exists():
        points = journal.read_journal(folder)[1]
        assert all(point["metrics"] for point in points)  # every line is complete
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    child.join()
    assert child.exitcode == 0
    assert_same(folder, undisturbed)


@pytest.mark.parametrize("torn", [0, 1, 2, 7])
def test_a_journal_that_is_killed_between_and_within_lines(tmp_path, monkeypatch, torn):
    """The reader drops the bytes of an incomplete line; the next writer begins a new line."""
    about = {"name": "n", "node": "n", "params": {}}
    real = os.write
    with Journal(tmp_path, **about) as log:
        for step in range(1, 4):
            log.log({"a": step}, step)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def killed(fd, content):
                real(fd, content[:torn])
                raise KeyboardInterrupt

            patch.setattr(journal.os, "write", killed)
            log.log({"a": 4}, 4)
    assert [p["step"] for p in journal.read_journal(tmp_path)[1]] == [1, 2, 3]
    with Journal(tmp_path, **about) as log:
        log.log({"a": 4}, 4)
    points = journal.read_journal(tmp_path)[1]
    assert [(p["step"], p["metrics"]["a"]) for p in points] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_a_short_write_leaves_no_torn_line(tmp_path, monkeypatch):
    """A disk takes half a line and then has room again: the half is removed."""
    real = os.write
    with Journal(tmp_path, name="n", node="n", params={}) as log:
        log.log({"a": 1}, 1)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(journal.os, "write", lambda fd, content: real(fd, content[:5]))
            log.log({"a": 2}, 2)
        log.log({"a": 3}, 3)
    assert [p["step"] for p in journal.read_journal(tmp_path)[1]] == [1, 3]


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="needs a read-only folder")
def test_a_folder_that_cannot_be_written(line, tmp_path):
    child = start(f"{line} --output /sys/kernel/t/out", tmp_path / "errors", save_every, 1e9)
    child.join()
    err = (tmp_path / "errors").read_text()
    assert child.exitcode == 1 and err.startswith("halfstep pretrain: /sys/kernel/t")

"""Killed, stopped, out of time, out of space: nothing half-written is ever taken for whole, and what goes on ends with the bits of a run that
was never disturbed."""

import hashlib
import os
import random
import resource
import signal
import time

import pytest
from forked import launch, start
from safetensors import safe_open
from small import MACHINE

from halfstep.distributed.group import OUT_OF_TIME
from halfstep.records import journal
from halfstep.records.journal import Journal
from halfstep.training import loop

KILLS, SECONDS = 50, 50  # of the chaos test, and what it may take
TRAINING = "--num-steps 40 --validate-every 15 --batch-size 4 --warmup-steps 2 --dropout 0.1 --lr-decay cosine --precision float32 --seed 4"
WEIGHTS = ("model", "ema", "best", "optimizer")


def save_every(seconds: float) -> None:
    loop.SAVE_EVERY_S = seconds
    journal.commit = lambda: "unknown"  # git, three times a start


def file_limit(size: int, every: float) -> None:
    """No file grows beyond `size` bytes: what a full disk does to a writer, without the need to fill one."""
    save_every(every)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def hashes(folder):
    return {
        name: hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
        for name in WEIGHTS
    }


def curve(folder):
    return [
        (
            p["step"],
            {k: v for k, v in p["metrics"].items() if "per_s" not in k and "system" not in k},
        )
        for p in journal.read_journal(folder)[1]
    ]


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


def wait_for(what, child, seconds=60):
    until = time.monotonic() + seconds
    while not what():
        assert child.is_alive() and time.monotonic() < until
        time.sleep(0.01)


def steps_done(folder):
    file = folder / "journal.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_killed_fifty_times(line, undisturbed, tmp_path):
    """kill -9 and SIGTERM at random moments, from the first instant of a process on; whenever a run comes through it is compared, and the next begins."""
    chance, began, kills, ended, codes = random.Random(5), time.monotonic(), 0, 0, []
    while kills < KILLS or not ended:
        folder, errors = tmp_path / str(ended) / "out", tmp_path / "errors"
        child = start(f"{line} --output {folder}", errors, save_every, 0.2)
        if kills < KILLS:
            child.join(chance.uniform(0, 1.2))
        else:
            child.join()
        if child.is_alive():
            child.kill() if chance.random() < 0.7 else child.terminate()
            child.join(20)
            kills += 1
            codes.append(child.exitcode)
            assert child.exitcode in (-signal.SIGKILL, -signal.SIGTERM, 143, 0), (
                errors.read_text()
            )  # -15: before the training began
        if child.exitcode == 0:
            assert hashes(folder) == hashes(undisturbed) and curve(folder) == curve(undisturbed)
            assert not (folder / "state").exists() and not list(folder.glob(".*"))
            ended += 1
        else:
            assert child.exitcode in (-signal.SIGKILL, -signal.SIGTERM, 143), errors.read_text()
            assert not (folder / "meta.json").exists() or hashes(folder) == hashes(
                undisturbed
            )  # after the last step: whole, or not there
        assert time.monotonic() - began < 10 * SECONDS
    print(
        f"{kills} kills, {ended} runs came through, exits {sorted(set(codes))}, {time.monotonic() - began:.0f} s"
    )
    assert {-signal.SIGKILL, 143} <= set(codes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(line, undisturbed, tmp_path, number, code):
    """It finishes its step, keeps its state (no timed save had come) and says so; the same command goes on from that very step."""
    folder, errors = tmp_path / "t" / "out", tmp_path / "errors"
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    wait_for(lambda: steps_done(folder) > 5, child)
    os.kill(child.pid, number)
    asked = time.monotonic()
    child.join(30)
    assert child.exitcode == code and time.monotonic() - asked < 10, errors.read_text()
    assert (
        f"{number.name} came; its state is kept" in errors.read_text()
        and journal.read_journal(folder)[0]["status"] == "killed"
    )
    reached = curve(folder)[-1][0]
    assert f"stopped after step {reached}:" in errors.read_text() and reached < 40
    with safe_open(folder / "state" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(reached)
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    child.join()
    assert (
        child.exitcode == 0
        and hashes(folder) == hashes(undisturbed)
        and curve(folder) == curve(undisturbed)
    )


def test_the_time_limit(line, undisturbed, tmp_path):
    """Each start does at least a step and leaves with its own code, until one comes through."""
    folder, errors, codes = tmp_path / "t" / "out", tmp_path / "errors", []
    while not codes or codes[-1]:
        limit = 1e-6 if len(codes) < 3 else 60
        child = start(f"{line} --time-limit {limit} --output {folder}", errors, save_every, 1e9)
        child.join()
        codes.append(child.exitcode)
        assert child.exitcode in (0, OUT_OF_TIME), errors.read_text()
    assert codes == [OUT_OF_TIME] * 3 + [0] and OUT_OF_TIME == 75
    assert (
        errors.read_text().count("the time limit is near; its state is kept") == 3
        and "stopped after step 3:" in errors.read_text()
    )
    assert hashes(folder) == hashes(undisturbed) and curve(folder) == curve(undisturbed)


def test_several_processes_stop_together(line, pipeline, tmp_path):
    """Two processes agree on the step at which the time is over, and two others go on from it."""
    two = f"{line.replace('--dropout 0.1', '--dropout 0').replace('--num-steps 40', '--num-steps 8')} --output {tmp_path}/t/out"
    first = launch(f"{two} --time-limit 1e-6", 2, tmp_path / "first", save_every, 1e9)
    assert [code for code, _ in first] == [OUT_OF_TIME] * 2, first
    assert {err.split("stopped after step ")[1].split(":")[0] for _, err in first} == {"1"}
    second = launch(two, 2, tmp_path / "second", save_every, 1e9)
    assert [code for code, _ in second] == [0, 0], second
    whole = launch(two.replace("t/out", "u/out"), 2, tmp_path / "whole", save_every, 1e9)
    assert [code for code, _ in whole] == [0, 0], whole
    assert hashes(tmp_path / "t/out") == hashes(tmp_path / "u/out") and curve(
        tmp_path / "t/out"
    ) == curve(tmp_path / "u/out")


@pytest.mark.parametrize(("size", "every"), [(1_000_000, 0.0), (1_000_000, 1e9), (700, 1e9)])
def test_no_room_on_the_disk(line, undisturbed, tmp_path, size, every):
    """While the rolling state is written, the checkpoint, a line of the journal: one sentence, nothing half-written, and with room again it goes on."""
    folder, errors = tmp_path / "t" / "out", tmp_path / "errors"
    child = start(f"{line} --output {folder}", errors, file_limit, size, every)
    child.join()
    assert child.exitcode == 1 and "Traceback" not in errors.read_text()
    assert "File too large" in errors.read_text() or "No space left" in errors.read_text(), (
        errors.read_text()
    )
    assert (
        not list(folder.rglob("*.part"))
        and not list(folder.rglob("*.safetensors"))
        and not (folder / "meta.json").exists()
    )
    if (folder / "run.json").exists():
        assert all(
            point["metrics"] for point in journal.read_journal(folder)[1]
        )  # every line is whole
    child = start(f"{line} --output {folder}", errors, save_every, 1e9)
    child.join()
    assert (
        child.exitcode == 0
        and hashes(folder) == hashes(undisturbed)
        and curve(folder) == curve(undisturbed)
    )


@pytest.mark.parametrize("torn", [0, 1, 2, 7])
def test_a_journal_that_is_killed_between_and_within_lines(tmp_path, monkeypatch, torn):
    """However many bytes of a line came to the disk: the reader drops them, the next writer goes on in a line of its own."""
    about = dict(name="n", node="n", params={})
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
    assert [(p["step"], p["metrics"]["a"]) for p in journal.read_journal(tmp_path)[1]] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
    ]


def test_a_short_write_leaves_no_torn_line(tmp_path, monkeypatch):
    """A disk that takes half a line, then has room again before the job has ended: the half is taken back."""
    real = os.write
    with Journal(tmp_path, name="n", node="n", params={}) as log:
        log.log({"a": 1}, 1)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(journal.os, "write", lambda fd, content: real(fd, content[:5]))
            log.log({"a": 2}, 2)
        log.log({"a": 3}, 3)
    assert [p["step"] for p in journal.read_journal(tmp_path)[1]] == [1, 3]


@pytest.mark.skipif(
    not os.path.isdir("/sys/kernel"), reason="no folder here in which nobody may write"
)
def test_a_folder_that_cannot_be_written(line, tmp_path):
    child = start(f"{line} --output /sys/kernel/t/out", tmp_path / "errors", save_every, 1e9)
    child.join()
    assert child.exitcode == 1 and (tmp_path / "errors").read_text().startswith(
        "halfstep pretrain: /sys/kernel/t"
    )

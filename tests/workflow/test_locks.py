"""Two runs of Snakemake in one folder: the first is alive, or was killed (kill -9)."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from dryrun import clean_environment, copy

from halfstep.workflow import locks

TARGET = "results/data/stories-ci/manifest.json"
OPTIONS = [TARGET, "--config", "preset=ci", "--cores", "1"]


def held_run(folder):
    """A copy of the workflow, a Snakemake whose job waits, and the file that lets it go on."""
    workflow = copy(folder)
    hold, go = folder / "hold", folder / "go"
    wait = f"touch {hold}; while [ ! -e {go} ]; do sleep 0.1; done; halfstep prepare"
    workflow.edit("rules/data.smk", lambda text: text.replace("halfstep prepare", wait, 1))
    with open(folder / "printed", "w") as printed:
        run = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *OPTIONS],
            cwd=folder,
            env=clean_environment(),
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    deadline = time.monotonic() + 90
    while not hold.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert hold.exists(), (folder / "printed").read_text()
    return workflow, run, go


def killed_run(folder):
    """The same, but its Snakemake was killed; the processes of its job are alive."""
    workflow, run, go = held_run(folder)
    job = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert list(folder.glob(".snakemake/locks/*.lock"))
    return workflow, job, go


def test_a_second_snakemake_on_the_same_results_refuses(tmp_path):
    """Then the first one succeeds, and nothing is left to do."""
    workflow, first, go = held_run(tmp_path)
    try:
        second = workflow.run(*OPTIONS)
        said = " ".join((second.stdout + second.stderr).split())
        assert second.returncode != 0 and "cannot be locked" in said
        assert first.poll() is None and not (tmp_path / TARGET).exists()
        go.touch()
        assert first.wait(timeout=90) == 0, (tmp_path / "printed").read_text()
    finally:
        go.touch()
        first.kill()
    assert (tmp_path / TARGET).is_file()
    assert "Nothing to be done" in workflow.run(*OPTIONS).stderr


def test_the_same_command_continues_after_a_kill(tmp_path):
    workflow, job, go = killed_run(tmp_path)
    try:
        refused = workflow.run(*OPTIONS)
        said = " ".join(refused.stderr.split())
        assert refused.returncode != 0 and "but its processes" in said, said
        assert str(job[0].pid) in said and not (tmp_path / TARGET).exists()
    finally:
        go.touch()
        psutil.wait_procs(job, timeout=60)
    done = workflow.run(*OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "removed the locks of a run that was killed" in done.stderr
    assert (tmp_path / TARGET).is_file()
    assert not list(tmp_path.glob(".snakemake/locks/*.lock"))
    assert "locks" not in workflow.run(*OPTIONS).stderr


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A folder .snakemake with a lock, and a function that writes its mark."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ".snakemake"
    (folder / "locks").mkdir(parents=True)
    (folder / "locks" / "0.output.lock").write_text("a")
    monkeypatch.setattr(locks, "_held", [])

    def mark(text):
        (folder / locks.MARK).write_text(text)
        return folder

    yield mark
    end_of_process()


def end_of_process():
    while locks._held:
        locks._held.pop().close()


def test_a_run_of_another_host_or_of_a_cluster_keeps_its_locks(locked):
    host = os.uname().nodename
    for mark in ("local elsewhere", f"cluster {host}", ""):
        folder = locked(mark)
        for _ in range(2):
            said = locks.take_over(folder)
            assert "halfstep run --unlock" in said and list(folder.glob("locks/*.lock"))
            end_of_process()


def test_a_run_that_is_alive_keeps_its_locks(locked):
    folder = locked(f"local {os.uname().nodename}")
    assert "removed" in locks.take_over(folder)
    (folder / "locks" / "0.output.lock").write_text("a")
    assert locks.take_over(folder) is None  # the first call's mark is still held
    assert list(folder.glob("locks/*.lock"))
    end_of_process()
    assert "removed" in locks.take_over(folder)
    assert not list(folder.glob("locks/*.lock"))

"""The journal: torn lines, resumed jobs, rewinding, and another experiment in the same folder."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from halfstep.errors import HalfstepError
from halfstep.files import sha256
from halfstep.records.journal import (
    LONGEST_LINE,
    Journal,
    complete_size,
    environment,
    fingerprint,
    mark,
    read_journal,
    read_points,
)


def open_journal(folder: Path, lr: float = 1e-3, digest: str = "aa") -> Journal:
    return Journal(
        folder,
        name="kl_backward/round-1",
        node="distill-round/tiny/kl_backward/1",
        params={"lr": lr, "round": 1},
        datasets=[{"name": "stories", "digest": digest, "source": "results/data/stories"}],
    )


def steps(folder: Path) -> list[int]:
    return [point["step"] for point in read_journal(folder)[1]]


def test_points_and_status_are_read_as_written(tmp_path):
    weights = tmp_path / "ema.safetensors"
    weights.write_bytes(b"weights")
    with open_journal(tmp_path) as journal:
        journal.log({"train/loss": 2.5, "train/lr": 1e-3}, 50)
        journal.artifact(tmp_path / "meta.json")
        assert read_journal(tmp_path)[0]["status"] == "running"
        journal.close(checkpoint=tmp_path)
    run, points = read_journal(tmp_path)
    assert len(points) == 1
    assert points[0]["step"] == 50
    assert points[0]["metrics"] == {"train/loss": 2.5, "train/lr": 1e-3}
    assert run["status"] == "finished"
    assert run["artifacts"] == ["meta.json"]
    assert run["checkpoint"] == {"folder": ".", "sha256": {"ema": sha256(weights)}}
    assert {"git_commit", "host", "torch"} <= run["tags"].keys()


def test_a_killed_writer_loses_at_most_its_last_line(tmp_path):
    folder = tmp_path / "run"
    script = f"""
from halfstep.records.journal import Journal
journal = Journal({str(folder)!r}, name="n", node="n", params={{}})
for step in range(10**9):
    journal.log({{"train/loss": step}}, step)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    file = folder / "journal.jsonl"
    for _ in range(600):
        if file.exists() and file.stat().st_size > 20_000:
            break
        time.sleep(0.02)
    child.kill()
    child.wait()
    with open(file, "ab") as torn:  # as a kill inside of the write would leave it
        torn.write(b'{"step": 99999')
    before = steps(folder)
    assert len(before) > 100
    assert before == list(range(len(before)))
    with Journal(folder, name="n", node="n", params={}) as journal:
        journal.log({"train/loss": 1.0}, len(before))  # not appended to the torn line
    assert steps(folder) == [*before, len(before)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    with open_journal(tmp_path) as journal:
        journal.log({"a": 1}, 1)
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b"rubbish\n" + file.read_bytes())
    with pytest.raises(HalfstepError, match=r"journal\.jsonl:1: not a line of JSON"):
        read_journal(tmp_path)


def test_a_resumed_job_rewinds_to_its_checkpoint_and_stays_the_same_run(tmp_path):
    with pytest.raises(RuntimeError), open_journal(tmp_path) as journal:
        for step in range(0, 500, 50):
            journal.log({"train/loss": 1.0}, step)
        raise RuntimeError("out of memory")
    first, _ = read_journal(tmp_path)
    assert first["status"] == "failed"
    with open_journal(tmp_path) as journal:
        journal.rewind(200)
        assert steps(tmp_path) == [0, 50, 100, 150, 200]
        for step in range(250, 500, 50):
            journal.log({"train/loss": 1.0}, step)
    run, _ = read_journal(tmp_path)
    assert steps(tmp_path) == list(range(0, 500, 50))
    assert run["status"] == "finished"
    assert run["started"] == first["started"]
    with open_journal(tmp_path) as journal:
        journal.rewind(-1)
    assert steps(tmp_path) == []
    assert read_journal(tmp_path)[0]["started"] > first["started"]


def test_an_exit_is_not_a_failure(tmp_path):
    with pytest.raises(SystemExit), open_journal(tmp_path):
        sys.exit(85)  # the time limit: the job will be resumed
    assert read_journal(tmp_path)[0]["status"] == "killed"


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"digest": "bb"}])
def test_another_experiment_starts_anew(tmp_path, change):
    with open_journal(tmp_path) as journal:
        journal.log({"train/loss": 1.0}, 50)
    old, _ = read_journal(tmp_path)
    with open_journal(tmp_path, **change):
        pass
    new, points = read_journal(tmp_path)
    assert points == []
    assert new["fingerprint"] != old["fingerprint"]
    assert new["started"] > old["started"]


def test_the_fingerprint_ignores_order_and_source():
    one = fingerprint(
        {"a": 1, "b": [2]},
        [{"name": "x", "digest": "1", "source": "here"}, {"name": "y", "digest": "2"}],
    )
    two = fingerprint(
        {"b": [2], "a": 1},
        [{"name": "y", "digest": "2"}, {"name": "x", "digest": "1", "source": "there"}],
    )
    assert one == two
    assert two != fingerprint({"a": 1, "b": [3]}, [])


def test_jobs_do_not_import_a_tracker():
    code = (
        "import sys, halfstep.records.journal as journal; journal.environment(); "
        "sys.exit(bool({'mlflow', 'pandas', 'torch'} & sys.modules.keys()))"
    )
    environ = os.environ | {"SLURM_JOB_ID": "7"}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0
    assert json.dumps(environment())


def long_journal(folder: Path, points: int) -> Path:
    """A finished run with this many lines."""
    with open_journal(folder):
        pass
    file = folder / "journal.jsonl"
    with open(file, "w") as lines:
        for step in range(points):
            metrics = {"train/loss": 1.0, "train/lr": 1e-3, "train/grad_norm": 0.5}
            lines.write(json.dumps({"step": step, "time": 1e9 + step, "metrics": metrics}) + "\n")
    return file


def test_readers_and_rewind_hold_one_line_of_a_long_journal(tmp_path):
    file = long_journal(tmp_path, 10_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_points(file)) == 10_000
        assert mark(file, complete_size(file)).startswith(f"{file.stat().st_size}-")
        with open_journal(tmp_path) as journal:
            journal.rewind(6_000)
        assert tracemalloc.get_traced_memory()[1] < 2 * LONGEST_LINE + 500_000
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in read_points(file)) == 6_001


def test_a_mark_stands_for_all_lines_before_it(tmp_path):
    """It stays the same when lines follow, and changes when these lines do."""
    with open_journal(tmp_path) as journal:
        for step in (1, 2, 3):
            journal.log({"a": step}, step)
        file = tmp_path / "journal.jsonl"
        size = complete_size(file)
        former = mark(file, size)
        assert former and mark(file, size - 1) == ""
        journal.log({"a": 4}, 4)
        assert mark(file, size) == former != mark(file, complete_size(file))
        journal.rewind(2)
        assert mark(file, size) == ""
        journal.log({"a": 3}, 3)  # the same length, at another time
        assert complete_size(file) == size or mark(file, size) == ""
        assert mark(file, size) != former


@pytest.mark.parametrize("tail", [b"", b'{"st', b"\0" * 5, b"x" * 3_000_000])
def test_the_complete_lines_end_before_a_torn_one(tmp_path, tail):
    file = tmp_path / "journal.jsonl"
    file.write_bytes(tail)
    assert complete_size(file) == 0
    file.write_bytes(b"1\n22\n" + tail)
    assert complete_size(file) == 5

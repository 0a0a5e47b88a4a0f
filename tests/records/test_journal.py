"""The journal: torn lines, resumption, rewinding, another experiment in the same place."""

import json
import os
import subprocess
import sys
import time

import pytest

from halfstep.errors import HalfstepError
from halfstep.records import journal as module
from halfstep.records.journal import Journal, read_journal


def journal(folder, lr=1e-3, digest="aa"):
    return Journal(folder, name="kl_backward/round-1", node="distill-round/tiny/kl_backward/1", params={"lr": lr, "round": 1},
                   datasets=[{"name": "stories", "digest": digest, "source": "results/data/stories"}])  # fmt: skip


def steps(folder):
    return [point["step"] for point in read_journal(folder)[1]]


def test_points_and_status_come_back_as_written(tmp_path):
    (tmp_path / "ema.safetensors").write_bytes(b"weights")
    with journal(tmp_path) as log:
        log.log({"train/loss": 2.5, "train/lr": 1e-3}, 50)
        log.artifact(tmp_path / "meta.json")
        assert read_journal(tmp_path)[0]["status"] == "running"
        log.close(checkpoint=tmp_path)
    run, points = read_journal(tmp_path)
    assert [(p["step"], p["metrics"]) for p in points] == [
        (50, {"train/loss": 2.5, "train/lr": 1e-3})
    ]
    assert run["status"] == "finished" and run["artifacts"] == ["meta.json"]
    assert run["checkpoint"] == {
        "folder": ".",
        "sha256": {"ema": journal.sha256(tmp_path / "ema.safetensors")},
    }
    assert {"git_commit", "host", "torch"} <= run["tags"].keys()


def test_a_killed_writer_costs_at_most_its_last_line(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from halfstep.records.journal import Journal
log = Journal({str(tmp_path / "run")!r}, name="n", node="n", params={{}})
for step in range(10**9):
    log.log({{"train/loss": step}}, step)
"""
    child = subprocess.Popen([sys.executable, "-c", script])
    file = tmp_path / "run" / "journal.jsonl"
    for _ in range(600):
        if file.exists() and file.stat().st_size > 20_000:
            break
        time.sleep(0.02)
    child.kill()
    child.wait()
    with open(file, "ab") as out:  # the torn line that a kill inside the write would leave
        out.write(b'{"step": 99999')
    found = steps(tmp_path / "run")
    assert found == list(range(len(found))) and len(found) > 100
    with Journal(
        tmp_path / "run", name="n", node="n", params={}
    ) as log:  # going on must not glue a line to the torn one
        log.log({"train/loss": 1.0}, len(found))
    assert steps(tmp_path / "run") == [*found, len(found)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    with journal(tmp_path) as log:
        log.log({"a": 1}, 1)
    file = tmp_path / "journal.jsonl"
    file.write_bytes(b"rubbish\n" + file.read_bytes())
    with pytest.raises(HalfstepError, match=r"journal\.jsonl:1: not a line of JSON"):
        read_journal(tmp_path)


def test_resumption_rewinds_to_the_checkpoint_and_stays_the_same_run(tmp_path):
    with pytest.raises(RuntimeError), journal(tmp_path) as log:
        for step in range(0, 500, 50):
            log.log({"train/loss": 1.0}, step)
        raise RuntimeError("out of memory")
    first = read_journal(tmp_path)[0]
    assert first["status"] == "failed"
    with journal(tmp_path) as log:
        log.rewind(200)
        assert steps(tmp_path) == [0, 50, 100, 150, 200]
        for step in range(250, 500, 50):
            log.log({"train/loss": 1.0}, step)
    run, _ = read_journal(tmp_path)
    assert (
        steps(tmp_path) == list(range(0, 500, 50))
        and run["status"] == "finished"
        and run["started"] == first["started"]
    )
    with journal(tmp_path) as log:
        log.rewind(-1)
    assert steps(tmp_path) == [] and read_journal(tmp_path)[0]["started"] > first["started"]


def test_an_exit_is_not_a_failure(tmp_path):
    with pytest.raises(SystemExit), journal(tmp_path):
        sys.exit(85)  # the time limit: the job will be resumed
    assert read_journal(tmp_path)[0]["status"] == "killed"


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"digest": "bb"}])
def test_another_experiment_begins_anew(tmp_path, change):
    with journal(tmp_path) as log:
        log.log({"train/loss": 1.0}, 50)
    old = read_journal(tmp_path)[0]
    with journal(tmp_path, **change):
        pass
    new, points = read_journal(tmp_path)
    assert (
        points == []
        and new["fingerprint"] != old["fingerprint"]
        and new["started"] > old["started"]
    )


def test_fingerprint_ignores_order_and_place():
    one = module.fingerprint(
        {"a": 1, "b": [2]},
        [{"name": "x", "digest": "1", "source": "here"}, {"name": "y", "digest": "2"}],
    )
    two = module.fingerprint(
        {"b": [2], "a": 1},
        [{"name": "y", "digest": "2"}, {"name": "x", "digest": "1", "source": "there"}],
    )
    assert one == two != module.fingerprint({"a": 1, "b": [3]}, [])


def test_jobs_do_not_load_a_tracker(tmp_path):
    code = "import sys, halfstep.records.journal as t; t.environment(); sys.exit(bool({'mlflow', 'pandas', 'torch'} & sys.modules.keys()))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"SLURM_JOB_ID": "7"}
        ).returncode
        == 0
    )
    assert json.dumps(module.environment())

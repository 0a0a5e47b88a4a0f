"""`halfstep fetch`, offline, with a hub cache that the test makes."""

import hashlib
import os
import subprocess
import sys

import pytest
from questions import write_task

from halfstep.files import read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """HF_HOME with one model, in the layout of the hub's client. Returns the model's files."""
    model = tmp_path / "home/hub/models--some--judge"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    files = model / "snapshots" / COMMIT
    files.mkdir(parents=True)
    (files / "config.json").write_text('{"model_type": "gpt2"}')
    (files / "model.safetensors").write_bytes(b"weights")
    return files


def fetch(tmp_path, repository):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    call = [sys.executable, "-m", "halfstep.cli", "fetch"]
    call += ["--repositories", repository, "--output", str(tmp_path / "hub.json")]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)


def test_checksums_are_written_and_damage_is_found(hub, tmp_path):
    done = fetch(tmp_path, "model:some/judge")
    assert done.returncode == 0, done.stderr
    first = read_json(tmp_path / "hub.json")["model:some/judge"]
    assert first["version"] == COMMIT
    assert first["files"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    assert len(first["files"]) == 2
    assert (tmp_path / "hub.provenance.json").is_file()
    (hub / "model.safetensors").write_bytes(b"weightz")
    again = fetch(tmp_path, "model:some/judge")
    assert again.returncode == 1
    assert "damaged" in again.stderr
    assert read_json(tmp_path / "hub.json")["model:some/judge"] == first


@pytest.mark.parametrize("repository", ["model:other/judge", "dataset:other/text"])
def test_offline_is_one_sentence(hub, tmp_path, repository):
    done = fetch(tmp_path, repository)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"{repository}: not in the hub's cache" in done.stderr
    assert "a node with internet" in done.stderr
    assert not (tmp_path / "hub.json").exists()


def test_the_parquet_files_of_a_split_are_found(tmp_path):
    """In the hub's own conversion, from which zero-shot texts are read."""
    home = tmp_path / "home/hub/datasets--some--text"
    (home / "refs/refs/convert").mkdir(parents=True)
    (home / "refs/refs/convert/parquet").write_text(COMMIT)
    files = home / "snapshots" / COMMIT / "default/test"
    files.mkdir(parents=True)
    (files / "0000.parquet").write_bytes(b"rows")
    name = "parquet:some/text:default/test"
    done = fetch(tmp_path, name)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "hub.json")[name]
    digest = hashlib.sha256(b"rows").hexdigest()
    assert found == {"version": COMMIT, "files": {"default/test/0000.parquet": digest}}
    assert "not in the hub's cache" in fetch(tmp_path, "parquet:some/text:default/train").stderr


def test_the_data_of_a_task_are_prepared_where_datasets_finds_them_again(tmp_path):
    task = write_task(tmp_path, "mine", [{"question": "a", "choices": ["b", "c"], "label": 0}])
    done = fetch(tmp_path, f"task:{task}")
    assert done.returncode == 0, done.stderr
    files = read_json(tmp_path / "hub.json")[f"task:{task}"]["files"]
    assert any(name.endswith(".arrow") for name in files)


def test_a_data_set_is_prepared_where_datasets_finds_it_again(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    done = fetch(tmp_path, f"dataset:{tmp_path / 'text'}")
    assert done.returncode == 0, done.stderr
    files = read_json(tmp_path / "hub.json")[f"dataset:{tmp_path / 'text'}"]["files"]
    assert any(name.endswith(".arrow") for name in files)

"""`halfstep fetch` with a hub's cache made here, and offline."""

import hashlib
import os
import subprocess
import sys

import pytest

from halfstep.files import read_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    """HF_HOME with one model, as the hub's client lays it out."""
    model = tmp_path / "home/hub/models--some--judge"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    (model / "snapshots" / COMMIT / "config.json").write_text('{"model_type": "gpt2"}')
    (model / "snapshots" / COMMIT / "model.safetensors").write_bytes(b"weights")
    return model


def fetch(tmp_path, *repositories):
    environment = os.environ | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }
    call = [
        sys.executable,
        "-m",
        "halfstep.cli",
        "fetch",
        "--repositories",
        *repositories,
        "--output",
        str(tmp_path / "hub.json"),
    ]
    return subprocess.run(call, env=environment, capture_output=True, text=True, timeout=120)


def test_files_are_listed_with_checksums_and_damage_is_found(hub, tmp_path):
    done = fetch(tmp_path, "model:some/judge")
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "hub.json")["model:some/judge"]
    assert (
        found["version"] == COMMIT
        and found["files"]["model.safetensors"] == hashlib.sha256(b"weights").hexdigest()
    )
    assert len(found["files"]) == 2 and (tmp_path / "hub.provenance.json").is_file()
    (hub / "snapshots" / COMMIT / "model.safetensors").write_bytes(b"weightz")
    again = fetch(tmp_path, "model:some/judge")
    assert (
        again.returncode == 1
        and "damaged" in again.stderr
        and read_json(tmp_path / "hub.json")["model:some/judge"] == found
    )


@pytest.mark.parametrize("repository", ["model:other/judge", "dataset:other/text"])
def test_offline_is_one_sentence(hub, tmp_path, repository):
    done = fetch(tmp_path, repository)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        f"{repository}: not in the hub's cache" in done.stderr
        and "a node with internet" in done.stderr
        and not (tmp_path / "hub.json").exists()
    )


def test_a_data_set_is_prepared_as_datasets_finds_it_again(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    done = fetch(tmp_path, f"dataset:{tmp_path / 'text'}")
    assert done.returncode == 0, done.stderr
    files = read_json(tmp_path / "hub.json")[f"dataset:{tmp_path / 'text'}"]["files"]
    assert any(name.endswith(".arrow") for name in files)

"""`halfstep prepare-corpus`, whole: what it writes, and what it leaves behind when it fails."""

import json
import subprocess
import sys

import pytest

from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus
from halfstep.data.corpora import CORPORA
from halfstep.data.pack import Windows
from halfstep.data.stories import judge, judge_window, log_likelihood, sample_stories
from halfstep.errors import HalfstepError
from halfstep.files import sha256

STORIES = Corpus(
    kind="stories", length=128, vocab_size=640, num_documents=2500, validation_documents=60
)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    prepare_corpus(folder, STORIES, workers=1)
    return folder


def test_every_kind_of_the_configuration_has_a_reader():
    assert set(CORPORA) == set(Corpus.model_fields["kind"].annotation.__args__)


def test_the_folder_is_whole(stories):
    names = {
        "train.bin",
        "validation.bin",
        "tokenizer.json",
        "manifest.json",
        "validation.jsonl",
        "last_words.jsonl",
        "provenance.json",
    }
    assert {path.name for path in stories.iterdir()} == names
    manifest = json.loads((stories / "manifest.json").read_text())
    assert Corpus(**manifest["corpus"]) == STORIES
    assert manifest["tokenizer_sha256"] == sha256(stories / "tokenizer.json")
    for split, documents in (("train", 2500), ("validation", 60)):
        windows = Windows(stories, split)
        windows.verify()
        assert (
            len(windows) == manifest["splits"][split]["windows"]
            and manifest["splits"][split]["documents"] == documents
        )
        tokens = windows[list(range(len(windows)))]
        assert (
            (tokens[:, 0] == windows.eos_id).all()
            and (tokens[:, -1] == windows.eos_id).all()
            and tokens.max() < windows.vocab_size
        )


def test_windows_read_back_as_whole_stories(stories):
    from tokenizers import Tokenizer

    tokenizer, windows = (
        Tokenizer.from_file(str(stories / "tokenizer.json")),
        Windows(stories, "train"),
    )
    counts = [
        judge_window(tokenizer.decode(windows[i].tolist(), skip_special_tokens=False))
        for i in range(200)
    ]
    found, accepted, consistent = map(sum, zip(*counts, strict=True))
    assert found == accepted == consistent > 200


def test_held_out_text_is_kept(stories):
    texts = [
        json.loads(line)["text"] for line in (stories / "validation.jsonl").read_text().splitlines()
    ]
    assert len(texts) == 60 and all(
        judge(text).consistent and log_likelihood(text, "train") is None for text in texts
    )
    words = [json.loads(line) for line in (stories / "last_words.jsonl").read_text().splitlines()]
    assert [row["text"] + "." for row in words] == texts


def test_the_same_command_writes_the_same_bytes(stories, tmp_path):
    prepare_corpus(tmp_path, STORIES, workers=2)
    for path in set(stories.iterdir()) - {stories / "provenance.json"}:  # which says when
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_own_text_with_a_limit_holds_out_the_last(tmp_path):
    texts = list(sample_stories(100, 1))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    corpus = Corpus(
        kind="files",
        files=[f"{tmp_path}/*.jsonl"],
        text_field="body",
        length=32,
        vocab_size=400,
        num_documents=80,
        validation_documents=9,
    )
    prepare_corpus(tmp_path / "out", corpus, workers=1)
    kept = [
        json.loads(line)["text"]
        for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()
    ]
    assert kept == texts[71:80] and not (tmp_path / "out/last_words.jsonl").exists()


def test_a_failure_leaves_no_manifest_and_no_part(tmp_path):
    prepare_corpus(
        tmp_path,
        STORIES.model_copy(update={"num_documents": 50, "validation_documents": 10}),
        workers=1,
    )
    with pytest.raises(
        HalfstepError, match="train text is shorter than one window: .* expected at least 99998"
    ):
        prepare_corpus(
            tmp_path, STORIES.model_copy(update={"num_documents": 50, "length": 100_000}), workers=1
        )
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    with pytest.raises(
        HalfstepError,
        match="2 documents and validation_documents is 1000: nothing is left to train on",
    ):
        prepare_corpus(tmp_path, Corpus(kind="files", files=[str(tmp_path / "a.txt")]), workers=1)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(HalfstepError, match="manifest.json: no such file"):
        Windows(tmp_path, "train")


def test_the_command_line_says_one_sentence(tmp_path):
    run = [
        sys.executable,
        "-m",
        "halfstep.cli",
        "prepare-corpus",
        "--output",
        tmp_path,
        "--kind",
        "files",
        "--files",
        tmp_path / "no.txt",
    ]
    found = subprocess.run(run, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout == ""
    assert (
        found.stderr.startswith("halfstep prepare-corpus: files: ")
        and "matches nothing" in found.stderr
        and found.stderr.count("\n") == 1
    )


OFFLINE = """
import json, sys
from pathlib import Path
import datasets
from datasets import Dataset
root = Path(sys.argv[1])
rows = Dataset.from_dict({"text": [f"document number {i} says hello" for i in range(50)]})
rows.to_parquet(root / "rows.parquet")
made = datasets.load_dataset("parquet", data_files=str(root / "rows.parquet"), cache_dir=str(root / "made"), split="train")
source = Path(made.cache_files[0]["filename"]).parent
target = root / "cache/Skylion007___openwebtext/default/0.0.0" / source.name
target.parent.mkdir(parents=True)
source.rename(target)
(target / "parquet-train.arrow").rename(target / "openwebtext-train.arrow")
info = json.loads((target / "dataset_info.json").read_text())
(target / "dataset_info.json").write_text(json.dumps({**info, "dataset_name": "openwebtext", "config_name": "default"}))
"""


def test_openwebtext_offline(tmp_path):
    """A cache laid out as `datasets` lays it out is read, its last documents held out; without it, one sentence."""
    pytest.importorskip("datasets")
    import os

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    run = [
        sys.executable,
        "-m",
        "halfstep.cli",
        "prepare-corpus",
        "--output",
        tmp_path / "out",
        "--kind",
        "openwebtext",
    ]
    run += ["--length", "16", "--vocab-size", "300", "--validation-documents", "10"]
    refused = subprocess.run(run, capture_output=True, text=True, env=env)
    assert (
        refused.returncode == 1
        and "comes neither from the hub nor from the local cache" in refused.stderr.splitlines()[-1]
    )
    subprocess.run(
        [sys.executable, "-c", OFFLINE, tmp_path], check=True, capture_output=True, env=env
    )
    subprocess.run(run, check=True, capture_output=True, env=env)
    kept = [
        json.loads(line)["text"]
        for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()
    ]
    assert kept == [f"document number {i} says hello" for i in range(40, 50)]

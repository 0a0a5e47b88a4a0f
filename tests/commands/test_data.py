"""`halfstep prepare-corpus` as a whole: the files it writes, and what is left after a failure."""

import json
import os
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus
from halfstep.data.stories import (
    is_for_validation,
    judge,
    judge_window,
    log_likelihood,
    sample_stories,
)
from halfstep.data.windows import Windows
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


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_cli(*arguments, **how):
    command = [sys.executable, "-m", "halfstep.cli", "prepare-corpus", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **how)


def test_the_folder_is_complete(stories):
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
        windows, facts = Windows(stories, split), manifest["splits"][split]
        windows.verify()
        assert len(windows) == facts["windows"] and facts["documents"] == documents
        tokens = windows[list(range(len(windows)))]
        assert (tokens[:, [0, -1]] == windows.eos_id).all() and tokens.max() < windows.vocab_size


def test_windows_decode_to_whole_stories(stories):
    tokenizer = Tokenizer.from_file(str(stories / "tokenizer.json"))
    windows = Windows(stories, "train")[list(range(200))].tolist()
    texts = tokenizer.decode_batch(windows, skip_special_tokens=False)
    counts = map(sum, zip(*map(judge_window, texts), strict=True))
    found, accepted, consistent, sentences, known = counts
    assert found == accepted == consistent > 200 and sentences == known > found


def test_held_out_text_is_kept(stories):
    texts = [row["text"] for row in rows_of(stories / "validation.jsonl")]
    last_words = [row["text"] + "." for row in rows_of(stories / "last_words.jsonl")]
    assert len(texts) == len(last_words) == 60
    for text in texts:
        assert is_for_validation(text) and log_likelihood(text, "train") is not None
    for text in last_words:
        assert judge(text).consistent and log_likelihood(text, "train") is None


def test_the_same_command_writes_the_same_bytes(stories, tmp_path):
    prepare_corpus(tmp_path, STORIES, workers=2)
    for path in set(stories.iterdir()) - {stories / "provenance.json"}:  # it holds times
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name


def test_the_last_documents_below_a_limit_are_held_out(tmp_path):
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
    output = tmp_path / "out"
    prepare_corpus(output, corpus, workers=1)
    assert [row["text"] for row in rows_of(output / "validation.jsonl")] == texts[71:80]
    assert not (output / "last_words.jsonl").exists()


def test_a_failure_leaves_no_manifest_and_no_temporary_file(tmp_path):
    small = STORIES.model_copy(update={"num_documents": 50})
    held_out = small.model_copy(update={"validation_documents": 10})
    prepare_corpus(tmp_path, held_out, workers=1)
    message = "train text is shorter than one window: .* expected at least 99998"
    with pytest.raises(HalfstepError, match=message):
        prepare_corpus(tmp_path, small.model_copy(update={"length": 100_000}), workers=1)
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    message = "2 documents and validation_documents is 1000: nothing is left to train on"
    with pytest.raises(HalfstepError, match=message):
        prepare_corpus(tmp_path, Corpus(kind="files", files=[str(tmp_path / "a.txt")]), workers=1)
    assert not (tmp_path / "manifest.json").exists() and not list(tmp_path.glob(".*"))
    with pytest.raises(HalfstepError, match="manifest.json: no such file"):
        Windows(tmp_path, "train")


def test_an_error_on_the_command_line_is_one_line(tmp_path):
    found = run_cli("--output", tmp_path, "--kind", "files", "--files", tmp_path / "no.txt")
    assert found.returncode == 1 and found.stdout == ""
    assert found.stderr.startswith("halfstep prepare-corpus: files: ")
    assert "matches nothing" in found.stderr and found.stderr.count("\n") == 1


OFFLINE = """
import json, sys
from pathlib import Path
import datasets
from datasets import Dataset
root = Path(sys.argv[1])
rows = Dataset.from_dict({"text": [f"document number {i} says hello" for i in range(50)]})
rows.to_parquet(root / "rows.parquet")
made = datasets.load_dataset(
    "parquet", data_files=str(root / "rows.parquet"), cache_dir=str(root / "made"), split="train"
)
source = Path(made.cache_files[0]["filename"]).parent
target = root / "cache/Skylion007___openwebtext/default/0.0.0" / source.name
target.parent.mkdir(parents=True)
source.rename(target)
(target / "parquet-train.arrow").rename(target / "openwebtext-train.arrow")
info = json.loads((target / "dataset_info.json").read_text())
info |= {"dataset_name": "openwebtext", "config_name": "default"}
(target / "dataset_info.json").write_text(json.dumps(info))
"""


def test_what_was_asked_for_and_what_there_is_are_printed(tmp_path, capsys):
    small = STORIES.model_copy(update={"num_documents": 50, "validation_documents": 10})
    prepare_corpus(tmp_path, small.model_copy(update={"vocab_size": 5000}), workers=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    facts = manifest["splits"]["train"]
    share = facts["cut_windows"] / facts["windows"]
    tokenizer, train, _ = capsys.readouterr().out.splitlines()
    assert tokenizer == (
        f"{tmp_path}/tokenizer.json: {manifest['vocab_size']} tokens (vocab_size asks for 5,000)"
    )
    assert train.endswith(f"tokens; {share:.0%} of the windows end inside a document")


def test_openwebtext_offline(tmp_path):
    """A cache in the layout of `datasets` is read; without one, the error is one sentence."""
    pytest.importorskip("datasets")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    flags = ["--output", tmp_path / "out", "--kind", "openwebtext", "--length", "16"]
    flags += ["--vocab-size", "300", "--validation-documents", "10"]
    refused = run_cli(*flags, env=env)
    message = "comes neither from the hub nor from the local cache"
    assert refused.returncode == 1 and message in refused.stderr.splitlines()[-1]
    make_cache = [sys.executable, "-c", OFFLINE, tmp_path]
    subprocess.run(make_cache, check=True, capture_output=True, env=env)
    run_cli(*flags, check=True, env=env)
    kept = [row["text"] for row in rows_of(tmp_path / "out/validation.jsonl")]
    assert kept == [f"document number {i} says hello" for i in range(40, 50)]

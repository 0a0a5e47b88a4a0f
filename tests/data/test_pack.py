"""Packing against a naive oracle, for any workers and chunks; damage is found, memory constant."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from known import words_tokenizer
from tokenizers import Tokenizer

from halfstep.data import pack
from halfstep.data.pack import Spool
from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS, train_bpe
from halfstep.data.windows import Windows, layout_of
from halfstep.errors import HalfstepError
from halfstep.files import sha256

TOKENIZER = train_bpe(sample_stories(300, 1), 400)


def texts(count, seed=0):
    rng = random.Random(seed)
    odd, words = ["", f"says {EOS} inside", "é🙂", "a\n\nb"], ["kite", "Lily", "zzz", "."]

    def text():
        if rng.random() < 0.2:
            return rng.choice(odd)
        return " ".join(rng.choices(words, k=rng.randrange(60)))

    return [text() for _ in range(count)]


def write_corpus(path, documents, length=16, held_out=20, workers=1, tokenizer=TOKENIZER):
    with Spool(path / ".spool", documents) as spool:
        train = len(spool) - held_out
        splits = {"train": range(train), "validation": range(train, len(spool))}
        layout = layout_of({"length": length, "eos_id": 0})
        facts = pack.pack_windows(spool, tokenizer, layout, path, splits, workers)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    manifest = {
        "format": 1,
        "length": length,
        "dtype": pack.token_dtype(tokenizer),
        "vocab_size": tokenizer.get_vocab_size(),
        "eos_id": 0,
        "splits": facts,
        "tokenizer_sha256": sha256(path / "tokenizer.json"),
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return facts


def oracle(documents, length):
    """The joined stream, and its windows."""
    plain = Tokenizer.from_str(TOKENIZER.to_str())
    plain.encode_special_tokens = True
    stream = [token for text in documents for token in [*plain.encode(text).ids, 0]]
    step = length - 2
    return stream, [[0, *stream[i : i + step], 0] for i in range(0, len(stream) - step + 1, step)]


def all_tokens(windows):
    return windows[list(range(len(windows)))]


@pytest.mark.parametrize("chunk", [64, 4096, 1 << 20])
def test_windows_are_the_oracles(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(pack, "CHUNK", chunk)
    documents = texts(300)
    facts = write_corpus(tmp_path, documents)
    for split, part in (("train", documents[:-20]), ("validation", documents[-20:])):
        windows, (stream, expected) = Windows(tmp_path, split), oracle(part, 16)
        assert all_tokens(windows).tolist() == expected and len(windows) == len(expected)
        windows.verify()
        assert facts[split]["documents"] == stream.count(0) == len(part)
        assert facts[split]["tokens"] == len(stream)
        assert facts[split]["cut_windows"] == sum(window[-2] != 0 for window in expected)
        assert facts[split]["unknown_tokens"] == 0
    chosen = Windows(tmp_path, "train")[[3, 1]]
    assert chosen.dtype.is_signed and chosen.shape == (2, 16)
    names = ["manifest.json", "tokenizer.json", "train.bin", "validation.bin"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "CHUNK", 2048)  # many chunks, so that several are pending
    documents, facts = texts(2000), []
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        facts.append(write_corpus(tmp_path / str(workers), documents, workers=workers))
    assert facts[0] == facts[1] and facts[0]["train"]["windows"] > 1000
    assert (tmp_path / "1/train.bin").read_bytes() == (tmp_path / "2/train.bin").read_bytes()


def test_a_flipped_bit_is_found(tmp_path):
    write_corpus(tmp_path, texts(300))
    path = tmp_path / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with pytest.raises(HalfstepError, match="train.bin: sha256 is"):
        Windows(tmp_path, "train").verify()
    Windows(tmp_path, "validation").verify()
    path.write_bytes(raw[:-2])
    with pytest.raises(HalfstepError, match=f"found {len(raw) - 2} bytes, expected {len(raw)}"):
        Windows(tmp_path, "train")
    path.unlink()
    with pytest.raises(HalfstepError, match="found 0 bytes"):
        Windows(tmp_path, "train")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(HalfstepError, match="tokenizer.json: sha256"):
        Windows(tmp_path, "validation").verify()


def test_a_folder_that_is_no_corpus_is_an_error(tmp_path):
    with pytest.raises(HalfstepError, match="manifest.json: no such file"):
        Windows(tmp_path, "train")
    (tmp_path / "manifest.json").write_text('{"format": 2}')
    with pytest.raises(HalfstepError, match="format is 2, expected 1"):
        Windows(tmp_path, "train")


def test_tokens_of_a_large_vocabulary_take_four_bytes(tmp_path):
    tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
    tokenizer.add_tokens([f"word{i:05d}" for i in range(70_000)])
    write_corpus(tmp_path, ["word69999 word00001"] * 200, tokenizer=tokenizer)
    windows = Windows(tmp_path, "train")
    assert windows.vocab_size > 1 << 16
    assert windows.vocab_size - 1 in all_tokens(windows).flatten().tolist()


def test_a_split_shorter_than_a_window_is_an_error(tmp_path):
    message = (
        "validation text is shorter than one window: 40 tokens in 20 documents, "
        "expected at least 1022"
    )
    with pytest.raises(HalfstepError, match=message):
        write_corpus(tmp_path, ["Lily Lily Lily " * 20] * 200 + ["."] * 20, length=1024)
    assert not list(tmp_path.glob(".*"))


def test_a_failing_source_leaves_no_spool(tmp_path):
    def source():
        yield "one"
        raise HalfstepError("broken")

    with pytest.raises(HalfstepError, match="broken"), Spool(tmp_path / ".spool", source()):
        pass
    assert not list(tmp_path.iterdir())


def test_the_spool_returns_its_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "CHUNK", 100)
    documents = [*texts(100), "long " * 200, "lone \ud800 surrogate"]
    with Spool(tmp_path / ".spool", documents) as spool:
        assert list(spool.texts(0, len(spool))) == [*documents[:-1], "lone ? surrogate"]
        assert list(spool.texts(17, 42)) == documents[17:42]
        spread = list(spool.spread(80, spool.bytes // 3 + 1))
        assert spread == documents[:80:3]


MEASURE = """
import sys
from pathlib import Path
from halfstep.commands.data import prepare_corpus
from halfstep.config import Corpus
from halfstep.data import pack
pack.CHUNK = 1 << 16  # a large chunk would make a peak that hides growth elsewhere
files, tokenizer, output = sys.argv[1:]
corpus = Corpus(
    kind="files", files=[files], tokenizer=tokenizer, length=128, validation_documents=10
)
prepare_corpus(Path(output), corpus, workers=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc (Linux)"
)
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Eight times the text takes the same peak memory.

    It is read as VmHWM: ru_maxrss would be inherited from pytest and hide all growth.
    """
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    lines = [json.dumps({"text": text}) + "\n" for text in sample_stories(1000, 1)]
    peaks = []
    for times in (10, 80):
        path = tmp_path / f"{times}.jsonl"
        with open(path, "w") as file:
            for _ in range(times):
                file.writelines(lines)
        run = [sys.executable, "-c", MEASURE, path, tmp_path, tmp_path / "out"]
        env = {**os.environ, "RAYON_NUM_THREADS": "1"}
        found = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
        peaks.append(int(found.stdout.split()[-1]) / 1024)
        size = path.stat().st_size / 2**20
    message = f"peak of {peaks} MB for {size / 8:.0f} and {size:.0f} MB of text"
    assert size > 10 and peaks[1] - peaks[0] < 5, message


def test_windows_are_memory_mapped(tmp_path):
    write_corpus(tmp_path, texts(300))
    assert isinstance(Windows(tmp_path, "train")._tokens, np.memmap)


def test_unknown_tokens_are_counted(tmp_path):
    about = json.loads(words_tokenizer("the cat sat").to_str())
    about["model"]["unk_token"] = "cat"
    tokenizer = Tokenizer.from_str(json.dumps(about))
    facts = write_corpus(tmp_path, ["the cat sat", "the dog sat"] * 50, tokenizer=tokenizer)
    assert facts["train"]["unknown_tokens"] == 80 and facts["validation"]["unknown_tokens"] == 20

"""Texts for zero-shot perplexity: windows by hand, detokenizers by example, the hub's files."""

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from known import words_tokenizer

from halfstep.data.windows import layout_of
from halfstep.data.zero_shot import (
    DATA_SETS,
    LAMBADA,
    LM1B,
    PTB,
    WIKITEXT,
    cut_windows,
    detokenize,
    find_data_set,
    read_rows_of,
)
from halfstep.errors import HalfstepError


def layout(length, **framing):
    """Of our own corpora, or with a frame of a model of transformers."""
    return layout_of({"length": length, "eos_id": 0} | framing)


def test_windows_are_cut_from_the_joined_texts_and_the_rest_is_dropped():
    """EOS (0) after each text, at both ends of a window, and for an empty row."""
    tokenizer = words_tokenizer("a b c d e")
    windows = cut_windows(["a b", "", "c d e a", "b"], tokenizer, layout(5))
    assert windows.tolist() == [[0, 1, 2, 0, 0], [0, 0, 3, 4, 0], [0, 5, 1, 0, 0]]
    assert cut_windows(iter(["a b", "c"] * 9000), tokenizer, layout(5), most=2).shape == (2, 5)
    assert windows.dtype == np.int32


def test_a_text_shorter_than_a_window_is_one_shorter_window():
    tokenizer = words_tokenizer("a b")
    assert cut_windows(["a b"], tokenizer, layout(99)).tolist() == [[0, 1, 2, 0, 0]]


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_is_an_error(texts):
    with pytest.raises(HalfstepError, match="found no text"):
        cut_windows(texts, words_tokenizer("a"), layout(4))


@pytest.mark.parametrize(
    "rules, text, expected",
    [
        (WIKITEXT, " = = Robert Boulter = = ", " == Robert Boulter == "),
        (WIKITEXT, "well @-@ known 1 @,@ 000 , ( so ) on . \n", "well-known 1,000, (so) on.\n"),
        (WIKITEXT, 'He said " no " : 5 @.@ 5 ° C', 'He said "no": 5.5°C'),
        (PTB, "the company 's <unk> did n't N N $ 1", "the company's ? didn't 1 1 $1"),
        (PTB, "a N N \\/ b $ 1 # 1", "a 1 1 / b $1 #1"),
        (LM1B, "He said , no . Why ? Go !", "He said, no. Why? Go!"),
        (LM1B, 'a " b c " ( d ) $ 5 http : / / x', 'a "b c" (d) $5 http://x'),
        (LAMBADA, " “ so ” he said ", '\n" so " he said'),
    ],
)  # fmt: skip
def test_texts_are_joined_as_people_write_them(rules, text, expected):
    assert detokenize(text, rules) == expected


def test_names_of_data_sets():
    assert set(DATA_SETS) == set("ptb wikitext lm1b lambada ag_news pubmed arxiv".split())
    repository = "ptb-text-only/ptb_text_only"
    assert find_data_set("ptb").source == f"parquet:{repository}:penn_treebank/validation"
    assert find_data_set("owner/set").source == "parquet:owner/set:default/test"
    assert find_data_set("owner/set:en/train").source == "parquet:owner/set:en/train"
    for other in ("paloma_ptb", "texts/mine.txt", "mine.jsonl", "tasks/mine.yaml", "a/b/c"):
        assert find_data_set(other) is None


def test_rows_are_read_from_the_hubs_parquet_files_offline(tmp_path, monkeypatch):
    """In the layout of the hub's cache, with two files of one split."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub/datasets--ptb-text-only--ptb_text_only"
    (home / "refs/refs/convert").mkdir(parents=True)
    (home / "refs/refs/convert/parquet").write_text(commit)
    folder = home / "snapshots" / commit / "penn_treebank/validation"
    folder.mkdir(parents=True)
    for number, rows in enumerate((["no it was n't N", ""], ["black monday 's"])):
        table = pyarrow.table({"sentence": rows})
        pyarrow.parquet.write_table(table, folder / f"{number:04}.parquet")
    stored = huggingface_hub.snapshot_download

    def offline(*args, **options):
        return stored(*args, cache_dir=tmp_path / "hub", local_files_only=True, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    found = list(read_rows_of(DATA_SETS["ptb"]))
    assert found == ["no it wasn't N", "", "black monday's"]
    with pytest.raises(
        HalfstepError, match="cannot read plain_text/test of .*halfstep fetch --rep"
    ):
        next(read_rows_of(DATA_SETS["lm1b"]))

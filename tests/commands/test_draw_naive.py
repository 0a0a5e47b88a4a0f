"""draw-naive: matched entropies, folders as `generate` writes them, no stories for the grammar."""

import json
import re

import numpy as np
import pytest

from halfstep.commands.data import prepare_corpus
from halfstep.commands.draw_naive import draw_naive
from halfstep.commands.evaluate import read_samples, response_spans, score_samples
from halfstep.commands.variety import DATA_WINDOWS, Texts, held_out_texts
from halfstep.config import NAIVE, Corpus, Evaluation, Machine
from halfstep.data.stories import sample_stories
from halfstep.data.tokenizer import EOS
from halfstep.data.windows import Windows, corpus_tokenizer
from halfstep.files import read_json
from halfstep.metrics.diversity import unigram_entropy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Windows of 64 tokens from 400 stories."""
    folder = tmp_path_factory.mktemp("naive") / "stories"
    sizes = {"num_documents": 400, "validation_documents": 200}
    prepare_corpus(folder, Corpus(kind="stories", length=64, vocab_size=640, **sizes), workers=1)
    return folder


@pytest.fixture(scope="module")
def drawn(corpus):
    """The folder naive of a teacher t, with 100 texts of each sampler."""
    folder = corpus.parent / "samples" / "t" / "naive"
    draw_naive(corpus, folder, num_samples=100)
    return folder


@pytest.mark.parametrize("name", ["unigram", "bigram"])
def test_entropies_are_those_of_held_out_text_within_the_standard_error(corpus, drawn, name):
    ids, facts = read_samples(drawn / name)
    found, wanted = unigram_entropy(ids), unigram_entropy(held_out_texts(corpus, DATA_WINDOWS).ids)
    error = np.hypot(found.std() / len(found) ** 0.5, wanted.std() / len(wanted) ** 0.5)
    assert abs(found.mean() - wanted.mean()) < error
    assert facts["entropy"] == pytest.approx(found.mean())
    assert facts["held_out_entropy"] == pytest.approx(wanted.mean())
    assert 0.2 < facts["fitted_temperature"] < 5


def test_texts_are_windows_of_the_corpus_and_depend_on_the_seed_alone(corpus, drawn, tmp_path):
    eos_id = read_json(corpus / "manifest.json")["eos_id"]
    draw_naive(corpus, tmp_path / "t" / "naive", num_samples=100)
    draw_naive(corpus, tmp_path / "u" / "naive", num_samples=100, sampling_seed=2)
    for name in NAIVE:
        ids, facts = read_samples(drawn / name)
        assert ids.shape == (100, 64) and (ids[:, [0, -1]] == eos_id).all()
        assert facts["model"] == f"t/{name}" and facts["steps"] is None
        np.testing.assert_array_equal(ids, read_samples(tmp_path / "t" / "naive" / name)[0])
        assert (ids != read_samples(tmp_path / "u" / "naive" / name)[0]).any()
    assert (drawn / "provenance.json").is_file()


def test_pasted_texts_hold_training_sentences_alone(corpus, drawn):
    """The last sentence of a pasted text is cut; all others are in the training text."""
    tokenizer = corpus_tokenizer(corpus)

    def sentences(ids):
        text = tokenizer.decode(ids, skip_special_tokens=False).replace(EOS, " ")
        return [part.strip() for part in re.split(r"(?<=\.) |(?<=!\") ", text)]

    windows = np.fromfile(corpus / "train.bin", np.uint16).reshape(-1, 64)
    known = set(sentences(windows[:, 1:-1].ravel().tolist()))
    pasted = read_samples(drawn / "cut_and_paste")[0]
    for ids in pasted.tolist():
        *whole, _ = sentences(ids[1:-1])
        assert whole and set(whole) <= known


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A corpus of 300 pairs, of which 40 are held out: first sentences, and the rest of stories."""
    root = tmp_path_factory.mktemp("naive-pairs")
    stories = [story.partition(". ") for story in sample_stories(300, 3)]
    rows = [{"prompt": f"{start}.", "response": rest} for start, _, rest in stories]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"vocab_size": 640, "length": 96, "validation_documents": 40}
    corpus = Corpus(kind="pairs", files=[str(root / "pairs.jsonl")], **sizes)
    prepare_corpus(root / "pairs", corpus, workers=1)
    return root / "pairs"


def test_of_pairs_the_words_of_held_out_responses_are_replaced(pairs, tmp_path):
    """So prompts and lengths are those of the samples of models, and a judge compares the rest."""
    draw_naive(pairs, tmp_path / "t" / "naive", num_samples=60)
    held_out, train = Windows(pairs, "validation"), Windows(pairs, "train")
    rows = np.arange(60) % len(held_out)
    windows = held_out[rows].numpy()
    words = held_out.words(rows, windows)
    assert words.any(1).all() and (windows[~words] != held_out.eos_id).any()
    every = np.arange(len(train))
    known = set(train[every].numpy()[train.words(every, train[every].numpy())].tolist())
    for name in NAIVE:
        ids, facts = read_samples(tmp_path / "t" / "naive" / name)
        np.testing.assert_array_equal(ids[~words], windows[~words])
        assert (ids[words] != windows[words]).mean() > 0.5
        assert held_out.eos_id not in ids[words]
        assert name == "cut_and_paste" or set(ids[words].tolist()) <= known
        spans = response_spans(held_out, ids, tmp_path)
        np.testing.assert_array_equal(spans, held_out.spans(rows, windows))
        counted = Texts(ids, {}, spans).counted
        assert facts["entropy"] == pytest.approx(unigram_entropy(counted).mean())
        if name != "cut_and_paste":
            assert facts["entropy"] == pytest.approx(facts["held_out_entropy"], abs=0.01)


def test_an_entropy_that_is_not_reached_is_said(corpus, tmp_path, capsys):
    draw_naive(corpus, tmp_path / "t" / "naive", num_samples=100)
    said = capsys.readouterr()
    assert "unigram at temperature" in said.out and "not reached" not in said.out
    assert "note: cut_and_paste: entropy" in said.err and "not reached" in said.err


def test_naive_samplers_have_rows_and_lose_on_the_grammar(world, corpus, drawn, tmp_path):
    evaluation = Evaluation(judge=str(world.models / "baseline" / "hf"), bootstrap=100)
    folders = [drawn / name for name in NAIVE]
    machine = Machine(device="cpu", threads=1)
    score_samples(folders, corpus, tmp_path / "samples.json", evaluation, machine)
    rows = read_json(tmp_path / "samples.json")
    for name in NAIVE:
        mine = {row["metric"]: row for row in rows if row["run"] == name}
        assert {row["teacher"] for row in mine.values()} == {"t"}
        assert {(row["steps"], row["weights"]) for row in mine.values()} == {(None, None)}
        assert mine["accepted_share"]["value"] < 0.05
        assert mine["consistent_share"]["value"] < 0.05
        assert not {"distinct_stories", "fact_divergence"} & mine.keys()
        assert "sample_mauve" in mine and "generative_perplexity" in mine

"""Naive samplers: draws follow the counts, temperatures meet the entropy, sentences are whole."""

import re

import numpy as np
import pytest
from known import words_tokenizer
from scipy.stats import chisquare

from halfstep.data.naive import (
    COLDEST,
    HOTTEST,
    bigram_texts,
    count_bigrams,
    count_unigrams,
    find_sentences,
    fit_temperature,
    unigram_texts,
)

STREAM = np.random.default_rng(0).choice(7, 500, p=[0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02])


def dense_counts(stream, size):
    """The table of the ring's bigrams, [size, size]."""
    table = np.zeros((size, size))
    for before, after in zip(stream, np.roll(stream, -1), strict=True):
        table[before, after] += 1
    return table


@pytest.mark.parametrize("chunk", [7, 100, 1 << 22])
def test_bigrams_are_those_of_a_dense_table_whatever_the_chunk(monkeypatch, chunk):
    monkeypatch.setattr("halfstep.data.naive.CHUNK", chunk)
    found = count_bigrams(STREAM, 50_000)
    table = np.zeros((7, 7))
    table[found.contexts, found.tokens] = found.counts
    np.testing.assert_array_equal(table, dense_counts(STREAM, 7))
    assert (found.counts > 0).all()
    unigrams = count_unigrams(STREAM)
    np.testing.assert_array_equal(table.sum(0), unigrams.counts)
    np.testing.assert_array_equal(table.sum(1), unigrams.counts)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_bigram_draws_follow_the_sharpened_counts(temperature):
    """Chi-square of the successors of each token, at a level of one in ten thousand."""
    laws = count_unigrams(STREAM).at(temperature), count_bigrams(STREAM, 7).at(temperature)
    ids = bigram_texts(*laws, np.random.default_rng(1).random((400, 60)))
    p = dense_counts(STREAM, 7) ** (1 / temperature)
    for token in range(7):
        successors = ids[:, 1:][ids[:, :-1] == token]
        found = np.bincount(successors, minlength=7)
        possible = p[token] > 0
        expected = p[token, possible] / p[token].sum() * len(successors)
        assert not found[~possible].any()
        assert chisquare(found[possible], expected).pvalue > 1e-4
    first = np.bincount(ids[:, 0], minlength=7)
    alone = np.bincount(STREAM) ** (1 / temperature)
    assert chisquare(first, alone / alone.sum() * len(ids)).pvalue > 1e-4


def test_a_cold_law_takes_the_most_frequent_token_and_a_hot_one_all_alike():
    u = np.random.default_rng(2).random((4, 5000))
    assert (unigram_texts(count_unigrams(STREAM).at(0.01), u) == 0).all()
    found = np.bincount(unigram_texts(count_unigrams(STREAM).at(1e6), u).ravel())
    assert chisquare(found).pvalue > 1e-4


def test_the_temperature_is_where_the_entropy_is_the_wanted_one():
    assert fit_temperature(lambda t: 2 * np.log(t), np.log(9.0)) == pytest.approx(3, rel=1e-4)
    assert fit_temperature(lambda t: t, 99.0) == HOTTEST
    assert fit_temperature(lambda t: t, 0.001) == COLDEST


TEXT = "A cat sat . The dog ran ! 'No .' EOS Why ? EOS We left"


@pytest.fixture
def pasted():
    tokenizer = words_tokenizer(TEXT)
    eos = tokenizer.token_to_id("EOS")
    return find_sentences(np.array(tokenizer.encode(TEXT).ids), tokenizer, eos), tokenizer, eos


def test_sentences_end_at_stops_and_keep_the_end_of_their_document(pasted):
    sentences, tokenizer, _ = pasted
    parts = np.split(sentences.stream, sentences.bounds[1:-1])
    words = [" ".join(tokenizer.id_to_token(i) for i in part) for part in parts]
    words[-1] = words[-1].removesuffix(" We left")
    assert words == ["A cat sat .", "The dog ran !", "'No .' EOS", "Why ? EOS"]
    stream = np.array([5, 6, 7])
    alone = find_sentences(stream, words_tokenizer("a b c d e f g h i"), 8)
    np.testing.assert_array_equal(alone.bounds, [0, 3])


def test_pasted_texts_hold_only_whole_sentences_and_all_of_them(pasted):
    sentences, tokenizer, _ = pasted
    ids = sentences.paste(600, np.random.default_rng(0))
    assert ids == sentences.paste(600, np.random.default_rng(0)) and len(ids) == 600
    text = " ".join(tokenizer.id_to_token(i) for i in ids)
    whole = re.split(r"(?<=sat \.) |(?<=ran !) |(?<=EOS) ", text)[:-1]
    assert set(whole) == {"A cat sat .", "The dog ran !", "'No .' EOS", "Why ? EOS"}
    counts = [whole.count(sentence) for sentence in sorted(set(whole))]
    assert chisquare(counts).pvalue > 1e-4

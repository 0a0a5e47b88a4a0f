"""Repetition, distinct texts and the divergence of facts: by hand, and unbiased under the law."""

from math import log

import numpy as np
import pytest

from halfstep.metrics.diversity import (
    distinct,
    distinct_in_groups,
    divergence_from_laws,
    repetition,
    self_bleu,
    unigram_entropy,
)


def test_repetition_by_hand():
    ids = np.array([[1, 2, 3, 4, 1, 2, 3, 4, 1], [1] * 9, [1, 2, 3, 4, 5, 6, 7, 8, 9]])
    np.testing.assert_allclose(repetition(ids), [2 / 6, 5 / 6, 0])


@pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts")
@pytest.mark.parametrize("tokens, length, texts", [(2, 3, 2), (3, 10, 5), (50, 40, 4), (5, 64, 5)])
def test_self_bleu_has_the_bits_of_nltk(tokens, length, texts):
    """Which counts the smallest float instead of 0 where no n-gram is common."""
    from nltk.translate.bleu_score import sentence_bleu

    ids = np.random.default_rng(length).integers(0, tokens, (20, texts, length))
    expected = []
    for group in ids.tolist():
        others = [group[:i] + group[i + 1 :] for i in range(texts)]
        found = [sentence_bleu(*pair) for pair in zip(others, group, strict=True)]
        expected.append(100 * np.mean([value if value > 1e-50 else 0.0 for value in found]))
    assert self_bleu(ids).tolist() == expected


@pytest.mark.filterwarnings("ignore:\\nThe hypothesis contains 0 counts")
def test_texts_of_several_lengths_have_nltks_bits_too():
    """A text that is shorter than its nearest reference has a penalty; one token has no bigram."""
    from nltk.translate.bleu_score import sentence_bleu

    rng = np.random.default_rng(1)
    groups = [[rng.integers(0, 3, n) for n in rng.integers(1, 20, 5)] for _ in range(20)]
    expected = []
    for group in groups:
        texts = [text.tolist() for text in group]
        found = [sentence_bleu(texts[:i] + texts[i + 1 :], own) for i, own in enumerate(texts)]
        expected.append(100 * np.mean([value if value > 1e-50 else 0.0 for value in found]))
    assert self_bleu(groups).tolist() == expected
    texts = [np.array([1, 1, 1]), np.array([1, 2]), np.array([4])]
    np.testing.assert_allclose(unigram_entropy(texts), [0, log(2), 0])
    np.testing.assert_allclose(distinct(texts, 2), [1 / 2, 1, 1])


def test_texts_are_counted_in_full_groups():
    assert distinct_in_groups(list("aabcdeaf"), 4) == (3 + 4, 8)
    assert distinct_in_groups(list("aabcdea"), 4) == (3, 4)
    assert distinct_in_groups(list("aab"), 4) == (0, 0)
    # The share does not fall with the number of texts.
    assert distinct_in_groups(list("abab" * 25), 4) == (50, 100)


def test_divergence_by_hand():
    """All texts have the first option of two equal ones: log 2, less the share of chance."""
    counts = [np.array([[1.0, 0.0]] * 50), np.array([[1.0, 1.0]] * 50)]
    laws = [np.array([0.5, 0.5])] * 2
    chance = (1 / 100 + 1 / 200) / 2
    value, interval = divergence_from_laws(counts, laws, 100)
    assert value == pytest.approx(log(2) / 2 - chance)
    assert interval[0] <= value <= interval[1]


@pytest.mark.parametrize("number", [30, 200])
def test_under_the_law_the_divergence_is_zero_within_its_interval(number):
    """Without the correction, the mean would be 7 / (2 number)."""
    law = np.array([0.3, 0.2, 0.15, 0.1, 0.1, 0.05, 0.05, 0.05])
    rng = np.random.default_rng(0)
    covered, raw = [], []
    for _ in range(60):
        counts = rng.multinomial(1, law, number).astype(float)
        value, (low, _) = divergence_from_laws([counts], [law], 100)
        covered.append(low == 0)
        raw.append(value)
    assert np.mean(covered) > 0.9 and np.median(raw) < 0.3 * 7 / (2 * number)


def test_a_sharpened_law_diverges_by_what_it_should():
    law = np.array([0.4, 0.3, 0.2, 0.1])
    sharp = law**2 / (law**2).sum()
    expected = (sharp * np.log(sharp / law)).sum()
    rng = np.random.default_rng(1)
    found = [
        divergence_from_laws([rng.multinomial(1, sharp, 150).astype(float)], [law], 100)
        for _ in range(60)
    ]
    assert np.mean([value for value, _ in found]) == pytest.approx(expected, abs=0.02)
    assert np.mean([low <= expected <= high for _, (low, high) in found]) > 0.85

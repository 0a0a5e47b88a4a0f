"""Diversity of token ids, one number per text; without it, a low perplexity means little."""

from __future__ import annotations

import warnings

import numpy as np


def unigram_entropy(ids: np.ndarray) -> np.ndarray:
    """Entropy of the token counts inside each text ids[N, L], in nats: [N].

    H = -sum_v (n_v / L) log (n_v / L)

    The measure of MDLM's and SDTT's follow-ups: 0 for a text that repeats one token, log L for a
    text without repetition.
    """
    return np.array([_entropy(np.unique(text, return_counts=True)[1]) for text in ids])


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def distinct(ids: np.ndarray, n: int) -> np.ndarray:
    """Share of different n-grams among all n-grams of each text ids[N, L]: [N].

    For groups of texts ids[N, K, L], the n-grams of a group are counted together. This is
    distinct-n (Li et al., arXiv 1510.03055) within a text instead of over all texts, so their
    number does not lower it.
    """
    grams = np.lib.stride_tricks.sliding_window_view(ids, n, axis=-1).reshape(len(ids), -1, n)
    return np.array([len(np.unique(text, axis=0)) / len(text) for text in grams])


def self_bleu(ids: np.ndarray) -> np.ndarray:
    """Self-BLEU of each prompt's continuations ids[P, K, C]: [P] in 0..100; low is diverse.

    100 mean_i BLEU-4(x_i | the other K - 1)

    Texygen's measure (Zhu et al., arXiv 1802.01886) within a prompt, as in SDTT
    section 4.1. BLEU is nltk's sentence_bleu: n-grams of 1 to 4 with equal weights, clipped counts,
    brevity penalty, no smoothing. Its words are the model's tokens.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns when BLEU is 0
        return np.array([100 * np.mean(_bleu_of_each(texts)) for texts in ids.tolist()])


def _bleu_of_each(texts: list[list[int]]) -> list[float]:
    """BLEU-4 of each text with the others as references."""
    from nltk.translate.bleu_score import sentence_bleu

    scores = [sentence_bleu(texts[:i] + texts[i + 1 :], text) for i, text in enumerate(texts)]
    # Without a common n-gram nltk counts the smallest float instead of 0.
    return [score if score > 1e-50 else 0.0 for score in scores]

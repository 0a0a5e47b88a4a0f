"""Diversity of texts and of their token ids; without it, a low perplexity means little."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from halfstep.metrics.intervals import bootstrap


def unigram_entropy(ids: Sequence[np.ndarray]) -> np.ndarray:
    """Entropy of the token counts inside each text of ids, N arrays of L tokens, in nats: [N].

    H = -sum_v (n_v / L) log (n_v / L)

    The measure of MDLM's and SDTT's follow-ups: 0 for a text that repeats one token, log L for a
    text without repetition.
    """
    return np.array([_entropy(np.unique(text, return_counts=True)[1]) for text in ids])


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def distinct(ids: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Share of different n-grams among all n-grams of each text of ids, N arrays [L]: [N].

    For groups of texts, N arrays [K, L], the n-grams of a group are counted together. A text
    without an n-gram repeats nothing: 1. This is distinct-n (Li et al., arXiv 1510.03055) within a
    text instead of over all texts, so their number does not lower it.
    """
    return np.array([_distinct(text, n) for text in ids])


def _distinct(text: np.ndarray, n: int) -> float:
    if text.shape[-1] < n:
        return 1.0
    grams = np.lib.stride_tricks.sliding_window_view(text, n, axis=-1).reshape(-1, n)
    return len(np.unique(grams, axis=0)) / len(grams)


def repetition(ids: Sequence[np.ndarray], n: int = 4) -> np.ndarray:
    """Share of the n-grams of each text of ids, N arrays [L], that occurred before in it: [N]."""
    return 1 - distinct(ids, n)


def distinct_in_groups(texts: Sequence[str], size: int) -> tuple[int, int]:
    """Numbers of different texts and of all texts, counted in groups of `size` texts in order.

    Equal texts count once in their group. Texts after the last full group are left out. So the
    share does not fall with the number of texts.
    """
    groups = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
    return sum(len(set(group)) for group in groups), size * len(groups)


def divergence_from_laws(
    counts: Sequence[np.ndarray], laws: Sequence[np.ndarray], resamples: int
) -> tuple[float, tuple[float, float]]:
    """Mean over facts of KL(found || law) in nats, and its 95% bootstrap interval over texts.

        KL = sum_k q_k log(q_k / p_k),   q = n / sum n,   n = sum of counts over the texts

    By chance q differs from p also where the law holds: KL is (K - 1) / (2 sum n) on average
    (Miller, 1955). This is subtracted, from the resampled values twice, because these differ once
    more by chance. Values below 0 become 0.

    Args:
        counts: for each fact [N, K], how often each text has each option
        laws: for each fact P(option) [K]
        resamples: number of bootstrap resamples
    """
    sizes = np.cumsum([len(law) for law in laws])[:-1]
    stories = [max(found.sum(), 1) for found in counts]
    chance = np.mean([(len(p) - 1) / 2 / n for n, p in zip(stories, laws, strict=True)])

    def plug_in(*means: float) -> float:
        found = np.split(np.array(means), sizes)
        return float(np.mean([_kl(n, p) for n, p in zip(found, laws, strict=True)]))

    table = np.concatenate(counts, 1)
    value = plug_in(*table.mean(0)) - chance
    low, high = (end - 2 * chance for end in bootstrap(table, plug_in, resamples))
    low, high = min(low, value), max(high, value)
    return max(value, 0.0), (max(low, 0.0), max(high, 0.0))


def _kl(counts: np.ndarray, law: np.ndarray) -> float:
    """KL(counts / sum || law); 0 for no counts at all."""
    found = counts > 0
    q = counts[found] / counts.sum()
    return float((q * np.log(q / law[found])).sum())


def self_bleu(groups: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Self-BLEU of P groups of K texts, such as a prompt's continuations: [P]; low is diverse.

    100 mean_i BLEU-4(x_i | the other K - 1)

    Texygen's measure (Zhu et al., arXiv 1802.01886) within a prompt, as in SDTT section 4.1. BLEU
    (Papineni et al., 2002) is that of nltk's sentence_bleu: n-grams of 1 to 4 with equal weights,
    clipped counts, no smoothing. Its words are the model's tokens. Values are 0 to 100.
    """
    return np.array(
        [100 * np.mean(_bleu_of_each([text.tolist() for text in texts])) for texts in groups]
    )


def _bleu_of_each(texts: list[list[int]]) -> list[float]:
    """BLEU-4 of each text with the others as references."""
    precisions = zip(*(_clipped_precisions(texts, n) for n in range(1, 5)), strict=True)
    lengths, found = [len(text) for text in texts], []
    for i, of_text in enumerate(precisions):
        own, others = lengths[i], lengths[:i] + lengths[i + 1 :]
        _, nearest = min((abs(other - own), other) for other in others)
        brevity = min(1.0, math.exp(1 - nearest / own))
        mean = math.fsum(math.log(p) / 4 for p in of_text) if all(of_text) else -math.inf
        found.append(brevity * math.exp(mean))
    return found


def _clipped_precisions(texts: list[list[int]], n: int) -> list[float]:
    """Of each text the share of its n-grams that another text has, at most as often as there."""
    counts = [Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in texts]
    found = []
    for i, own in enumerate(counts):
        others = counts[:i] + counts[i + 1 :]
        matched = sum(min(own[gram], max(other[gram] for other in others)) for gram in own)
        found.append(matched / max(1, own.total()))
    return found

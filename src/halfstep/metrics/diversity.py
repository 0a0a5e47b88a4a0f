"""Diversity of texts, measured on token ids, one number per text: what a low perplexity must be read beside."""

import numpy as np


def unigram_entropy(ids: np.ndarray) -> np.ndarray:
    """Entropy in nats of the token counts inside each text, H = -sum_v (n_v / L) log (n_v / L); ids[N, L] -> [N].

    The measure of MDLM's and SDTT's follow-ups: 0 for a text of one token repeated, log L for a text with no repetition.
    """
    return np.array([_entropy(np.unique(text, return_counts=True)[1]) for text in ids])


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def distinct(ids: np.ndarray, n: int) -> np.ndarray:
    """Share of different n-grams among the n-grams of each text; ids[N, L] -> [N].

    distinct-n (Li et al., arXiv 1510.03055) within a text rather than over all texts, so it does not fall with their number.
    """
    grams = np.lib.stride_tricks.sliding_window_view(ids, n, axis=1)
    return np.array([len(np.unique(text, axis=0)) / len(text) for text in grams])

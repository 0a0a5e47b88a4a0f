"""Diversity of texts, measured on token ids, one number per text: what a low perplexity must be read beside."""

import warnings

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
    """Share of different n-grams among the n-grams of each text ids[N, L], or of each group of texts ids[N, K, L]; [N].

    distinct-n (Li et al., arXiv 1510.03055) within a text rather than over all texts, so it does not fall with their number.
    """
    grams = np.lib.stride_tricks.sliding_window_view(ids, n, axis=-1).reshape(len(ids), -1, n)
    return np.array([len(np.unique(text, axis=0)) / len(text) for text in grams])


def self_bleu(ids: np.ndarray) -> np.ndarray:
    """Self-BLEU of each prompt's continuations ids[P, K, C] -> [P] in 0..100: the mean over i of BLEU-4(x_i | the other K - 1), times 100.

    Low is diverse. Texygen's measure (Zhu et al., arXiv 1802.01886) within a prompt, as in SDTT section 4.1. BLEU is nltk's sentence_bleu: n-grams
    of 1 to 4 with equal weights, clipped counts, brevity penalty, no smoothing. Its words are the model's own tokens.
    """
    from nltk.translate.bleu_score import sentence_bleu

    def bleu(texts: list[list[int]], i: int) -> float:
        score = sentence_bleu(texts[:i] + texts[i + 1 :], texts[i])
        return (
            score if score > 1e-50 else 0.0
        )  # where no n-gram recurs nltk counts the smallest float

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nltk, that BLEU is 0
        return np.array(
            [100 * np.mean([bleu(texts, i) for i in range(len(texts))]) for texts in ids.tolist()]
        )

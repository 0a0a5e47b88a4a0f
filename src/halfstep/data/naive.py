"""Naive samplers: texts from the counts and the sentences of a corpus, without a network.

A metric by which they rank above a model is no evidence of quality (arXiv 2606.08417).

    unigram        every token alone:      P(x) ~ n(x) ** (1 / T)
    bigram         every token by the one before it:      P(x | y) ~ n(y x) ** (1 / T)
    cut_and_paste  sentences of the corpus in random order

Of pairs they are written in place of the words of held-out responses, from training responses.

n counts the training split. T has no other purpose than the entropy of the texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from halfstep.data.tokenizer import encode_texts
from halfstep.data.windows import Windows

MOST_TOKENS = 1 << 25  # of the training split that are counted: its first ones
CHUNK = 1 << 22  # tokens counted at a time
COLDEST, HOTTEST = 1 / 16, 16.0  # temperatures of the search
HALVINGS = 24  # of the search
QUOTES = "\"')]”’»"  # may follow the stop of a sentence


def training_stream(corpus: Path) -> np.ndarray:
    """The tokens of a corpus's training split, without the frames of its windows: [N] int64.

    They are the first MOST_TOKENS at most; of pairs, the responses without their end-of-text.
    """
    windows = Windows(corpus, "train")
    inside = windows.layout.framing.inside(windows.length)
    most = max(1, MOST_TOKENS // windows.layout.room)
    found = windows[:most].numpy()
    words = windows.words(np.arange(len(found)), found)
    return found[:, inside].flatten() if words is None else found[words]


@dataclass(frozen=True)
class NgramCounts:
    """How often each token follows each context, without the zeros; sorted by context."""

    contexts: np.ndarray
    """[M] int64"""
    tokens: np.ndarray
    """[M] int64"""
    counts: np.ndarray
    """[M] float64, above 0"""

    def at(self, temperature: float) -> Law:
        """The law P(token | context) ~ count ** (1 / temperature)."""
        first = np.flatnonzero(np.diff(self.contexts, prepend=-1))
        sizes = np.diff(first, append=len(self.contexts))
        largest = np.maximum.reduceat(self.counts, first)
        p = (self.counts / largest.repeat(sizes)) ** (1 / temperature)
        p /= np.add.reduceat(p, first).repeat(sizes)
        return Law(self.contexts[first], first, sizes, self.tokens, p.cumsum())


@dataclass(frozen=True)
class Law:
    """P(token | context) of K contexts, ready for draws."""

    contexts: np.ndarray
    """[K], ascending"""
    first: np.ndarray
    """[K]: the place of each context's first token"""
    sizes: np.ndarray
    """[K]: the number of each context's tokens"""
    tokens: np.ndarray
    """[M]"""
    sums: np.ndarray
    """[M]: the sum of P up to and with each token; a context adds 1"""

    def draw(self, contexts: np.ndarray, u: np.ndarray) -> np.ndarray:
        """One token for each of contexts[...], by uniforms u of the same shape."""
        row = np.searchsorted(self.contexts, contexts)
        place = np.searchsorted(self.sums, row + u, side="right")
        # Sums are rounded: a draw stays among the tokens of its context.
        place = np.clip(place, self.first[row], self.first[row] + self.sizes[row] - 1)
        return self.tokens[place]


def count_unigrams(stream: np.ndarray) -> NgramCounts:
    """n(x) of stream[N]; the only context is 0."""
    tokens, counts = np.unique(stream, return_counts=True)
    return NgramCounts(np.zeros_like(tokens), tokens, counts.astype(np.float64))


def count_bigrams(stream: np.ndarray, vocab_size: int) -> NgramCounts:
    """n(y x) of stream[N], whose last token is followed by its first one.

    So every token has a successor, and n(x) is the law that the chain of bigrams keeps.
    """
    pairs, counts = np.zeros(0, np.int64), np.zeros(0)
    for start in range(0, len(stream), CHUNK):
        before = stream[start : start + CHUNK]
        after = stream[start + 1 : start + CHUNK + 1]
        if len(after) < len(before):
            after = np.append(after, stream[0])
        found, times = np.unique(before * vocab_size + after, return_counts=True)
        pairs, place = np.unique(np.concatenate([pairs, found]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times]))
    return NgramCounts(pairs // vocab_size, pairs % vocab_size, counts)


def unigram_texts(unigrams: Law, u: np.ndarray) -> np.ndarray:
    """Texts [N, L] of single tokens, by uniforms u[N, L]."""
    return unigrams.draw(np.zeros(u.shape, np.int64), u)


def bigram_texts(unigrams: Law, bigrams: Law, u: np.ndarray) -> np.ndarray:
    """Texts [N, L] of the chain of bigrams, by uniforms u[N, L]; the first token is a unigram."""
    ids = np.empty(u.shape, np.int64)
    ids[:, 0] = unigram_texts(unigrams, u[:, 0])
    for i in range(1, u.shape[1]):
        ids[:, i] = bigrams.draw(ids[:, i - 1], u[:, i])
    return ids


def fit_temperature(entropy_at: Callable[[float], float], wanted: float) -> float:
    """The temperature where the entropy is the wanted one, by bisection of its logarithm.

    An entropy that is not reached gives COLDEST or HOTTEST.
    """
    if entropy_at(COLDEST) >= wanted:
        return COLDEST
    if entropy_at(HOTTEST) <= wanted:
        return HOTTEST
    low, high = np.log(COLDEST), np.log(HOTTEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if entropy_at(float(np.exp(middle))) < wanted:
            low = middle
        else:
            high = middle
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Sentences:
    """The sentences of a stream of tokens: they end at a stop, or with their document."""

    stream: np.ndarray
    """[N] int64"""
    bounds: np.ndarray
    """[S + 1]: sentence i is stream[bounds[i] : bounds[i + 1]], with its EOS if it has one"""
    tokenizer: Tokenizer
    eos_id: int

    def paste(self, length: int, rng: np.random.Generator) -> list[int]:
        """`length` tokens of sentences in random order, joined by blanks.

        A document ends after a sentence that ended one.
        """
        ids: list[int] = []
        while len(ids) < length:
            chosen = int(rng.integers(len(self.bounds) - 1))
            sentence = self.stream[self.bounds[chosen] : self.bounds[chosen + 1]].tolist()
            text = self.tokenizer.decode([token for token in sentence if token != self.eos_id])
            inside = ids and ids[-1] != self.eos_id
            blank = " " if inside else ""
            added = encode_texts(self.tokenizer, [blank + text.strip()])[0]
            if sentence[-1] == self.eos_id:
                added = [*added, self.eos_id]
            ids += added
        return ids[:length]


def find_sentences(stream: np.ndarray, tokenizer: Tokenizer, eos_id: int) -> Sentences:
    """The sentences of stream[N]; what follows the last one is left out.

    A stop is a token that ends with a full stop, an exclamation mark or a question mark, quotes and
    brackets after it aside. A stream without any stop or EOS is one sentence.
    """
    stops = np.zeros(max(int(stream.max()), eos_id) + 1, bool)
    for token in np.unique(stream).tolist():
        text = tokenizer.decode([token], skip_special_tokens=False)
        stops[token] = text.rstrip().rstrip(QUOTES).endswith((".", "!", "?"))
    stops[eos_id] = True
    ends = stops[stream]
    ends[:-1] &= stream[1:] != eos_id  # EOS belongs to the sentence before it
    bounds = np.flatnonzero(ends) + 1
    bounds = bounds if len(bounds) else np.array([len(stream)])
    return Sentences(stream, np.concatenate([[0], bounds]), tokenizer, eos_id)

"""The generative frontier: perplexity against entropy over temperatures, and values read off it.

A perplexity at one temperature flatters a model that loses entropy. So two models are compared at
equal entropy (arXiv 2604.02718). The points of a curve are in the order of their temperatures.
Between two neighbors the log-perplexity is linear in the entropy. There is no extrapolation.

Noise can bend a curve, so that it has an entropy more than once. Then the value is the mean of the
log-perplexities of all crossings: to choose one of them would favor a model.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from halfstep.metrics.intervals import resampled_means

REACHED, ABOVE, BELOW = "yes", "no: above the curve", "no: below the curve"
"""Whether a curve has an entropy: if not, where that entropy is"""


class Reading(NamedTuple):
    """A value read off a curve; None where the curve does not reach it."""

    value: float | None
    low: float | None
    high: float | None
    at_entropy: float
    reached: str


def log_perplexity_at(
    entropy: np.ndarray, log_perplexity: np.ndarray, target: np.ndarray | float
) -> np.ndarray:
    """The log-perplexity of curves [..., T] at the entropies target[...].

    It is inf for a target above all entropies of a curve, where more temperature and perplexity
    would be, and -inf for one below them.
    """
    left, right = entropy[..., :-1], entropy[..., 1:]
    start, end = log_perplexity[..., :-1], log_perplexity[..., 1:]
    at = np.asarray(target)[..., None]
    crossed = (np.minimum(left, right) <= at) & (at <= np.maximum(left, right))
    width = np.where(right == left, 1.0, right - left)
    share = np.where(right == left, 0.5, (at - left) / width)
    total = np.where(crossed, start + share * (end - start), 0.0).sum(-1)
    outside = np.where(at[..., 0] > entropy.max(-1), np.inf, -np.inf)
    count = crossed.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), outside)


def perplexity_at(curve: np.ndarray, target: float, resamples: int) -> Reading:
    """The perplexity of a model at an entropy, with a bootstrap interval.

    Args:
        curve: values [T, N, 3] of N texts at T ascending temperatures: the sum of -log p, the
            number of tokens, and the entropy of a text
        target: the entropy in nats, which counts as exact
        resamples: bootstrap resamples
    """
    values, drawn = _with_resamples(curve, resamples)
    return _reading(_read(values, target), _read(drawn, target), target, entropies(values))


def ratio_at(
    student: np.ndarray, teacher: np.ndarray, resamples: int, paired: bool = True
) -> Reading:
    """A student's perplexity divided by its teacher's at the student's entropy.

    Args:
        student: values [N, 3] of the student's texts at one temperature, see `perplexity_at`
        teacher: the teacher's curve [T, N, 3]
        resamples: bootstrap resamples
        paired: whether text i has the same random numbers in both; if not, each has its resamples
    """
    if paired:
        values, drawn = _with_resamples(np.concatenate([student[None], teacher]), resamples)
    else:
        both = [_with_resamples(student[None], resamples, 1), _with_resamples(teacher, resamples)]
        values, drawn = (np.concatenate(parts, -2) for parts in zip(*both, strict=True))

    def log_ratio(means: np.ndarray) -> np.ndarray:
        target = entropies(means)[..., 0]
        mine = log_perplexities(means)[..., 0]
        return mine - _read(means[..., 1:, :], target)

    target = float(entropies(values)[0])
    return _reading(log_ratio(values), log_ratio(drawn), target, entropies(values)[1:])


def entropies(means: np.ndarray) -> np.ndarray:
    """The entropy of means [..., T, 3]: [..., T]."""
    return means[..., 2]


def log_perplexities(means: np.ndarray) -> np.ndarray:
    """The log-perplexity of means [..., T, 3]: [..., T]."""
    return means[..., 0] / means[..., 1]


def _with_resamples(
    curve: np.ndarray, resamples: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Means over texts [T, 3], and over texts that are drawn with replacement [resamples, T, 3].

    A resample takes the same texts at every temperature, because text i has the same random
    numbers at all of them.
    """
    temperatures, texts, columns = curve.shape
    rows = curve.transpose(1, 0, 2).reshape(texts, -1)
    drawn = np.array(list(resampled_means(rows, resamples, seed)))
    return curve.mean(1), drawn.reshape(resamples, temperatures, columns)


def _read(means: np.ndarray, target: np.ndarray | float) -> np.ndarray:
    return log_perplexity_at(entropies(means), log_perplexities(means), target)


def _reading(value: np.ndarray, drawn: np.ndarray, target: float, entropy: np.ndarray) -> Reading:
    """The exponential of a value, and of the 2.5% and 97.5% points of its resamples.

    A resample that does not reach the entropy counts as infinitely high or low, by the end of the
    curve that it misses. A bound among such resamples is unknown: None.
    """
    if not np.isfinite(value):
        return Reading(None, None, None, target, ABOVE if target > entropy.max() else BELOW)
    low = np.quantile(drawn, 0.025, method="lower")
    high = np.quantile(drawn, 0.975, method="higher")
    bounds = [float(np.exp(bound)) if np.isfinite(bound) else None for bound in (low, high)]
    return Reading(float(np.exp(value)), *bounds, target, REACHED)

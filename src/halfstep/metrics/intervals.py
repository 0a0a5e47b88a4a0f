"""95% intervals: Wilson's for shares, the percentile bootstrap for means and functions of means."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

Z = 1.959963984540054  # 97.5% point of the normal distribution


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """Wilson's score interval of a share p = hits / trials (JASA 22, 1927).

    (p + z^2/2n -+ z sqrt(p (1-p) / n + z^2/4n^2)) / (1 + z^2/n)
    """
    p, z2 = hits / trials, Z * Z / trials
    middle, half = p + z2 / 2, Z * (p * (1 - p) / trials + z2 / trials / 4) ** 0.5
    low = 0.0 if hits == 0 else (middle - half) / (1 + z2)
    high = 1.0 if hits == trials else (middle + half) / (1 + z2)
    return low, high


def bootstrap(
    values: np.ndarray,
    statistic: Callable[..., float] = float,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of statistic(*column means) of values[N] or [N, k].

    The rows are drawn with replacement, `resamples` times. A row is one text or item, the unit that
    varies; `statistic` takes the k column means and returns a float.
    """
    drawn = [statistic(*means) for means in resampled_means(values, resamples, seed)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def resampled_means(values: np.ndarray, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Column means [k] of values[N] or [N, k], the rows drawn with replacement each time."""
    table = np.asarray(values, np.float64).reshape(len(values), -1)
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        rows = rng.integers(0, len(table), len(table))
        yield table[rows].mean(0)

"""Accuracy of filled-in positions at each number of tokens per forward, and the area under it.

A window has several masked positions. A sampler fills them in with a limit of ceil(M / k) steps,
where M is the largest number of masked positions of a window and k = 1, 2, 4, ...; the last limit
is one step. Tokens per forward are masked positions divided by passes of the network, as counted:

    rho = sum over windows of masked positions / sum over windows of network evaluations

    exact      share of the items (last words) of which all tokens are the original ones
    grammar    share of the stories that the grammar finds consistent: any consistent filling counts
    tokens     share of the masked positions whose token is the original one

The area is the mean accuracy over doublings of rho, from one token to all of them in one pass:

    A = 1 / log2(R) * integral of accuracy over log2(rho) from rho = 1 to R,   R = mean of M

by the trapezoidal rule between measured points. Below the smallest measured rho the accuracy is
that of this point, because passes can always be wasted. Nothing is extrapolated to larger rho: a
sampler that was not measured at R has no area.

AUP of d3LLM (arXiv 2601.07568) is another area: over rho itself and not its logarithm, without a
common end, each accuracy y weighted by min(exp(-3 (1 - y / y_max)), 1), and only points no more
than 5 percentage points below the first one. Here nothing is weighted or cut off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CountRight = Callable[[np.ndarray], np.ndarray]
"""Filled-in windows, ids[N, L] -> right items and all items of each window [N, 2]."""


@dataclass(frozen=True)
class MaskedItems:
    """Windows of which some positions are to be filled in, and how the fillings are judged.

    windows ids[N, L]; masked bool [N, L], at least one position of each window; count: for each
    protocol the right items of filled-in windows
    """

    task: str
    windows: np.ndarray
    masked: np.ndarray
    count: dict[str, CountRight]

    @property
    def limits(self) -> list[int]:
        """`step_limits` of the window with the most masked positions."""
        return step_limits(int(self.masked.sum(1).max()))


def step_limits(most: int) -> list[int]:
    """Limits of steps for `most` positions, descending: one a pass, two, four, ..., all at once."""
    tokens = [2**i for i in range(most.bit_length()) if 2**i < most]
    return list(dict.fromkeys([*(-(-most // k) for k in tokens), 1]))


def right_tokens(windows: np.ndarray, masked: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Masked positions with the original token, and all masked ones, of each window [N, 2]."""
    right = (filled == windows) & masked
    return np.stack([right.sum(1), masked.sum(1)], 1)


def right_items(windows: np.ndarray, items: list[list[slice]], filled: np.ndarray) -> np.ndarray:
    """Items of which all tokens are the original ones, and all items, of each window [N, 2]."""
    same = filled == windows
    return np.array([[sum(same[i, s].all() for s in found), len(found)]
                     for i, found in enumerate(items)])  # fmt: skip


def area_under_accuracy(tokens: np.ndarray, accuracy: np.ndarray, most: float) -> float | None:
    """Mean accuracy[B] over log2 of tokens[B] per forward from 1 to `most` (see above).

    None where no point has `most` tokens per forward.
    """
    if tokens.max() < most * (1 - 1e-9):
        return None
    order = np.argsort(tokens, kind="stable")
    x, y = np.log2(tokens[order]), accuracy[order]
    end = np.log2(most)
    if end <= 0:
        return float(y[-1])
    inside = x[(x > 0) & (x < end)]
    grid = np.concatenate([[0.0], inside, [end]])
    # np.interp keeps the accuracy of the first point below it.
    return float(np.trapezoid(np.interp(grid, x, y), grid) / end)


def area_of_means(*means: float) -> float:
    """`area_under_accuracy` of the means over windows, as a bootstrap resamples them.

    means: right items at each limit, passes at each limit, items, masked positions
    """
    *values, items, masked = means
    right, passes = np.split(np.array(values), 2)
    found = area_under_accuracy(masked / passes, right / items, masked)
    return np.nan if found is None else found

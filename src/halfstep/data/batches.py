"""Which windows make up the batch of a step: a pure function of (seed, step), so that a run resumes from one integer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from halfstep.errors import HalfstepError


@lru_cache(maxsize=4)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def batch_indices(num_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """int64 [batch_size]: places step*batch_size ... of the endless stream permutation(epoch 0), permutation(epoch 1), ...

    Every window comes once per epoch; a batch may end one epoch and begin the next.
    """
    if num_windows < batch_size:
        raise HalfstepError(
            f"batch_size is {batch_size}, but the corpus has only {num_windows} windows; lower batch_size or length, or add text"
        )
    epoch, start = divmod(step * batch_size, num_windows)
    batch = _permutation(num_windows, seed, epoch)[start : start + batch_size]
    if len(batch) < batch_size:
        batch = np.concatenate(
            [batch, _permutation(num_windows, seed, epoch + 1)[: batch_size - len(batch)]]
        )
    return batch.astype(np.int64)

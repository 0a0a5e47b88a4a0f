"""The windows of each batch: a pure function of (seed, step), so a run resumes from one integer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from halfstep.errors import HalfstepError
from halfstep.progress import format_number


@lru_cache(maxsize=4)
def _permutation(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def describe_epochs(num_windows: int, batch_size: int, num_steps: int) -> str:
    """How often a training reads its corpus, in one sentence."""
    epochs = num_steps * batch_size / num_windows
    return (
        f"{num_steps:,} steps of {batch_size:,} windows are {format_number(epochs)} epochs of "
        f"{num_windows:,} windows"
    )


def batch_indices(num_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the windows of one batch, int64 [batch_size].

    They are entries step * batch_size, ... of the endless stream permutation(epoch 0),
    permutation(epoch 1), ... Each epoch contains every window once; a batch may end one epoch and
    begin the next.
    """
    if num_windows < batch_size:
        raise HalfstepError(
            f"batch_size is {batch_size}, but the corpus has only {num_windows} windows; "
            "lower batch_size or length, or add text"
        )
    epoch, start = divmod(step * batch_size, num_windows)
    batch = _permutation(num_windows, seed, epoch)[start : start + batch_size]
    missing = batch_size - len(batch)
    if missing:
        batch = np.concatenate([batch, _permutation(num_windows, seed, epoch + 1)[:missing]])
    return batch.astype(np.int64)

"""Batches: each epoch has every window once, in a new order; a step can be computed alone."""

import numpy as np
import pytest

from halfstep.data.batches import batch_indices, describe_epochs
from halfstep.errors import HalfstepError


@pytest.mark.parametrize("num_windows, batch_size", [(12, 4), (13, 4), (7, 7), (101, 32), (5, 1)])
def test_each_epoch_has_every_window_once(num_windows, batch_size):
    steps = range(num_windows)  # batch_size whole epochs
    batches = [batch_indices(num_windows, batch_size, 1, step) for step in steps]
    epochs = np.concatenate(batches).reshape(batch_size, num_windows)
    assert (np.sort(epochs, 1) == np.arange(num_windows)).all()
    if num_windows > 6 and batch_size > 1:
        assert (epochs[0] != epochs[1]).any()


def test_a_batch_depends_on_seed_and_step_only():
    straight = [batch_indices(1000, 64, 7, step) for step in range(40)]
    resumed = [batch_indices(1000, 64, 7, step) for step in reversed(range(40))][::-1]
    for a, b in zip(straight, resumed, strict=True):
        assert (a == b).all() and a.dtype == np.int64 and a.shape == (64,)
    assert (batch_indices(1000, 64, 8, 0) != straight[0]).any()
    assert (np.sort(straight[0]) != np.arange(64)).any()


def test_a_corpus_smaller_than_a_batch_is_an_error():
    with pytest.raises(HalfstepError, match="batch_size is 8, but the corpus has only 7 windows"):
        batch_indices(7, 8, 1, 0)


def test_epochs_are_steps_times_batch_over_windows():
    said = describe_epochs(num_windows=20_000, batch_size=64, num_steps=1000)
    assert said == "1,000 steps of 64 windows are 3.2 epochs of 20,000 windows"
    assert "are 0.025 epochs" in describe_epochs(num_windows=80, batch_size=2, num_steps=1)

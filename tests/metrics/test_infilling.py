"""Accuracy of filled-in positions on an enumerated language, and the area in closed form."""

from itertools import pairwise

import numpy as np
import pytest
from oracle import Language, Perfect

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.metrics.infilling import (
    MaskedItems,
    area_of_means,
    area_under_accuracy,
    right_items,
    right_tokens,
    step_limits,
)

LANGUAGE, N = Language(3, 5, seed=3), 20_000
TEXT = LANGUAGE.texts[LANGUAGE.p.argmax()]
FREE = [0, 1, 3, 4]


def filled(steps, sampler="first_hitting", **options):
    """The likeliest text of the language with four masked positions, filled in N times."""
    frame = TEXT.clone()
    frame[FREE] = LANGUAGE.mask_id
    draws = Draws(seed=steps)
    how = {"sampler": sampler, "draws": draws, "given": frame}
    return sample(Perfect(LANGUAGE), N, 5, steps, **how, **options)


@pytest.mark.parametrize(
    ("sampler", "options"), [("first_hitting", {}), ("threshold", {"threshold": 1.0})]
)
def test_accuracy_of_a_perfect_denoiser(sampler, options):
    """One token a pass: the chance of the whole item. All in one pass: the product of chances."""
    frame = TEXT.clone()
    frame[FREE] = LANGUAGE.mask_id
    state = LANGUAGE.index(frame)
    whole = LANGUAGE.p[LANGUAGE.text_index(TEXT)] / LANGUAGE.chance[state]
    product = LANGUAGE.posterior[state][FREE, TEXT[FREE]].prod()
    assert abs(whole - product) > 0.05  # the test can tell
    windows = TEXT.expand(N, 5).numpy()
    for steps, chance in ((4, whole.item()), (1, product.item())):
        found = right_items(
            windows, [[slice(0, 5)]] * N, filled(steps, sampler, **options).ids.numpy()
        )
        assert (found[:, 1] == 1).all()
        error = 5 * (chance * (1 - chance) / N) ** 0.5
        assert found[:, 0].mean() == pytest.approx(chance, abs=error)


def test_single_tokens_have_their_marginal_chances_one_a_pass_and_all_at_once():
    """The measure of tokens does not see what is lost between tokens of one pass."""
    frame = TEXT.clone()
    frame[FREE] = LANGUAGE.mask_id
    chance = LANGUAGE.posterior[LANGUAGE.index(frame)][FREE, TEXT[FREE]].mean().item()
    windows, masked = TEXT.expand(N, 5).numpy(), np.isin(np.arange(5), FREE)
    for steps in (4, 1):
        found = right_tokens(windows, np.tile(masked, (N, 1)), filled(steps).ids.numpy())
        assert (found[:, 1] == 4).all()
        assert found[:, 0].mean() / 4 == pytest.approx(chance, abs=5 * 0.5 / N**0.5)


@pytest.mark.parametrize("most", [*range(1, 20), 127, 128, 511])
def test_limits_go_from_one_position_a_pass_to_all_at_once(most):
    limits = step_limits(most)
    assert limits[0] == most and limits[-1] == 1
    assert all(a > b >= a / 2 for a, b in pairwise(limits))


def test_limits_are_those_of_the_fullest_window():
    masked = np.array([[True, True, False], [True, True, True]])
    assert MaskedItems("any", np.zeros((2, 3), int), masked, {}).limits == [3, 2, 1]


def test_area_in_closed_form():
    tokens = np.array([1.0, 2.0, 4.0, 8.0])
    assert area_under_accuracy(tokens, np.full(4, 0.3), 8) == pytest.approx(0.3)
    falling = np.array([0.9, 0.6, 0.3, 0.0])  # linear in log2: the mean of its ends
    assert area_under_accuracy(tokens, falling, 8) == pytest.approx(0.45)
    assert area_under_accuracy(tokens[::-1], falling[::-1], 8) == pytest.approx(0.45)
    # One number of tokens twice, as of a sampler that is not held back by its limit.
    twice = np.array([1.0, 2.0, 2.0, 4.0, 8.0]), np.array([0.9, 0.6, 0.6, 0.3, 0.0])
    assert area_under_accuracy(*twice, 8) == pytest.approx(0.45)


def test_area_outside_of_what_was_measured():
    """Below the first point its accuracy holds; above the last one nothing is known."""
    tokens, accuracy = np.array([2.0, 8.0]), np.array([0.6, 0.2])
    assert area_under_accuracy(tokens, accuracy, 8) == pytest.approx((0.6 + 2 * 0.4) / 3)
    assert area_under_accuracy(tokens, accuracy, 16) is None
    assert np.isnan(area_of_means(0.6, 0.2, 8.0, 2.0, 1.0, 32.0))
    # Of a point below one token a pass only the part from one token on counts.
    tokens, accuracy = np.array([0.5, 2.0]), np.array([0.8, 0.4])
    assert area_under_accuracy(tokens, accuracy, 2) == pytest.approx(0.5)
    assert area_under_accuracy(np.array([1.0]), np.array([0.7]), 1) == 0.7


def test_area_of_means_is_that_of_the_ratios():
    """Of windows with different numbers of items and masked positions."""
    right = np.array([[2, 1, 0], [3, 3, 1]])  # at three limits
    passes = np.array([[6, 3, 1], [9, 4, 1]])
    items, masked = np.array([2, 4]), np.array([6, 10])
    values = np.column_stack([right, passes, items, masked])
    ratios = masked.sum() / passes.sum(0), right.sum(0) / items.sum()
    assert area_of_means(*values.mean(0)) == pytest.approx(area_under_accuracy(*ratios, 8.0))


def test_an_item_is_right_only_as_a_whole():
    windows = np.array([[0, 5, 6, 7, 0]])
    wrong = np.array([[0, 5, 1, 7, 0]])
    items = [[slice(1, 3), slice(3, 4)]]
    assert right_items(windows, items, windows).tolist() == [[2, 2]]
    assert right_items(windows, items, wrong).tolist() == [[1, 2]]

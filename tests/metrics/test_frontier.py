"""Values read off a curve of perplexity against entropy: closed forms, and intervals that cover."""

import numpy as np
import pytest

from halfstep.metrics.frontier import (
    ABOVE,
    BELOW,
    REACHED,
    log_perplexity_at,
    perplexity_at,
    ratio_at,
)


def texts_of(entropy, log_perplexity, count=40, noise=0.0, rng=None):
    """Values [T, N, 3] of texts with these means; one noise for all temperatures and both values.

    Of a text the tokens are 7, so the sum of -log p is 7 times its log-perplexity.
    """
    rng = rng or np.random.default_rng(0)
    means = np.stack([entropy, log_perplexity])
    shared = rng.normal(0, noise, (2, 1, count))
    own = rng.normal(0, noise, (2, len(entropy), count))
    h, nll = means[..., None] + shared + own
    return np.stack([7 * nll, np.full_like(nll, 7), h], -1)


def test_between_neighbors_the_log_perplexity_is_linear_in_the_entropy():
    entropy, log_p = np.array([3.0, 3.2, 3.6]), np.log([8.0, 16.0, 4.0])
    for target, expected in [(3.0, 8), (3.1, np.sqrt(8 * 16)), (3.3, 16 / 4**0.25), (3.6, 4)]:
        assert np.exp(log_perplexity_at(entropy, log_p, target)) == pytest.approx(expected)


def test_a_line_is_read_exactly_whatever_the_temperatures():
    entropy = np.array([2.9, 3.1, 3.15, 3.4])
    targets = np.linspace(2.9, 3.4, 23)
    found = [log_perplexity_at(entropy, 5 * entropy - 12, target) for target in targets]
    assert np.allclose(found, 5 * targets - 12)


def test_a_bent_curve_counts_all_its_crossings():
    """3.15 is crossed three times: at half of each of the segments."""
    entropy, log_p = np.array([3.0, 3.3, 3.0, 3.3]), np.array([1.0, 2.0, 4.0, 8.0])
    assert log_perplexity_at(entropy, log_p, 3.15) == pytest.approx((1.5 + 3 + 6) / 3)
    flat = np.array([3.0, 3.0])
    assert log_perplexity_at(flat, np.array([1.0, 2.0]), 3.0) == pytest.approx(1.5)


def test_several_curves_and_targets_are_read_at_once():
    rng = np.random.default_rng(1)
    entropy, log_p = rng.normal(3, 0.2, (2, 50, 4))
    targets = rng.normal(3, 0.2, 50)
    each = [log_perplexity_at(*case) for case in zip(entropy, log_p, targets, strict=True)]
    assert np.array_equal(log_perplexity_at(entropy, log_p, targets), each)


@pytest.mark.parametrize("target, reached", [(3.41, ABOVE), (2.89, BELOW)])
def test_outside_of_the_curve_there_is_no_value(target, reached):
    curve = texts_of(np.array([2.9, 3.4]), np.array([1.0, 2.0]), noise=0.001)
    assert perplexity_at(curve, target, 100) == (None, None, None, target, reached)
    student = texts_of(np.array([target]), np.array([1.0]), noise=0.001)[0]
    found = ratio_at(student, curve, 100)
    assert found[:3] == (None, None, None) and found.reached == reached
    assert found.at_entropy == pytest.approx(target, abs=0.01)


def test_a_bound_among_resamples_that_miss_the_entropy_is_open():
    """Near the end of a curve a part of the resamples does not reach it."""
    curve = texts_of(np.array([3.0, 3.4]), np.array([1.0, 2.0]), noise=0.2)
    top, bottom = curve[1, :, 2].mean() - 0.01, curve[0, :, 2].mean() + 0.01
    above, below = perplexity_at(curve, top, 400), perplexity_at(curve, bottom, 400)
    assert above.high is None and above.low < above.value and above.reached == REACHED
    assert below.low is None and below.high > below.value and below.reached == REACHED
    # The teacher's perplexity has no upper bound, so the ratio has no lower one.
    student = texts_of(np.array([3.4]), np.array([1.0]), noise=0.2)[0]
    student[:, 2] += top - student[:, 2].mean()
    ratio = ratio_at(student, curve, 400)
    assert ratio.low is None and ratio.high > ratio.value


def test_a_model_compared_to_itself_has_the_ratio_one():
    curve = texts_of(np.array([3.0, 3.2, 3.4]), np.array([1.0, 1.6, 2.0]), noise=0.02)
    found = ratio_at(curve[1], curve, 200)
    assert found.value == pytest.approx(1) == found.low == found.high


@pytest.mark.parametrize("kind", ["value", "ratio"])
def test_the_interval_covers_the_truth_as_often_as_it_says(kind):
    """Both are read where the truth is known; 95% of 300 are 285, and 99.99% are within 16."""
    rng, covered = np.random.default_rng(2), 0
    entropy, log_p = np.array([3.0, 3.2, 3.4]), np.array([1.0, 1.6, 2.0])
    for _ in range(300):
        curve = texts_of(entropy, log_p, 80, 0.1, rng)
        if kind == "value":
            found, truth = perplexity_at(curve, 3.28, 200), np.exp(1.6 + 0.4 * 0.4)
        else:
            student = texts_of(np.array([3.1]), np.array([0.9]), 80, 0.1, rng)[0]
            found, truth = ratio_at(student, curve, 200), np.exp(0.9 - 1.3)
        covered += (found.low or 0) <= truth <= (found.high or np.inf)
    assert 268 <= covered <= 299

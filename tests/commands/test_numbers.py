"""Entropy, distinct n-grams, intervals and rows, by hand."""

from math import log

import numpy as np
import pytest

from halfstep.errors import HalfstepError
from halfstep.metrics.diversity import distinct, unigram_entropy
from halfstep.metrics.intervals import bootstrap, wilson
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.metrics.rows import model_name, name_parts, row


def test_entropy_by_hand():
    ids = np.array([[7, 7, 7, 7], [1, 2, 3, 4], [5, 5, 6, 6], [9, 9, 9, 1]])
    np.testing.assert_allclose(
        unigram_entropy(ids),
        [0, log(4), log(2), -(0.75 * log(0.75) + 0.25 * log(0.25))],
        atol=1e-12,
    )


def test_distinct_by_hand():
    ids = np.array([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [1, 1, 2, 1, 1]])
    np.testing.assert_allclose(distinct(ids, 2), [2 / 4, 1, 1 / 4, 3 / 4])
    np.testing.assert_allclose(distinct(ids, 1), [2 / 5, 1, 1 / 5, 2 / 5])
    np.testing.assert_allclose(distinct(ids, 3), [2 / 3, 1, 1 / 3, 1])


@pytest.mark.parametrize(
    "hits, trials, low, high",
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_against_published_values(hits, trials, low, high):
    assert wilson(hits, trials) == pytest.approx((low, high), abs=5e-5)


def test_bootstrap_of_a_mean_is_the_normal_interval_and_repeats_itself():
    values = np.random.default_rng(0).normal(3, 2, 900)
    low, high = bootstrap(values, resamples=2000)
    half = 1.96 * values.std() / 30
    assert (low, high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert (
        bootstrap(values, resamples=2000)
        == (low, high)
        != bootstrap(values, resamples=2000, seed=1)
    )


def test_bootstrap_draws_whole_rows_of_a_ratio():
    """Numerator and denominator of a text go together: their ratio is 2 in every resample."""
    number = np.random.default_rng(0).integers(1, 9, 50).astype(float)
    assert bootstrap(
        np.stack([2 * number, number], 1), lambda total, count: total / count
    ) == pytest.approx((2, 2))
    low, high = bootstrap(np.stack([number**2, number], 1), lambda total, count: total / count)
    assert low < (number**2).sum() / number.sum() < high


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = [
        low < 0 < high
        for low, high in (bootstrap(rng.normal(0, 1, 60), resamples=200) for _ in range(300))
    ]
    assert 0.90 < np.mean(covered) < 0.98


def test_rows_hold_every_column_and_no_other():
    found = row(
        "entropy", "unigram", 3.0, (2.9, 3.1), model="m", steps=8, temperature=1.0, top_p=0.95
    )
    assert list(found) == [
        "metric", "protocol", "version", "value", "low", "high", "model", "teacher", "run", "round", "steps", "sampler", "network_evaluations",
        "num_samples", "seed", "weights", "draw_dtype", "temperature", "top_p", "judge", "judge_dtype", "data", "checkpoint", "commit",
    ]  # fmt: skip
    assert (
        found["steps"] == 8
        and found["judge"] is None
        and found["commit"]
        and found["version"] == PROTOCOLS["entropy"]["unigram"]
    )
    assert found["temperature"] is None and found["top_p"] == 0.95
    assert "length" in row("latency_s", "interleaved", 1, (1, 1), length=64)
    with pytest.raises(TypeError, match="judgement"):
        row("entropy", "unigram", 3, (2, 4), judgement=1)
    for metric, protocol in (("entropy", None), ("entropy", "ids"), ("entropie", "unigram")):
        with pytest.raises(TypeError, match=f"{metric} has no protocol {protocol!r}"):
            row(metric, protocol, 3, (2, 4))
    with pytest.raises(HalfstepError, match="generative_perplexity of stories-tiny/teacher is nan"):
        row("generative_perplexity", "ids", float("nan"), (0, 1), model="stories-tiny/teacher")


def test_names_say_teacher_run_and_round(tmp_path):
    assert name_parts("stories-tiny/kl_backward/round-3") == {
        "model": "stories-tiny/kl_backward/round-3",
        "teacher": "stories-tiny",
        "run": "kl_backward",
        "round": 3,
    }
    assert (
        name_parts("stories-tiny/teacher")["round"] == 0
        and name_parts("stories-tiny/baseline")["run"] == "baseline"
    )
    assert name_parts("mine") == {"model": "mine", "teacher": "mine", "run": None, "round": 0}
    assert model_name(tmp_path / "results" / "models" / "a" / "b" / "round-1") == "a/b/round-1"
    assert (
        model_name(tmp_path / "models" / "of" / "mine" / "models" / "a" / "teacher") == "a/teacher"
    )
    assert model_name(tmp_path / "mine") == "mine"

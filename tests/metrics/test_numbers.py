"""Entropy, distinct n-grams, intervals and rows, by hand."""

from math import log

import numpy as np
import pytest

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.metrics.diversity import distinct, unigram_entropy
from halfstep.metrics.intervals import bootstrap, wilson
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.metrics.rows import mean_row, model_name, name_parts, row, share_row, write_rows


def test_entropy_by_hand():
    ids = np.array([[7, 7, 7, 7], [1, 2, 3, 4], [5, 5, 6, 6], [9, 9, 9, 1]])
    expected = [0, log(4), log(2), -(0.75 * log(0.75) + 0.25 * log(0.25))]
    np.testing.assert_allclose(unigram_entropy(ids), expected, atol=1e-12)


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


def test_bootstrap_of_a_mean_is_the_normal_interval_and_repeatable():
    values = np.random.default_rng(0).normal(3, 2, 900)
    found = bootstrap(values, resamples=2000)
    half = 1.96 * values.std() / 30
    normal = (values.mean() - half, values.mean() + half)
    assert found == pytest.approx(normal, abs=0.1 * half)
    assert bootstrap(values, resamples=2000) == found
    assert bootstrap(values, resamples=2000, seed=1) != found


def test_bootstrap_draws_whole_rows_of_a_ratio():
    """Numerator and denominator of a text stay together: their ratio is 2 in every resample."""

    def ratio(total, count):
        return total / count

    number = np.random.default_rng(0).integers(1, 9, 50).astype(float)
    assert bootstrap(np.stack([2 * number, number], 1), ratio) == pytest.approx((2, 2))
    low, high = bootstrap(np.stack([number**2, number], 1), ratio)
    assert low < (number**2).sum() / number.sum() < high


def test_a_95_percent_interval_covers_the_truth_in_95_percent_of_the_cases():
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.normal(0, 1, 60), resamples=200) for _ in range(300)]
    assert 0.90 < np.mean([low < 0 < high for low, high in found]) < 0.98


def test_rows_have_all_columns_and_no_others():
    about = {"model": "m", "steps": 8, "temperature": 1.0, "top_p": 0.95}
    found = row("entropy", "unigram", 3.0, (2.9, 3.1), **about)
    columns = (
        "metric protocol version value low high model teacher run round steps tokens_per_step "
        "sampler network_evaluations num_samples seed weights draw_dtype precision temperature "
        "top_p judge judge_dtype data checkpoint commit"
    )
    assert list(found) == columns.split()
    assert found["steps"] == 8 and found["judge"] is None and found["commit"]
    assert found["version"] == PROTOCOLS["entropy"]["unigram"]
    assert found["temperature"] is None and found["top_p"] == 0.95
    assert "length" in row("latency_s", "interleaved", 1, (1, 1), length=64)
    with pytest.raises(TypeError, match="opinion"):
        row("entropy", "unigram", 3, (2, 4), opinion=1)
    for metric, protocol in (("entropy", None), ("entropy", "ids"), ("entropie", "unigram")):
        with pytest.raises(TypeError, match=f"{metric} has no protocol {protocol!r}"):
            row(metric, protocol, 3, (2, 4))
    with pytest.raises(HalfstepError, match="generative_perplexity of stories-tiny/teacher is nan"):
        row("generative_perplexity", "ids", float("nan"), (0, 1), model="stories-tiny/teacher")


def test_rows_of_means_and_shares(tmp_path):
    columns, values = {"model": "m", "num_samples": 9}, np.array([[1.0, 2.0], [3.0, 6.0]])
    mean = mean_row("entropy", "unigram", values, columns, 100, lambda a, b: a / b)
    interval = bootstrap(values, lambda a, b: a / b, 100)
    assert mean == row("entropy", "unigram", 0.5, interval, **columns)
    share = share_row("accepted_share", "grammar", 2, 8, columns)
    columns["num_samples"] = 8
    assert share == row("accepted_share", "grammar", 0.25, wilson(2, 8), **columns)
    empty = share_row("accepted_share", "grammar", 0, 0, columns)
    assert (empty["value"], empty["low"], empty["high"], empty["num_samples"]) == (0, 0, 1, 0)
    (tmp_path / "input").write_text("")
    write_rows(tmp_path / "rows.json", [mean, share], [tmp_path / "input"])
    assert read_json(tmp_path / "rows.json") == [mean, share]
    record = read_json(tmp_path / "rows.provenance.json")
    assert record["inputs"].keys() == {"input"} and record["outputs"].keys() == {"rows.json"}


def test_a_name_gives_teacher_run_and_round(tmp_path):
    assert name_parts("stories-tiny/kl_backward/round-3") == {
        "model": "stories-tiny/kl_backward/round-3",
        "teacher": "stories-tiny",
        "run": "kl_backward",
        "round": 3,
    }
    assert name_parts("stories-tiny/teacher")["round"] == 0
    assert name_parts("stories-tiny/baseline")["run"] == "baseline"
    assert name_parts("mine") == {"model": "mine", "teacher": "mine", "run": None, "round": 0}


@pytest.mark.parametrize(
    "folder, name",
    [
        ("results/models/a/b/round-1", "a/b/round-1"),
        ("models/of/mine/models/a/teacher", "a/teacher"),
        ("mine", "mine"),
        ("results/models", "models"),
    ],
)
def test_a_model_is_named_after_its_path_below_models(tmp_path, folder, name):
    assert model_name(tmp_path / folder) == name

"""Speed at equal quality: the fewest steps as good as another model, timed against it."""

import re

import pandas
import pytest

from halfstep.report.equal_quality import NO_GAIN, speed_verdict
from halfstep.report.rows import tidy

NONE = tidy(pandas.DataFrame())


def scored(run, steps, value, metric="generative_perplexity"):
    round_ = 0 if run in ("teacher", "baseline") else 3
    return {
        "teacher": "a", "run": run, "round": round_, "model": f"a/{run}/{round_}",
        "metric": metric, "protocol": "ids", "judge": "j", "steps": steps,
        "tokens_per_step": steps and 64 / steps, "value": value, "low": value - 1,
        "high": value + 1, "reached": "yes",
    }  # fmt: skip


def timed(run, steps, seconds, batch_size=1, length=64):
    return {
        "teacher": "a", "run": run, "model": f"a/{run}", "metric": "latency_s",
        "protocol": "interleaved", "steps": steps, "value": seconds, "low": 0.9 * seconds,
        "high": 1.1 * seconds, "length": length, "batch_size": batch_size,
    }  # fmt: skip


QUALITY = [
    *(scored("teacher", steps, value) for steps, value in ((8, 60), (16, 30), (64, 20))),
    *(scored("kl", steps, value) for steps, value in ((8, 40), (16, 17), (64, 12))),
]
BASELINE = scored("baseline", None, 15)
TIMES = [timed("kl", steps, steps / 100) for steps in (8, 16, 64)]


def verdict(rows, times, frontier=()):
    tables = (tidy(pandas.DataFrame(list(rows))) for rows in (times, rows))
    return speed_verdict(*tables, tidy(pandas.DataFrame(frontier)) if frontier else NONE)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(2.5, "3.91 times faster"), (0.2, f"3.20 times slower: {NO_GAIN}"), (0.62, NO_GAIN)],
)
def test_the_fewest_steps_as_good_as_the_baseline_are_timed_against_it(seconds, said):
    """64 steps are needed, which take 0.64 s; at 16 steps the baseline is better."""
    found = verdict([*QUALITY, BASELINE], [*TIMES, timed("baseline", None, seconds)])
    (sentence,) = [one for one in found.details if one.startswith("kl round 3, 64 steps:")]
    assert "12.0 [11.0, 13.0], the baseline's 15.0 [14.0, 16.0]" in sentence
    (time,) = sentence.splitlines()[1:]
    assert time.startswith("  1 text of 64 tokens: 640 ms [576, 704] against ")
    assert time.endswith(said)
    gains = "times faster" in said
    assert (found.summary == f"At equal quality {NO_GAIN}.") == (not gains)
    assert found.summary.startswith("At equal quality 1 of 2 models write faster") == gains


def test_a_model_that_is_never_as_good_gains_nothing_however_fast():
    found = verdict([*QUALITY, scored("baseline", None, 9)], [*TIMES, timed("baseline", None, 99)])
    assert found.summary == f"At equal quality {NO_GAIN}."
    for sentence, label in zip(found.details, ("teacher", "kl round 3"), strict=False):
        assert sentence.startswith(f"{label}: at none of 8, 16, 64 steps")
        assert sentence.endswith(NO_GAIN)


def test_quality_is_read_at_equal_entropy_where_the_frontier_has_it():
    """There 16 steps suffice."""
    name = "perplexity_at_data_entropy"
    frontier = [scored("baseline", None, 25, name), scored("kl", 16, 24, name)]
    frontier.append(scored("kl", 8, float("nan"), name))
    found = verdict([*QUALITY, BASELINE], [*TIMES, timed("baseline", None, 2.0)], frontier)
    assert found.details[0].startswith(
        "kl round 3, 16 steps: perplexity at the entropy of held-out text 24.0 [23.0, 25.0]"
    )


def test_a_frontier_at_other_steps_than_the_timed_ones_leaves_the_generative_perplexity():
    """Its readings at 32 steps cannot be compared, those of the table of steps can."""
    name = "perplexity_at_data_entropy"
    frontier = [scored("baseline", None, 25, name), scored("kl", 32, 24, name)]
    found = verdict([*QUALITY, BASELINE], [*TIMES, timed("baseline", None, 2.0)], frontier)
    assert found.details[1].startswith("kl round 3, 64 steps: generative perplexity 12.0")


def test_nothing_is_said_about_autoregression_if_no_step_count_is_timed_and_scored():
    times = [timed("kl", 32, 1.0), timed("baseline", None, 2.0)]
    found = verdict([*QUALITY, BASELINE], times)
    assert found.summary.startswith("No step count was both timed and scored")
    assert not found.details


def test_a_student_is_timed_against_its_teacher_at_its_best_without_any_baseline():
    """16 steps of the student are better than 64 of the teacher."""
    found = verdict(QUALITY, TIMES)
    assert "No autoregressive baseline" in found.summary
    (sentence,) = found.details
    assert sentence.startswith("kl round 3, 16 steps, against its teacher at its best, 64 steps")
    assert re.search(r"160 ms .* against 640 ms .*: 4.00 times faster$", sentence)


def test_times_are_of_texts_as_long_as_the_samples():
    assert "not timed" in verdict(QUALITY, [timed("kl", 8, 1.0, length=32)]).summary
    found = verdict(
        [*QUALITY, BASELINE],
        [*TIMES, timed("kl", 64, 0.1, length=32), timed("baseline", None, 0.2, length=32)],
    )
    assert "No autoregressive baseline" in found.summary


def test_each_batch_size_is_compared_alone():
    times = [timed("kl", 64, 1.0), timed("kl", 64, 4.0, batch_size=8)]
    times += [timed("baseline", None, 3.0, batch_size=count) for count in (1, 8)]
    found = verdict([*QUALITY, BASELINE], times)
    (sentence,) = [one for one in found.details if one.startswith("kl round 3, 64")]
    one, eight = sentence.splitlines()[1:]
    assert one.endswith("3.00 times faster") and "8 texts" in eight and eight.endswith(NO_GAIN)

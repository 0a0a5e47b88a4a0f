"""Sentences of the summary: chosen by rule, with intervals, and never better than the table."""

import pandas
import pytest

from halfstep.report import sentences
from halfstep.report.rows import tidy


def row(run, round_, steps, value, half, metric="generative_perplexity"):
    model = f"a/{run}/round-{round_}" if round_ else f"a/{run}"
    return {
        "teacher": "a",
        "run": run,
        "round": round_,
        "model": model,
        "metric": metric,
        "protocol": "ids",
        "judge": "j",
        "steps": steps,
        "tokens_per_step": 256 / steps,
        "value": value,
        "low": value - half,
        "high": value + half,
    }


TEACHER = [row("teacher", 0, 16, 24, 2), row("teacher", 0, 64, 9, 1), row("teacher", 0, 256, 7, 1)]


def sentence(*students):
    table = tidy(pandas.DataFrame([*TEACHER, *students]))
    (headline,) = sentences.headlines(table)
    return headline, sentences.headline_sentence(headline)


def test_the_headline_is_the_fewest_steps_that_reach_the_teachers_best():
    students = [row("kl", 7, 16, 15, 2), row("kl", 7, 64, 5, 0.5), row("kl", 7, 256, 4, 0.5)]
    headline, text = sentence(*students)
    assert (headline.student["steps"], headline.same_steps["value"]) == (64, 9)
    assert headline.best["steps"] == 256
    assert text == (
        "a: kl round 7 with 64 steps (4 tokens each) has perplexity 5.00 [4.50, 5.50], its teacher "
        "at its best, with 256 steps (1 token each), 7.00 [6.00, 8.00]: "
        "better with 1/4 of the steps"
    )


def test_a_clear_gain_comes_before_an_equal_at_fewer_steps():
    headline, text = sentence(row("kl", 7, 16, 6.9, 1), row("kl", 7, 64, 5, 0.5))
    assert headline.student["steps"] == 64 and text.endswith("better with 1/4 of the steps")


def test_the_headline_takes_the_last_round_alone_and_says_where_intervals_overlap():
    _, text = sentence(row("kl", 6, 16, 1, 0.1), row("kl", 7, 64, 6.5, 1))
    assert text.endswith("intervals overlap with 1/4 of the steps")
    _, text = sentence(row("kl", 7, 64, 7.5, 1))  # above the best, and as near to it as 6.5
    assert text.endswith("intervals overlap with 1/4 of the steps")
    headline, text = sentence(row("kl", 7, 16, 30, 1), row("kl", 7, 256, 10, 1))
    assert text.endswith("not reached") and headline.student["steps"] == 256


def test_the_headline_names_the_calls_of_the_network_where_they_are_known():
    calls = {16: 16.0, 64: 62.9, 256: 163.0}
    rows = [*TEACHER, row("kl", 7, 64, 5, 0.5)]
    rows = [one | {"network_evaluations": calls[one["steps"]]} for one in rows]
    (headline,) = sentences.headlines(tidy(pandas.DataFrame(rows)))
    assert sentences.headline_sentence(headline).endswith(
        "better with 1/4 of the steps (62.9 network evaluations against 163)"
    )


def test_gains_compare_intervals_at_every_common_step_count():
    entropy = row("kl", 7, 16, 3.7, 0.1, "entropy") | {"vs_data_percent": -1.26}
    students = [row("kl", 7, 16, 15, 2), row("kl", 7, 64, 9.5, 1), row("kl", 7, 256, 20, 1)]
    students.append(row("kl", 7, 2, 1800, 100))  # the step count that the round is made for
    table = tidy(pandas.DataFrame([*TEACHER, *students]))
    (text,) = sentences.gains(table, tidy(pandas.DataFrame([entropy])))
    assert text.splitlines() == [
        "a, kl round 7 against its teacher:",
        "  2 steps (128 tokens each): 1,800 [1,700, 1,900], not sampled from the teacher",
        "  16 steps (16 tokens each): 24.0 [22.0, 26.0] -> 15.0 [13.0, 17.0] (1.6 times lower); "
        "entropy -1.3% against held-out text",
        "  64 steps (4 tokens each): 9.00 [8.00, 10.0] -> 9.50 [8.50, 10.5] (intervals overlap)",
        "  256 steps (1 token each): 7.00 [6.00, 8.00] -> 20.0 [19.0, 21.0] (higher)",
    ]


def test_gains_at_equal_entropy_are_those_of_the_main_temperature():
    """A ratio whose interval reaches 1 is no gain, and an entropy out of reach is said to be so."""
    name = "perplexity_ratio_at_equal_entropy"
    ratios = [
        row("kl", 7, 16, 0.5, 0.1, name),
        row("kl", 7, 16, 0.4, 0.1, name) | {"temperature": 0.8},
        row("kl", 7, 64, 0.95, 0.1, name),
        row("kl", 7, 72, 0.9, 0.097, name),
        row("kl", 7, 80, 1.3, 0.1, name),
        row("kl", 7, 128, float("nan"), 0, name),
        row("kl", 7, 256, 0.8, 0.1, name) | {"high": float("nan")},
        row("kl", 6, 16, 0.7, 0.1, name),
    ]
    (text,) = sentences.equal_entropy(tidy(pandas.DataFrame(ratios)), 1)
    assert text.splitlines() == [
        "a, kl round 7 at temperature 1: perplexity / teacher's at equal entropy:",
        "  16 steps (16 tokens each): 0.50 [0.40, 0.60] (a gain)",
        "  64 steps (4 tokens each): 0.95 [0.85, 1.05] (no clear gain: the interval holds 1)",
        "  72 steps (3.56 tokens each): 0.90 [0.80, 0.9970] (a gain)",
        "  80 steps (3.2 tokens each): 1.30 [1.20, 1.40] "
        "(a loss: the teacher at a lower temperature writes better)",
        "  128 steps (2 tokens each): the teacher does not reach this entropy",
        "  256 steps (1 token each): 0.80 [0.70, open] "
        "(the teacher's curve ends too near for an interval)",
    ]
    (text,) = sentences.equal_entropy(tidy(pandas.DataFrame(ratios)), 0.8)
    assert text.splitlines()[1:] == ["  16 steps (16 tokens each): 0.40 [0.30, 0.50] (a gain)"]
    assert sentences.equal_entropy(tidy(pandas.DataFrame(TEACHER)), 1) == []


def lead(*ratios, **about):
    students = [row("kl", 7, 16, 15, 2), row("kl", 7, 64, 5, 0.5), row("kl", 7, 256, 4, 0.5)]
    name = "perplexity_ratio_at_equal_entropy"
    ratios = [row("kl", 7, steps, value, 0.1, name) | about for steps, value in ratios]
    frontier = tidy(pandas.DataFrame(ratios))
    (text,) = sentences.lead_sentences(tidy(pandas.DataFrame([*TEACHER, *students])), frontier)
    return text


def test_what_comes_first_is_the_ratio_at_equal_entropy_at_the_fewest_steps():
    """Not at those where the ratio is lowest."""
    assert lead((16, 0.5), (64, 0.3), (256, float("nan"))) == (
        "a: at equal entropy, kl round 7 with 16 steps (16 tokens each) has 0.50 [0.40, 0.60] "
        "times the perplexity of its teacher with as many steps (a gain)"
    )


def test_a_clear_gain_comes_before_a_clear_loss_and_names_it():
    """And a loss comes before what is not clear."""
    text = lead((16, 1.2), (64, 0.5), (256, 1.4))
    assert "with 64 steps (4 tokens each) has 0.50 [0.40, 0.60] times" in text
    assert "(a gain), but with 16 steps (16 tokens each) 1.20 [1.10, 1.30] (a loss" in text
    assert "with 256 steps (1 token each) has 1.40 [1.30, 1.50] times" in lead((16, 1), (256, 1.4))
    assert "with 16 steps (16 tokens each) has 1.00 [0.90, 1.10] times" in lead((16, 1), (64, 1))


def test_without_a_ratio_the_headline_comes_first():
    _, text = sentence(row("kl", 7, 16, 15, 2), row("kl", 7, 64, 5, 0.5))
    assert lead() == lead((64, float("nan"))) == lead((64, 0.5), temperature=0.8) == text


def test_last_words_of_the_last_round_are_compared_with_the_teachers():
    rows = [
        row("teacher", 0, 1, 0.9, 0.05, "lambada_accuracy"),
        row("kl", 6, 1, 0.5, 0.05, "lambada_accuracy"),
        row("kl", 7, 1, 0.88, 0.05, "lambada_accuracy"),
        row("mse", 7, 1, 0.7, 0.05, "lambada_accuracy"),
        row("baseline", 0, 1, 0.99, 0.01, "lambada_accuracy") | {"protocol": "ar"},
        row("teacher", 0, 1, 1.3, 0.1, "lambada_perplexity"),
        row("kl", 7, 1, 1.7, 0.1, "lambada_perplexity"),
    ]
    assert sentences.last_word_verdicts(tidy(pandas.DataFrame(rows))) == [
        "a, accuracy of last words: teacher 0.900 [0.850, 0.950], kl round 7 0.880 [0.830, 0.930] "
        "(intervals overlap)",
        "a, accuracy of last words: teacher 0.900 [0.850, 0.950], "
        "squared error round 7 0.700 [0.650, 0.750] (lower)",
        "a, perplexity of last words: teacher 1.30 [1.20, 1.40], kl round 7 1.70 [1.60, 1.80] "
        "(higher)",
    ]


def test_a_table_without_students_says_nothing():
    table = tidy(pandas.DataFrame(TEACHER))
    assert sentences.headlines(table) == [] and sentences.gains(table, table[:0]) == []
    assert sentences.story_shares(table) == []


@pytest.mark.parametrize(("number", "found"), [(0, "one\ntwo"), (1, "three"), (2, None)])
def test_a_sample_is_found_by_its_number(tmp_path, number, found):
    file = tmp_path / "samples.txt"
    file.write_text("=== 0\none\ntwo\n=== 1\nthree\n")
    assert sentences.sample_text(file, number) == found
    assert sentences.sample_text(tmp_path / "none", number) is None


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("<e> of a story.<e>One day.<e>Then two.<e>And", "One day.\n\nThen two.\n\nAnd"),
        ("of a story.<e><e> One day.<e>Then", "One day.\n\nThen"),
        ("of a story.<e>One day", "of a story.<e>One day"),
        ("<e>One long document.", "<e>One long document."),
    ],
)
def test_a_sample_begins_with_its_first_whole_document(tmp_path, written, shown):
    end = "<|endoftext|>"
    (tmp_path / "samples.txt").write_text("=== 0\n" + written.replace("<e>", end) + "\n")
    assert sentences.sample_text(tmp_path / "samples.txt", 0) == shown.replace("<e>", end)


def test_a_long_sample_is_cut_at_a_word(tmp_path):
    (tmp_path / "samples.txt").write_text("=== 0\n" + "word " * 500)
    text = sentences.sample_text(tmp_path / "samples.txt", 0)
    assert len(text) <= 902 and text.endswith("word …")

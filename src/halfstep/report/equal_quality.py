"""Speed at equal quality: the time of the fewest steps that write as well as another model does.

Quality is the perplexity at the entropy of held-out text where the frontier has it for step counts
that were timed, else the generative perplexity. A student is compared with the autoregressive
baseline, and with its teacher at the teacher's best. Times are those of texts as long as samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

from pandas import DataFrame

from halfstep.report.conditions import join_values
from halfstep.report.frontier import label_with_steps, reading_cell
from halfstep.report.grids import model_label, round_number
from halfstep.report.rows import sampled_rows, usual_rows
from halfstep.report.sentences import Headline, first_protocol, headlines

NO_GAIN = "nothing is gained over autoregression"
AT_DATA = "perplexity_at_data_entropy"


class SpeedVerdict(NamedTuple):
    """What the timings of a teacher's models support."""

    summary: str
    details: list[str]
    """Sentences with an item on each line after the first, as those of sentences.py"""


def speed_verdict(speed: DataFrame, steps: DataFrame, temperatures: DataFrame) -> SpeedVerdict:
    """What the timings of one teacher's models say about speed at equal quality.

    Args:
        speed: the teacher's rows of the table `speed`
        steps: its rows of the table `steps`, pooled over trainings
        temperatures: its rows of the table `temperatures`, pooled over trainings; may be empty
    """
    perplexity = first_protocol(steps[steps["metric"] == "generative_perplexity"])
    samples = sampled_rows(perplexity)
    lengths = (samples["steps"] * samples["tokens_per_step"]).dropna().astype(float).round()
    usual = usual_rows(speed)
    timed = usual[usual["length"].astype(float) == lengths.max()]
    if timed.empty:
        return SpeedVerdict("Texts as long as the samples were not timed.", [])
    against_teacher = [
        sentence
        for headline in headlines(perplexity)
        for sentence in _against_teacher(headline, timed)
    ]
    name, quality = _quality(perplexity, temperatures, timed)
    baseline, models = quality[quality["run"] == "baseline"], list(_last_models(quality))
    missing = "autoregressive baseline" if models else "step count"
    if not models or baseline.empty or (timed["run"] != "baseline").all():
        summary = (
            f"No {missing} was both timed and scored, so there is no comparison with "
            "autoregression."
        )
        return SpeedVerdict(summary, against_teacher)
    level = _lowest(baseline)
    found = [_against_baseline(name, rows, level, timed) for rows in models]
    gains = sum(is_gain for _, is_gain in found)
    summary = f"At equal quality {NO_GAIN}."
    if gains:
        summary = (
            f"At equal quality {gains} of {len(found)} models write faster than the autoregressive "
            "baseline, at the batch sizes below."
        )
    return SpeedVerdict(summary, [*(sentence for sentence, _ in found), *against_teacher])


def _quality(
    perplexity: DataFrame, temperatures: DataFrame, timed: DataFrame
) -> tuple[str, DataFrame]:
    """The measure by which models are compared: its name, and its rows of timed step counts."""
    found = first_protocol(temperatures[temperatures["metric"] == AT_DATA])
    found, perplexity = (
        rows[rows["steps"].isin(timed["steps"].dropna()) | (rows["run"] == "baseline")]
        for rows in (found.dropna(subset="value"), perplexity)
    )
    is_baseline = found["run"] == "baseline"
    if is_baseline.any() and not is_baseline.all():
        return "perplexity at the entropy of held-out text", found
    return "generative perplexity", perplexity


def _last_models(quality: DataFrame) -> Iterator[DataFrame]:
    """The rows of the teacher, and those of the last round of each run."""
    for _, rows in sampled_rows(quality).groupby("run", sort=False):
        yield rows[rows["round"] == rows["round"].max()].sort_values("steps")


def _against_baseline(
    name: str, rows: DataFrame, baseline: Any, timed: DataFrame
) -> tuple[str, bool]:
    """A sentence on the fewest timed steps that are as good as the baseline; is it faster?"""
    equal = rows[rows["value"] <= baseline.value]
    best = _lowest(rows)
    if equal.empty:
        text = (
            f"{model_label(best)}: at none of {join_values(rows['steps'])} steps is its {name} as "
            f"low as the baseline's {reading_cell(baseline)}; the lowest of these is "
            f"{reading_cell(best)} with {best.steps} steps: {NO_GAIN}"
        )
        return text, False
    student = next(equal.itertuples())
    title = (
        f"{label_with_steps(student)}: {name} {reading_cell(student)}, the baseline's "
        f"{reading_cell(baseline)}; time to write:"
    )
    pairs = list(_pairs(timed[timed["steps"] == student.steps], timed[timed["run"] == "baseline"]))
    items = [_compared_times(mine, other, NO_GAIN) for mine, other in pairs]
    return "\n  ".join([title, *items]), any(mine.high < other.low for mine, other in pairs)


def _against_teacher(headline: Headline, timed: DataFrame) -> list[str]:
    """A sentence on a student and the steps of its teacher's best, where both are timed."""
    student, best = SimpleNamespace(**headline.student), SimpleNamespace(**headline.best)
    of_steps = (timed[timed["steps"] == row.steps] for row in (student, best))
    pairs = list(_pairs(*of_steps))
    if not pairs or student.value > best.value or student.steps == best.steps:
        return []
    title = (
        f"{label_with_steps(student)}, against its teacher at its best, {best.steps} steps; time "
        "to write:"
    )
    items = [_compared_times(mine, other, "nothing is gained") for mine, other in pairs]
    return ["\n  ".join([title, *items])]


def _pairs(rows: DataFrame, others: DataFrame) -> Iterator[tuple[Any, Any]]:
    """The fastest row of each side, at each batch size where both were timed."""
    for count in sorted(set(rows["batch_size"]) & set(others["batch_size"])):
        mine, other = (_lowest(side[side["batch_size"] == count]) for side in (rows, others))
        yield mine, other


def _lowest(rows: DataFrame) -> Any:
    return next(rows.sort_values("value", kind="stable").itertuples())


def _compared_times(mine: Any, other: Any, no_gain: str) -> str:
    """1 text of 64 tokens: 12.0 ms [11.5, 12.8] against 36.0 ms [35.1, 37.2]: 3.00 times faster"""
    if mine.high < other.low:
        word = f"{round_number(other.value / mine.value)} times faster"
    elif mine.low > other.high:
        word = f"{round_number(mine.value / other.value)} times slower: {no_gain}"
    else:
        word = f"no clear difference: {no_gain}"
    texts = f"{mine.batch_size} text{'' if mine.batch_size == 1 else 's'} of {mine.length} tokens"
    return f"{texts}: {_milliseconds(mine)} against {_milliseconds(other)}: {word}"


def _milliseconds(row: Any) -> str:
    value, low, high = (round_number(1000 * seconds) for seconds in (row.value, row.low, row.high))
    return f"{value} ms [{low}, {high}]"

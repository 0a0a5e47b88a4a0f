"""The reproduction report: published numbers and claims next to what was measured here.

Each published value (published.py) is compared with the row of the same model,
metric, step count and length. The verdict is `agrees` where our 95% interval holds the published
value, `differs` with the difference, or `not comparable` with the reason. Published values are
printed without intervals, so `agrees` says no more than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas
from pandas import DataFrame

from halfstep.report.catalogue import TABLES
from halfstep.report.conditions import join_values
from halfstep.report.grids import round_number
from halfstep.report.paper import KLD, ON_HUB
from halfstep.report.points import one_metric, short_judge
from halfstep.report.rows import usual_rows

Tables = Mapping[str, DataFrame]
AGREES, DIFFERS, NOT_COMPARABLE, MISSING = "agrees", "differs", "not comparable", "not measured"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
SIZES = {"1.3B": "1.3B", "424M": "medium", "863M": "large"}  # published name: our untrained size
OTHER_METHODS = ("Di4C", "Instruct", "IDLM", "Duo")  # parts of their names
HEADER = ("published", "value", "source", "ours", "interval", "verdict")


class Comparison(NamedTuple):
    """What the comparison of two numbers says, and why."""

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word}: {self.reason}" if self.reason else self.word


def published_lines(
    published: DataFrame, tables: Tables, size: str, commands: Mapping[str, str]
) -> DataFrame:
    """One line for each published value of a model that this pipeline makes, with our number.

    Args:
        published: rows of `published_rows`
        tables: our tables by name, with the rows of one trained teacher and of untrained networks
        size: network size of the trained teacher
        commands: for each table the command that fills an empty cell

    Returns:
        a frame with the columns HEADER
    """
    lines = []
    for row in published.to_dict("records"):
        kind = kind_of_model(row["model"])
        if kind is None:
            continue  # another method
        table = _table_of(row["metric"])
        mine = None if table is None else _ours(row, kind, tables.get(table))
        line = [_described(row), round_number(row["value"]), row["source"]]
        if mine is None:
            command = commands.get(table or "")
            verdict = Comparison(MISSING, f"run `{command}`" if command else "no table has it")
            line += ["", "", str(verdict)]
        else:
            line += [round_number(mine["value"]), _interval(mine), str(compare(row, mine, size))]
        lines.append(line)
    return DataFrame(lines, columns=HEADER)


def kind_of_model(name: str) -> str | None:
    """What a published model corresponds to: teacher, student or baseline; None for others."""
    if any(method in name for method in OTHER_METHODS):
        return None
    if "SDTT" in name:
        return "student"
    if name.startswith("MDLM"):
        return "teacher"
    return "baseline" if name.startswith(("GPT-2", "AR")) else None


def compare(published: Mapping[str, Any], mine: Mapping[str, Any], size: str) -> Comparison:
    """The verdict on a published value and our row of the same measure."""
    if reason := _obstacle(published, mine, size):
        return Comparison(NOT_COMPARABLE, reason)
    value, low, high = published["value"], mine["low"], mine["high"]
    if not pandas.isna(low) and low <= value <= high:
        return Comparison(AGREES)
    return Comparison(DIFFERS, f"by {100 * (mine['value'] / value - 1):+.0f}%")


def _obstacle(published: Mapping[str, Any], mine: Mapping[str, Any], size: str) -> str:
    """Why two numbers cannot be compared; "" if nothing is known against it."""
    source, draws, judge = published["source"], mine.get("draw_dtype"), mine.get("judge")
    if "second-hand" in source or "figure-read" in source:
        return "the published value is not from a table of its authors"
    if published["metric"] == "latency_s":
        device = "A100" if "A100" in source else "another device"
        return f"timed on {device} there, on {mine.get('device')} here"
    if size != "small":
        return f"169M parameters there, the size {size} here"
    if "fp64" in source and isinstance(draws, str) and draws != "float64":
        return f"drawn in float64 there, in {draws} here"
    if published["round"] not in (0, mine["round"]):
        return f"round {published['round']} there, round {mine['round']} here"
    theirs = published.get("judge")
    if isinstance(theirs, str) and isinstance(judge, str) and short_judge(judge) != theirs:
        return f"judged by {theirs} there, by {short_judge(judge)} here"
    return ""


def _table_of(metric: str) -> str | None:
    """The table that holds a metric."""
    return next((name for name, row in TABLES.items() if metric in row.metrics), None)


MATCHED = ("steps", "length", "batch_size")
"""Columns that a published value and ours must share, where the published one has them"""


def _ours(row: Mapping[str, Any], kind: str, table: DataFrame | None) -> dict[str, Any] | None:
    """Our row of a published value: the same metric, kind of model and columns MATCHED."""
    if table is None or not (table["metric"] == row["metric"]).any():
        return None
    mine = one_metric(table, row["metric"], all_judges=True)
    if kind == "student":
        mine = mine[mine["run"].isin((KLD, ON_HUB[KLD]))]
        number = row["round"] if row["round"] in set(mine["round"]) else mine["round"].max()
        mine = mine[mine["round"] == number]
    else:
        mine = mine[mine["run"] == kind]
    for column in MATCHED if kind != "baseline" else MATCHED[1:]:
        if not pandas.isna(row[column]):
            mine = mine[mine[column] == row[column]]
    if row["metric"] == "latency_s":
        for published_size, size in SIZES.items():
            if published_size in row["model"]:
                mine = mine[mine["teacher"].str.startswith(f"{size}-untrained")]
    judged = mine[[short_judge(judge) == row["judge"] for judge in mine["judge"]]]
    chosen = judged if len(judged) else mine
    return None if chosen.empty else chosen.iloc[0].to_dict()


def _described(row: Mapping[str, Any]) -> str:
    """Metric, model and where it was measured, in a few words."""
    words = [str(row["metric"]).replace("_", " "), "of", row["model"]]
    for column, unit in (("steps", "steps"), ("length", "tokens"), ("batch_size", "texts")):
        if not pandas.isna(row.get(column)):
            words.append(f"{int(row[column])} {unit},")
    return " ".join(words).rstrip(",")


def _interval(row: Mapping[str, Any]) -> str:
    if pandas.isna(row["low"]) or pandas.isna(row["high"]):
        return ""
    return f"[{round_number(row['low'])}, {round_number(row['high'])}]"


@dataclass(frozen=True)
class ClaimSide:
    """One side of a claim: which row of a table."""

    table: str
    metric: str
    run: str
    steps: int | None = None
    last_round: bool = False
    protocol: str | None = None

    def find(self, tables: Tables) -> dict[str, Any] | None:
        """The row, of the first teacher that has it; None where there is none."""
        table = tables.get(self.table)
        if table is None:
            return None
        names = (self.run, ON_HUB.get(self.run))
        mine = table[(table["metric"] == self.metric) & table["run"].isin(names)]
        if self.protocol:
            mine = mine[mine["protocol"] == self.protocol]
        if mine.empty:
            return None
        mine = one_metric(mine, self.metric)
        if self.steps is not None:
            mine = mine[mine["steps"] == self.steps]
        if self.last_round:
            mine = mine[mine["round"] == mine["round"].max()]
        return None if mine.empty else mine.iloc[0].to_dict()

    def __str__(self) -> str:
        at = "" if self.steps is None else f" with {self.steps} steps"
        return f"{self.run}{', last round' if self.last_round else ''}{at}"


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper as a comparison: `less` has the lower value.

    Attributes:
        text: the claim in our words
        place: where the paper says it
        less: the side that the paper says is lower
        more: the side that the paper says is higher
    """

    text: str
    place: str
    less: ClaimSide
    more: ClaimSide


STEPS, LAST_WORDS = "steps", "lambada"
PARALLEL = "parallel"  # the paper's protocol of accuracy
PPL, ACCURACY, WORD_PPL = "generative_perplexity", "lambada_accuracy", "lambada_perplexity"


def _student(metric: str, run: str = KLD, steps: int | None = None) -> ClaimSide:
    table = {PPL: STEPS, ACCURACY: LAST_WORDS, WORD_PPL: LAST_WORDS}.get(metric, "continuations")
    protocol = PARALLEL if metric == ACCURACY else None
    return ClaimSide(table, metric, run, steps, last_round=True, protocol=protocol)


CLAIMS = (
    Claim(
        "A student with 32 steps writes better than the teacher with 1,024",
        "section 4.1",
        _student(PPL, steps=32),
        ClaimSide(STEPS, PPL, "teacher", 1024),
    ),
    Claim(
        "A student with 64 steps writes better than GPT-2 with nucleus 0.95 (draws in float64)",
        "appendix, figure 9",
        _student(PPL, steps=64),
        ClaimSide(STEPS, PPL, "baseline"),
    ),
    Claim(
        "KLD keeps the accuracy of last words",
        "figure 2a",
        ClaimSide(LAST_WORDS, ACCURACY, "teacher", protocol=PARALLEL),
        _student(ACCURACY),
    ),
    Claim(
        "KLD keeps last words better than MSE",
        "figure 2",
        _student(WORD_PPL),
        _student(WORD_PPL, "mse"),
    ),
    Claim(
        "KLD keeps last words better than TVD",
        "figure 2",
        _student(WORD_PPL),
        _student(WORD_PPL, "tvd"),
    ),
    Claim(
        "MSE has a lower perplexity of unconditional texts than KLD",
        "section 4.1, figure 6a",
        _student(PPL, "mse", 32),
        _student(PPL, steps=32),
    ),
    Claim(
        "KLD improves MAUVE over the teacher with 128 steps",
        "figure 5",
        ClaimSide("continuations", "mauve", "teacher", 128),
        _student("mauve", steps=128),
    ),
)


def claim_verdict(claim: Claim, tables: Tables) -> tuple[Comparison, str]:
    """Whether a claim holds here, and the two numbers with their 95% intervals.

    It holds, or does not, where the intervals are apart.
    """
    less, more = claim.less.find(tables), claim.more.find(tables)
    if less is None or more is None:
        side = claim.less if less is None else claim.more
        return Comparison(MISSING, str(side)), ""
    numbers = f"{_number(less)} against {_number(more)}"
    bounds = [less["low"], less["high"], more["low"], more["high"]]
    if any(map(pandas.isna, bounds)):
        return Comparison(OPEN, "there is no interval"), numbers
    if less["high"] < more["low"]:
        return Comparison(HOLDS), numbers
    if less["low"] > more["high"]:
        return Comparison(FAILS), numbers
    return Comparison(OPEN, "the intervals overlap"), numbers


def _number(row: Mapping[str, Any]) -> str:
    return f"{round_number(row['value'])} {_interval(row)}".strip()


def speed_claim(speed: DataFrame | None, steps: int, factor: float) -> tuple[Comparison, str]:
    """Whether a student of `steps` is `factor` times faster than the fastest KV cache.

    The paper's case: 1.3B parameters, 8 texts of 2,048 tokens (figure 3b). Else the largest
    network and length of the table are taken, and named.
    """
    if speed is None or speed.empty or "times_faster" not in speed:
        return Comparison(MISSING, "the table speed"), ""
    usual = usual_rows(speed)
    mine = usual[(usual["steps"] == steps) & usual["times_faster"].notna()]
    if mine.empty:
        return Comparison(MISSING, f"a student with {steps} steps, timed with a baseline"), ""
    mine = mine[mine["params"] == mine["params"].max()]
    row = mine.sort_values(["length", "batch_size"]).iloc[-1]
    at = (
        f"{row['times_faster']:.1f} times ({row['teacher']}, {row['batch_size']} texts of "
        f"{row['length']} tokens, {row['device']})"
    )
    if row["params"] < 1e9 or row["length"] < 2048:
        return Comparison(NOT_COMPARABLE, "a smaller network or shorter texts than the paper's"), at
    return Comparison(HOLDS if row["times_faster"] >= factor else FAILS), at


Formatter = Callable[[list[list[str]], tuple[str, ...]], str]


def report_parts(
    published: DataFrame,
    tables: Tables,
    size: str,
    commands: Mapping[str, str],
    grid: Formatter,
) -> list[tuple[str, str]]:
    """(heading, text) of each part of the report, its grids written by `grid`.

    The other arguments are those of `published_lines`.
    """
    claims = []
    for claim in CLAIMS:
        verdict, numbers = claim_verdict(claim, tables)
        claims.append([claim.text, claim.place, numbers, str(verdict)])
    for steps, factor in ((16, 8.0), (32, 4.0)):
        verdict, numbers = speed_claim(tables.get("speed"), steps, factor)
        text = f"{steps} steps are {factor:.0f} times faster than a KV cache"
        claims.append([text, "section 4.3, figure 3b", numbers, str(verdict)])
    lines = published_lines(published, tables, size, commands)
    counts = lines["verdict"].str.partition(":")[0].value_counts()
    measured = [f"{table} ({join_values(rows['commit'])})" for table, rows in tables.items()]
    return [
        ("What the paper claims", grid(claims, ("claim", "place", "ours", "verdict"))),
        ("Published numbers", grid(lines.astype(str).to_numpy().tolist(), HEADER)),
        (
            "How to read this",
            "Intervals are ours, 95%. A claim holds, or does not, where two intervals are apart. "
            "Published values come without intervals: `agrees` means that ours holds them. "
            f"Verdicts: {', '.join(f'{word} {n}' for word, n in counts.items()) or 'none'}. "
            f"Tables and commits: {', '.join(measured) or 'none yet'}.",
        ),
    ]

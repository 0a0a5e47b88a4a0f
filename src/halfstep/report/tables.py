"""Metric rows to tables: long CSV for programs, Markdown for people, with the conditions of measurement in a line below.

    rows(files) -> DataFrame, one row for each metric row, columns COLUMNS
    TABLES[name] -> (select: rows -> long table, markdown: long table -> text, titles of its metrics)

Numbers taken under different conditions never share a column: `select` raises HalfstepError and names the two models that differ.
Published values (published.py) have rows and grids of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.report.continuations import METRICS as CONTINUATIONS
from halfstep.report.continuations import continuations, continuations_markdown

if TYPE_CHECKING:
    from pandas import DataFrame

COLUMNS = (
    "teacher", "run", "round", "model", "metric", "protocol", "version", "steps", "network_evaluations", "value", "low", "high", "judge",
    "judge_dtype", "data", "sampler", "num_samples", "seed", "weights", "draw_dtype", "temperature", "top_p", "length", "batch_size",
    "tokens_per_s", "tokens_per_forward", "energy_j", "device", "dtype", "params", "checkpoint", "commit", "source",
)  # fmt: skip
INTEGERS = ("round", "version", "steps", "num_samples", "seed", "length", "batch_size", "params")
LEVELS = ("baseline", "data")  # no sampling steps: lines to compare with

SAMPLES = {  # metric: its title; the order of the steps table
    "generative_perplexity": "Generative perplexity, lower is better",
    "entropy": "Unigram entropy of a sample in nats, and its difference from held-out text",
    "consistent_share": "Share of consistent stories",
    "accepted_share": "Share of stories that the grammar accepts",
    "distinct_2": "Share of distinct bigrams",
}
SHARES = (
    "consistent_share",
    "accepted_share",
)  # of stories, whose number differs from model to model
LAMBADA = {"lambada_accuracy": "accuracy", "lambada_perplexity": "perplexity"}
SPEED = {"latency_s": "seconds to write"}


def row_files(paths: Iterable[Path]) -> list[Path]:
    """These files, and the .json files below these folders that are no records of provenance."""
    below = (
        (path,) if not path.is_dir() else sorted(path.rglob("*.json")) for path in map(Path, paths)
    )
    return [file for one in below for file in one if not file.name.endswith("provenance.json")]


def rows(paths: Iterable[Path]) -> DataFrame:
    """All metric rows of these files, and of the .json files below these folders."""
    import pandas

    found = []
    for file in row_files(paths):
        content = read_json(file)
        if not isinstance(content, list) or not all(
            isinstance(row, dict) and {"metric", "model", "value"} <= row.keys() for row in content
        ):
            raise HalfstepError(
                f"{file}: expected a list of metric rows, each with metric, model and value; give --metrics only such files"
            )
        found += content
    return tidy(pandas.DataFrame(found))


def tidy(frame: DataFrame) -> DataFrame:
    """COLUMNS in their order, whole numbers as whole numbers, a stable order of rows. Also for a table read back from CSV."""
    extra = [column for column in frame.columns if column not in COLUMNS]
    frame = frame.reindex(columns=[*COLUMNS, *extra])
    for column in INTEGERS:
        frame[column] = frame[column].astype("Int64")
    frame["round"] = frame["round"].fillna(0)
    frame["rank"] = frame["run"].map({"teacher": 0, "baseline": 2, "data": 3}).fillna(1)
    order = [
        "teacher",
        "rank",
        "run",
        "round",
        "metric",
        "protocol",
        "length",
        "batch_size",
        "steps",
    ]
    return frame.sort_values(order, kind="stable", ignore_index=True).drop(columns="rank")


def read_csv(file: Path) -> DataFrame:
    """A table of ours, as written by `halfstep tabulate`."""
    import pandas

    try:
        return tidy(
            pandas.read_csv(file, dtype={"seed": "Int64", "checkpoint": str, "commit": str})
        )
    except FileNotFoundError:
        raise HalfstepError(f"{file}: no such table; make it with halfstep tabulate") from None
    except (ValueError, KeyError) as error:
        raise HalfstepError(
            f"{file}: not a table of halfstep tabulate ({error}); make it again"
        ) from None


def steps(table: DataFrame) -> DataFrame:
    """What was measured of samples, for every model and step count; `vs_data_percent` compares with held-out text."""
    table = table[table["metric"].isin(SAMPLES)].copy()
    comparable(table, ("data",))
    comparable(
        table[~table["run"].isin(LEVELS)],
        ("sampler", "weights", "draw_dtype", "temperature", "seed"),
    )
    comparable(table[~table["run"].isin(LEVELS) & ~table["metric"].isin(SHARES)], ("num_samples",))
    key = ["teacher", "metric", "protocol", "judge"]
    known = table.assign(judge=table["judge"].astype(object).fillna(""))
    data = known[known["run"] == "data"].set_index(key)["value"]
    keys = list(known[key].itertuples(index=False, name=None))
    table["vs_data_percent"] = [
        100 * (value / data[key] - 1) if data.get(key) else None
        for key, value in zip(keys, table["value"], strict=True)
    ]
    return table


def lambada(table: DataFrame) -> DataFrame:
    """Last words: accuracy and perplexity of every model by every protocol."""
    table = table[table["metric"].isin(LAMBADA)].copy()
    comparable(table, ("data",))
    comparable(table[table["run"] != "baseline"], ("weights", "num_samples"))
    return table


def speed(table: DataFrame) -> DataFrame:
    """Time to write; `times_faster` is the fastest baseline's latency at the same length and batch size over this one."""
    table = table[table["metric"] == "latency_s"].copy()
    comparable(table, ("device", "dtype"))
    comparable(table[table["run"] != "baseline"], ("draw_dtype",))
    base = (
        table[table["run"] == "baseline"]
        .groupby(["teacher", "length", "batch_size"])["value"]
        .min()
    )
    keys = list(zip(table["teacher"], table["length"], table["batch_size"], strict=True))
    table["times_faster"] = [
        base[key] / value if key in base.index else None
        for key, value in zip(keys, table["value"], strict=True)
    ]
    return table


def comparable(table: DataFrame, conditions: Sequence[str]) -> None:
    """One teacher's numbers of one metric share these conditions, each protocol's version, and the set of protocols and judges, or HalfstepError."""
    check_unique(table)
    table = table.assign(temperature=table["temperature"].astype(float).fillna(1.0))
    for (teacher, metric), group in table.groupby(["teacher", "metric"], sort=False):
        for condition in conditions:
            _same(metric, group, condition, condition)
        for protocol, mine in group.groupby("protocol", sort=False):
            _same(metric, mine, "version", f"version of protocol {protocol}")
        if metric not in LAMBADA:  # there every protocol has its own column
            ways = group.assign(
                way=["protocol " + ", judge ".join(way) for way in _ways(group)]
            ).groupby("model", sort=False)["way"]
            ways = ways.agg(lambda column: tuple(sorted(set(column))))
            if ways.nunique() > 1:
                one, two = ways.drop_duplicates().index[:2]
                raise HalfstepError(
                    f"{metric} of {one} is by {'; '.join(ways[one])}, that of {two} by {'; '.join(ways[two])}: "
                    f"these numbers do not belong in one column; measure all of {teacher} alike"
                )


def check_unique(table: DataFrame) -> None:
    """HalfstepError where two rows would be one cell: the same measure of one model, taken twice."""
    key = ["model", "teacher", "metric", "protocol", "judge", "steps", "length", "batch_size"]
    twice = table[table.duplicated(key, keep=False)]
    if len(twice):
        _, twice = next(iter(twice.groupby(key, dropna=False, sort=False)))
        row = twice.iloc[0]
        raise HalfstepError(
            f"{row['metric']} of {row['model']} by protocol {row['protocol']}{'' if row.isna()['steps'] else f' at {row.steps} steps'} is there {len(twice)} times "
            f"(checkpoints {_list(twice['checkpoint'])}; seeds {_list(twice['seed'])}): give --metrics one file of each measurement"
        )


def _same(metric: str, group: DataFrame, column: str, called: str) -> None:
    first = group.drop_duplicates(column)
    if len(first) > 1:
        (one, a), (two, b) = (
            first[["model", column]]
            .astype(object)
            .where(first[["model", column]].notna(), "none")
            .values[:2]
        )
        raise HalfstepError(
            f"{metric} of {one} has {called} {a}, that of {two} has {b}: these numbers do not belong in one column; measure both alike"
        )


def _ways(group: DataFrame) -> list[tuple[str, ...]]:
    """Of each row: its protocol, and its judge where it has one, with the precision in which it reads."""
    columns = group[["protocol", "judge", "judge_dtype"]].astype(object).fillna("")
    return [
        (protocol or "none", *([f"{judge} {dtype}".strip()] if judge else []))
        for protocol, judge, dtype in columns.itertuples(index=False)
    ]


def mixed_commits(table: DataFrame) -> str | None:
    """A sentence where the rows were not all made by one commit, or by a working tree that differs from its commit; else None."""
    found = sorted(table["commit"].dropna().unique())
    if len(found) < 2 and not any(commit.endswith("+dirty") for commit in found):
        return None
    counts = "; ".join(
        f"{commit}: {(table['commit'] == commit).sum()} of {len(table)} rows" for commit in found
    )
    what = (
        "of more than one commit"
        if len(found) > 1
        else "of a working tree that differs from its commit"
    )
    return f"These numbers are {what} ({counts}); make them anew where the code between may have changed them."


def steps_markdown(table: DataFrame, metrics: Sequence[str] = tuple(SAMPLES)) -> str:
    """For each teacher and metric a grid, models down and step counts across, `value ±half-width` of the 95% interval."""
    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
        parts.append(f"## {teacher}: samples")
        for (metric, protocol, judge), group in _by(mine, metrics):
            title = f"### {SAMPLES[metric]} (protocol {protocol})" + (
                f", judge {judge}" if mine["judge"].nunique() > 1 and judge else ""
            )
            parts.append(title + ", ± 95% interval")
            parts.append(_grid(group[~group["run"].isin(LEVELS)], "steps", "sampling steps"))
            level = [
                f"{row.run}: {_cell(row)}" for row in group[group["run"].isin(LEVELS)].itertuples()
            ]
            parts += ["Without sampling steps: " + "; ".join(level) + "."] if level else []
            parts.append(conditions(group))
        passes = mine[(mine["metric"] == metrics[0]) & ~mine["run"].isin(LEVELS)].dropna(
            subset="network_evaluations"
        )
        if len(passes) and (passes["network_evaluations"] == passes["steps"]).all():
            parts.append("The network is called once per sampling step.")
        elif len(passes):
            cells = passes.assign(
                value=passes["network_evaluations"], low=None, high=None, metric="passes"
            )
            parts += [
                "### Calls of the network per sample",
                _grid(cells, "steps", "sampling steps"),
            ]
    return "\n\n".join(parts) + "\n"


def lambada_markdown(table: DataFrame) -> str:
    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
        columns = mine.assign(
            case=[
                f"{LAMBADA[m]}, {p}" for m, p in zip(mine["metric"], mine["protocol"], strict=True)
            ]
        )
        parts += [
            f"## {teacher}: last words (LAMBADA), ± 95% interval",
            _grid(columns, "case", "model"),
            conditions(mine),
        ]
    return "\n\n".join(parts) + "\n"


def speed_markdown(table: DataFrame) -> str:
    parts = []
    for teacher, mine in table.groupby("teacher", sort=False):
        cases = zip(mine["steps"], mine["run"], mine["sampler"], strict=True)
        mine = mine.assign(
            case=[
                f"{steps} steps" if run not in LEVELS else baseline(sampler)
                for steps, run, sampler in cases
            ]
        )
        who = ", ".join(mine.loc[mine["run"] != "baseline", "model"].unique())
        shown = [
            (
                "milliseconds to write, median ± quartile (times faster than the fastest baseline)",
                _latency_cell,
            ),
            ("tokens per second", lambda row: f"{row.tokens_per_s:,.0f}"),
            ("tokens per forward pass of a text", lambda row: number(row.tokens_per_forward)),
        ] + [("joules per text", lambda row: number(row.energy_j / row.batch_size))] * bool(
            mine["energy_j"].notna().all()
        )
        for title, cell in shown:
            parts += [
                f"## {teacher}: {title}",
                _grid(
                    mine,
                    "case",
                    "tokens × texts",
                    cell,
                    lambda row: f"{row.length} × {row.batch_size}",
                ),
            ]
        what = f"{who}, and {_list(baseline(sampler) for sampler in mine.loc[mine['run'] == 'baseline', 'sampler'])}"
        timed = f"Timed: {what}, in one process; weights {_list(mine['weights'])}; ± is the farther quartile; "
        parts.append(
            timed
            + f"{_list(mine['device'])}, {_list(mine['dtype'])}; commit {_list(mine['commit'])}."
        )
    return "\n\n".join(parts) + "\n"


def baseline(sampler) -> str:
    """What a baseline of the speed table is called: ours is the one without a name, in rows of old too."""
    return {"transformers": "baseline, transformers", "vllm": "baseline, vLLM"}.get(
        sampler, "baseline"
    )


def conditions(table: DataFrame) -> str:
    """How the numbers of a table were taken, in a line: judge, protocol and its version, data, sampler, number of samples, seed, weights, commit."""
    base, students = table[table["run"] == "baseline"], table[~table["run"].isin(LEVELS)]
    judges = table[["judge", "judge_dtype"]].dropna(subset="judge").drop_duplicates()
    protocols = table[["protocol", "version"]].drop_duplicates()
    named = (
        ("judge", [f"{judge} ({dtype})" if isinstance(dtype, str) else judge for judge, dtype in judges.values]),
        ("protocol", [f"{protocol} v{version}" for protocol, version in protocols.values]), ("data", table["data"]), ("sampler", students["sampler"]),
        ("draws", students["draw_dtype"]), ("temperature", students["temperature"]), ("top-p of the baseline", base["top_p"]),
        ("n", _range(table["num_samples"])), ("seed", table["seed"]), ("weights", students["weights"]), ("commit", table["commit"]),
    )  # fmt: skip
    text = (
        "; ".join(f"{name} {listed}" for name, values in named if (listed := _list(values))) + "."
    )
    return text[0].upper() + text[1:]


def _range(values) -> list:
    """A few values, or the least and the largest of many."""
    found = sorted(set(values.dropna()))
    return found if len(found) < 4 else [f"{found[0]:,} to {found[-1]:,}"]


def label(run: str, round_: int) -> str:
    """A model's name in a row of a table."""
    return f"{run} round {round_}" if round_ else run


def short(judge: str) -> str:
    """A judge without its revision and place: gpt2-large, Meta-Llama-3-8B, baseline."""
    return str(judge).partition("@")[0].removesuffix("/hf").rpartition("/")[2]


def _by(table: DataFrame, metrics: Sequence[str]):
    """((metric, protocol, judge), rows): a grid's worth of numbers each, judges in the order of the configuration."""
    for metric in metrics:
        mine = table[table["metric"] == metric]
        for (protocol, judge), group in mine.groupby(
            ["protocol", "judge"], dropna=False, sort=False
        ):
            yield (metric, protocol, judge if isinstance(judge, str) else None), group


def _grid(table: DataFrame, across: str, corner: str, cell=None, down=None) -> str:
    """Models (or what `down` says) as rows, the values of `across` as columns, in the order they appear; steps ascend."""
    from tabulate import tabulate

    names = (
        sorted(table[across].dropna().unique())
        if across == "steps"
        else list(dict.fromkeys(table[across]))
    )
    lines: dict[str, dict] = {}
    for row in table.itertuples():
        lines.setdefault(down(row) if down else label(row.run, row.round), {})[
            getattr(row, across)
        ] = (cell or _cell)(row)
    body = [[name, *(cells.get(column, "") for column in names)] for name, cells in lines.items()]
    return tabulate(
        body,
        [corner, *map(str, names)],
        "github",
        disable_numparse=True,
        colalign=("left", *("right" for _ in names)),
    )


def _cell(row) -> str:
    import pandas

    text = _interval(row)
    if (
        row.metric == "entropy"
        and not pandas.isna(getattr(row, "vs_data_percent", None))
        and row.run != "data"
    ):
        text += f" ({row.vs_data_percent:+.1f}%)"
    return text


def _latency_cell(row) -> str:
    import pandas

    ratio = (
        ""
        if row.run == "baseline" or pandas.isna(row.times_faster)
        else f" ({number(row.times_faster, 2)}×)"
    )
    return _interval(row, 1000) + ratio


def _interval(row, unit: float = 1) -> str:
    """The value, and the wider half of its interval with as many decimals: 69.4 ±2.8"""
    import pandas

    text = number(unit * row.value)
    if pandas.isna(row.low) or pandas.isna(row.high):
        return text
    return f"{text} ±{unit * max(row.high - row.value, row.value - row.low):.{len(text.partition('.')[2])}f}"


def number(value: float, digits: int = 3) -> str:
    """Three significant digits, never an exponent for what fits a table: 152, 15.2, 0.152."""
    return (
        f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:#.{digits}g}".rstrip(".")
    )


def _list(values) -> str:
    import pandas

    return ", ".join(str(value) for value in dict.fromkeys(values) if not pandas.isna(value))


TABLES = {  # name: (select, markdown, the metrics in it and what they are called)
    "steps": (steps, steps_markdown, SAMPLES),
    "lambada": (lambada, lambada_markdown, LAMBADA),
    "speed": (speed, speed_markdown, SPEED),
    "continuations": (continuations, continuations_markdown, CONTINUATIONS),
}

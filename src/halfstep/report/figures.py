"""The figures: one function each, from tables to a Figure and the points it shows.

    FIGURES[name] = (function, the tables it needs)      function(tables: dict[str, DataFrame]) -> (Figure, points)

Tables are those of `halfstep tabulate` by name (steps, lambada, speed), `journals`, the curves of every training, and with --published
`published`, values of others that four of the figures lay under ours.
To add a figure write a function that selects points (columns style.POINTS), give them to `style.draw`, and add it to FIGURES.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import pandas

from halfstep.errors import HalfstepError
from halfstep.records.journal import read_journal
from halfstep.report import style
from halfstep.report.continuations import mauve_vs_steps
from halfstep.report.published import PROTOCOL
from halfstep.report.tables import LEVELS, baseline, conditions, short

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    Drawn = tuple[Figure, DataFrame]

LOSSES = {
    "train/loss": "training loss",
    "val/nelbo": "held-out loss",
    "val/nll": "held-out loss",
}  # teacher and rounds, baseline
CURVE_POINTS = 120  # of a training curve: the mean over equal stretches of steps


def ppl_vs_steps(tables: dict[str, DataFrame]) -> Drawn:
    """Generative perplexity against sampling steps: teacher and every round, a panel for each run and judge; baseline and data as lines."""
    rows = _metric(tables["steps"], "generative_perplexity", of_every_judge=True)
    points = _by_run(rows, "steps")
    alike = {
        panel: None for panel in points["panel"] if "judge" not in panel or "gpt2-large" in panel
    }
    points, published = _with_published(points, tables, "generative_perplexity", "steps", alike)
    note = f"Generative perplexity, mean and 95% interval. {conditions(rows)}{published}"
    return style.draw_panels(
        points,
        note,
        xlabel="sampling steps",
        ylabel="generative perplexity",
        x_scale="steps",
        log_y=True,
        labels="left",
    ), points


def entropy_vs_steps(tables: dict[str, DataFrame]) -> Drawn:
    """Unigram entropy against sampling steps; the grey band is 5% around held-out text: outside of it a low perplexity is no success."""
    rows = _metric(tables["steps"], "entropy")
    points, published = _with_published(_by_run(rows, "steps"), tables, "entropy", "steps")

    def band(axes, mine) -> None:
        data = mine.loc[mine["series"] == "data", "y"]
        if len(data):
            bottom, top = axes.get_ylim()
            axes.axhspan(
                0.95 * data.iloc[0],
                1.05 * data.iloc[0],
                color="#999",
                alpha=0.12,
                linewidth=0,
                zorder=0,
            )
            axes.set_ylim(min(bottom, 0.94 * data.iloc[0]), max(top, 1.06 * data.iloc[0]))

    note = f"Unigram entropy of a sample, mean and 95% interval; grey band: within 5% of held-out text. {conditions(rows)}{published}"
    return style.draw_panels(
        points,
        note,
        xlabel="sampling steps",
        ylabel="entropy (nats)",
        x_scale="steps",
        labels="left",
        before=band,
    ), points


def ppl_vs_latency(tables: dict[str, DataFrame]) -> Drawn:
    """Generative perplexity against the time to write one text: teacher and last rounds at each timed step count, the fastest baseline as a point.

    A speed-up is one of equal quality where a student's line meets the level of the baseline's perplexity.
    """
    quality, speed = _metric(tables["steps"], "generative_perplexity"), tables["speed"]
    parts, notes = [], []
    for teacher, mine in quality.groupby("teacher", sort=False):
        timed = speed[speed["teacher"] == teacher]
        timed = timed[timed["length"] == timed["length"].max()]
        timed = timed[timed["batch_size"] == timed["batch_size"].min()]
        seconds = (
            timed[timed["run"] != "baseline"].drop_duplicates("steps").set_index("steps")["value"]
        )
        last = mine[~mine["run"].isin(LEVELS)].groupby("run", sort=False)["round"].transform("max")
        lines = mine[
            ~mine["run"].isin(LEVELS)
            & (mine["round"] == last.reindex(mine.index))
            & mine["steps"].isin(seconds.index)
        ]
        name = [
            run if run == "teacher" else f"{run}, round {round_}"
            for run, round_ in zip(lines["run"], lines["round"], strict=True)
        ]
        counts = [
            f"{steps} steps" if run == "teacher" else None
            for run, steps in zip(lines["run"], lines["steps"], strict=True)
        ]
        parts.append(
            _points(lines, teacher, name, 1000 * lines["steps"].map(seconds).astype(float)).assign(
                round=0, text=counts
            )
        )
        base, base_time = (
            mine[mine["run"] == "baseline"],
            timed.loc[timed["run"] == "baseline", "value"],
        )
        if len(base) and len(base_time):
            parts.append(
                _points(base.tail(1), teacher, "baseline", 1000 * base_time.min()).assign(
                    kind="point"
                )
            )
            parts.append(
                _points(base.tail(1), teacher, "the baseline's quality", None).assign(
                    kind="level", low=None, high=None
                )
            )
        parts.append(
            _points(mine[mine["run"] == "data"].tail(1), teacher, "data", None).assign(kind="level")
        )
        if len(timed):
            what = f"{timed['length'].iloc[0]} tokens, batch size {timed['batch_size'].iloc[0]}, {timed['device'].iloc[0]}, {timed['dtype'].iloc[0]}"
            notes.append(
                f"{teacher}: {what}, timed {', '.join(timed['model'].unique())}; one network size, so one time for all rounds"
            )
    points = pandas.concat(parts, ignore_index=True)
    if not (points["kind"] == "line").any():
        raise HalfstepError(
            "ppl_vs_latency: no step count is in both tables, steps and speed; let benchmark_steps name some of sampling steps"
        )
    note = f"{'. '.join(notes)}. {conditions(quality)}"
    return style.draw_panels(
        points,
        note,
        xlabel="milliseconds to write one text",
        ylabel="generative perplexity",
        x_scale="log",
        log_y=True,
        labels="left",
        share_y=False,
    ), points


def lambada_vs_round(tables: dict[str, DataFrame]) -> Drawn:
    """Last-word accuracy and perplexity against the round, round 0 being the teacher: a line for each run, a panel for each protocol."""
    table = tables["lambada"]
    parts = []
    for (teacher, metric), mine in table.groupby(["teacher", "metric"], sort=False):
        base = mine[mine["run"] == "baseline"].tail(1)
        for protocol, group in mine[mine["run"] != "baseline"].groupby("protocol", sort=False):
            panel = _title(table, teacher, f"{metric.removeprefix('lambada_')}, {protocol}")
            start = group[group["run"] == "teacher"]
            for run in (
                group.loc[group["run"] != "teacher", "run"].unique()
                if (group["run"] != "teacher").any()
                else ["teacher"]
            ):
                line = (
                    group[(group["run"] == run)]
                    if run == "teacher"
                    else pandas.concat([start, group[group["run"] == run]])
                )
                parts.append(_points(line, panel, run, line["round"]).assign(round=0))
            parts.append(_points(base, panel, "baseline", None).assign(kind="level"))
    points = pandas.concat(parts, ignore_index=True)
    titles = {
        panel: panel.rpartition(": ")[2].partition(",")[0] for panel in points["panel"].unique()
    }
    alike = {panel: None for panel in titles if panel.endswith("accuracy, parallel")}
    points, published = _with_published(points, tables, "lambada_accuracy", "round", alike)
    note = f"Last words (LAMBADA), 95% intervals; round 0 is the teacher. {conditions(table)}{published}"
    return style.draw_panels(
        points,
        note,
        xlabel="round",
        ylabel=titles,
        share_y=False,
        columns=3 if len(titles) % 4 else 2,
    ), points


def latency_vs_length(tables: dict[str, DataFrame]) -> Drawn:
    """Time to write against the number of tokens: baselines with their KV cache and every step count, a panel for each network and batch size.

    The paper's figures 3b and 20 (batch 8) and 21 (batch 4), and a text alone; others of many batch sizes are in `speedup_vs_batch`.
    """
    table, parts, sizes = tables["speed"], [], {}
    if table["batch_size"].nunique() > 3:
        table = table[
            table["batch_size"].isin((1, 4, 8)) | ~table["batch_size"].isin((1, 4, 8)).any()
        ]
    counts = sorted(table["steps"].dropna().unique(), reverse=True)
    for (teacher, size), mine in table.groupby(["teacher", "batch_size"], sort=False):
        panel = _title(
            table, teacher, "one text at a time" if size == 1 else f"{size} texts at once"
        )
        sizes[panel] = size
        base, timed = mine[mine["run"] == "baseline"], mine[mine["run"] != "baseline"]
        for name, rows in base.groupby(
            base["sampler"].map(baseline).where(base["sampler"].notna(), "baseline"), sort=False
        ):
            parts.append(
                _points(
                    rows,
                    panel,
                    "baseline, KV cache" if name == "baseline" else name,
                    rows["length"],
                    1000,
                ).assign(round=0)
            )
        for model, rows in timed.groupby("model", sort=False):
            prefix = f"{model.partition('/')[2]}, " if timed["model"].nunique() > 1 else ""
            for darker, steps in enumerate(counts, start=1):  # the fewer steps, the darker
                line = rows[rows["steps"] == steps]
                parts.append(
                    _points(line, panel, f"{prefix}{steps} steps", line["length"], 1000).assign(
                        round=darker
                    )
                )
    points, published = _with_published(
        pandas.concat(parts, ignore_index=True), tables, "latency_s", "length", sizes, 1000
    )
    note = f"Medians, bands to the quartiles; {_timed(table)}{published}"
    return style.draw_panels(
        points, note, xlabel="tokens written", ylabel="milliseconds", x_scale="steps", log_y=True
    ), points


def speedup_vs_batch(tables: dict[str, DataFrame]) -> Drawn:
    """How many times faster than the fastest baseline against the number of texts at once: a line for each step count, a panel for each network
    and three of the lengths. Below one, in the grey, autoregression wins.
    """
    table, parts = tables["speed"], []
    lengths = sorted(table["length"].unique())
    shown = {lengths[0], lengths[len(lengths) // 2], lengths[-1]}
    counts = sorted(table["steps"].dropna().unique(), reverse=True)
    timed = table[
        (table["run"] != "baseline") & table["times_faster"].notna() & table["length"].isin(shown)
    ]
    if timed.empty:
        raise HalfstepError(
            "speedup_vs_batch: the speed table has no student timed beside a baseline; make it with halfstep latency"
        )
    for (teacher, length), mine in timed.groupby(["teacher", "length"], sort=False):
        panel = _title(table, teacher, f"{length} tokens")
        for model, rows in mine.groupby("model", sort=False):
            prefix = f"{model.partition('/')[2]}, " if mine["model"].nunique() > 1 else ""
            for darker, steps in enumerate(counts, start=1):
                line = rows[rows["steps"] == steps].sort_values("batch_size")
                ratio = line.assign(value=line["times_faster"], low=None, high=None)
                parts.append(
                    _points(ratio, panel, f"{prefix}{steps} steps", line["batch_size"]).assign(
                        round=darker
                    )
                )
        parts.append(
            _points(
                mine.head(1).assign(value=1.0, low=None, high=None), panel, "baseline", None
            ).assign(kind="level", round=0)
        )
    points = pandas.concat(parts, ignore_index=True)

    def lost(axes, mine) -> None:
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(bottom, 0.7), max(top, 1.5))
        axes.axhspan(axes.get_ylim()[0], 1, color="#999", alpha=0.18, linewidth=0, zorder=0)
        axes.annotate(
            "autoregression wins",
            (0.02, 0.02),
            xycoords="axes fraction",
            fontsize=6.5,
            color="#555",
        )

    note = f"Ratio of medians to the fastest baseline ({', '.join(dict.fromkeys(map(baseline, table.loc[table['run'] == 'baseline', 'sampler'])))}); {_timed(table)}"
    return style.draw_panels(
        points,
        note,
        xlabel="texts at once",
        ylabel="times faster than autoregression",
        x_scale="steps",
        log_y=True,
        before=lost,
    ), points


def _timed(table: DataFrame) -> str:
    """Where and how the rows of the speed table were timed, in a sentence."""
    where = "; ".join(
        ", ".join(map(str, table[column].dropna().unique())) for column in ("device", "dtype")
    )
    return f"all in one process. {where}; weights {', '.join(table['weights'].dropna().unique())}; commit {', '.join(table['commit'].dropna().unique())}."


def loss_curves(tables: dict[str, DataFrame]) -> Drawn:
    """Training loss, and the held-out one, against optimiser steps: a panel for each run with all its rounds, one for teacher and baseline."""
    table, parts = tables["journals"], []
    for title in dict.fromkeys(LOSSES.values()):
        kept = table[table["key"].map(LOSSES.get) == title]
        for (teacher, group), mine in kept.groupby(["teacher", "group"], sort=False):
            panel = _title(table, teacher, f"{group}: {title}")
            for series, curve in mine.groupby("series", sort=False):
                x, y = _thin(curve["step"].to_numpy(float), curve["value"].to_numpy(float))
                parts.append(
                    pandas.DataFrame(
                        {
                            "panel": panel,
                            "series": series,
                            "kind": "line",
                            "round": curve["round"].iloc[0],
                            "x": x,
                            "y": y,
                        }
                    )
                )
    if not parts:
        raise HalfstepError(
            f"loss_curves: the journals hold none of {', '.join(LOSSES)}; name the folders under results/models with --tables"
        )
    points = pandas.concat(parts, ignore_index=True).reindex(columns=style.POINTS)
    titles = {panel: panel.rpartition(": ")[2] for panel in points["panel"].unique()}
    groups = table.drop_duplicates(["teacher", "group"])
    note = f"Means over equal stretches of steps, at most {CURVE_POINTS} a curve. Journals of {', '.join(table['teacher'].unique())}; commit {', '.join(table['commit'].unique())}."
    return style.draw_panels(
        points,
        note,
        xlabel="optimiser steps",
        ylabel=titles,
        share_y=False,
        columns=min(len(groups), 6),
    ), points


def journals(folders: Iterable[Path]) -> DataFrame:
    """The curves in these folders (or journal files): teacher, group (run, or pretraining), series, round, key, step, value, commit."""
    found = []
    for path in folders:
        places = (
            [path.parent]
            if path.is_file()
            else sorted(file.parent for file in path.rglob("journal.jsonl"))
        )
        for folder in places:
            run, curve = read_journal(folder)
            teacher, name = folder.parent.name, folder.name
            group, series, round_ = "pretraining", name, 0
            if name.startswith("round-"):
                teacher, group, series, round_ = (
                    folder.parent.parent.name,
                    folder.parent.name,
                    name.replace("-", " "),
                    int(name.removeprefix("round-")),
                )
            base = {
                "teacher": teacher,
                "group": group,
                "series": series,
                "round": round_,
                "commit": run["tags"].get("git_commit", "unknown"),
            }
            found += [
                base | {"key": key, "step": point["step"], "value": value}
                for point in curve
                for key, value in point["metrics"].items()
            ]
    table = pandas.DataFrame(
        found, columns=["teacher", "group", "series", "round", "commit", "key", "step", "value"]
    )
    rank = table.assign(rank=table["group"] != "pretraining", last=table["series"] == "baseline")
    return table.loc[
        rank.sort_values(["teacher", "rank", "group", "last", "round"], kind="stable").index
    ].reset_index(drop=True)


def _metric(table: DataFrame, metric: str, of_every_judge: bool = False) -> DataFrame:
    """Rows of one metric by a teacher's first judge, or by each; of the protocols by it the first too (ids before retokenized)."""
    rows = table[table["metric"] == metric]
    if rows.empty:
        raise HalfstepError(f"the steps table has no row of {metric}; score samples first")
    if not of_every_judge:
        rows = rows[
            rows["judge"].isna()
            | (rows["judge"] == rows.groupby("teacher")["judge"].transform("first"))
        ]
    return rows[
        rows["protocol"]
        == rows.groupby(["teacher", "judge"], dropna=False)["protocol"].transform("min")
    ]


def _with_published(
    points: DataFrame,
    tables: dict[str, DataFrame],
    metric: str,
    x: str,
    panels: dict | None = None,
    unit: float = 1,
):
    """The points with published ones, within the range of ours, in these panels (all) or those of a batch size, and a sentence that names the sources."""
    if "published" not in tables:
        return points, ""
    panels = dict.fromkeys(points["panel"]) if panels is None else panels
    rows, ours = tables["published"], points.loc[points["kind"] == "line", "x"]
    rows = rows[
        (rows["metric"] == metric) & rows["in_figures"] & rows[x].between(ours.min(), ours.max())
    ]
    if x == "round":  # a teacher and its rounds are one line
        rows = rows.assign(model=rows.groupby("source")["model"].transform(" and ".join))
    counts = [
        f", {steps} steps" if x == "length" and not pandas.isna(steps) else ""
        for steps in rows["steps"]
    ]
    rows = rows.assign(who=rows["model"] + counts + ", " + rows["source"])
    parts, letters = [points], {}
    for panel, size in panels.items():
        for name, line in (
            (rows if size is None else rows[rows["batch_size"] == size])
            .sort_values(x)
            .groupby("who", sort=False)
        ):
            letter = letters.setdefault(name, chr(ord("a") + len(letters)))
            parts.append(
                _points(line, panel, f"published {letter}: {name}", line[x], unit).assign(
                    kind="published", round=0
                )
            )
    told = "; ".join(f"{letter} {name}" for name, letter in letters.items())
    return pandas.concat(
        parts, ignore_index=True
    ), f" Published, {PROTOCOL}: {told}." if told else ""


def _by_run(rows: DataFrame, x: str) -> DataFrame:
    """A panel for each run of each teacher, and for each of several judges: the teacher, its rounds, and the levels."""
    parts, several = [], rows.groupby("teacher")["judge"].nunique() > 1
    for (teacher, judge), mine in rows.groupby(["teacher", "judge"], dropna=False, sort=False):
        runs = [run for run in mine["run"].unique() if run not in ("teacher", *LEVELS)] or [
            "teacher"
        ]
        for run in runs:
            panel = " · ".join(
                [teacher]
                + [run] * (run != "teacher")
                + [f"judge {short(judge)}"] * bool(several[teacher])
            )
            lines = mine[mine["run"].isin({"teacher", run})].sort_values(["round", x])
            parts.append(
                _points(
                    lines,
                    panel,
                    [f"round {r}" if r else "teacher" for r in lines["round"]],
                    lines[x],
                )
            )
            for level in LEVELS:
                parts.append(
                    _points(mine[mine["run"] == level].tail(1), panel, level, None).assign(
                        kind="level"
                    )
                )
    return pandas.concat([part for part in parts if len(part)], ignore_index=True)


def _points(rows: DataFrame, panel, series, x, unit: float = 1) -> DataFrame:
    values = {
        column: unit * rows[name].to_numpy(float)
        for column, name in (("y", "value"), ("low", "low"), ("high", "high"))
    }
    x = numpy.nan if x is None else x.to_numpy(float) if hasattr(x, "to_numpy") else x
    frame = {
        "panel": panel,
        "series": series,
        "kind": "line",
        "round": rows["round"].to_numpy(int),
        "x": x,
        **values,
    }
    return pandas.DataFrame(frame, columns=style.POINTS, index=range(len(rows)))


def _title(table: DataFrame, teacher: str, text: str) -> str:
    return f"{teacher}: {text}" if table["teacher"].nunique() > 1 else text


def _thin(x, y) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Means over at most CURVE_POINTS stretches, all of one length (but the last), or a curve would be rougher where they are shorter."""
    starts = range(0, len(x), -(-len(x) // CURVE_POINTS))
    return (numpy.add.reduceat(values, starts) / numpy.diff([*starts, len(x)]) for values in (x, y))


FIGURES = {
    "ppl_vs_steps": (ppl_vs_steps, ("steps",)),
    "entropy_vs_steps": (entropy_vs_steps, ("steps",)),
    "ppl_vs_latency": (ppl_vs_latency, ("steps", "speed")),
    "lambada_vs_round": (lambada_vs_round, ("lambada",)),
    "latency_vs_length": (latency_vs_length, ("speed",)),
    "speedup_vs_batch": (speedup_vs_batch, ("speed",)),
    "loss_curves": (loss_curves, ("journals",)),
    "mauve_vs_steps": (mauve_vs_steps, ("continuations",)),
}

"""The figures of speed; otherwise as those of figures.py."""

from __future__ import annotations

from matplotlib.axes import Axes
from pandas import DataFrame

from halfstep.errors import HalfstepError
from halfstep.report import style
from halfstep.report.conditions import describe_conditions, join_values
from halfstep.report.figures import Drawn, Tables
from halfstep.report.points import (
    add_published,
    join_points,
    make_level,
    make_points,
    one_metric,
    panel_title,
)
from halfstep.report.rows import baseline_name, sampled_rows


def ppl_vs_latency(tables: Tables) -> Drawn:
    """Generative perplexity against the time to write, at each timed step count.

    The times are those of texts as long as the samples. The teacher and the last rounds are lines,
    the fastest baseline is a point. A student's line and the level of the baseline's perplexity
    meet at a speed-up of equal quality.
    """
    quality = one_metric(tables["steps"], "generative_perplexity")
    parts, notes = [], []
    for teacher, mine in quality.groupby("teacher", sort=False):
        timed = _one_text(tables["speed"], teacher, mine)
        parts += _quality_by_latency(mine, timed, teacher)
        if len(timed):
            first = timed.iloc[0]
            notes.append(
                f"{teacher}: texts of {first['length']} tokens, {first['batch_size']} in a batch, "
                f"{first['device']}, {first['dtype']}, timed {', '.join(timed['model'].unique())}; "
                "one network size, so one time for all rounds"
            )
    points = join_points(parts)
    if not (points["kind"] == "line").any():
        raise HalfstepError(
            "ppl_vs_latency: no step count is in both tables, steps and speed; "
            "let benchmark_steps name some of sampling steps"
        )
    figure = style.draw_panels(
        points,
        note=f"{'. '.join(notes)}. {describe_conditions(quality)}",
        xlabel="milliseconds to write",
        ylabel="generative perplexity",
        x_scale="log",
        log_y=True,
        labels="left",
        share_y=False,
    )
    return figure, points


def _one_text(speed: DataFrame, teacher: str, quality: DataFrame) -> DataFrame:
    """A teacher's rows of the speed table at the length of its samples and one batch size.

    Of the batch sizes with the most step counts it is the smallest. HalfstepError if other lengths
    were timed, but not that of the samples.
    """
    samples = sampled_rows(quality)
    lengths = (samples["steps"] * samples["tokens_per_step"]).dropna().astype(float).round()
    length = lengths.max()
    timed = speed[speed["teacher"] == teacher]
    found = timed[timed["length"].astype(float) == length]
    if len(timed) and found.empty:
        written = "unknown length" if lengths.empty else f"{length:.0f} tokens"
        raise HalfstepError(
            f"ppl_vs_latency: the samples of {teacher} are texts of {written}, but the speed table "
            f"has only texts of {join_values(timed['length'])} tokens; time the length of the "
            "samples (--lengths)"
        )
    if found.empty:
        return found
    steps = found.groupby("batch_size")["steps"].nunique()
    return found[found["batch_size"] == steps.idxmax()]  # the first of the largest


def _quality_by_latency(quality: DataFrame, timed: DataFrame, teacher: str) -> list[DataFrame]:
    """Points of one teacher: lines of the models, the baseline's point and level, and the data."""
    is_baseline = timed["run"] == "baseline"
    seconds = timed[~is_baseline].drop_duplicates("steps").set_index("steps")["value"]
    models = sampled_rows(quality)
    last_round = models.groupby("run", sort=False)["round"].transform("max")
    last = models[models["round"] == last_round]
    lines = last[last["steps"].isin(seconds.index)]
    series, texts = [], []
    for run, round_, steps in lines[["run", "round", "steps"]].itertuples(index=False):
        series.append(run if run == "teacher" else f"{run}, round {round_}")
        texts.append(f"{steps} steps" if run == "teacher" else None)
    milliseconds = 1000 * lines["steps"].map(seconds).astype(float)
    parts = [make_points(lines, teacher, series, milliseconds, round=0, text=texts)]
    baseline = quality[quality["run"] == "baseline"].tail(1)
    if len(baseline) and is_baseline.any():
        fastest = 1000 * timed.loc[is_baseline, "value"].min()
        parts.append(make_points(baseline, teacher, "baseline", fastest, kind="point"))
        level = baseline.assign(low=None, high=None)
        parts.append(make_level(level, teacher, "the baseline's quality"))
    parts.append(make_level(quality[quality["run"] == "data"], teacher, "data"))
    return parts


def latency_vs_length(tables: Tables) -> Drawn:
    """Time to write against the number of tokens: baselines with KV cache, and every step count.

    A panel for each network and batch size that was timed at several lengths, or for all where none
    was. The paper's figures 3b and 20 have batch size 8, figure 21 has 4.
    """
    table = tables["speed"]
    lengths = table.groupby(["teacher", "batch_size"])["length"].transform("nunique")
    if (lengths > 1).any():
        table = table[lengths > 1]
    parts = []
    batch_sizes = {}
    for (teacher, size), mine in table.groupby(["teacher", "batch_size"], sort=False):
        text = "one text at a time" if size == 1 else f"{size} texts at once"
        panel = panel_title(table, teacher, text)
        batch_sizes[panel] = size
        baselines = mine[mine["run"] == "baseline"]
        names = [baseline_name(sampler) for sampler in baselines["sampler"]]
        for name, rows in baselines.groupby(names, sort=False):
            series = "baseline, KV cache" if name == "baseline" else name
            parts.append(make_points(rows, panel, series, rows["length"], 1000, round=0))
        for series, shade, line in _lines_by_steps(mine[mine["run"] != "baseline"], table):
            parts.append(make_points(line, panel, series, line["length"], 1000, round=shade))
    points = join_points(parts)
    points, sources = add_published(points, tables, "latency_s", "length", batch_sizes, 1000)
    figure = style.draw_panels(
        points,
        note=f"Medians, bands: {join_values(table['bounds'])}; "
        f"{_timing_conditions(table)}{sources}",
        xlabel="tokens written",
        ylabel="milliseconds",
        x_scale="steps",
        log_y=True,
    )
    return figure, points


def speedup_vs_batch(tables: Tables) -> Drawn:
    """How many times faster than the fastest baseline against the batch size.

    A line for each step count, a panel for each network and for three of the lengths: the shortest,
    the longest, and one with the most batch sizes. Below one, in the gray area, the baseline is
    faster.
    """
    table = tables["speed"]
    timed = table[(table["run"] != "baseline") & table["times_faster"].notna()]
    if timed.empty:
        raise HalfstepError(
            "speedup_vs_batch: the speed table has no student timed together with a baseline; "
            "make it with halfstep latency"
        )
    batch_sizes = timed.groupby("length")["batch_size"].nunique()
    most = batch_sizes.index[batch_sizes == batch_sizes.max()]
    shown = {batch_sizes.index[0], most[len(most) // 2], batch_sizes.index[-1]}
    timed = timed[timed["length"].isin(shown)]
    parts = []
    for (teacher, length), mine in timed.groupby(["teacher", "length"], sort=False):
        panel = panel_title(table, teacher, f"{length} tokens")
        for series, shade, line in _lines_by_steps(mine, table):
            line = line.sort_values("batch_size")
            ratio = line.assign(value=line["times_faster"], low=None, high=None)
            parts.append(make_points(ratio, panel, series, line["batch_size"], round=shade))
        one = mine.head(1).assign(value=1.0, low=None, high=None)
        parts.append(make_level(one, panel, "baseline", round=0))
    points = join_points(parts)
    samplers = table.loc[table["run"] == "baseline", "sampler"]
    baselines = join_values(baseline_name(sampler) for sampler in samplers)
    figure = style.draw_panels(
        points,
        note=f"Ratio of medians to the fastest baseline ({baselines}); {_timing_conditions(table)}",
        xlabel="texts at once",
        ylabel="times faster than autoregression",
        x_scale="steps",
        log_y=True,
        before=_where_baseline_is_faster,
    )
    return figure, points


def _where_baseline_is_faster(axes: Axes, points: DataFrame) -> None:
    bottom, top = axes.get_ylim()
    bottom = min(bottom, 0.7)
    axes.set_ylim(bottom, max(top, 1.5))
    axes.axhspan(bottom, 1, color="#999", alpha=0.18, linewidth=0, zorder=0)
    text, corner = "autoregression wins", (0.02, 0.02)
    axes.annotate(text, corner, xycoords="axes fraction", fontsize=6.5, color="#555")


def _lines_by_steps(rows: DataFrame, table: DataFrame) -> list[tuple[str, int, DataFrame]]:
    """(name, shade, rows) for each model and step count of the table; fewer steps are darker."""
    counts = sorted(table["steps"].dropna().unique(), reverse=True)
    several = rows["model"].nunique() > 1
    lines = []
    for model, mine in rows.groupby("model", sort=False):
        for shade, steps in enumerate(counts, start=1):
            name = f"{steps} steps"
            if several:
                name = f"{model.partition('/')[2]}, {name}"
            lines.append((name, shade, mine[mine["steps"] == steps]))
    return lines


def _timing_conditions(table: DataFrame) -> str:
    """Where and how the rows of the speed table were timed, in a sentence."""
    return (
        "at each length and batch size all in turns in one process. "
        f"{join_values(table['device'])}; {join_values(table['dtype'])}; "
        f"weights {join_values(table['weights'])}; commit {join_values(table['commit'])}."
    )

"""The figures of speed and of costs; otherwise as those of figures.py."""

from __future__ import annotations

import pandas
from matplotlib.axes import Axes
from pandas import DataFrame, Series

from halfstep.errors import HalfstepError
from halfstep.report import style
from halfstep.report.conditions import explain_conditions, join_values
from halfstep.report.decoders import at_held_out_entropy, decoder_points, with_costs
from halfstep.report.figures import Drawn, Tables
from halfstep.report.grids import round_number
from halfstep.report.headlines import title_of_decoders, title_of_infilling
from halfstep.report.infilling import RIGHT, parallel_points, shown_protocol
from halfstep.report.labels import in_words
from halfstep.report.points import (
    add_published,
    join_points,
    make_level,
    make_points,
    one_metric,
    panel_title,
    with_conditions,
)
from halfstep.report.rows import DEFAULT, LEVELS, baseline_name, sampled_rows, usual_rows
from halfstep.report.sentences import with_interval


def ppl_vs_latency(tables: Tables) -> Drawn:
    """Generative perplexity against the time to write, at each timed step count.

    The times are those of texts as long as the samples. The teacher and the last rounds are lines,
    the fastest baseline is a point. A student's line and the level of the baseline's perplexity
    meet at a speed-up of equal quality.
    """
    quality = one_metric(tables["steps"], "generative_perplexity")
    speed = usual_rows(tables["speed"])
    parts, notes = [], []
    for teacher, mine in quality.groupby("teacher", sort=False):
        timed = _one_text(speed, teacher, mine)
        parts += _quality_by_latency(mine, timed, teacher)
        if len(timed):
            first = timed.iloc[0]
            at_once = "one" if first["batch_size"] == 1 else first["batch_size"]
            notes.append(
                f"{teacher}: texts of {first['length']:,} tokens, {at_once} at a time, on "
                f"{first['device']} in {first['dtype']}"
            )
    points = join_points(parts)
    if not (points["kind"] == "line").any():
        raise HalfstepError(
            "ppl_vs_latency: no step count is in both tables, steps and speed; "
            "let benchmark_steps name some of sampling steps"
        )
    figure = style.draw_panels(
        points,
        title=_title_of_trade(points),
        note=f"{'. '.join(notes)}. All rounds have one network size, so one time. "
        f"{explain_conditions(quality)}",
        xlabel="milliseconds to write a text",
        ylabel="generative perplexity",
        better="lower",
        x_scale="log",
        log_y=True,
        labels="left",
        share_y=False,
    )
    return figure, with_conditions(points, pandas.concat([quality, speed]))


def decoders(tables: Tables) -> Drawn:
    """Generative perplexity against network evaluations per text: a line for each way to draw.

    A panel for the teacher and for the last round of each run, and where there is a frontier
    another one of perplexities at the entropy of held-out text. The baseline and held-out text are
    levels.
    """
    table = tables["variants"]
    perplexity = one_metric(table, "generative_perplexity")
    rows = with_costs(perplexity, table)
    if rows.empty:
        raise HalfstepError(
            "decoders: no row of the table variants has network evaluations; draw the samples again"
        )
    levels = perplexity[perplexity["run"].isin(LEVELS) & (perplexity["variant"] == DEFAULT)]
    read = at_held_out_entropy(rows, table)
    points = decoder_points(rows, read, levels)
    entropies = (
        "H: the entropy in nats, where it is more than 2% from that of the default draws with the "
        "most similar number of network evaluations. "
    )
    asking = list(dict.fromkeys(rows.loc[rows["autoregressive_passes"].notna(), "variant"]))
    asked = (
        "Not counted: the passes of the autoregressive model that a sampler asks "
        f"({join_values(map(in_words, asking))}); the table has them. "
    )
    missing = (
        "At the entropy of held-out text: read off the curve over temperatures, which not every "
        "way to draw reaches. "
    )
    figure = style.draw_panels(
        points,
        title=title_of_decoders(rows),
        note=f"{entropies if points['text'].notna().any() else ''}"
        f"{missing if len(read) else ''}{asked if asking else ''}"
        f"{explain_conditions(perplexity)}",
        xlabel="network evaluations per text",
        ylabel="generative perplexity",
        better="lower",
        x_scale="log",
        log_y=True,
        columns=2,
    )
    return figure, with_conditions(points, perplexity)


def accuracy_vs_parallelism(tables: Tables) -> Drawn:
    """Accuracy of filled-in positions against tokens per forward, of teachers and last rounds.

    A panel for each task; with several ways to draw one for each task and model.
    """
    table = shown_protocol(tables["infilling"])
    rows = table[table["metric"] == "infilling_accuracy"]
    if rows.empty:
        raise HalfstepError(
            "accuracy_vs_parallelism: the table infilling has no row of infilling_accuracy; "
            "measure it first with halfstep score-infilling"
        )
    points = parallel_points(rows)
    judged = " ".join(RIGHT[name] for name in dict.fromkeys(rows["protocol"]))
    figure = style.draw_panels(
        points,
        title=title_of_infilling(table),
        note=f"{judged} {explain_conditions(rows)}",
        xlabel="tokens per forward",
        ylabel="accuracy",
        better="higher",
        x_scale="log",
        columns=2,
    )
    return figure, with_conditions(points, rows)


def _title_of_trade(points: DataFrame) -> str:
    """Time and perplexity of a last round at its most steps against those of the baseline.

    Without a baseline it is compared with its teacher.
    """
    points = points[points["panel"] == points["panel"].iloc[0]]
    lines = points[points["kind"] == "line"]
    students = lines[lines["series"] != "teacher"]
    mine = students[students["series"] == students["series"].iloc[0]] if len(students) else lines
    best = mine.loc[mine["x"].idxmax()]
    run, _, number = best["series"].partition(", ")
    name = f"{number[0].upper()}{number[1:]} of {in_words(run)}" if number else "The teacher"
    text = f"{name} writes a text in {_time(best['x'])} with perplexity {_span(best)}"
    others = [(row, "an autoregressive model") for _, row in points.iterrows() if
              row["kind"] == "point"] + [(row, "its teacher") for _, row in lines.iterrows() if
              number and row["series"] == "teacher" and row["x"] == best["x"]]  # fmt: skip
    if not others:
        return text
    other, called = others[0]
    return f"{text}, {called} in {_time(other['x'])} with {_span(other)}"


def _span(point: Series) -> str:
    """The value of a point and its interval: 12.4 [11.9, 12.9]"""
    return with_interval(point.rename({"y": "value"}))


def _time(milliseconds: float) -> str:
    """A time in milliseconds or, from ten seconds on, in seconds."""
    if milliseconds >= 10_000:
        return f"{round_number(milliseconds / 1000)} s"
    return f"{round_number(milliseconds)} ms"


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
    table = usual_rows(tables["speed"])
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
        title=_title_of_lengths(points),
        note=f"Medians. {_timing_conditions(table)}{sources}",
        xlabel="tokens written",
        ylabel="milliseconds",
        better="lower",
        x_scale="steps",
        log_y=True,
        interval="quartiles" if (table["bounds"].astype(str).str.startswith("quartiles")).all()
        else "shortest and longest run",
    )  # fmt: skip
    return figure, with_conditions(points, table)


def _title_of_lengths(points: DataFrame) -> str:
    """The times of the fewest and the most steps at the longest length, and of the baseline."""
    lines = points[(points["panel"] == points["panel"].iloc[0]) & (points["kind"] == "line")]
    longest = lines[lines["x"] == lines["x"].max()]
    students = longest[longest["round"] > 0].sort_values("y")
    baselines = longest[longest["series"].str.startswith("baseline")].sort_values("y")
    if students.empty:
        return "Time to write against the number of tokens"
    ends = students.iloc[[0, -1]].drop_duplicates("series")
    at_once = longest["panel"].iloc[0]
    text = (
        f"{at_once[0].upper()}{at_once[1:]}, {longest['x'].iloc[0]:,.0f} tokens take "
        + " and ".join(
            f"{_time(row['y'])} with {in_words(row['series'])}" for _, row in ends.iterrows()
        )
    )
    if len(baselines):
        text += f", {_time(baselines['y'].iloc[0])} with an autoregressive model"
    return text


def speedup_vs_batch(tables: Tables) -> Drawn:
    """How many times faster than the fastest baseline against the batch size.

    A line for each step count, a panel for each network and for three of the lengths: the shortest,
    the longest, and one with the most batch sizes. Below one, in the gray area, the baseline is
    faster.
    """
    table = usual_rows(tables["speed"])
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
    points = join_points(parts)
    samplers = table.loc[table["run"] == "baseline", "sampler"]
    baselines = dict.fromkeys(map(baseline_name, samplers))
    among = f" ({in_words(join_values(baselines))})" if len(baselines) > 1 else ""
    figure = style.draw_panels(
        points,
        title=_title_of_speedup(timed),
        note=f"Median time of the fastest autoregressive model{among} divided by the student's. "
        f"{_timing_conditions(table)}",
        xlabel="texts written at once",
        ylabel="times as fast as autoregression",
        better="higher",
        x_scale="steps",
        log_y=True,
        before=_where_baseline_is_faster,
    )
    points = with_conditions(points, table)
    points["conditions"] = f"Against {join_values(baselines)}. " + points["conditions"]
    return figure, points


def _title_of_speedup(timed: DataFrame) -> str:
    """The speed-up of the most steps at the longest length, for the fewest and the most texts."""
    mine = timed[timed["teacher"] == timed["teacher"].iloc[0]]
    mine = mine[mine["length"] == mine["length"].max()]
    mine = mine[mine["steps"] == mine["steps"].max()].sort_values("batch_size")
    ends = mine.iloc[[0, -1]].drop_duplicates("batch_size")
    texts = [
        "one text at a time" if size == 1 else f"{size} texts at once"
        for size in ends["batch_size"]
    ]
    times = [f"{round_number(ratio)} times as fast" for ratio in ends["times_faster"]]
    steps, length = mine["steps"].iloc[0], mine["length"].iloc[0]
    start = f"With {steps} steps and texts of {length:,} tokens, a student is"
    text = f"{start} {times[0]} as an autoregressive model with {texts[0]}"
    return f"{text}, {times[1]} with {texts[1]}" if len(times) > 1 else text


def _where_baseline_is_faster(axes: Axes, points: DataFrame) -> None:
    bottom, top = axes.get_ylim()
    bottom = min(bottom, 0.7)
    axes.set_ylim(bottom, max(top, 1.5))
    axes.axhline(1, color="#555", linewidth=0.8, zorder=1)
    axes.axhspan(bottom, 1, color="#999", alpha=0.18, linewidth=0, zorder=0)
    text, corner = "autoregression is faster", (0.02, 0.02)
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
    """Where and how the rows of the speed table were timed, in plain sentences."""
    return (
        "All models of a length and batch size ran in turns in one process, on "
        f"{join_values(table['device'])} in {join_values(table['dtype'])}. "
        "All conditions are in the CSV."
    )

"""Figures: each draws, shows exactly the points of its CSV, is reproducible, has free labels."""

import functools
import itertools
import json
import re
from pkgutil import resolve_name
from xml.etree import ElementTree

import numpy
import pandas
import pytest
import synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from halfstep.cli import main
from halfstep.commands.report import plot, summary, tabulate
from halfstep.errors import HalfstepError
from halfstep.report import marks, style
from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES
from halfstep.report.curves import CURVE_POINTS, read_curves, thin_curve
from halfstep.report.grids import round_number
from halfstep.report.labels import in_words, spread
from halfstep.report.points import POINTS
from halfstep.report.published import published_rows
from halfstep.report.rows import read_table

PUBLISHED = [name for name, row in FIGURES.items() if row.published]
EVERYDAY = [name for name, row in FIGURES.items() if not row.only_in_paper]
CASES = [(name, False) for name in FIGURES] + [(name, True) for name in PUBLISHED]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = synthetic.write(
        tmp_path_factory.mktemp("figures") / "results",
        runs=("kl_backward", "mse"),
        rounds=7,
        steps=[8, 16, 32],
        points=10,
    )
    for name in TABLES:
        tabulate(name, [folder / "metrics", folder / "benchmarks"], folder / "tables" / name)
    return folder


def inputs(results, name):
    """What `--tables` of a figure names."""
    needs = FIGURES[name].needs
    if JOURNALS in needs:
        return [results / "models"]
    return [results / "tables" / f"{need}.csv" for need in needs]


def test_the_panel_of_the_default_draws_is_the_first_and_all_have_the_levels(results):
    """Whatever the variants are called."""
    tables = frames(results, "ppl_by_variant")
    table = tables["variants"]
    renamed = table["variant"].replace("released-noise", "a-variant")
    tables["variants"] = table.assign(variant=renamed).sort_values("variant", kind="stable")
    _, points = resolve_name(FIGURES["ppl_by_variant"].draw)(tables)
    panels = list(dict.fromkeys(points["panel"]))
    assert [panel.rpartition(" · ")[2] for panel in panels] == [
        *["default"] * 2,
        *["a-variant"] * 2,
    ]
    levels = points[points["kind"] == "level"]
    for panel in panels:
        assert set(levels.loc[levels["panel"] == panel, "series"]) == {"baseline", "data"}


def frames(results, name, published=False):
    """The tables of a figure."""
    found = {"published": published_rows()} if published else {}
    for need in FIGURES[name].needs:
        if need == JOURNALS:
            found[need] = read_curves([results / "models"])
        else:
            found[need] = read_table(results / "tables" / f"{need}.csv")
    return found


def draw(name, tables):
    return resolve_name(FIGURES[name].draw)(tables)


@functools.cache
def picture(results, name, published=False):
    """A figure of the unchanged tables, and its points: drawn once, and only looked at."""
    return draw(name, frames(results, name, published))


def lines_of(figure):
    """The lines of series in all panels."""
    return [line for axes in figure.axes for line in axes.lines if line.get_gid()]


def foot(figure):
    """The note at the foot of the figure."""
    texts = [text.get_text() for text in figure.texts if text.get_gid() != "title"]
    return " ".join(reversed(texts))


def title_of(figure):
    """The sentence at the top of the figure."""
    return " ".join(text.get_text() for text in figure.texts if text.get_gid() == "title")


def strong(points):
    """The points whose lines are drawn strongly: of a panel's rounds the first, middle and last."""
    kept = []
    for _, panel in points.groupby("panel"):
        is_round = panel["series"].str.startswith("round ")
        is_line = is_round & panel["kind"].isin(["line", "curve"])
        rounds = sorted(panel.loc[is_line, "round"].unique())
        shown = {rounds[0], rounds[(len(rounds) - 1) // 2], rounds[-1]} if rounds else set()
        kept.append(panel[~is_round | panel["round"].isin(shown)])
    return pandas.concat(kept or [points])


@pytest.mark.parametrize("name, published", CASES)
def test_a_figure_draws_the_points_of_its_csv(results, name, published):
    figure, points = picture(results, name, published)
    assert list(points.columns[: len(POINTS)]) == list(POINTS) and len(points)
    drawn = {
        (line.axes.get_label(), line.get_gid()): line.get_xydata() for line in lines_of(figure)
    }
    assert drawn.keys() == set(zip(points["panel"], points["series"], strict=True))
    for (panel, series), group in points.groupby(["panel", "series"]):
        if group["kind"].iloc[0] == "level":
            assert set(drawn[panel, series][:, 1]) == set(group["y"])
        else:
            assert numpy.array_equal(drawn[panel, series], group[["x", "y"]].to_numpy(float))
    bands = sum(len(axes.collections) for axes in figure.axes)
    with_interval = points[points["low"].notna() & (points["kind"] != "level")]
    assert (with_interval["repeats"] >= 10).all()
    assert bands == len(strong(with_interval).drop_duplicates(["panel", "series"]))


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_the_same_bytes_twice_and_a_record_of_its_inputs(results, name, tmp_path):
    plot(name, inputs(results, name), tmp_path / "one" / f"{name}.pdf")
    plot(name, inputs(results, name), tmp_path / "two" / name)
    for suffix in ("pdf", "svg", "csv"):
        one, two = [
            (tmp_path / folder / f"{name}.{suffix}").read_bytes() for folder in ("one", "two")
        ]
        assert one == two and len(one) > 100
    origin = json.loads((tmp_path / "one" / f"{name}.provenance.json").read_text())
    assert origin["inputs"] and all(len(digest) == 64 for digest in origin["inputs"].values())
    assert set(origin["outputs"]) == {f"{name}.{suffix}" for suffix in ("pdf", "svg", "csv")}
    svg = (tmp_path / "one" / f"{name}.svg").read_text()
    metadata = svg.partition("</metadata>")[0].replace("rdf:Description", "").lower()
    assert svg.startswith("<?xml") and "date" not in metadata


def test_the_recorded_command_draws_the_figure_again(results, tmp_path):
    tables = map(str, inputs(results, "ppl_vs_steps"))
    output = ["--output", str(tmp_path / "figure.pdf")]
    assert main(["plot", "--figure", "ppl_vs_steps", "--tables", *tables, *output]) == 0
    before = (tmp_path / "figure.svg").read_bytes()
    (tmp_path / "figure.svg").unlink()
    assert main(json.loads((tmp_path / "figure.provenance.json").read_text())["command"][1:]) == 0
    assert (tmp_path / "figure.svg").read_bytes() == before


@pytest.mark.parametrize("name", FIGURES)
def test_the_csv_names_the_conditions_and_the_foot_has_plain_words(results, name):
    figure, points = picture(results, name)
    assert not re.search(r"[0-9a-f]{12}|_|results/", foot(figure))
    (conditions,) = points["conditions"].unique()
    assert "commit " in conditions.lower()
    if name == "ppl_vs_steps":
        for words in ("512 texts a point", "95% intervals", "Faint: the rounds in between"):
            assert words in foot(figure)
        for words in (
            "Judge results/models/stories-tiny/baseline@aabbccddeeff",
            "protocol ids v1",
            "n 512",
            "seed 1",
            "weights ema",
            "commit 0123456789ab",
        ):
            assert words in conditions


def known_spans(tables):
    """Every value of the tables with its interval, and every time, as a title writes them."""
    found = set()
    for table in tables.values():
        for row in table.itertuples():
            if {"low", "high"} <= set(table.columns):
                numbers = (row.value, row.low, row.high)
                for text in (round_number, "{:.2f}".format):
                    value, low, high = ("open" if x != x else text(x) for x in numbers)
                    found.add(f"{value} [{low}, {high}]")
            if getattr(row, "metric", "") == "latency_s":
                found.add(f"{round_number(1000 * row.value)} ms")
            if not pandas.isna(getattr(row, "times_faster", None)):
                found.add(f"{round_number(row.times_faster)} times as fast")
            if "step" in table.columns:
                found.add(f"{row.value:.3f}")
    return found


SPAN = re.compile(
    r"[\d.,]*\d \[[\w.,]+, [\w.,]+\]|[\d.,]*\d ms|[\d.,]+ times as fast|\d\.\d{3}(?! \[)"
)


@pytest.mark.parametrize("name", EVERYDAY)
def test_a_title_is_a_sentence_whose_numbers_are_those_of_the_table(results, name):
    tables = frames(results, name)
    title = title_of(picture(results, name)[0])
    assert title[0].isupper() or title[0].isdigit()
    assert "_" not in title and len(title.split()) >= 8
    if name == "entropy_vs_steps":
        table = tables["steps"]
        entropy = table[table["metric"] == "entropy"]
        (held_out,) = entropy.loc[entropy["run"] == "data", "value"]
        mine = entropy[(entropy["run"] == "kl_backward") & (entropy["round"] == 7)]
        assert (
            f"within {100 * (mine['value'] / held_out - 1).abs().max():.1f}% from 8 to 32" in title
        )
    else:
        spans = SPAN.findall(title)
        assert spans and set(spans) <= known_spans(tables)


def test_a_title_says_no_more_than_the_data(results):
    """Intervals that overlap show no difference; without students there is no comparison."""
    steps = frames(results, "ppl_vs_steps")["steps"]
    wide = steps.assign(low=steps["value"] / 9, high=9 * steps["value"])
    assert title_of(draw("ppl_vs_steps", {"steps": wide})[0]).endswith(": no clear difference")
    lambada = frames(results, "lambada_vs_round")["lambada"]
    unclear = lambada.assign(low=0.0, high=20.0)
    title = title_of(draw("lambada_vs_round", {"lambada": unclear})[0])
    assert title.endswith(": no clear difference") and " is 0.410 [" in title
    alone = steps[steps["round"] == 0]
    assert title_of(draw("ppl_vs_steps", {"steps": alone})[0]).startswith("The teacher's gen")
    far = steps.assign(value=steps["value"].where(steps["round"] != 7, 0.9 * steps["value"]))
    title = title_of(draw("entropy_vs_steps", {"steps": far})[0])
    assert re.match(
        r"At 32 steps the entropy of round 7 of reverse KL is 10\.\d% below that of held-out", title
    )
    frontier = frames(results, "frontier")
    table = frontier["temperatures"]
    is_ratio = table["metric"] == "perplexity_ratio_at_equal_entropy"
    for low, high, words in (
        (0.4, 0.8, "has 0.60 [0.40, 0.80] of its teacher's perplexity at equal entropy"),
        (0.4, 1.2, "perplexity at equal entropy: no clear difference"),
        (1.1, 1.2, "has 0.60 [1.10, 1.20] times its teacher's"),
    ):
        changed = table.copy()
        changed.loc[is_ratio, ["value", "low", "high"]] = [0.6, low, high]
        assert words in title_of(draw("frontier", frontier | {"temperatures": changed})[0])
    gone = table.assign(value=table["value"].where(~is_ratio))
    title = title_of(draw("frontier", frontier | {"temperatures": gone})[0])
    assert title.endswith("the teacher reaches the entropy of no student")


def test_a_ring_is_at_the_steps_of_each_round(results):
    """Synthetic round r was made for 1024 / 2**r steps, and 8, 16 and 32 are drawn."""
    figure, points = picture(results, "ppl_vs_steps")
    own = points[points["own_steps"]]
    assert set(zip(own["round"], own["x"], strict=True)) == {(7, 8), (6, 16), (5, 32)}
    rings = [
        tuple(point)
        for axes in figure.axes
        for line in axes.lines
        if line.get_markerfacecolor() == "none"
        for point in line.get_xydata()
    ]
    assert sorted(rings) == sorted(own[["x", "y"]].itertuples(index=False, name=None))
    assert "Ring: the number of steps" in foot(figure)


def test_levels_do_not_stretch_the_axis_and_those_outside_have_an_arrow(results):
    figure, points = picture(results, "ppl_vs_steps")
    levels, lines = points[points["kind"] == "level"], points[points["kind"] == "line"]
    assert set(levels["series"]) == {"baseline", "data", "unigram", "bigram", "cut_and_paste"}
    low, high = figure.axes[-1].get_ylim()
    assert low > 0.8 * lines["low"].min() and high < 1.2 * lines["high"].max()
    named = {text.get_text() for axes in figure.axes for text in axes.texts}
    assert {"held-out text 7.20 ↓", "random tokens 180 ↑"} <= named
    drawn = {line.get_gid(): line.get_visible() for line in lines_of(figure)}
    assert not drawn["data"] and not drawn["unigram"]


def test_a_curve_outside_of_the_axis_is_named_with_its_values(results):
    figure, points = picture(results, "frontier")
    low, _ = figure.axes[0].get_ylim()
    y = points.loc[points["series"] == "baseline", "y"]
    assert y.max() < low and y.nunique() > 1
    named = {text.get_text() for text in figure.axes[0].texts}
    assert f"autoregressive {round_number(y.min())} to {round_number(y.max())} ↓" in named


@pytest.mark.parametrize("runs, shown", [(8, False), (9, False), (10, True)])
def test_bands_are_of_at_least_ten_repeats(results, runs, shown):
    speed = frames(results, "latency_vs_length")["speed"]
    speed = speed.assign(bounds=f"quartiles of {runs}")
    figure, points = draw("latency_vs_length", {"speed": speed})
    assert (points["repeats"] == runs).all() and points["low"].notna().all()
    assert any(axes.collections for axes in figure.axes) == shown
    assert ("Bands: quartiles." in foot(figure)) == shown
    assert (f"fewer than 10 repeats (here {runs})" in foot(figure)) != shown


def test_a_protocol_that_says_the_same_as_another_is_not_drawn(results):
    lambada = frames(results, "lambada_vs_round")["lambada"]
    panels = set(draw("lambada_vs_round", {"lambada": lambada})[1]["panel"])
    assert "accuracy, confidence" in panels
    same = lambada.copy()
    is_sure, is_parallel = (same["protocol"] == name for name in ("confidence", "parallel"))
    numbers = ["value", "low", "high"]
    same.loc[is_sure, numbers] = same.loc[is_parallel, numbers].to_numpy()
    figure, points = draw("lambada_vs_round", {"lambada": same})
    assert set(points["panel"]) == panels - {"accuracy, confidence"}
    assert "another panel says the same: the surest token first" in foot(figure)


def test_a_smoothed_loss_is_the_running_mean_of_the_logged_one(results, tmp_path):
    synthetic.write(tmp_path, runs=("mse",), rounds=1, steps=[8], points=40, benchmark=False)
    figure, points = draw("loss_curves", {"journals": read_curves([tmp_path / "models"])})
    raw = points[(points["kind"] == "raw") & (points["series"] == "round 1")]
    smooth = points[points["series"] == "round 1, smoothed"]
    assert len(raw) == len(smooth) == 40 and raw["x"].tolist() == smooth["x"].tolist()
    mean = raw["y"].to_numpy()[8:12].mean()  # a tenth of 40 points
    assert smooth["y"].to_numpy()[10] == pytest.approx(mean)
    assert smooth["y"].diff().std() < raw["y"].diff().std()
    labels = {axes.get_label(): axes.get_ylabel() for axes in figure.axes}
    assert labels["mse: training loss"].startswith("squared difference of log-probabilities")
    assert labels["mse: held-out loss"].startswith("held-out loss (nats per token)")


def test_an_svg_is_dark_where_its_reader_prefers_that(results, tmp_path):
    plot("entropy_vs_steps", inputs(results, "entropy_vs_steps"), tmp_path / "figure")
    svg = (tmp_path / "figure.svg").read_text()
    assert svg.count(style.DARK) == 1
    root = ElementTree.fromstring(svg)
    (sheet, *_) = root.iter("{http://www.w3.org/2000/svg}style")
    assert "prefers-color-scheme: dark" in sheet.text


def test_keys_become_words():
    assert in_words("stories-tiny · kl_backward") == "stories-tiny · reverse KL"
    assert in_words("data") == "held-out text"
    assert in_words("mse, round 7") == "squared error, round 7"
    assert in_words("mse-long") == "mse-long", "a part of a name is no key"


@pytest.mark.parametrize("name, published", CASES)
def test_labels_do_not_overlap_and_stay_on_the_page(results, name, published):
    figure, _ = picture(results, name, published)
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    for axes in figure.axes:
        boxes = []  # of the text, without the leader
        for text in axes.texts:
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer).padded(-0.5)
            boxes.append((text.get_text(), box))
        for i, (one, a) in enumerate(boxes):
            assert page.x0 <= a.x0 and a.x1 <= page.x1, f"{one} leaves the page"
            for two, b in boxes[i + 1 :]:
                apart = a.x0 >= b.x1 or b.x0 >= a.x1 or a.y0 >= b.y1 or b.y0 >= a.y1
                assert apart, f"{one} on {two} in {axes.get_label()}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_are_gray_lines_under_ours_with_their_source(results, name):
    """They add lines and nothing else: our points, colors and range of x stay the same.

    The foot explains the letter of every line.
    """
    plain, ours = picture(results, name)
    figure, points = picture(results, name, published=True)
    mine, theirs = points[points["kind"] != "published"], points[points["kind"] == "published"]
    pandas.testing.assert_frame_equal(mine, ours)
    assert len(theirs) and theirs["x"].between(ours["x"].min(), ours["x"].max()).all()
    for series in theirs["series"].unique():
        letter, source = series.removeprefix("published ").split(": ")
        assert f"{letter} {source}" in foot(figure) and source.rpartition(", ")[2]
    before = {line.get_gid(): line.get_color() for line in lines_of(plain)}
    after = {line.get_gid(): line.get_color() for line in lines_of(figure)}
    assert before.items() <= after.items()
    assert {after[series] for series in theirs["series"]} == {marks.PUBLISHED["color"]}
    assert marks.PUBLISHED["linewidth"] < 1
    our_lines = set(mine.loc[mine["kind"] == "line", "series"])
    their_lines = set(theirs["series"])
    lowest = min(line.get_zorder() for line in lines_of(figure) if line.get_gid() in our_lines)
    for line in lines_of(figure):
        assert line.get_gid() not in their_lines or line.get_zorder() < lowest


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in PUBLISHED])
def test_a_figure_without_published_values_in_the_catalogue_ignores_them(results, name):
    _, plain = picture(results, name)
    _, points = picture(results, name, published=True)
    pandas.testing.assert_frame_equal(points, plain)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_figure_without_published_values_in_its_range_draws_ours_alone(results, name):
    tables = frames(results, name, published=True)
    _, ours = draw(name, tables | {"published": tables["published"].assign(in_figures=False)})
    pandas.testing.assert_frame_equal(ours, picture(results, name)[1])


def test_published_rows_of_a_table_are_drawn_only_with_the_flag(results, tmp_path):
    tabulate("steps", [results / "metrics"], tmp_path / "steps", published=True)
    plot("ppl_vs_steps", inputs(results, "ppl_vs_steps"), tmp_path / "one")
    plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "two")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "three", published=True)
    assert "published a: " in (tmp_path / "three.csv").read_text()


def test_a_second_judge_has_its_own_panels_without_values_of_the_first(results):
    table = read_table(results / "tables" / "steps.csv")
    other = table[table["protocol"] == "retokenized"].assign(
        judge="meta-llama/Meta-Llama-3-8B@0123456789ab", judge_dtype="bfloat16"
    )
    other["value"] *= 2
    both = pandas.concat([table, other], ignore_index=True)
    _, points = draw("ppl_vs_steps", {"steps": both, "published": published_rows()})
    _, alone = draw("ppl_vs_steps", {"steps": table})
    panels = points.groupby("panel", sort=False)["y"]
    assert list(panels.groups) == [
        f"stories-tiny · {run} · judge {judge}"
        for judge in ("baseline", "Meta-Llama-3-8B")
        for run in ("kl_backward", "mse")
    ]
    for run in ("kl_backward", "mse"):
        first = points[points["panel"] == f"stories-tiny · {run} · judge baseline"]
        before = alone[alone["panel"] == f"stories-tiny · {run}"]
        assert first["y"].tolist() == before["y"].tolist()
        second = points[points["panel"] == f"stories-tiny · {run} · judge Meta-Llama-3-8B"]
        numpy.testing.assert_allclose(second["y"], 2.2 * first["y"])
    assert not (points["kind"] == "published").any()  # they are gpt2-large's
    speed = read_table(results / "tables" / "speed.csv")
    _, by_latency = draw("ppl_vs_latency", {"steps": both, "speed": speed})
    assert by_latency["y"].max() <= alone["y"].max()  # of the first judge alone


def test_times_are_those_of_texts_as_long_as_the_samples(results):
    """The synthetic samples have 1,024 tokens; 2,048 were timed too, and do not count."""
    tables = frames(results, "ppl_vs_latency")
    speed = tables["speed"]
    longer = speed[speed["length"] == 1024].assign(length=2048, value=lambda rows: 9 * rows.value)
    both = pandas.concat([speed, longer], ignore_index=True)
    _, points = draw("ppl_vs_latency", tables | {"speed": both})
    at_samples = speed[(speed["length"] == 1024) & (speed["batch_size"] == 1)]
    lines = points[points["kind"] == "line"]
    sampled = at_samples["steps"].isin(tables["steps"]["steps"].dropna())
    students = at_samples.loc[sampled, "value"]
    assert set(lines["x"]) == set(1000 * students)
    (baseline,) = at_samples.loc[at_samples["run"] == "baseline", "value"]
    assert points.loc[points["kind"] == "point", "x"].tolist() == [1000 * baseline]
    with pytest.raises(
        HalfstepError,
        match="samples of stories-tiny are texts of 1024 tokens, but the speed table has only "
        "texts of 64, 256, 512, 2048 tokens",
    ):
        other = both[both["length"] != 1024]
        draw("ppl_vs_latency", tables | {"speed": other})


def test_times_are_of_the_batch_size_with_the_most_step_counts(results):
    tables = frames(results, "ppl_vs_latency")
    speed = tables["speed"]
    kept = speed[(speed["batch_size"] == 8) | (speed["steps"].fillna(8) == 8)]
    _, points = draw("ppl_vs_latency", tables | {"speed": kept})
    mine = speed.query("length == 1024 and batch_size == 8")
    mine = mine[mine["steps"].isin(tables["steps"]["steps"].dropna())]
    assert set(points.loc[points["kind"] == "line", "x"]) == set(1000 * mine["value"])


def test_a_curve_over_lengths_has_several_of_them(results):
    """A batch size that was timed at one length only is in the other figure of speed."""
    speed = frames(results, "latency_vs_length")["speed"]
    one = speed.query("length == 1024 and batch_size == 8").assign(batch_size=512)
    both = pandas.concat([speed, one], ignore_index=True)
    _, points = draw("latency_vs_length", {"speed": both})
    assert set(points["panel"]) == {"one text at a time", "8 texts at once"}
    _, points = draw("latency_vs_length", {"speed": one})
    assert set(points["panel"]) == {"512 texts at once"}
    _, points = draw("speedup_vs_batch", {"speed": both})
    at_samples = points[points["panel"] == "1024 tokens"]
    assert set(at_samples.loc[at_samples["kind"] == "line", "x"]) == {1, 8, 512}


def test_rounds_differ_in_gray():
    looks = [marks.series_style(f"round {number}", number, 7, 0) for number in range(1, 8)]
    gray = [numpy.dot(to_rgb(look["color"]), (0.299, 0.587, 0.114)) for look in looks]
    assert all(a - b > 0.06 for a, b in itertools.pairwise(gray))
    markers = {look["marker"] for look in looks} | {
        marks.series_style("teacher", 0, 7, 0)["marker"]
    }
    assert len(markers) == 8


def test_spread_separates_near_places_and_leaves_the_others():
    assert spread([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert spread([50, 50, 50], 10, 0, 100) == [40, 50, 60]
    assert spread([99, 100], 10, 0, 100) == [90, 100]
    assert numpy.diff(spread([1] * 30, 10, 0, 100)).min() == pytest.approx(100 / 29)


def test_faults_are_one_sentence(results, tmp_path):
    steps = results / "tables" / "steps.csv"
    with pytest.raises(HalfstepError, match="did you mean ppl_vs_steps") as error:
        plot("ppl_vs_step", [steps], tmp_path / "x")
    assert f"known are {', '.join(FIGURES)}" in str(error.value)
    with pytest.raises(
        HalfstepError, match=r"ppl_vs_latency needs steps\.csv, speed\.csv; found no speed\.csv"
    ):
        plot("ppl_vs_latency", [steps], tmp_path / "x")
    with pytest.raises(HalfstepError, match="no such table"):
        plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "x")
    with pytest.raises(HalfstepError, match="no rows in journals"):
        plot("loss_curves", [tmp_path], tmp_path / "x")
    speed = read_table(results / "tables" / "speed.csv")
    speed["steps"] = speed["steps"] * 100
    speed.to_csv(tmp_path / "speed.csv", index=False)
    with pytest.raises(HalfstepError, match="no step count is in both tables"):
        plot("ppl_vs_latency", [steps, tmp_path / "speed.csv"], tmp_path / "x")


def test_long_curves_are_thinned_by_means():
    numbers = numpy.arange(10_000)
    x = thin_curve(numbers.astype(float))
    y = thin_curve(numpy.where(numbers % 2, 1.0, 3.0))
    assert len(x) == len(y) <= CURVE_POINTS and numpy.abs(y - 2).max() < 0.05
    noise = numpy.random.default_rng(0).normal(size=200)
    means = noise.reshape(100, 2).mean(1)  # each point is equally smooth
    numpy.testing.assert_allclose(thin_curve(noise), means)


def test_journals_are_found_by_folder_or_by_file(results):
    files = sorted((results / "models").rglob("journal.jsonl"), reverse=True)
    by_file, by_folder = read_curves(files), read_curves([results / "models"])
    columns = ["teacher", "group", "series", "key", "step"]
    pandas.testing.assert_frame_equal(
        by_file.sort_values(columns, ignore_index=True),
        by_folder.sort_values(columns, ignore_index=True),
    )
    assert set(by_file["group"]) == {"pretraining", "kl_backward", "mse"}
    assert by_file["series"].nunique() == 9


def test_a_table_of_two_teachers_draws_a_panel_for_each_run(results, tmp_path):
    table = pandas.read_csv(results / "tables" / "steps.csv")
    other = table[table["run"] != "mse"].assign(teacher="owt-small")
    other["model"] = other["model"].str.replace("stories-tiny", "owt-small")
    pandas.concat([table, other]).to_csv(tmp_path / "steps.csv", index=False)
    figure, _ = draw("ppl_vs_steps", {"steps": read_table(tmp_path / "steps.csv")})
    assert [axes.get_label() for axes in figure.axes] == [
        "owt-small · kl_backward",
        "stories-tiny · kl_backward",
        "stories-tiny · mse",
    ]


def test_summary_fits_a_terminal(results, monkeypatch, capsys):
    """With the words that a pipe gets, where a sentence is one line."""
    summary(results)
    piped = capsys.readouterr().out
    assert max(map(len, piped.splitlines())) > 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    summary(results, width=80)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    summary_words = shown[shown.index("Number of trainings") :].split()
    assert summary_words == piped[piped.index("Number of trainings") :].split()


def test_summary_prints_the_result_three_texts_comparisons_and_places(results, capsys):
    """In this order. The tables are not among it."""
    steps = results / "tables" / "steps.csv"
    plot("ppl_vs_steps", [steps], results / "figures" / "ppl_vs_steps.pdf")
    (results / "mlflow.db").touch()
    summary(results)
    out = capsys.readouterr().out
    found = [
        out.index(words)
        for words in (
            "stories-tiny: at equal entropy, reverse KL round 7 with ",
            "At 16 steps teacher wrote",
            "At 16 steps kl_backward/round-7 wrote",
            "At 32 steps teacher wrote",
            "Number of trainings: 1; 95% intervals over texts.",
            "stories-tiny: reverse KL round 7 with 16 steps (64 tokens each) has perplexity",
            "better with 1/2 of the steps",
            "  8 steps (128 tokens each): 150 [144, 156] -> ",
            "times lower",
            "reverse KL: every round at its own step count, its teacher -> the round:\n"
            "  32: 21.4 [20.5, 22.3] -> 19.2 [18.4, 19.9] (better)\n  16: 29.6",
            "16 steps (64 tokens each), consistent stories: teacher 71.2% [69.2%, 73.2%], "
            "reverse KL round 7 92.2% [90.2%, 94.2%] (more)",
            "accuracy of last words",
            "stories-tiny: At equal quality ",
            "ppl_vs_steps.pdf",
            f"halfstep ui --results {results}",
        )
    ]
    assert found == sorted(found)
    assert "Another text" not in out and "| reverse KL round 7 |" not in out


def test_figures_over_steps_show_the_tokens_per_step_along_the_top(results):
    figure, points = picture(results, "ppl_vs_steps")
    lines = points[points["kind"] == "line"]
    assert (lines["tokens"] * lines["x"] == 1024).all()  # tokens of a synthetic text
    (top,) = figure.axes[0].child_axes
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["128", "64", "32"]
    assert top.get_xticks().tolist() == [8, 16, 32]
    other, _ = picture(results, "latency_vs_length")
    assert not other.axes[0].child_axes


def test_a_curve_of_one_point_has_one_tick(results):
    tables = frames(results, "loss_curves")
    table = tables["journals"]
    last = table.groupby(["teacher", "group", "series", "key"])["step"].transform("max")
    is_kept = table["key"].str.startswith("train") | (table["step"] == last)
    figure, _ = draw("loss_curves", {"journals": table[is_kept]})
    held_out = [axes for axes in figure.axes if "mse: held-out" in axes.get_label()]
    assert [len(axes.get_xticks()) for axes in held_out] == [1]

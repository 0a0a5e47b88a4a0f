"""Figures: each draws, shows exactly the points of its CSV, is reproducible, has free labels."""

import itertools
import json
from pkgutil import resolve_name

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
from halfstep.report import style
from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES
from halfstep.report.curves import CURVE_POINTS, read_curves, thin_curve
from halfstep.report.labels import spread
from halfstep.report.points import POINTS
from halfstep.report.published import published_rows
from halfstep.report.rows import read_table

PUBLISHED = [name for name, row in FIGURES.items() if row.published]
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


def lines_of(figure):
    """The lines of series in all panels."""
    return [line for axes in figure.axes for line in axes.lines if line.get_gid()]


def foot(figure):
    """The note at the foot of the figure."""
    return " ".join(text.get_text() for text in reversed(figure.texts))


@pytest.mark.parametrize("name, published", CASES)
def test_a_figure_draws_the_points_of_its_csv(results, name, published):
    figure, points = draw(name, frames(results, name, published))
    assert list(points.columns) == list(POINTS) and len(points)
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
    assert bands == len(with_interval.drop_duplicates(["panel", "series"]))


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


def test_the_foot_names_the_conditions(results):
    figure, _ = draw("ppl_vs_steps", frames(results, "ppl_vs_steps"))
    for words in (
        "95% interval",
        "Judge results/models/stories-tiny/baseline@aabbccddeeff",
        "protocol ids v1",
        "n 512",
        "seed 1",
        "weights ema",
        "commit 0123456789ab",
    ):
        assert words in foot(figure)


@pytest.mark.parametrize("name, published", CASES)
def test_labels_do_not_overlap_and_stay_on_the_page(results, name, published):
    figure, _ = draw(name, frames(results, name, published))
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
    plain, ours = draw(name, frames(results, name))
    figure, points = draw(name, frames(results, name, published=True))
    mine, theirs = points[points["kind"] != "published"], points[points["kind"] == "published"]
    pandas.testing.assert_frame_equal(mine, ours)
    assert len(theirs) and theirs["x"].between(ours["x"].min(), ours["x"].max()).all()
    for series in theirs["series"].unique():
        letter, source = series.removeprefix("published ").split(": ")
        assert f"{letter} {source}" in foot(figure) and source.rpartition(", ")[2]
    before = {line.get_gid(): line.get_color() for line in lines_of(plain)}
    after = {line.get_gid(): line.get_color() for line in lines_of(figure)}
    assert before.items() <= after.items()
    assert {after[series] for series in theirs["series"]} == {style.PUBLISHED["color"]}
    assert style.PUBLISHED["linewidth"] < 1
    our_lines = set(mine.loc[mine["kind"] == "line", "series"])
    their_lines = set(theirs["series"])
    lowest = min(line.get_zorder() for line in lines_of(figure) if line.get_gid() in our_lines)
    for line in lines_of(figure):
        assert line.get_gid() not in their_lines or line.get_zorder() < lowest


@pytest.mark.parametrize("name", [name for name in FIGURES if name not in PUBLISHED])
def test_a_figure_without_published_values_in_the_catalogue_ignores_them(results, name):
    _, plain = draw(name, frames(results, name))
    _, points = draw(name, frames(results, name, published=True))
    pandas.testing.assert_frame_equal(points, plain)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_figure_without_published_values_in_its_range_draws_ours_alone(results, name):
    tables = frames(results, name, published=True)
    _, ours = draw(name, tables | {"published": tables["published"].assign(in_figures=False)})
    pandas.testing.assert_frame_equal(ours, draw(name, frames(results, name))[1])


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
    looks = [style.series_style(f"round {number}", number, 7, 0) for number in range(1, 8)]
    gray = [numpy.dot(to_rgb(look["color"]), (0.299, 0.587, 0.114)) for look in looks]
    assert all(a - b > 0.06 for a, b in itertools.pairwise(gray))
    markers = {look["marker"] for look in looks} | {
        style.series_style("teacher", 0, 7, 0)["marker"]
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


def test_summary_prints_tables_texts_and_places(results, capsys):
    steps = results / "tables" / "steps.csv"
    plot("ppl_vs_steps", [steps], results / "figures" / "ppl_vs_steps.pdf")
    (results / "mlflow.db").touch()
    summary(results)
    out = capsys.readouterr().out
    for words in (
        "| kl_backward round 7 |",
        "Generative perplexity",
        "Unigram entropy",
        "last words",
        "milliseconds to write",
        "At 16 steps teacher wrote",
        "At 16 steps kl_backward/round-7 wrote",
        "At 32 steps teacher wrote",
        "stories-tiny: kl_backward round 7 with 16 steps (64 tokens each) has perplexity",
        "better with 1/2 of the steps",
        "  8 steps (128 tokens each): 150 [144, 156] -> ",
        "times lower",
        "kl_backward: every round at its own step count, its teacher -> the round:\n"
        "  32: 21.4 [20.5, 22.3] -> 19.2 [18.4, 19.9] (better)\n  16: 29.6",
        "16 steps (64 tokens each), consistent stories: teacher 71.2% [69.2%, 73.2%], "
        "kl_backward round 7 92.2% [90.2%, 94.2%] (more)",
        "ppl_vs_steps.pdf",
        f"mlflow ui --backend-store-uri sqlite:///{results}/mlflow.db",
    ):
        assert words in out, words
    assert "Another text" not in out and "Share of consistent" not in out


def test_figures_over_steps_show_the_tokens_per_step_along_the_top(results):
    figure, points = draw("ppl_vs_steps", frames(results, "ppl_vs_steps"))
    lines = points[points["kind"] == "line"]
    assert (lines["tokens"] * lines["x"] == 1024).all()  # tokens of a synthetic text
    (top,) = figure.axes[0].child_axes
    assert [tick.get_text() for tick in top.get_xticklabels()] == ["128", "64", "32"]
    assert top.get_xticks().tolist() == [8, 16, 32]
    other, _ = draw("latency_vs_length", frames(results, "latency_vs_length"))
    assert not other.axes[0].child_axes


def test_a_curve_of_one_point_has_one_tick(results):
    tables = frames(results, "loss_curves")
    table = tables["journals"]
    last = table.groupby(["teacher", "group", "series", "key"])["step"].transform("max")
    is_kept = table["key"].str.startswith("train") | (table["step"] == last)
    figure, _ = draw("loss_curves", {"journals": table[is_kept]})
    held_out = [axes for axes in figure.axes if "mse: held-out" in axes.get_label()]
    assert [len(axes.get_xticks()) for axes in held_out] == [1]

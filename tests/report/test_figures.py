"""Figures: every one draws, shows exactly the points of its CSV, comes out the same twice; labels do not touch."""

import json

import numpy
import pandas
import pytest
import synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from halfstep.cli import main
from halfstep.commands.report import first_sample, plot, summary, tabulate
from halfstep.errors import HalfstepError
from halfstep.report import style
from halfstep.report.figures import FIGURES, journals
from halfstep.report.published import published as published_values
from halfstep.report.tables import TABLES, read_csv


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


PUBLISHED = ("ppl_vs_steps", "entropy_vs_steps", "lambada_vs_round", "latency_vs_length")
CASES = [
    (name, published)
    for name in FIGURES
    for published in (False, True)
    if not published or name in PUBLISHED
]


def inputs(results, name):
    needs = FIGURES[name][1]
    return (
        [results / "models"]
        if "journals" in needs
        else [results / "tables" / f"{need}.csv" for need in needs]
    )


def frames(results, name, published=False):
    others = {"published": published_values()} if published else {}
    return others | {
        need: journals([results / "models"])
        if need == "journals"
        else read_csv(results / "tables" / f"{need}.csv")
        for need in FIGURES[name][1]
    }


@pytest.mark.parametrize("name, published", CASES)
def test_the_csv_is_what_is_drawn(results, name, published):
    figure, points = FIGURES[name][0](frames(results, name, published))
    assert list(points.columns) == list(style.POINTS) and len(points)
    drawn = {
        (axes.get_label(), line.get_gid()): line.get_xydata()
        for axes in figure.axes
        for line in axes.lines
        if line.get_gid()
    }
    assert drawn.keys() == set(zip(points["panel"], points["series"], strict=True))
    for (panel, series), group in points.groupby(["panel", "series"]):
        if group["kind"].iloc[0] == "level":
            assert set(drawn[panel, series][:, 1]) == set(group["y"])
        else:
            assert numpy.array_equal(drawn[panel, series], group[["x", "y"]].to_numpy(float))
    bands = sum(len(axes.collections) for axes in figure.axes)
    with_interval = points[points["low"].notna() & (points["kind"] != "level")].drop_duplicates(
        ["panel", "series"]
    )
    assert bands == len(with_interval)


@pytest.mark.parametrize("name", FIGURES)
def test_files_come_out_the_same_twice_and_say_where_they_are_from(results, name, tmp_path):
    plot(name, inputs(results, name), tmp_path / "one" / f"{name}.pdf")
    plot(name, inputs(results, name), tmp_path / "two" / name)
    for suffix in ("pdf", "svg", "csv"):
        one, two = (
            (tmp_path / where / f"{name}.{suffix}").read_bytes() for where in ("one", "two")
        )
        assert one == two and len(one) > 100
    origin = json.loads((tmp_path / "one" / f"{name}.provenance.json").read_text())
    assert origin["inputs"] and all(len(digest) == 64 for digest in origin["inputs"].values())
    assert set(origin["outputs"]) == {f"{name}.{suffix}" for suffix in ("pdf", "svg", "csv")}
    svg = (tmp_path / "one" / f"{name}.svg").read_text()
    assert (
        svg.startswith("<?xml")
        and "date" not in svg.partition("</metadata>")[0].replace("rdf:Description", "").lower()
    )


def test_the_recorded_command_draws_the_figure_again(results, tmp_path):
    tables = map(str, inputs(results, "ppl_vs_steps"))
    assert (
        main(
            [
                "plot",
                "--figure",
                "ppl_vs_steps",
                "--tables",
                *tables,
                "--output",
                str(tmp_path / "figure.pdf"),
            ]
        )
        == 0
    )
    before = (tmp_path / "figure.svg").read_bytes()
    (tmp_path / "figure.svg").unlink()
    assert main(json.loads((tmp_path / "figure.provenance.json").read_text())["command"][1:]) == 0
    assert (tmp_path / "figure.svg").read_bytes() == before


def test_the_page_states_the_conditions(results):
    figure, _ = FIGURES["ppl_vs_steps"][0](frames(results, "ppl_vs_steps"))
    foot = " ".join(text.get_text() for text in reversed(figure.texts))
    for words in (
        "95% interval",
        "Judge results/models/stories-tiny/baseline@aabbccddeeff",
        "protocol ids v1",
        "n 512",
        "seed 1",
        "weights ema",
        "commit 0123456789ab",
    ):
        assert words in foot


@pytest.mark.parametrize("name, published", CASES)
def test_labels_do_not_touch_and_stay_on_the_page(results, name, published):
    figure, _ = FIGURES[name][0](frames(results, name, published))
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    for axes in figure.axes:
        for text in axes.texts:
            text.update_positions(renderer)
        boxes = [
            (text.get_text(), Text.get_window_extent(text, renderer).padded(-0.5))
            for text in axes.texts
        ]  # of the words, without the leader
        for i, (one, a) in enumerate(boxes):
            assert page.x0 <= a.x0 and a.x1 <= page.x1, f"{one} leaves the page"
            for two, b in boxes[i + 1 :]:
                assert not (a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1), (
                    f"{one} on {two} in {axes.get_label()}"
                )


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values_lie_under_ours_in_grey_with_their_source(results, name):
    """They add lines and nothing else: our points, our colours and the range of x stay; every line's letter is told at the foot."""
    plain, ours = FIGURES[name][0](frames(results, name))
    figure, points = FIGURES[name][0](frames(results, name, published=True))
    mine, theirs = points[points["kind"] != "published"], points[points["kind"] == "published"]
    pandas.testing.assert_frame_equal(mine, ours)
    assert len(theirs) and theirs["x"].between(ours["x"].min(), ours["x"].max()).all()
    foot = " ".join(text.get_text() for text in reversed(figure.texts))
    for series in theirs["series"].unique():
        letter, source = series.removeprefix("published ").split(": ")
        assert f"{letter} {source}" in foot and source.rpartition(", ")[2]
    colours = [
        {
            line.get_gid(): line.get_color()
            for axes in drawn.axes
            for line in axes.lines
            if line.get_gid()
        }
        for drawn in (plain, figure)
    ]
    assert colours[0].items() <= colours[1].items()
    assert {colours[1][series] for series in theirs["series"]} == {
        style.PUBLISHED["color"]
    } and style.PUBLISHED["linewidth"] < 1
    below = min(
        line.get_zorder()
        for axes in figure.axes
        for line in axes.lines
        if line.get_gid() in set(mine.loc[mine["kind"] == "line", "series"])
    )
    assert all(
        line.get_zorder() < below
        for axes in figure.axes
        for line in axes.lines
        if line.get_gid() in set(theirs["series"])
    )


def test_a_table_with_published_rows_draws_the_same_figure_unless_they_are_asked_for(
    results, tmp_path
):
    tabulate("steps", [results / "metrics"], tmp_path / "steps", published=True)
    plot("ppl_vs_steps", inputs(results, "ppl_vs_steps"), tmp_path / "one")
    plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "two")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "three", published=True)
    assert "published a: " in (tmp_path / "three.csv").read_text()


def test_a_second_judge_has_panels_of_its_own_and_no_number_beside_the_first(results):
    table = read_csv(results / "tables" / "steps.csv")
    other = table[table["protocol"] == "retokenized"].assign(
        judge="meta-llama/Meta-Llama-3-8B@0123456789ab", judge_dtype="bfloat16"
    )
    other["value"] *= 2
    both = pandas.concat([table, other], ignore_index=True)
    _, points = FIGURES["ppl_vs_steps"][0]({"steps": both, "published": published_values()})
    _, alone = FIGURES["ppl_vs_steps"][0]({"steps": table})
    panels = points.groupby("panel", sort=False)["y"]
    assert list(panels.groups) == [
        f"stories-tiny · {run} · judge {j}"
        for j in ("baseline", "Meta-Llama-3-8B")
        for run in ("kl_backward", "mse")
    ]
    for run in ("kl_backward", "mse"):
        first = points[points["panel"] == f"stories-tiny · {run} · judge baseline"]
        assert (
            first["y"].tolist()
            == alone.loc[alone["panel"] == f"stories-tiny · {run}", "y"].tolist()
        )
        second = points[points["panel"] == f"stories-tiny · {run} · judge Meta-Llama-3-8B"]
        numpy.testing.assert_allclose(second["y"], 2.2 * first["y"])
    assert not (points["kind"] == "published").any()  # they are gpt2-large's
    _, entropy = FIGURES["ppl_vs_latency"][0](
        {"steps": both, "speed": read_csv(results / "tables" / "speed.csv")}
    )
    assert entropy["y"].max() <= alone["y"].max()  # one judge, the first


def test_rounds_are_told_apart_in_grey():
    grey = [
        numpy.dot(to_rgb(style.series_style(f"round {r}", r, 7, 0)["color"]), (0.299, 0.587, 0.114))
        for r in range(1, 8)
    ]
    assert all(a - b > 0.06 for a, b in zip(grey, grey[1:], strict=False))
    assert (
        len(
            {style.series_style(f"round {r}", r, 7, 0)["marker"] for r in range(1, 8)}
            | {style.series_style("teacher", 0, 7, 0)["marker"]}
        )
        == 8
    )


def test_spread_keeps_apart_what_is_near_and_leaves_the_rest():
    assert style.spread([10, 50, 90], 10, 0, 100) == [10, 50, 90]
    assert style.spread([50, 50, 50], 10, 0, 100) == [40, 50, 60]
    assert style.spread([99, 100], 10, 0, 100) == [90, 100]
    assert numpy.diff(style.spread([1] * 30, 10, 0, 100)).min() == pytest.approx(100 / 29)


def test_faults_are_one_sentence(results, tmp_path):
    steps = results / "tables" / "steps.csv"
    with pytest.raises(HalfstepError, match="did you mean ppl_vs_steps"):
        plot("ppl_vs_step", [steps], tmp_path / "x")
    with pytest.raises(
        HalfstepError, match=r"ppl_vs_latency needs steps\.csv, speed\.csv; found no speed\.csv"
    ):
        plot("ppl_vs_latency", [steps], tmp_path / "x")
    with pytest.raises(HalfstepError, match="no such table"):
        plot("ppl_vs_steps", [tmp_path / "steps.csv"], tmp_path / "x")
    with pytest.raises(HalfstepError, match="no rows in journals"):
        plot("loss_curves", [tmp_path], tmp_path / "x")
    speed = read_csv(results / "tables" / "speed.csv")
    speed["steps"] = speed["steps"] * 100
    speed.to_csv(tmp_path / "speed.csv", index=False)
    with pytest.raises(HalfstepError, match="no step count is in both tables"):
        plot("ppl_vs_latency", [steps, tmp_path / "speed.csv"], tmp_path / "x")


def test_long_curves_are_thinned_by_means_not_by_choice(results):
    from halfstep.report.figures import CURVE_POINTS, _thin

    x, y = _thin(numpy.arange(10_000.0), numpy.where(numpy.arange(10_000) % 2, 1.0, 3.0))
    assert len(x) <= CURVE_POINTS and numpy.abs(y - 2).max() < 0.05
    noise = numpy.random.default_rng(0).normal(size=200)
    _, y = _thin(numpy.arange(200.0), noise)
    numpy.testing.assert_allclose(
        y, noise.reshape(100, 2).mean(1)
    )  # every point as smooth as any other


def test_journals_are_found_by_folder_or_named_one_by_one(results):
    named = journals(sorted((results / "models").rglob("journal.jsonl"), reverse=True))
    columns = ["teacher", "group", "series", "key", "step"]
    pandas.testing.assert_frame_equal(
        named.sort_values(columns, ignore_index=True),
        journals([results / "models"]).sort_values(columns, ignore_index=True),
    )
    assert (
        set(named["group"]) == {"pretraining", "kl_backward", "mse"}
        and named["series"].nunique() == 9
    )


def test_a_table_of_two_teachers_draws_a_panel_for_each_run(results, tmp_path):
    table = pandas.read_csv(results / "tables" / "steps.csv")
    other = table[table["run"] != "mse"].assign(
        teacher="owt-small", model=lambda t: t["model"].str.replace("stories-tiny", "owt-small")
    )
    pandas.concat([table, other]).to_csv(tmp_path / "steps.csv", index=False)
    figure, _ = FIGURES["ppl_vs_steps"][0]({"steps": read_csv(tmp_path / "steps.csv")})
    assert [axes.get_label() for axes in figure.axes] == [
        "owt-small · kl_backward",
        "stories-tiny · kl_backward",
        "stories-tiny · mse",
    ]


def test_summary_prints_tables_texts_and_places(results, capsys):
    plot(
        "ppl_vs_steps", [results / "tables" / "steps.csv"], results / "figures" / "ppl_vs_steps.pdf"
    )
    (results / "mlflow.db").touch()
    summary(results)
    out = capsys.readouterr().out
    for words in (
        "| kl_backward round 7 |", "Generative perplexity", "Unigram entropy", "last words", "milliseconds to write", "At 8 steps teacher wrote",
        "At 8 steps kl_backward/round-7 wrote", "times lower",
        "kl_backward: every round at its own step count, its teacher -> the round:\n  32: 21.4 [20.5, 22.3] -> 19.2 [18.4, 19.9] (better)\n  16: 29.6",
        "8 steps, consistent stories: teacher 52.5% [50.5%, 54.5%], kl_backward round 7 73.5% [71.5%, 75.5%] (more)", "ppl_vs_steps.pdf", f"mlflow ui --backend-store-uri sqlite:///{results}/mlflow.db",
    ):  # fmt: skip
        assert words in out, words
    assert "Another text" not in out and "Share of consistent" not in out


def test_the_first_sample_is_cut_at_its_end(tmp_path):
    file = tmp_path / "samples.txt"
    file.write_text("=== sample 0\none\ntwo\n=== sample 1\nthree\n")
    assert first_sample(file) == "one\ntwo" and first_sample(tmp_path / "none") is None
    file.write_text("=== 0\n" + "word " * 500)
    assert len(first_sample(file)) <= 902 and first_sample(file).endswith("word …")

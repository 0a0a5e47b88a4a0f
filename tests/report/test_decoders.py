"""Ways to draw and their costs: the figure `decoders`, and the grids of the table `variants`."""

import itertools

import pandas
import pytest
import synthetic
from matplotlib.backends.backend_agg import FigureCanvasAgg

from halfstep.commands.report import tabulate
from halfstep.report.decoders import AT_DATA, cost_grid, with_costs
from halfstep.report.grids import round_number
from halfstep.report.headlines import title_of_decoders
from halfstep.report.markdown import variants_markdown
from halfstep.report.points import one_metric
from halfstep.report.rows import read_table
from halfstep.report.speed_figures import decoders

LAST = "stories-tiny/kl_backward/round-3"
NUMBERS = ["value", "low", "high"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The default draws of a teacher and three rounds at 8, 16 and 32 steps of 1024 tokens.

    The entropy of held-out text is not reached with 8 steps.
    """
    folder = tmp_path_factory.mktemp("decoders")
    synthetic.write(folder, runs=("kl_backward",), rounds=3, steps=[8, 16, 32], points=2)
    tabulate("variants", [folder / "metrics"], folder / "variants")
    table = read_table(folder / "variants.csv")
    return table[table["variant"] == "default"]


def with_variant(table, name, steps, evaluations, perplexity=1.0, entropy=1.0, passes=None):
    """The table and a variant: the default draws at a step count, times these factors."""
    mine = table[(table["variant"] == "default") & (table["steps"] == steps)]
    factor = mine["metric"].map({"entropy": entropy}).fillna(perplexity)
    about = {"variant": name, "network_evaluations": evaluations, "autoregressive_passes": passes}
    mine = mine.assign(**about, **{number: factor * mine[number] for number in NUMBERS})
    return pandas.concat([table, mine], ignore_index=True)


def costs(table):
    return with_costs(one_metric(table, "generative_perplexity"), table)


def test_points_are_perplexities_over_passes_of_teacher_and_last_round(plain):
    """The CSV has what the figure cannot show."""
    table = with_variant(plain, "energy", 16, 16, 0.7, passes=64.0)
    _, points = decoders({"variants": table})
    lines = points[points["kind"] == "line"]
    assert list(dict.fromkeys(lines["panel"])) == [
        "stories-tiny · teacher, as drawn",
        "stories-tiny · reverse KL round 3, as drawn",
        "stories-tiny · teacher, at the entropy of held-out text",
        "stories-tiny · reverse KL round 3, at the entropy of held-out text",
    ]
    lines = lines[lines["panel"].str.endswith("as drawn")]
    shown = table[(table["metric"] == "generative_perplexity") & (table["protocol"] == "ids")]
    shown = shown[shown["model"].isin(("stories-tiny/teacher", LAST))]
    columns = ["variant", "network_evaluations", "value"]
    assert sorted(shown[columns].itertuples(index=False, name=None)) == sorted(
        lines[["series", "x", "y"]].itertuples(index=False, name=None)
    )
    assert (lines["network_evaluations"] == lines["x"]).all() and lines["entropy"].notna().all()
    asked = lines[lines["autoregressive_passes"].notna()]
    assert set(asked["series"]) == {"energy"} and set(asked["autoregressive_passes"]) == {64.0}
    assert set(points.loc[points["kind"] == "level", "series"]) == {"baseline", "data"}


def test_perplexities_at_equal_entropy_stand_at_the_passes_of_their_samples(plain):
    """In panels of their own; what no curve reaches is no point."""
    table = with_variant(plain, "energy", 16, 12.5, 0.7, passes=64.0)
    table = with_variant(table, "threshold", 8, 7.0)
    _, points = decoders({"variants": table})
    lines = points[(points["kind"] == "line") & points["panel"].str.contains("at the entropy")]
    read = table[(table["metric"] == AT_DATA) & (table["protocol"] == "ids")]
    read = read[read["model"].isin(("stories-tiny/teacher", LAST)) & read["value"].notna()]
    passes = {("default", 16): 16.0, ("default", 32): 32.0, ("energy", 16): 12.5}
    cases = zip(read["variant"], read["steps"], read["value"], strict=True)
    expected = [(variant, passes[variant, steps], value) for variant, steps, value in cases]
    found = lines[["series", "x", "y"]].itertuples(index=False, name=None)
    assert sorted(found) == sorted(expected) and len(expected) == 6
    levels = points[(points["kind"] == "level") & points["panel"].str.contains("at the entropy")]
    at_data = table[(table["metric"] == AT_DATA) & (table["run"] == "baseline")]
    value = at_data.loc[at_data["protocol"] == "ids", "value"].item()
    assert set(levels.loc[levels["series"] == "baseline", "y"]) == {value}


def test_a_model_whose_curves_reach_nothing_has_one_panel(plain):
    """Even if the baseline's curve does."""
    table = plain.copy()
    gone = (table["metric"] == AT_DATA) & (table["model"] == LAST)
    table.loc[gone, NUMBERS] = None
    _, points = decoders({"variants": table})
    assert [panel for panel in dict.fromkeys(points["panel"]) if "at the entropy" in panel] == [
        "stories-tiny · teacher, at the entropy of held-out text"
    ]
    table.loc[(table["metric"] == AT_DATA) & (table["run"] != "baseline"), NUMBERS] = None
    _, points = decoders({"variants": table})
    assert set(points["panel"]) == {
        "stories-tiny · teacher",
        "stories-tiny · reverse KL round 3",
    }


def test_without_a_frontier_a_model_has_one_panel(plain):
    table = with_variant(plain[plain["metric"] != AT_DATA], "energy", 16, 16)
    _, points = decoders({"variants": table})
    assert set(points["panel"]) == {
        "stories-tiny · teacher",
        "stories-tiny · reverse KL round 3",
    }
    assert "held-out entropy" not in variants_markdown(table)


@pytest.mark.parametrize("factor, named", [(0.97, True), (0.985, False), (1.03, True)])
def test_an_entropy_is_named_where_it_is_not_that_of_the_default_draws(plain, factor, named):
    """Those of as many passes: 14 evaluations are compared with 16, whatever the limit of steps."""
    table = with_variant(plain, "threshold", 32, 14.0)
    entropy = table[(table["metric"] == "entropy") & (table["variant"] == "default")]
    usual = entropy[entropy["steps"] == 16].set_index("model")["value"]
    mine = (table["metric"] == "entropy") & (table["variant"] == "threshold")
    table.loc[mine, "value"] = factor * table.loc[mine, "model"].map(usual)
    _, points = decoders({"variants": table})
    texts = points[points["series"] == "threshold"].set_index("panel")["text"]
    assert texts[texts.index.str.contains("at the entropy")].isna().all()
    expected = f"H {factor * usual['stories-tiny/teacher']:.2f}" if named else None
    assert texts["stories-tiny · teacher, as drawn"] == expected
    assert points.loc[points["series"] == "default", "text"].isna().all()


@pytest.mark.parametrize(
    ("change", "begin", "end"),
    [
        ({"perplexity": 1.01}, "Drawn as threshold, round 3 has", ": no clear difference"),
        ({"perplexity": 0.5}, "Drawn as threshold, round 3 has", "with 32.0 network evaluations"),
        (
            {"perplexity": 2.0},
            "No other way to draw lets round 3",
            "32.0 network evaluations a text",
        ),
        ({"perplexity": 0.5, "entropy": 0.9}, "No other way to draw lets round 3", "a text"),
        ({"passes": 31.0}, "Drawn as", ": no clear difference"),
    ],
)
def test_the_title_names_the_fewest_passes_of_equal_quality(plain, change, begin, end):
    """A way to draw that loses entropy does not count."""
    rows = costs(with_variant(plain, "threshold", 32, 12.5, **change))
    title = title_of_decoders(rows)
    assert title.startswith(begin) and title.endswith(end)
    if begin.startswith("Drawn"):
        assert "with 12.5 network evaluations" in title
    assert ("and 31.0 autoregressive passes a text" in title) == ("passes" in change)


def test_the_title_says_who_decides_over_drafts(plain):
    table = with_variant(plain, "drafts", 32, 12.5, 0.5, passes=31.0)
    table.loc[table["variant"] == "drafts", "sampler"] = "speculative(draft_tokens=4)"
    title = title_of_decoders(costs(table))
    assert title.startswith("Drawn as drafts, accepted or corrected by the autoregressive model, ")
    assert "accepted" not in title_of_decoders(costs(table.assign(sampler="ancestral")))


def test_texts_of_near_points_are_not_written_over_one_another(plain):
    """Several ways to draw with the same passes and perplexity: each entropy can be read."""
    table = plain
    for name in ("one", "two", "three"):
        table = with_variant(table, name, 16, 16, 1.5, entropy=0.9)
    figure, _ = decoders({"variants": table})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes[:2]:
        notes = [text for text in axes.texts if text.get_text().startswith("H ")]
        boxes = [note.get_tightbbox(canvas.get_renderer()) for note in notes]
        assert len(boxes) == 3
        for one, other in itertools.combinations(boxes, 2):
            assert not one.overlaps(other)


def test_a_table_without_the_default_draws_has_a_title_too(plain):
    rows = costs(with_variant(plain, "cold", 8, 8))
    title = title_of_decoders(rows[rows["variant"] == "cold"])
    assert title == "Generative perplexity against sampling steps"


def test_tokens_and_evaluations_of_the_grid_make_a_text(plain):
    """Grids are of the teacher and the last round, with a column of passes where one has any."""
    rows = costs(with_variant(plain, "threshold", 32, 12.5))
    made = rows["tokens_per_evaluation"] * rows["network_evaluations"]
    assert made.to_list() == pytest.approx([1024] * len(rows))
    mine = rows[rows["model"] == LAST]
    table = with_variant(plain, "threshold", 32, 12.5)
    header, _, *lines = cost_grid(mine, table).splitlines()
    assert "autoregressive passes" not in header and len(lines) == len(mine) == 4
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:2] == ["threshold", "32"] and cells[-2:] == ["12.5", "81.9"]
    text = variants_markdown(with_variant(plain, "energy", 16, 16, passes=64.0))
    assert text.count("### Costs of ") == 2 * 2  # two models, two protocols
    grid = text[text.index(f"### Costs of {LAST}") :]
    line = next(line for line in grid.splitlines() if line.startswith("| energy"))
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["16.0", "64.0", "64.0"]


def test_the_grid_has_all_measures_of_the_same_samples(plain):
    """Of stories their accepted share, and MAUVE; a column that nothing fills is not there."""
    table = with_variant(plain, "threshold", 16, 12.5, 0.5, 0.9)
    mine = table[(table["model"] == LAST) & (table["metric"] == "entropy")]
    more = [
        mine.assign(metric=metric, value=value + mine["steps"].astype(float) / 100, **changes)
        for metric, value, changes in (
            ("sample_mauve", 0.5, {"protocol": "windows"}),
            ("accepted_share", 0.1, {"protocol": "grammar", "low": 0.05, "high": 0.2}),
        )
    ]
    table = pandas.concat([table, *more], ignore_index=True)
    text = variants_markdown(table)
    header, _, *lines = text[text.index(f"### Costs of {LAST} (protocol ids)") :].split("\n")[2:8]
    names = [cell.strip() for cell in header.split("|")[1:-1]]
    assert names == [
        "way to draw", "steps", "perplexity", "at held-out entropy", "entropy", "MAUVE",
        "accepted stories", "network evaluations", "tokens per network evaluation",
    ]  # fmt: skip
    grid = [dict(zip(names, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in lines]
    rows = table[(table["model"] == LAST) & (table["protocol"] == "ids")]
    for line in grid:
        same = rows[
            (rows["variant"] == line["way to draw"]) & (rows["steps"] == int(line["steps"]))
        ]
        values = same.set_index("metric")["value"]
        assert line["perplexity"].split()[0] == round_number(values["generative_perplexity"])
        read = values[AT_DATA]
        if line["steps"] == "8":
            assert line["at held-out entropy"] == "not reached: below the curve"
        else:
            assert line["at held-out entropy"].split()[0] == round_number(read)
        assert line["MAUVE"].split()[0] == round_number(0.5 + int(line["steps"]) / 100)
        share = f"{10 + int(line['steps'])}.0% [5.0, 20.0]"
        assert line["accepted stories"] == share
    assert [line["way to draw"] for line in grid] == ["default"] * 3 + ["threshold"]
    assert "Not reached: the entropy is above or below all points of the curve" in text

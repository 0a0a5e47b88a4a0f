"""Ways to draw and their costs: the figure `decoders`, and the grids of the table `variants`."""

import pandas
import pytest
import synthetic

from halfstep.commands.report import tabulate
from halfstep.report.decoders import cost_grid, with_costs
from halfstep.report.headlines import title_of_decoders
from halfstep.report.markdown import variants_markdown
from halfstep.report.points import one_metric
from halfstep.report.rows import read_table
from halfstep.report.speed_figures import decoders

LAST = "stories-tiny/kl_backward/round-3"
NUMBERS = ["value", "low", "high"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The default draws of a teacher and three rounds at 8, 16 and 32 steps of 1024 tokens."""
    folder = tmp_path_factory.mktemp("decoders")
    synthetic.write(folder, runs=("kl_backward",), rounds=3, steps=[8, 16, 32], points=2)
    tabulate("variants", [folder / "metrics"], folder / "variants")
    table = read_table(folder / "variants.csv")
    return table[table["variant"] == "default"]


def with_variant(table, name, steps, evaluations, perplexity=1.0, entropy=1.0, passes=None):
    """The table and a variant: the default draws at a step count, times these factors."""
    mine = table[(table["variant"] == "default") & (table["steps"] == steps)]
    factor = mine["metric"].map({"generative_perplexity": perplexity, "entropy": entropy})
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
    assert set(lines["panel"]) == {
        "stories-tiny · teacher",
        "stories-tiny · reverse KL round 3",
    }
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
    expected = f"H {factor * usual['stories-tiny/teacher']:.2f}" if named else None
    assert texts["stories-tiny · teacher"] == expected
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
    header, _, *lines = cost_grid(mine).splitlines()
    assert "autoregressive passes" not in header and len(lines) == len(mine) == 4
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:2] == ["threshold", "32"] and cells[-2:] == ["12.5", "81.9"]
    text = variants_markdown(with_variant(plain, "energy", 16, 16, passes=64.0))
    assert text.count("### Costs of ") == 2 * 2  # two models, two protocols
    grid = text[text.index(f"### Costs of {LAST}") :]
    line = next(line for line in grid.splitlines() if line.startswith("| energy"))
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["16.0", "64.0", "64.0"]

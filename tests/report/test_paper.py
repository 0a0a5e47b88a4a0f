"""The paper's figures and tables: which exist, and that each shows the rows that it names."""

import json
from pathlib import Path

import pandas
import pytest
import synthetic

from halfstep.commands.report import plot, tabulate
from halfstep.errors import HalfstepError
from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.report.paper import ITEMS, KLD, SCALING, TIMED, missing, paper_items
from halfstep.report.rows import keep_rows, read_table
from halfstep.resolve import resolve

PRESETS = Path(__file__).parents[2] / "workflow" / "presets"
RUNS = [KLD, *sorted({run for item in ITEMS.values() for run in item.runs} - {KLD})]
EVERY_TABLE = [*TABLES]
LENGTHS = [64, 128, 256, 512]


def configuration(**changes):
    """A configuration of three sizes with all runs of the paper, and all sizes timed."""
    teachers = {
        size: {
            "corpus": "openwebtext",
            "network": {"size": size},
            "runs": {run: {} for run in RUNS},
        }
        for size in SCALING
    }
    benchmark = {"sizes": [*TIMED], "batch_sizes": [4, 8]}
    whole = {
        "preset": "owt-small",
        "teachers": {"owt-small": None, **teachers},
        "benchmark": benchmark,
    }
    return resolve(whole | changes, PRESETS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Tables of three teachers with all runs of the paper, and timings of all sizes."""
    folder = tmp_path_factory.mktemp("paper") / "results"
    for size in SCALING:
        synthetic.write(folder, size, RUNS, 2, [8, 16, 32], points=10)
    for size in TIMED[len(SCALING) :]:
        rows = synthetic.timings(f"{size}-untrained", "teacher", 0)
        synthetic.dump(folder / "benchmarks" / size / "latency.json", rows)
    for file in (folder / "benchmarks").rglob("*.json"):
        rows = json.loads(file.read_text())
        one_text = [row for row in rows if row["batch_size"] == 1]
        fours = [row | {"batch_size": 4, "value": row["value"] * 1.1} for row in one_text]
        synthetic.dump(file, rows + fours)
    for name in TABLES:
        tabulate(name, [folder / "metrics", folder / "benchmarks"], folder / "tables" / name)
    return folder


def test_the_catalogue_of_the_paper_has_all_its_figures_of_data():
    """3a is a drawing; 11 and 12 have the law of 6 and 5.

    What became of these three is in docs/paper.md.
    """
    numbers = {name.removeprefix("figure-").rstrip("abcdef") for name in ITEMS}
    of_figures = {number for number in numbers if number.isdecimal()}
    assert of_figures == {str(number) for number in range(1, 23)} - {"11", "12"}
    assert "figure-3a" not in ITEMS and "figure-3b" in ITEMS


def test_every_item_shows_a_row_of_the_catalogue_and_every_paper_figure_has_an_item():
    shown = {item.shows for item in ITEMS.values()}
    assert shown <= {*FIGURES, *TABLES}
    assert {name for name, row in FIGURES.items() if row.only_in_paper} <= shown


def test_every_preset_that_an_item_names_exists():
    known = {file.stem for file in PRESETS.glob("*.yaml")}
    assert {item.preset for item in ITEMS.values()} <= known


def test_a_graph_of_all_sizes_and_runs_makes_every_item():
    found = paper_items(configuration(), EVERY_TABLE)
    assert found.keys() == ITEMS.keys()
    assert found["figure-6a"] == {"teacher": ["small"], "run": ["kl_backward", "mse"]}
    assert found["figure-16"]["teacher"] == ["medium", "large"]
    assert found["figure-20d"] == {"teacher": ["1.3B-untrained"], "batch_size": ["8"]}
    assert found["figure-21a"]["teacher"] == ["small"], "a trained network of the size comes first"


def test_released_students_have_the_names_of_the_hub():
    found = paper_items(resolve({"preset": "sdtt-published"}, PRESETS), EVERY_TABLE)
    assert found["figure-6a"] == {"teacher": ["mdlm-owt"], "run": ["kld", "mse"]}
    assert {"figure-2a", "figure-5", "figure-19b", "table-1"} <= found.keys()


def test_an_item_says_what_a_configuration_lacks():
    config = resolve({"preset": "laptop"}, PRESETS)
    found = paper_items(config, ["steps", "lambada", "speed"])
    assert {"figure-1", "figure-22"} <= found.keys()
    lacking = {
        "figure-6a": "a teacher with the runs kl_backward and mse",
        "figure-4b": "teachers of the sizes small, medium, large, each with kl_backward",
        "figure-21a": "benchmark.batch_sizes with 4",
        "figure-18a": "the section continuations",
    }
    for name, words in lacking.items():
        assert name not in found
        said = missing(ITEMS[name], config, ["steps", "lambada", "speed"])
        assert said == f"{words}, as in --config preset={ITEMS[name].preset}"


def rows_of(item):
    """The flag `--where` of an item."""
    where = paper_items(configuration(), EVERY_TABLE)[item]
    return [f"{column}={','.join(values)}" for column, values in where.items()]


def drawn(results, item, to):
    """The points of an item's figure."""
    tables = [results / "tables" / f"{name}.csv" for name in ITEMS[item].tables]
    plot(ITEMS[item].shows, tables, to / item, where=rows_of(item))
    assert (to / f"{item}.pdf").stat().st_size > 1000
    return pandas.read_csv(to / f"{item}.csv")


@pytest.mark.parametrize("item", [name for name, item in ITEMS.items() if item.is_figure])
def test_an_item_shows_its_runs_and_no_others(results, tmp_path, item):
    points = drawn(results, item, tmp_path)
    text = " ".join([*points["panel"], *points["series"]])
    if ITEMS[item].shows == "ppl_vs_latency":  # of the last rounds
        assert "kl_backward, round 2" in text and "mse" not in text
    for run in {*RUNS} - {*ITEMS[item].runs, "kl_backward"}:
        assert not (points["panel"] == run).any() and not (points["series"] == run).any()


def test_mauve_by_round_has_a_panel_for_each_round_with_the_values_of_the_table(results, tmp_path):
    points = drawn(results, "figure-5", tmp_path)
    assert list(points["panel"].unique()) == ["round 1", "round 2"]
    table = keep_rows(read_table(results / "tables/continuations.csv"), ["teacher=small"])
    mine = table[(table["metric"] == "mauve") & (table["run"] == "tvd") & (table["round"] == 2)]
    line = points[(points["panel"] == "round 2") & (points["series"] == "tvd")]
    assert line["y"].tolist() == mine["value"].tolist() and line["x"].tolist() == [8, 16, 32]


def test_quality_against_self_bleu_pairs_both_metrics_of_a_model_and_step_count(results, tmp_path):
    points = drawn(results, "figure-4a", tmp_path)
    table = keep_rows(read_table(results / "tables/continuations.csv"), ["teacher=small"])
    of = table[(table["run"] == "kl_backward") & (table["round"] == 1)].set_index("steps")
    line = points[points["series"] == "round 1"]
    assert line["x"].tolist() == of.loc[of["metric"] == "self_bleu", "value"].tolist()
    expected = of.loc[of["metric"] == "continuation_perplexity", "value"]
    assert line["y"].tolist() == expected.tolist()


def test_sizes_are_lines_of_their_teachers(results, tmp_path):
    points = drawn(results, "figure-17a", tmp_path)
    assert set(points["series"]) == set(SCALING)
    assert [panel.split(",")[0] for panel in points["panel"].unique()] == ["accuracy"]
    names = set(drawn(results, "figure-4b", tmp_path)["series"])
    ends = ("teacher", "kl_backward round 2")
    assert names == {f"{size}, {end}" for size in SCALING for end in ends}


def test_timings_are_of_one_size_and_batch_size(results, tmp_path):
    points = drawn(results, "figure-21d", tmp_path)
    assert list(points["panel"].unique()) == ["4 texts at once"]
    table = read_table(results / "tables/speed.csv")
    of = table[(table["teacher"] == "1.3B-untrained") & (table["batch_size"] == 4)]
    expected = 1000 * of.loc[of["steps"] == 16, "value"]
    assert points.loc[points["series"] == "16 steps", "y"].tolist() == pytest.approx(list(expected))


def test_where_keeps_what_runs_are_compared_with(results):
    table = read_table(results / "tables/steps.csv")
    kept = keep_rows(table, ["run=mse", "teacher=small"])
    assert set(kept["run"]) == {"mse", "teacher", "baseline", "data"}
    assert set(kept["teacher"]) == {"small"}
    assert len(keep_rows(table, ["steps=8,16"])) == table["steps"].isin([8, 16]).sum()


@pytest.mark.parametrize("text", ["run", "nothing=1", "=mse"])
def test_where_refuses_other_forms(results, text):
    with pytest.raises(HalfstepError, match="expected column=value,value"):
        keep_rows(read_table(results / "tables/steps.csv"), [text])


def test_a_figure_without_rows_says_which_were_asked_for(results, tmp_path):
    tables = [results / "tables/steps.csv"]
    with pytest.raises(HalfstepError, match="no rows with teacher=other in steps"):
        plot("ppl_vs_steps", tables, tmp_path / "x", where=["teacher=other"])

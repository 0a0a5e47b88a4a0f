"""The catalogue: functions and rows agree, and every reader of the catalogue finds every row."""

import inspect
import re
from pkgutil import resolve_name
from types import SimpleNamespace

import pytest
import synthetic

from halfstep.cli import main
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.report import figures, markdown, paper_figures, speed_figures, tables
from halfstep.report.catalogue import (
    FIGURES,
    JOURNALS,
    TABLES,
    expand_paths,
    figure_inputs,
    table_inputs,
)

ROWS = {**TABLES, **FIGURES}
EVERYDAY = {name for name, row in FIGURES.items() if not row.only_in_paper}
EXAMINED = {
    "evaluation": SimpleNamespace(
        lambada="last_words",
        infilling_items=24,
        tasks=["piqa"],
        task_steps=[8],
        perplexity=["ptb"],
    ),
    "sampling": SimpleNamespace(temperatures=[0.8], variants={"released-noise": {}}),
}
NAMES = {
    "model": ["t/teacher", "t/baseline", "t/mse/round-1"],
    "teacher": ["t"],
    "last_words": ["t/teacher", "t/baseline", "t/mse"],
    "sampled": ["t/teacher", "t/baseline"],
    "continued": ["t/teacher", "t/baseline"],
    "swept": ["t/teacher", "t/baseline"],
    "examined": ["t/teacher", "t/baseline"],
    "varied": ["t/teacher/released-noise"],
    "varied_frontier": ["t/teacher/released-noise"],
    "infilled": ["t/teacher"],
    "timed": ["t/trained/length-64-256-512-1024"],
}


def public_functions(module):
    """Functions of a module that are defined there, as "module:function"."""
    return {
        f"{module.__name__}:{name}"
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_")
    }


def test_every_function_of_a_figure_has_a_row_and_every_row_its_function():
    functions = set().union(*map(public_functions, (figures, speed_figures, paper_figures)))
    assert functions == {row.draw for row in FIGURES.values()}


def test_every_function_of_a_table_has_a_row_and_every_row_its_functions():
    named = [reference for row in TABLES.values() for reference in (row.select, row.markdown)]
    written = public_functions(tables) | public_functions(markdown)
    assert written == set(named) and len(named) == len(set(named))


def test_names_are_unique_and_fit_file_names():
    assert len(ROWS) == len(TABLES) + len(FIGURES) and JOURNALS not in ROWS
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_a_title_in_one_line_and_a_caption_of_sentences(name):
    row = ROWS[name]
    assert row.title.strip() == row.title != "" and "\n" not in row.title
    assert row.caption[0].isupper() and row.caption.endswith(".") and "\n" not in row.caption


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_needs_tables_or_journals(name):
    row = FIGURES[name]
    assert row.needs and set(row.needs) <= {*TABLES, JOURNALS}
    assert callable(resolve_name(row.draw))


def test_every_metric_is_in_one_table():
    """Only the variants have metrics of other tables, those of all samples and of the frontier."""
    others = [row for name, row in TABLES.items() if name != "variants"]
    assert sorted(metric for row in others for metric in row.metrics) == sorted(PROTOCOLS)
    assert TABLES["variants"].metrics.keys() <= {
        *TABLES["steps"].metrics,
        *TABLES["temperatures"].metrics,
    }
    assert all(title for row in TABLES.values() for title in row.metrics.values())


def test_the_synthetic_results_hold_the_inputs_of_every_table(tmp_path):
    """So that the tests of tables and figures cover each row."""
    synthetic.write(tmp_path / "results", teacher="t", runs=("mse",), rounds=1, points=2)
    inputs = table_inputs(SimpleNamespace(continuations=True, **EXAMINED), **NAMES)
    assert inputs.keys() == TABLES.keys()
    for files in inputs.values():
        assert files and all((tmp_path / file).is_file() for file in files)


def test_a_pattern_is_expanded_for_every_value_of_its_placeholder():
    patterns = ["a/{model}.json", "b/{teacher}.json"]
    expected = ["a/x.json", "a/y.json", "b/z.json"]
    assert expand_paths(patterns, model=["x", "y"], teacher=["z"]) == expected


def test_tables_of_a_section_and_their_figures_exist_with_the_section():
    with_section = table_inputs(SimpleNamespace(continuations=True, **EXAMINED), **NAMES)
    without = table_inputs(SimpleNamespace(continuations=None, **EXAMINED), **NAMES)
    config = SimpleNamespace(**EXAMINED)
    of_section = {name for name, row in TABLES.items() if row.section == "continuations"}
    assert with_section.keys() - without.keys() == of_section != set()
    figures_with = figure_inputs(config, with_section, NAMES["model"], NAMES["model"])
    figures_without = figure_inputs(config, without, NAMES["model"], NAMES["model"])
    drawn_from_them = {name for name in EVERYDAY if of_section & set(FIGURES[name].needs)}
    assert figures_with.keys() == EVERYDAY
    assert figures_with.keys() - figures_without.keys() == drawn_from_them != set()


def test_the_frontier_is_made_where_temperatures_are_set():
    of_models = table_inputs(SimpleNamespace(continuations=None, **EXAMINED), **NAMES)[
        "temperatures"
    ]
    assert of_models == [f"results/metrics/{name}/frontier.json" for name in NAMES["swept"]]
    cold = EXAMINED | {"sampling": SimpleNamespace(temperatures=[], variants={})}
    without = table_inputs(SimpleNamespace(continuations=None, **cold), **NAMES)
    assert "temperatures" not in without
    names = NAMES["model"]
    assert "frontier" not in figure_inputs(SimpleNamespace(**cold), without, names, names)


def test_a_table_of_continuations_is_made_from_the_models_that_continue_prompts():
    inputs = table_inputs(SimpleNamespace(continuations=True, **EXAMINED), **NAMES)
    assert inputs["continuations"] == [
        "results/metrics/t/teacher/continuations.json",
        "results/metrics/t/baseline/continuations.json",
    ]


def test_a_figure_of_a_key_exists_with_the_key():
    """Its table is there without it too: answers that are chosen have no step counts."""
    chosen = SimpleNamespace(**vars(EXAMINED["evaluation"]) | {"task_steps": []})
    for evaluation, is_there in ((EXAMINED["evaluation"], True), (chosen, False)):
        config = SimpleNamespace(evaluation=evaluation)
        inputs = figure_inputs(config, TABLES, NAMES["model"], NAMES["model"])
        assert ("task_accuracy_vs_steps" in inputs) == is_there


def test_a_figure_is_made_from_the_files_of_its_needs():
    models = ["t/teacher", "t/mse/round-1"]
    config = SimpleNamespace(**EXAMINED)
    inputs = figure_inputs(config, TABLES, [*models, "t/baseline"], models)
    assert inputs["ppl_vs_latency"] == ["results/tables/steps.csv", "results/tables/speed.csv"]
    assert inputs["loss_curves"] == [
        "results/models/t/teacher/journal.jsonl",
        "results/models/t/mse/round-1/journal.jsonl",
    ]


@pytest.mark.parametrize("command, rows", [("tabulate", TABLES), ("plot", FIGURES)])
def test_help_lists_every_row_with_its_title(command, rows, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, row in rows.items():
        assert f"- {name}: {row.title}" in words
    for name, row in FIGURES.items():
        if command == "plot" and row.published:
            assert name in words.partition("published values under ours")[2]

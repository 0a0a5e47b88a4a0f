"""Tables: complete, comparable or refused, intervals where they belong."""

import csv
import json
import tomllib
from pathlib import Path

import pandas
import pytest
import synthetic

from halfstep.commands.report import tabulate
from halfstep.errors import HalfstepError
from halfstep.report import published, tables


@pytest.fixture
def results(tmp_path):
    return synthetic.write(tmp_path, runs=("kl_backward", "mse"), rounds=2, steps=[8, 16], points=2)


def rewrite(file, change):
    file.write_text(json.dumps([change(row) for row in json.loads(file.read_text())]))


def made(results):
    for name in tables.TABLES:
        tabulate(name, [results / "metrics", results / "benchmarks"], results / "tables" / name)
    return {name: tables.read_csv(results / "tables" / f"{name}.csv") for name in tables.TABLES}


def test_csv_holds_every_row_with_its_interval_and_origin(results):
    found = made(results)
    rows = [
        row for file in results.rglob("metrics/**/*.json") for row in json.loads(file.read_text())
    ]
    assert sum(len(found[name]) for name in ("steps", "lambada", "continuations")) == len(rows)
    row = (
        found["steps"]
        .query("model == 'stories-tiny/mse/round-2' and steps == 16 and protocol == 'ids'")
        .iloc[0]
    )
    source = next(
        r
        for r in rows
        if r["model"] == "stories-tiny/mse/round-2" and r["steps"] == 16 and r["protocol"] == "ids"
    )
    assert {key: row[key] for key in source} == source
    assert row["low"] < row["value"] < row["high"]


def test_entropy_is_compared_with_held_out_text(results):
    table = (
        made(results)["steps"]
        .query("metric == 'entropy' and run == 'teacher' and steps == 8")
        .iloc[0]
    )
    assert table["vs_data_percent"] == pytest.approx(100 * (table["value"] / 3.95 - 1))


def test_ratio_to_the_baseline_is_of_the_same_case(results):
    speed = made(results)["speed"]
    for row in speed[speed["run"] != "baseline"].itertuples():
        base = speed.query(
            "run == 'baseline' and length == @row.length and batch_size == @row.batch_size"
        )["value"].item()
        assert row.times_faster == pytest.approx(base / row.value)
    assert (speed.loc[speed["run"] == "baseline", "times_faster"] == 1).all()


def test_markdown_reads_as_a_grid_with_conditions_below(results):
    made(results)
    text = (results / "tables" / "steps.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["sampling steps", "8", "16"]
    assert [row[0] for row in rows[2:7]] == [
        "teacher",
        "kl_backward round 1",
        "kl_backward round 2",
        "mse round 1",
        "mse round 2",
    ]
    assert rows[2][1] == "150 ±6"
    assert "Without sampling steps: baseline: 9.40 ±0.38; data: 7.20 ±0.29." in text
    judge = "results/models/stories-tiny/baseline@aabbccddeeff (float32)"
    taken = "data stories@001122334455; sampler ancestral; draws float64; n 512; seed 1; weights ema; commit 0123456789ab."
    assert (
        f"Judge {judge}; protocol ids v1; {taken}" in text
        and f"Protocol unigram v1; {taken}" in text
    )
    assert "(+2.8%)" in text and "called once per sampling step" in text
    speed = (results / "tables" / "speed.md").read_text()
    assert "| 64 × 8 " in speed and "270 ±" in speed and "(8.3×)" in speed
    assert "accuracy, parallel" in (results / "tables" / "lambada.md").read_text()


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda row: (
                row | {"judge": "gpt2-large"} if row["metric"] == "generative_perplexity" else row
            ),
            "judge .* gpt2-large",
        ),
        (
            lambda row: row | {"protocol": "words"} if row["protocol"] == "retokenized" else row,
            "protocol .*words",
        ),
        (lambda row: row | {"sampler": "analytic"}, "sampler .* analytic"),
        (lambda row: row | {"weights": "raw"}, "weights .* raw"),
        (lambda row: row | {"draw_dtype": "float32"}, "draw_dtype .* float32"),
        (
            lambda row: row | {"version": 2} if row["protocol"] == "ids" else row,
            "version of protocol ids .* 2",
        ),
        (
            lambda row: row | {"judge_dtype": "bfloat16"} if row["judge"] else row,
            "judge .* results/models/stories-tiny/baseline@aabbccddeeff bfloat16",
        ),
        (lambda row: row | {"data": "stories@ffffffffffff"}, "data .* stories@ffffffffffff"),
        (lambda row: row | {"temperature": 0.9}, "temperature .* 0.9"),
        (lambda row: row | {"seed": 2}, "seed .* 2"),
        (lambda row: row | {"num_samples": 500}, "num_samples .* 500"),
    ],
)
def test_numbers_of_different_conditions_are_refused(results, change, found):
    rewrite(results / "metrics/stories-tiny/mse/round-2/samples.json", change)
    with pytest.raises(
        HalfstepError, match=f"(?s){found}|{'.*'.join(reversed(found.split(' .* ')))}"
    ) as error:
        made(results)
    assert "stories-tiny/" in str(error.value) and "do not belong in one column" in str(error.value)


def test_a_number_that_is_there_twice_is_refused(results):
    """The same measure of one model taken twice: one of the two would be hidden by the other."""
    file = results / "metrics/stories-tiny/mse/round-2/samples.json"
    again = [
        row | {"value": 1.0, "low": 1.0, "high": 1.0}
        for row in json.loads(file.read_text())
        if row["metric"] == "entropy"
    ]
    (results / "metrics/stories-tiny/mse/round-2/again.json").write_text(json.dumps(again))
    with pytest.raises(
        HalfstepError,
        match=r"entropy of stories-tiny/mse/round-2 by protocol unigram at \d+ steps is there 2 times",
    ):
        made(results)


@pytest.mark.parametrize(
    "change, found",
    [
        (
            lambda row: row | {"data": "last_words.jsonl[2000]@ffffffffffff"},
            r"data .*@66778899aabb.*@ffffffffffff",
        ),
        (lambda row: row | {"weights": "raw"}, "weights .*ema.* raw"),
        (
            lambda row: row | {"version": 2} if row["protocol"] == "elbo-mc" else row,
            "version of protocol elbo-mc",
        ),
    ],
)
def test_last_words_of_other_items_or_weights_are_refused(results, change, found):
    rewrite(results / "metrics/stories-tiny/mse/round-2/lambada.json", change)
    with pytest.raises(HalfstepError, match=f"(?s){found}.*do not belong in one column"):
        tabulate("lambada", [results / "metrics"], results / "lambada")


def commits(results, capsys, *found):
    """The warning and the table when the teacher's rows are of these commits in turn."""
    file, each = results / "metrics/stories-tiny/teacher/samples.json", iter(found * 100)
    rewrite(file, lambda row: row | {"commit": next(each)})
    tabulate("steps", [file], results / "steps")
    assert len(tables.read_csv(results / "steps.csv")) == 10
    return capsys.readouterr().err, (results / "steps.md").read_text()


def test_rows_of_more_than_one_commit_are_written_with_a_warning(results, capsys):
    said, text = commits(results, capsys, "0123456789ab")
    assert said == "" and "commit 0123456789ab." in text and "Mind" not in text
    for found, words in (
        (
            ("0123456789ab", "ba9876543210"),
            "of more than one commit (0123456789ab: 5 of 10 rows; ba9876543210: 5 of 10 rows)",
        ),
        (
            ("0123456789ab", "0123456789ab+dirty"),
            "of more than one commit (0123456789ab: 5 of 10 rows; 0123456789ab+dirty: 5 of 10 rows)",
        ),
        (
            ("0123456789ab+dirty",),
            "of a working tree that differs from its commit (0123456789ab+dirty: 10 of 10 rows)",
        ),
    ):
        said, text = commits(results, capsys, *found)
        assert (
            said.startswith("halfstep tabulate: warning: steps: ")
            and words in said
            and said.count("\n") == 1
        )
        assert words in text.splitlines()[-1]


def test_published_values_have_rows_and_grids_of_their_own(results):
    made(results)
    for name, (_, _, titles) in tables.TABLES.items():
        plain, before = (
            tables.read_csv(results / "tables" / f"{name}.csv"),
            (results / "tables" / f"{name}.md").read_text(),
        )
        tabulate(
            name,
            [results / "metrics", results / "benchmarks"],
            results / "with" / name,
            published=True,
        )
        table, text = (
            tables.read_csv(results / "with" / f"{name}.csv"),
            (results / "with" / f"{name}.md").read_text(),
        )
        theirs = table[table["run"] == "published"]
        assert text.startswith(before) and len(table) == len(plain) + len(theirs) and len(theirs)
        assert (
            set(theirs["protocol"]) == {"as published"}
            and theirs["source"].notna().all()
            and set(theirs["metric"]) <= set(titles)
        )
        assert "as published" not in set(plain["protocol"]) and "as published" not in before
        grids = {
            grid.splitlines()[0]: grid
            for grid in text[len(before) :].split("### Published, protocol as published: ")[1:]
        }
        for metric, mine in theirs.groupby("metric"):
            head, _, *lines = [
                [cell.strip() for cell in line.split("|")[1:-1]]
                for line in grids[titles[metric]].splitlines()
                if line[:1] == "|"
            ]
            shown = {
                (line[0], case): cell
                for line in lines
                for case, cell in zip(head[1:], line[1:], strict=True)
                if cell
            }
            columns = mine["length" if metric == "latency_s" else "steps"]
            assert shown == {
                (published._who(row), "none" if pandas.isna(n) else str(int(n))): tables.number(row.value)
                for row, n in zip(mine.itertuples(), columns, strict=True)
            }  # fmt: skip
    steps = tables.read_csv(results / "with" / "steps.csv").query(
        "run == 'published' and metric == 'generative_perplexity' and steps == 32"
    )
    assert set(steps["value"]) == {192.31, 66.26, 61.65, 62.29, 25.0}


def test_published_values_are_those_that_were_read(shared):
    """Each with its value, step count and source in the file that the design keeps of them."""
    with open(shared / "data/published_values.csv") as file:
        kept = {(row["value"], row["steps"], row["certainty"]) for row in csv.DictReader(file)}
    with open(published.FILE) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 100
    for row in rows:
        value = (
            f"{100 * float(row['value']):g}"
            if row["metric"] == "lambada_accuracy"
            else row["value"]
        )
        steps = row["steps"] or ("AR" if row["model"] == "GPT-2" else "")
        assert (value, steps, row["certainty"]) in kept, row


def test_every_file_that_is_no_module_is_in_the_package():
    root = Path(tables.__file__).parents[3]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    found = {
        file
        for name, globs in packaged.items()
        for glob in globs
        for file in (root / "src" / name.replace(".", "/")).glob(glob)
    }
    files = {
        file
        for file in (root / "src/halfstep").rglob("*")
        if file.is_file() and file.suffix not in (".pyc", ".so")
    }
    assert found == {
        file for file in files if file.suffix != ".py" or not (file.parent / "__init__.py").exists()
    }


def test_two_protocols_for_every_model_are_two_grids(results):
    made(results)
    text = (results / "tables" / "steps.md").read_text()
    assert text.count("(protocol ids)") == text.count("(protocol retokenized)") == 1


def test_two_teachers_have_their_own_judges(results):
    synthetic.write(results, teacher="owt-small", runs=(), rounds=0, steps=[8], points=2)
    assert set(made(results)["steps"]["teacher"]) == {"stories-tiny", "owt-small"}


def test_a_file_that_holds_no_rows_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(HalfstepError, match=r"x\.json: expected a list of metric rows"):
        tables.rows([tmp_path / "x.json"])
    with pytest.raises(HalfstepError, match=r"no\.json: no such file"):
        tables.rows([tmp_path / "no.json"])


def test_a_number_keeps_three_digits():
    assert [tables.number(x) for x in (1234.5, 152.4, 15.24, 1.5, 0.98765, 0.01234)] == [
        "1,234",
        "152",
        "15.2",
        "1.50",
        "0.988",
        "0.0123",
    ]


def test_missing_levels_and_teachers_are_no_error(tmp_path):
    rows = synthetic.sampled("t", "teacher", 0, "t/teacher", 8, "ab")
    synthetic.dump(tmp_path / "a.json", rows)
    for name in tables.TABLES:
        tabulate(name, [tmp_path / "a.json"], tmp_path / "tables" / f"{name}.csv")
    assert "teacher" in (tmp_path / "tables" / "steps.md").read_text()
    assert (tmp_path / "tables" / "speed.md").read_text() == "No rows of speed yet.\n"
    assert (tmp_path / "tables" / "lambada.md").read_text() == "No rows of lambada yet.\n"


def test_an_unknown_table_is_one_sentence(tmp_path):
    with pytest.raises(HalfstepError, match="--table step: no such table.*did you mean steps"):
        tabulate("step", [tmp_path], tmp_path / "step")

"""Tables: complete, comparable or refused, intervals where they belong."""

import json

import pytest
import synthetic

from halfstep.commands.report import tabulate
from halfstep.errors import HalfstepError
from halfstep.report import tables


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
    rows = [row for file in results.rglob("metrics/**/*.json") for row in json.loads(file.read_text())]
    assert len(found["steps"]) + len(found["lambada"]) == len(rows)
    row = found["steps"].query("model == 'stories-tiny/mse/round-2' and steps == 16 and protocol == 'ids'").iloc[0]
    source = next(r for r in rows if r["model"] == "stories-tiny/mse/round-2" and r["steps"] == 16 and r["protocol"] == "ids")
    assert {key: row[key] for key in source} == source
    assert row["low"] < row["value"] < row["high"]


def test_entropy_is_compared_with_held_out_text(results):
    table = made(results)["steps"].query("metric == 'entropy' and run == 'teacher' and steps == 8").iloc[0]
    assert table["vs_data_percent"] == pytest.approx(100 * (table["value"] / 3.95 - 1))


def test_ratio_to_the_baseline_is_of_the_same_case(results):
    speed = made(results)["speed"]
    for row in speed[speed["run"] != "baseline"].itertuples():
        base = speed.query("run == 'baseline' and length == @row.length and batch_size == @row.batch_size")["value"].item()
        assert row.times_faster == pytest.approx(base / row.value)
    assert (speed.loc[speed["run"] == "baseline", "times_faster"] == 1).all()


def test_markdown_reads_as_a_grid_with_conditions_below(results):
    made(results)
    text = (results / "tables" / "steps.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0] == ["sampling steps", "8", "16"]
    assert [row[0] for row in rows[2:7]] == ["teacher", "kl_backward round 1", "kl_backward round 2", "mse round 1", "mse round 2"]
    assert rows[2][1] == "150 ±6"
    assert "Without sampling steps: baseline: 9.40 ±0.38; data: 7.20 ±0.29." in text
    assert "Judge results/models/stories-tiny/baseline; protocol ids; sampler ancestral; draws float64; n 512; seed 1; weights ema; commit 0123456789ab." in text
    assert "(+2.8%)" in text and "called once per sampling step" in text
    speed = (results / "tables" / "speed.md").read_text()
    assert "| 64 × 8 " in speed and "270 ±" in speed and "(8.3×)" in speed
    assert "accuracy, parallel" in (results / "tables" / "lambada.md").read_text()


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda row: row | {"judge": "gpt2-large"} if row["metric"] == "generative_perplexity" else row, "judge .* gpt2-large"),
        (lambda row: row | {"protocol": "words"} if row["protocol"] == "retokenized" else row, "protocol .*words"),
        (lambda row: row | {"sampler": "analytic"}, "sampler .* analytic"),
        (lambda row: row | {"weights": "raw"}, "weights .* raw"),
        (lambda row: row | {"draw_dtype": "float32"}, "draw_dtype .* float32"),
    ],
)
def test_numbers_of_different_conditions_are_refused(results, change, found):
    rewrite(results / "metrics/stories-tiny/mse/round-2/samples.json", change)
    with pytest.raises(HalfstepError, match=f"(?s){found}|{'.*'.join(reversed(found.split(' .* ')))}") as error:
        made(results)
    assert "stories-tiny/" in str(error.value) and "do not belong in one column" in str(error.value)


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
    assert [tables.number(x) for x in (1234.5, 152.4, 15.24, 1.5, 0.98765, 0.01234)] == ["1,234", "152", "15.2", "1.50", "0.988", "0.0123"]


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

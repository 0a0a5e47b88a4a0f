"""`halfstep score-frontier`: from samples at several temperatures to rows and a figure."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from small import MACHINE, call, done

from halfstep.commands.report import plot, tabulate
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json

DRAW = f"--num-samples 4 {MACHINE}"
TEMPERATURES = (0.7, 1.3)


@pytest.fixture(scope="module")
def swept(pipeline, tmp_path_factory):
    """The teacher's and a student's samples at three temperatures, with their rows in metrics/."""
    root = tmp_path_factory.mktemp("swept")
    score = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    score += f" --held-out {pipeline.metrics}/data.json"
    for name in ("teacher", "student"):
        draw = f"--checkpoint {getattr(pipeline, name)} {DRAW}"
        done(f"generate --steps 8 4 --output {root}/{name}/steps-{{steps}} {draw}")
        swept = f"--steps 8 --temperatures {' '.join(map(str, TEMPERATURES))}"
        done(f"generate {swept} --output {root}/{name}/frontier/steps-{{steps}} {draw}")
        against = f"--teacher {root}/metrics/teacher/frontier.json" if name == "student" else ""
        folders = " ".join(map(str, folders_of(root, name)))
        sets = f"--samples {root}/{name}/steps-4 {root}/{name}/steps-8 --frontier {folders}"
        done(f"score-frontier {sets} --output {root}/metrics/{name} {against} {score}")
    return root


def frontier_of(root, name):
    return root / "metrics" / name / "frontier.json"


def folders_of(root, name):
    sets = [root / name / f"frontier/steps-8/temperature-{t}" for t in TEMPERATURES]
    return [root / name / "steps-8", *sets]


def rows_of(file, metric):
    return [row for row in read_json(file) if row["metric"] == metric and row["protocol"] != "ids"]


def test_points_are_the_scores_of_their_samples(pipeline, swept, tmp_path):
    """Values and intervals are those of score-samples, at every temperature."""
    score = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    for folder in folders_of(swept, "teacher"):
        done(f"score-samples --samples {folder} --output {tmp_path}/rows.json {score}")
        for metric in ("perplexity", "entropy"):
            name = metric.replace("perplexity", "generative_perplexity")
            (expected,) = rows_of(tmp_path / "rows.json", name)
            (found,) = [
                row
                for row in rows_of(frontier_of(swept, "teacher"), f"frontier_{metric}")
                if row["temperature"] == expected["temperature"]
            ]
            for key in ("value", "low", "high", "checkpoint", "judge", "data"):
                assert found[key] == expected[key], key


def test_a_variant_is_a_column_of_all_rows(pipeline, swept, tmp_path):
    """And nothing else changes."""
    score = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    folders = " ".join(map(str, folders_of(swept, "teacher")))
    sets = f"--samples {swept}/teacher/steps-4 {swept}/teacher/steps-8 --frontier {folders}"
    held_out = f"--held-out {pipeline.metrics}/data.json"
    done(f"score-frontier {sets} {held_out} --variant sure --output {tmp_path} {score}")
    for name in ("samples.json", "frontier.json"):
        plain = read_json(swept / "metrics/teacher" / name)
        assert read_json(tmp_path / name) == [row | {"variant": "sure"} for row in plain]


def test_rows_of_samples_are_those_of_score_samples(pipeline, swept, tmp_path):
    """At every step count, whether it is on the frontier or not; and the record names the files."""
    score = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    folders = f"{swept}/student/steps-4 {swept}/student/steps-8"
    output = tmp_path / "student/samples.json"
    done(f"score-samples --samples {folders} --output {output} {score}")
    found = swept / "metrics/student/samples.json"
    assert read_json(found) == read_json(output)
    made_for = read_json(Path(pipeline.student) / "meta.json")["student_steps"]
    assert {row["student_steps"] for row in read_json(found)} == {made_for}
    record = read_json(found.with_name("samples.provenance.json"))
    read = [path for path in record["inputs"] if path.endswith("samples.npy")]
    assert len(read) == 2 and not any("temperature" in path for path in read)


def test_readings_say_what_they_reach(swept):
    (at_data,) = rows_of(frontier_of(swept, "teacher"), "perplexity_at_data_entropy")
    ratios = rows_of(frontier_of(swept, "student"), "perplexity_ratio_at_equal_entropy")
    assert [row["temperature"] for row in ratios] == [0.7, None, 1.3]
    assert not rows_of(frontier_of(swept, "teacher"), "perplexity_ratio_at_equal_entropy")
    for row in [at_data, *ratios]:
        assert (row["value"] is None) == row["reached"].startswith("no")
        assert row["at_entropy"] > 0 and row["steps"] == 8


@pytest.mark.parametrize("name", ["other judge", "twice", "no values", "precision"])
def test_what_does_not_belong_together_is_refused(pipeline, swept, tmp_path, name, capsys):
    """Samples given twice, rows of another corpus, a teacher without values, or in bfloat16."""
    folders, teacher = folders_of(swept, "student"), tmp_path / "teacher.json"
    held_out, words = pipeline.metrics / "data.json", ""
    shutil.copy(frontier_of(swept, "teacher"), teacher)
    shutil.copy(frontier_of(swept, "teacher").with_suffix(".npy"), tmp_path / "teacher.npy")
    if name == "twice":
        shutil.copytree(folders[0], tmp_path / "copy")
        folders = [*folders, tmp_path / "copy"]
        words = "found 4 folders for 3 pairs of step count"
    if name == "no values":
        np.save(tmp_path / "teacher.npy", np.zeros((1, 4, 3)))
        words = "teacher.npy: not the values of its rows"
    if name == "precision":
        words = "its samples have precision bfloat16, those of the student have float32"
        write_json(teacher, [row | {"precision": "bfloat16"} for row in read_json(teacher)])
    if name == "other judge":
        rows = [row | {"data": "other@0"} for row in read_json(held_out)]
        held_out, words = tmp_path / "data.json", "no row of the entropy of stories@"
        write_json(held_out, rows)
    samples = " ".join(map(str, folders))
    line = f"score-frontier --samples {folders[0]} --frontier {samples} --output {tmp_path}/x"
    line += f" --teacher {teacher}"
    line += f" --held-out {held_out} --corpus {pipeline.corpus} --judge {pipeline.baseline}/hf"
    assert call(f"{line} --bootstrap 100 {MACHINE}") == 1
    assert words in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_tables_and_figure_of_real_rows(pipeline, swept, tmp_path):
    rows = [frontier_of(swept, "teacher"), frontier_of(swept, "student")]
    tabulate("temperatures", rows, tmp_path / "temperatures")
    text = (tmp_path / "temperatures.md").read_text()
    assert "teacher, 8 steps" in text and "reverse KL round 1, 8 steps" in text
    samples = [pipeline.metrics / "teacher/samples.json", pipeline.metrics / "data.json"]
    tabulate("steps", samples, tmp_path / "steps")
    tables = [tmp_path / "steps.csv", tmp_path / "temperatures.csv"]
    plot("frontier", tables, tmp_path / "frontier")
    assert (tmp_path / "frontier.svg").is_file()


def test_rows_of_other_draws_are_refused(swept, tmp_path):
    rows = [row | {"seed": 2} for row in read_json(frontier_of(swept, "student"))]
    write_json(tmp_path / "other.json", rows)
    with pytest.raises(HalfstepError, match="seed .*do not belong in one column"):
        tabulate(
            "temperatures", [frontier_of(swept, "teacher"), tmp_path / "other.json"], tmp_path / "x"
        )
    twice = [frontier_of(swept, "student"), tmp_path / "again.json"]
    write_json(tmp_path / "again.json", read_json(twice[0])[:1])
    with pytest.raises(HalfstepError, match="found 2 times"):
        tabulate("temperatures", twice, tmp_path / "x")

"""`halfstep generate-frontier` and `score-frontier`, from a checkpoint to rows and a figure."""

import shutil

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
    """The teacher's and a student's samples at three temperatures, scored: name -> rows file."""
    root = tmp_path_factory.mktemp("swept")
    score = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --bootstrap 100 {MACHINE}"
    score += f" --held-out {pipeline.metrics}/data.json"
    for name in ("teacher", "student"):
        draw = f"--checkpoint {getattr(pipeline, name)} {DRAW}"
        done(f"generate --steps 8 --output {root}/{name}/steps-8 {draw}")
        sets = "--steps 8 --temperatures " + " ".join(map(str, TEMPERATURES))
        done(f"generate-frontier {sets} --output {root}/{name}/frontier {draw}")
        against = f"--teacher {root}/teacher.json" if name == "student" else ""
        folders = " ".join(map(str, folders_of(root, name)))
        done(f"score-frontier --samples {folders} --output {root}/{name}.json {against} {score}")
    return root


def folders_of(root, name):
    sets = [root / name / f"frontier/steps-8/temperature-{t}" for t in TEMPERATURES]
    return [root / name / "steps-8", *sets]


def rows_of(file, metric):
    return [row for row in read_json(file) if row["metric"] == metric and row["protocol"] != "ids"]


def test_a_set_is_what_generate_draws_at_its_temperature(pipeline, swept, tmp_path):
    """And other temperatures give other texts of the same seed."""
    line = f"--checkpoint {pipeline.teacher} --steps 8 --temperature 0.7 {DRAW}"
    done(f"generate --output {tmp_path} {line}")
    one, two = tmp_path, folders_of(swept, "teacher")[1]
    assert (one / "samples.npy").read_bytes() == (two / "samples.npy").read_bytes()
    of_one, of_two = (read_json(folder / "samples.json") for folder in (one, two))
    assert of_one.pop("elapsed_s") and of_two.pop("elapsed_s") and of_one == of_two
    texts = [(folder / "samples.npy").read_bytes() for folder in folders_of(swept, "teacher")]
    assert len(set(texts)) == 3
    record = read_json(swept / "teacher/frontier.provenance.json")
    assert len(record["outputs"]) == 3 * len(TEMPERATURES)


def test_a_temperature_for_all_sets_is_refused(pipeline, tmp_path, capsys):
    line = f"generate-frontier --checkpoint {pipeline.teacher} --output {tmp_path} --steps 8"
    assert call(f"{line} --temperatures 0.7 --temperature 0.9 {DRAW}") == 1
    assert "temperature: found 0.9, expected only --temperatures" in capsys.readouterr().err
    assert call(f"{line} --temperatures 0 {DRAW}") == 1
    assert "--temperatures: found" in capsys.readouterr().err


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
                for row in rows_of(swept / "teacher.json", f"frontier_{metric}")
                if row["temperature"] == expected["temperature"]
            ]
            for key in ("value", "low", "high", "checkpoint", "judge", "data"):
                assert found[key] == expected[key], key


def test_readings_say_what_they_reach(swept):
    (at_data,) = rows_of(swept / "teacher.json", "perplexity_at_data_entropy")
    ratios = rows_of(swept / "student.json", "perplexity_ratio_at_equal_entropy")
    assert [row["temperature"] for row in ratios] == [0.7, None, 1.3]
    assert not rows_of(swept / "teacher.json", "perplexity_ratio_at_equal_entropy")
    for row in [at_data, *ratios]:
        assert (row["value"] is None) == row["reached"].startswith("no")
        assert row["at_entropy"] > 0 and row["steps"] == 8


@pytest.mark.parametrize("name", ["other judge", "twice", "no values", "precision"])
def test_what_does_not_belong_together_is_refused(pipeline, swept, tmp_path, name, capsys):
    """Samples given twice, rows of another corpus, a teacher without values, or in bfloat16."""
    folders, teacher = folders_of(swept, "student"), tmp_path / "teacher.json"
    held_out, words = pipeline.metrics / "data.json", ""
    shutil.copy(swept / "teacher.json", teacher)
    shutil.copy(swept / "teacher.npy", tmp_path)
    if name == "twice":
        folders, words = [*folders, folders[0]], "found 4 folders for 3 pairs of step count"
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
    line = f"score-frontier --samples {samples} --output {tmp_path}/x.json --teacher {teacher}"
    line += f" --held-out {held_out} --corpus {pipeline.corpus} --judge {pipeline.baseline}/hf"
    assert call(f"{line} --bootstrap 100 {MACHINE}") == 1
    assert words in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_tables_and_figure_of_real_rows(pipeline, swept, tmp_path):
    rows = [swept / "teacher.json", swept / "student.json"]
    tabulate("temperatures", rows, tmp_path / "temperatures")
    text = (tmp_path / "temperatures.md").read_text()
    assert "teacher, 8 steps" in text and "kl_backward round 1, 8 steps" in text
    samples = [pipeline.metrics / "teacher/samples.json", pipeline.metrics / "data.json"]
    tabulate("steps", samples, tmp_path / "steps")
    tables = [tmp_path / "steps.csv", tmp_path / "temperatures.csv"]
    plot("frontier", tables, tmp_path / "frontier")
    assert (tmp_path / "frontier.svg").is_file()


def test_rows_of_other_draws_are_refused(swept, tmp_path):
    rows = [row | {"seed": 2} for row in read_json(swept / "student.json")]
    write_json(tmp_path / "other.json", rows)
    with pytest.raises(HalfstepError, match="seed .*do not belong in one column"):
        tabulate("temperatures", [swept / "teacher.json", tmp_path / "other.json"], tmp_path / "x")
    twice = [swept / "student.json", tmp_path / "again.json"]
    write_json(tmp_path / "again.json", read_json(twice[0])[:1])
    with pytest.raises(HalfstepError, match="found 2 times"):
        tabulate("temperatures", twice, tmp_path / "x")

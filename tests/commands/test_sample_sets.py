"""`halfstep generate` with several sets of samples: folders, texts, and what is kept."""

import shutil

import numpy as np
import pytest
from small import MACHINE, call, done

from halfstep.commands import generate as module
from halfstep.files import read_json, write_json
from halfstep.records.provenance import Verification

SETS = "--steps 2 4 --temperatures 0.7 1.3"
FOLDERS = [f"steps-{steps}/temperature-{t}" for steps in (2, 4) for t in (0.7, 1.3)]


OTHERS = [("2 steps", 1.3), ("4 steps", 0.7), ("4 steps", 1.3)]


def command(model, output, sets=SETS, count=3):
    return f"generate --checkpoint {model} --output {output} {sets} --num-samples {count} {MACHINE}"


@pytest.fixture(scope="module")
def finished(pipeline, tmp_path_factory):
    """The checkpoint and its sets of samples, in a results folder."""
    root = tmp_path_factory.mktemp("sets") / "results"
    shutil.copytree(pipeline.teacher, root / "models/a/teacher")
    done(command(root / "models/a/teacher", root / "samples/a/teacher/steps-{steps}"))
    return root


@pytest.fixture
def results(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "results")


@pytest.fixture
def drawn(monkeypatch):
    """The sets that are drawn, by the end of their label."""
    labels, draw_texts = [], module.draw_texts

    def note(write, prompts, micro_batch, label, group):
        labels.append(label.partition(" at ")[2])
        return draw_texts(write, prompts, micro_batch, label, group)

    monkeypatch.setattr(module, "draw_texts", note)
    return labels


def again(results, **options):
    done(
        command(
            results / "models/a/teacher", results / "samples/a/teacher/steps-{steps}", **options
        )
    )


def faults(results):
    """What `halfstep verify` finds, but that the corpus of the model was not copied."""
    return [fault for fault in Verification(results).faults() if "which is gone" not in fault]


def unrecorded(results):
    return [file for file in Verification(results).unrecorded if "samples" in file.parts]


def test_a_set_is_what_a_call_for_it_alone_draws(finished, tmp_path):
    """The same bytes. Other temperatures give other texts of the same seed."""
    texts = {}
    for number, folder in enumerate(FOLDERS):
        steps, temperature = folder[6], folder.partition("temperature-")[2]
        alone, sets = tmp_path / str(number), f"--steps {steps} --temperature {temperature}"
        done(command(finished / "models/a/teacher", alone, sets))
        together = finished / "samples/a/teacher" / folder
        for name in ("samples.npy", "samples.txt"):
            assert (alone / name).read_bytes() == (together / name).read_bytes()
        facts = [read_json(folder / "samples.json") for folder in (alone, together)]
        assert all(about.pop("elapsed_s") for about in facts) and facts[0] == facts[1]
        texts[folder] = (together / "samples.npy").read_bytes()
    for steps in (2, 4):
        cold, hot = (texts[f"steps-{steps}/temperature-{t}"] for t in (0.7, 1.3))
        assert cold != hot


def test_one_record_holds_all_sets(finished):
    record = read_json(finished / "samples/a/teacher/provenance.json")
    kinds = ("json", "npy", "txt")
    assert set(record["outputs"]) == {f"{one}/samples.{kind}" for one in FOLDERS for kind in kinds}
    assert not faults(finished) and not unrecorded(finished)


def test_an_interrupted_call_draws_only_what_is_left(results, drawn):
    """The last set has no samples.json, as after a kill, and the record is gone."""
    samples = results / "samples/a/teacher"
    before = {file: file.read_bytes() for file in samples.rglob("samples.*")}
    (samples / FOLDERS[-1] / "samples.json").unlink()
    (samples / "provenance.json").unlink()
    again(results)
    assert drawn == ["4 steps, temperature 1.3"]
    after = {file: file.read_bytes() for file in samples.rglob("samples.*")}
    assert after.keys() == before.keys()
    assert {file for file in after if after[file] != before[file]} <= {
        samples / FOLDERS[-1] / "samples.json"  # its time
    }
    assert not faults(results)


def test_one_more_step_count_is_drawn_alone(results, drawn):
    again(results, sets=SETS.replace("2 4", "2 3 4"))
    assert drawn == ["3 steps, temperature 0.7", "3 steps, temperature 1.3"]


def test_a_set_that_nobody_asks_for_is_kept_without_a_record(results, drawn):
    """It is drawn by no call, it is no fault, and it is there when it is asked for again."""
    again(results, sets="--steps 2 --temperatures 0.7")
    record = read_json(results / "samples/a/teacher/provenance.json")
    assert {path.partition("/")[0] for path in record["outputs"]} == {"steps-2"}
    assert len(unrecorded(results)) == 3 * 3 and not faults(results)
    again(results)
    assert drawn == [] and not faults(results)


@pytest.mark.parametrize("change", ["seed", "count", "weights", "version", "ids", "text", "json"])
def test_what_differs_or_was_changed_is_drawn_again(pipeline, results, drawn, monkeypatch, change):
    first, options = results / "samples/a/teacher" / FOLDERS[0], {}
    if change == "seed":
        options["sets"] = f"{SETS} --sampling-seed 9"
    if change == "count":
        options["count"] = 2
    if change == "weights":
        shutil.copytree(pipeline.student, results / "models/a/teacher", dirs_exist_ok=True)
    if change == "version":
        monkeypatch.setattr(module, "GENERATE_STAGE", module.GENERATE_STAGE + 1)
    if change == "ids":
        np.save(first / "samples.npy", np.load(first / "samples.npy") * 0)
    if change == "text":
        (first / "samples.txt").write_text("another text\n")
    if change == "json":
        (first / "samples.json").write_text("[]")
    again(results, **options)
    changed = ["2 steps, temperature 0.7"]
    if change in ("seed", "count", "weights", "version"):
        changed += [f"{at}, temperature {t}" for at, t in OTHERS]
    assert drawn == changed and not faults(results)


def test_a_file_has_one_record(results):
    """A record that an earlier call left inside a set is replaced by that of the last call."""
    write_json(results / "samples/a/teacher" / FOLDERS[0] / "provenance.json", {})
    again(results)
    assert not faults(results)


def test_a_simple_call_writes_into_its_folder(pipeline, tmp_path):
    done(command(pipeline.teacher, tmp_path / "out", "--steps 2"))
    names = {str(file.relative_to(tmp_path / "out")) for file in tmp_path.rglob("*.json")}
    assert names == {"samples.json", "provenance.json"}


@pytest.mark.parametrize("sets, words", [
    ("--steps 2 4", "found 2 step counts for one folder, expected {steps} in its name; write "),
    ("--steps 2 --temperatures 0.7 --temperature 0.9", "temperature: found 0.9, expected only --t"),
    ("--steps 2 --temperatures 0", "--temperatures: found [0.0]: input should be greater than 0"),
])  # fmt: skip
def test_sets_that_cannot_be_are_refused(pipeline, tmp_path, capsys, sets, words):
    assert call(command(pipeline.teacher, tmp_path / "out", sets)) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_every_step_count_is_checked_before_anything_is_drawn(pipeline, tmp_path, capsys):
    output, sets = tmp_path / "steps-{steps}", "--steps 2 99 --sampler first_hitting"
    assert call(command(pipeline.teacher, output, sets)) == 1
    assert "found 99, but sampler first_hitting takes at most" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""score-lambada on a tiny finished workflow."""

import hashlib
import json
import shutil

import pytest
import torch

from halfstep import checkpoint
from halfstep.commands import last_words as module
from halfstep.commands.last_words import score_lambada
from halfstep.config import Evaluation, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics import lambada
from halfstep.metrics.lambada import evaluate_lambada

MACHINE = Machine(device="cpu", threads=1)


def scoring(**keys) -> Evaluation:
    return Evaluation(**{"lambada": "last_words", "lambada_items": 12, "bootstrap": 100} | keys)


@pytest.mark.parametrize(
    "name, accuracies, perplexities",
    [
        ("teacher", ["parallel", "confidence"], ["elbo-exact", "elbo-mc"]),
        ("baseline", ["ar"], ["ar"]),
    ],
)
def test_last_words_of_both_kinds_of_model(world, tmp_path, name, accuracies, perplexities):
    folder, output = world.models / name, tmp_path / "rows.json"
    score_lambada([folder], world.corpus, output, scoring(), MACHINE)
    rows = read_json(output)
    assert [row["protocol"] for row in rows] == [*accuracies, *perplexities]
    metrics = ["lambada_accuracy"] * len(accuracies) + ["lambada_perplexity"] * len(perplexities)
    assert [row["metric"] for row in rows] == metrics
    checkpoint = read_json(folder / "meta.json")["sha256"]["ema.safetensors"][:16]
    lines = (world.corpus / "last_words.jsonl").read_text().splitlines()[:12]
    texts = "\0".join(json.loads(line)["text"] for line in lines)
    data = f"last_words.jsonl[12]@{hashlib.sha256(texts.encode()).hexdigest()[:12]}"
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["num_samples"], row["run"], row["weights"]) == (12, name, "ema")
        assert (row["checkpoint"], row["data"]) == (checkpoint, data)
    assert rows[-1]["value"] > 10  # a random network guesses
    assert rows[0]["network_evaluations"] == 1


def rows_of(world, output, names=("teacher", "baseline"), **keys) -> list[dict]:
    """The rows of several models in one call."""
    folders = [world.models / name for name in names]
    score_lambada(folders, world.corpus, output, scoring(**keys), MACHINE)
    return read_json(output)


def test_several_models_in_one_call_have_the_rows_of_single_calls(world, tmp_path):
    together = rows_of(world, tmp_path / "both.json")
    alone = [rows_of(world, tmp_path / f"{i}.json", [i]) for i in ("teacher", "baseline")]
    assert together == [row for rows in alone for row in rows]
    inputs = read_json(tmp_path / "both.provenance.json")["inputs"]
    assert {file.split("/")[-2] for file in map(str, inputs)} >= {"teacher", "baseline"}
    with pytest.raises(HalfstepError, match="expected each model once"):
        rows_of(world, tmp_path / "twice.json", ["teacher", "teacher"])


def test_a_stopped_call_goes_on_with_the_next_model(world, tmp_path, monkeypatch, capsys):
    expected = rows_of(world, tmp_path / "whole.json")
    output, asked = tmp_path / "rows.json", []

    def stopped(model, *args):
        asked.append(model.kind)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate_lambada(model, *args)

    monkeypatch.setattr(lambada, "evaluate_lambada", stopped)
    with pytest.raises(KeyboardInterrupt):
        rows_of(world, output)
    assert (tmp_path / "rows.partial").exists() and not output.exists()
    assert rows_of(world, output) == expected
    assert asked == ["diffusion", "autoregressive", "autoregressive"]
    assert "4 rows are finished" in capsys.readouterr().err
    assert not (tmp_path / "rows.partial").exists()


@pytest.mark.parametrize("change", ["lambada_items", "bootstrap", "precision", "items", "weights"])
def test_rows_of_other_items_or_settings_do_not_count(world, tmp_path, change):
    """Without a change they do: their values come back."""
    output, partial = tmp_path / "rows.json", tmp_path / "rows.partial"
    items = tmp_path / "items.jsonl"
    shutil.copyfile(world.corpus / "last_words.jsonl", items)
    keys = {"lambada": str(items)}
    rows = rows_of(world, output, **keys)
    settings = module._kept_rows(output, str(items), scoring(**keys)).settings
    marked = {"settings": settings, "rows": [row | {"value": 77.0} for row in rows]}
    write_json(partial, marked)
    assert {row["value"] for row in rows_of(world, output, **keys)} == {77.0}
    write_json(partial, marked)
    weights = "ema"
    if change == "items":
        items.write_text('{"text": "Once upon a time"}\n' + items.read_text())
    elif change == "weights":
        weights = "raw"
    else:
        keys |= {"lambada_items": 11, "bootstrap": 150, "precision": "bfloat16"} | keys
        keys = {key: keys[key] for key in ("lambada", change)}
    score_lambada(
        [world.models / "teacher"], world.corpus, output, scoring(**keys), MACHINE, weights
    )
    assert 77.0 not in {row["value"] for row in read_json(output)}


def test_a_repeat_of_a_training_is_another_model(world, tmp_path):
    """Its rows have a column more, and are kept next to those of the first training."""
    names = ("t", "t-seed-2")
    folders = [tmp_path / "models" / name / "teacher" for name in names]
    for folder in folders:
        shutil.copytree(world.models / "teacher", folder)
    output = tmp_path / "rows.json"
    score_lambada(folders, world.corpus, output, scoring(), MACHINE)
    first, repeat = (
        [row for row in read_json(output) if row["model"] == f"{name}/teacher"] for name in names
    )
    items = str(world.corpus / "last_words.jsonl")
    settings = module._kept_rows(output, items, scoring()).settings
    kept = first + [row | {"value": 77.0} for row in repeat]
    write_json(tmp_path / "rows.partial", {"settings": settings, "rows": kept})
    score_lambada(folders[::-1], world.corpus, output, scoring(), MACHINE)
    assert read_json(output) == kept[len(first) :] + first


def test_the_configuration_sets_the_number_of_resamples(world, tmp_path):
    """Other resamples give the same perplexity another interval."""
    one, two = (
        rows_of(world, tmp_path / "rows.json", ["teacher"], bootstrap=number)[-1]
        for number in (100, 150)
    )
    assert one["metric"] == "lambada_perplexity" and one["value"] == two["value"]
    assert (one["low"], one["high"]) != (two["low"], two["high"])


def test_the_chosen_weights_are_scored_and_named(world, tmp_path):
    """Raw weights that prefer tokens with large ids make common words nearly impossible."""
    folder = shutil.copytree(world.models / "teacher", tmp_path / "models" / "t" / "teacher")
    model = checkpoint.load_checkpoint(folder)
    state = model.network.state_dict()
    raw = state | {
        "output_layer.linear.weight": 0 * state["output_layer.linear.weight"],
        "output_layer.linear.bias": torch.arange(model.vocab_size + 1) * 1.0,
    }
    files = {"raw": "model.safetensors", "ema": "ema.safetensors"}
    tensors = {files["raw"]: raw, files["ema"]: state}
    meta = {key: value for key, value in model.meta.items() if key != "sha256"}
    checkpoint.save_checkpoint(folder, tensors, meta, folder / "tokenizer.json")
    values = {}
    for weights, file in files.items():
        output = tmp_path / "rows.json"
        score_lambada([folder], world.corpus, output, scoring(), MACHINE, weights)
        rows = read_json(output)
        values[weights] = {row["protocol"]: row["value"] for row in rows}
        found = {(row["weights"], row["checkpoint"]) for row in rows}
        assert found == {(weights, sha256(folder / file)[:16])}
    assert values["raw"]["elbo-exact"] > 10 * values["ema"]["elbo-exact"]


def test_items_can_come_from_a_local_file(world, tmp_path):
    items, output = tmp_path / "mine.jsonl", tmp_path / "rows.json"
    items.write_text('{"text": "Once upon a time"}\n{"text": "The little fox"}\n')
    evaluation = scoring(lambada=str(items), lambada_items=None)
    score_lambada([world.models / "teacher"], world.corpus, output, evaluation, MACHINE)
    assert read_json(output)[0]["num_samples"] == 2
    gone = scoring(lambada=str(tmp_path / "gone.jsonl"))
    with pytest.raises(HalfstepError, match="no file .*gone.jsonl"):
        score_lambada([world.models / "teacher"], world.corpus, output, gone, MACHINE)

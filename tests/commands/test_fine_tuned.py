"""`halfstep pretrain --from`: a published denoiser is the start of a teacher's training."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from hub_files import lightning, networks
from published import build_family, masked_tokenizer
from safetensors.torch import load_file
from small import MACHINE, ROUND, TRAINING, call, done

import halfstep
from halfstep.distributed.group import OUT_OF_TIME
from halfstep.records import provenance
from halfstep.records.journal import read_journal

V, LENGTH, MASK = 300, 24, 103  # of the small corpus
FAMILIES = {"modernbert": "", "qwen2": "--logits same"}


@pytest.fixture(scope="module", params=FAMILIES)
def hub(request, pipeline, tmp_path_factory):
    """The hub folder of a model, the checkpoint that import makes of it, and the flags of both."""
    kind, root = request.param, tmp_path_factory.mktemp("hub")
    build_family(kind, V + 1, LENGTH, root / kind)
    masked_tokenizer(pipeline.corpus, MASK).save_pretrained(root / kind)
    source, flags = f"hf:{root / kind}", FAMILIES[kind]
    imported = root / "models/published/teacher"
    line = f"--source {source} --corpus {pipeline.corpus} --output {imported}"
    done(f"import {line} {flags}")
    return SimpleNamespace(source=source, flags=flags, imported=imported)


def line(pipeline, hub, output, options=""):
    place = f"--corpus {pipeline.corpus} --output {output} --from {hub.source} {hub.flags}"
    return f"pretrain {place} --size 2x32x2 {TRAINING} {MACHINE} {options}"


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_it_begins_where_an_import_ends(hub, pipeline, tmp_path):
    """With a learning rate of almost zero the weights after two steps are those of the import."""
    output = tmp_path / "models/t/teacher"
    done(line(pipeline, hub, output, "--lr 1e-30"))
    found, expected = weights(output), weights(hub.imported)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-20), name
    meta, imported = (
        json.loads((place / "meta.json").read_text()) for place in (output, hub.imported)
    )
    same = ("transformers", "framing", "network", "vocab_size", "eos_id", "length", "kind", "round")
    assert {key: meta[key] for key in same} == {key: imported[key] for key in same}
    digest = imported["imported"]["sha256"]
    assert meta["adapted"] == {"from": hub.source, "sha256": digest} and "imported" not in meta
    run, points = read_journal(output)
    assert run["datasets"][1] == {"name": "adapted from", "digest": digest, "source": hub.source}
    assert points[-1]["metrics"]["val/nelbo"] > 0
    record = provenance.read_record(output / provenance.NAME, output)
    assert any(name.endswith("config.json") for name in record["inputs"])


def test_training_lowers_the_held_out_loss_and_a_round_follows(hub, pipeline, tmp_path):
    teacher, student = tmp_path / "models/t/teacher", tmp_path / "models/t/kl/round-1"
    longer = "--num-steps 60 --lr 3e-3 --ema-decay 0.9 --validate-every 10 --dropout 0"
    done(line(pipeline, hub, teacher, longer))
    _, points = read_journal(teacher)
    losses = [point["metrics"]["val/nelbo"] for point in points if "val/nelbo" in point["metrics"]]
    assert losses[-1] < losses[0] - 0.5
    place = f"--teacher {teacher} --corpus {pipeline.corpus} --output {student}"
    done(f"distill-round {place} {ROUND}")
    model = halfstep.load(student, "cpu")
    assert model.meta["adapted"]["from"] == hub.source and model.meta["student_steps"] == 8
    assert model.framing == halfstep.load(hub.imported, "cpu").framing
    (text,) = halfstep.generate(model, steps=4, prompt="Tom")
    assert text.startswith("Tom")


def test_interrupted_after_every_step_it_ends_with_the_same_bits(hub, pipeline, tmp_path):
    options = "--num-steps 5 --dropout 0.1"
    whole, parts = (tmp_path / name / "teacher" for name in ("whole", "parts"))
    done(line(pipeline, hub, whole, options))
    stops = 0
    while not (parts / "meta.json").exists():
        try:
            done(line(pipeline, hub, parts, f"{options} --time-limit 1e-9"))
        except SystemExit as stop:
            assert stop.code == OUT_OF_TIME
            stops += 1
    assert stops == 4
    for name in ("model", "ema", "best", "optimizer"):
        one, other = (load_file(place / f"{name}.safetensors") for place in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.parametrize("which", ["ema", "raw"])
def test_a_denoiser_of_mdlm_is_fine_tuned_too(pipeline, tmp_path, which):
    """It starts at the chosen one of the two sets of weights in its file."""
    raw, ema = networks(V)
    file, output = lightning(tmp_path / "mdlm.ckpt", raw, ema), tmp_path / "models/t/teacher"
    place = f"--corpus {pipeline.corpus} --output {output} --from {file} --from-weights {which}"
    done(f"pretrain {place} --size tiny {TRAINING} {MACHINE} --lr 1e-30")
    found, chosen = weights(output), {"ema": ema, "raw": raw}[which]
    for name, value in chosen.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-20), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--from {hub} --size tiny", "--from hf:.*: found size 2x32x2, expected tiny; set network"),
        ("--from {hub} --adapt gpt2", "found it with --adapt gpt2, but a training has one start"),
        ("--from {hub} --time-conditioning", "transformers has no input for the time; leave it"),
        ("--from {hub} --anneal-attention 1", "--anneal-attention: found 1 without --adapt"),
        ("--logits same", "--logits same: found it without --from hf:...; leave it out"),
        ("--from hf:{corpus}", "--from hf:.*: holds no config.json; name a hub name such as"),
        ("--from {other}", "--from hf:.*: its tokenizer has other tokens than that of corpus"),
    ],
)
def test_refusals_are_one_line(pipeline, tmp_path, capsys, options, sentence):
    places = {"hub": tmp_path / "hub", "other": tmp_path / "other"}
    for place in places.values():
        build_family("bert", V + 1, LENGTH, place)
        masked_tokenizer(pipeline.corpus, MASK).save_pretrained(place)
    about = json.loads((tmp_path / "other/tokenizer.json").read_text())
    tokens = about["model"]["vocab"]
    first, second = list(tokens)[110:112]
    tokens[first], tokens[second] = tokens[second], tokens[first]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(about))
    capsys.readouterr()
    given = {name: f"hf:{place}" for name, place in places.items()} | {"corpus": pipeline.corpus}
    place = f"--corpus {pipeline.corpus} --output {tmp_path}/t/out {TRAINING} {MACHINE}"
    assert call(f"pretrain --size 2x32x2 {place} {options.format_map(given)}") == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(sentence, error[-1]) and error[-1].startswith("halfstep pretrain: "), error
    assert not (tmp_path / "t").exists()

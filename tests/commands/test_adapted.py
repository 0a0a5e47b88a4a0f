"""A teacher that starts from the autoregressive baseline, through the whole chain."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from small import MACHINE, TRAINING, call, done

import halfstep
from halfstep.models.adapt import adapt_weights
from halfstep.models.dit import DiT
from halfstep.records import provenance
from halfstep.records.journal import read_journal


@pytest.fixture(scope="module")
def adapted(pipeline, tmp_path_factory):
    """A teacher adapted from the baseline, trained for two steps."""
    folder = tmp_path_factory.mktemp("adapted") / "models/stories-tiny/teacher"
    line = f"pretrain --corpus {pipeline.corpus} --output {folder} --size tiny {TRAINING} {MACHINE}"
    done(f"{line} --adapt {pipeline.baseline}")
    return folder


def test_it_says_where_it_comes_from(adapted, pipeline):
    meta = json.loads((adapted / "meta.json").read_text())
    digest = halfstep.load(pipeline.baseline, "cpu").sha256
    assert meta["network"]["shifted"] and meta["adapted"]["sha256"] == digest
    assert halfstep.load(adapted, "cpu").denoiser.shifted
    run, _ = read_journal(adapted)
    assert [data["name"] for data in run["datasets"]] == ["stories/train", "adapted from"]
    record = provenance.read_record(adapted / provenance.NAME, adapted)
    assert any("baseline/ema.safetensors" in name for name in record["inputs"])


def test_training_starts_at_the_averaged_weights_of_the_baseline(pipeline, tmp_path):
    """With a learning rate of almost zero the weights after a step are those before it."""
    still = f"{TRAINING} --lr 1e-30 {MACHINE} --size tiny --adapt {pipeline.baseline}"
    done(f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/t/teacher {still}")
    gpt = halfstep.load(pipeline.baseline, "cpu", weights="ema").network
    dit = DiT(gpt.vocabulary, gpt.width, len(gpt.blocks), gpt.heads)
    adapt_weights(gpt, dit)
    found = load_file(tmp_path / "t/teacher/model.safetensors")
    for name, value in dit.state_dict().items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-20) or "sigma_map" in name, name


def test_a_round_samples_and_scores_follow(adapted, pipeline, tmp_path):
    """The student is shifted, too; it fills in a frame and continues a prompt."""
    student = tmp_path / "models/stories-tiny/own/round-1"
    options = f"--round 1 --rounds 2 --teacher-steps 16 {TRAINING} {MACHINE}"
    done(
        f"distill-round --teacher {adapted} --corpus {pipeline.corpus} --output {student} {options}"
    )
    model = halfstep.load(student, "cpu")
    assert model.denoiser.shifted
    (text,) = halfstep.generate(model, steps=4, num_samples=1, prompt="Once")
    assert text.startswith("Once")
    done(
        f"score-lambada --checkpoint {student} --corpus {pipeline.corpus} --lambada last_words "
        f"--lambada-items 4 --output {tmp_path}/rows.json {MACHINE}"
    )
    assert json.loads((tmp_path / "rows.json").read_text())
    assert call(f"export --checkpoint {student} --output {tmp_path}/exported") == 1


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        (
            "teacher",
            "--size tiny",
            "--adapt .*: is a denoiser; name a checkpoint of halfstep train",
        ),
        ("baseline", "--size mini", "vocabulary, width, blocks and heads are .*; set network.size"),
        ("nowhere", "--size tiny", "nowhere: not a finished checkpoint"),
    ],
)
def test_refusals_are_one_line(pipeline, tmp_path, capsys, source, options, sentence):
    place = f"--corpus {pipeline.corpus} --output {tmp_path}/t/out {TRAINING} {MACHINE}"
    assert call(f"pretrain {place} {options} --adapt {pipeline.models}/{source}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(sentence, error), error
    assert not (tmp_path / "t").exists()


def test_a_baseline_of_another_corpus_is_refused(pipeline, tmp_path, capsys):
    corpus = tmp_path / "other"
    done(
        f"prepare-corpus --output {corpus} --kind stories --length 24 --vocab-size 290 "
        "--num-documents 40 --validation-documents 4 --workers 1"
    )
    line = f"pretrain --corpus {corpus} --output {tmp_path}/t/out --size tiny {TRAINING} {MACHINE}"
    assert call(f"{line} --adapt {pipeline.baseline}") == 1
    assert "its tokenizer has other tokens than that of corpus" in capsys.readouterr().err

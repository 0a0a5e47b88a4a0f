"""A teacher that starts from autoregressive weights, through the whole chain."""

import hashlib
import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import torch
from forked import launch, note_batches
from published import save_gpt2
from safetensors.torch import load_file
from small import MACHINE, TRAINING, call, done

import halfstep
from halfstep.distributed.group import OUT_OF_TIME
from halfstep.models.adapt import adapt_weights
from halfstep.models.dit import DiT
from halfstep.models.gpt2 import GPT2
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
    done(f"export --checkpoint {student} --output {tmp_path}/exported")
    assert (
        f"| adapted from | {pipeline.baseline} |" in (tmp_path / "exported/README.md").read_text()
    )


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


# GPT-2


@pytest.fixture(scope="module")
def gpt2(pipeline, tmp_path_factory):
    """A folder of transformers' GPT-2 with the tokenizer of the corpus."""
    folder = tmp_path_factory.mktemp("published") / "gpt2"
    vocabulary = json.loads((pipeline.corpus / "manifest.json").read_text())["vocab_size"]
    save_gpt2(folder, vocabulary, 32, pipeline.corpus / "tokenizer.json")
    return folder


@pytest.fixture(scope="module")
def from_gpt2(gpt2, pipeline, tmp_path_factory):
    """A teacher adapted from GPT-2, with attention annealed over the first of four steps."""
    folder = tmp_path_factory.mktemp("adapted") / "models/stories-gpt2/teacher"
    place = f"--corpus {pipeline.corpus} --output {folder} --size 2x32x2 --adapt {gpt2}"
    done(f"pretrain {place} {TRAINING} {MACHINE} --num-steps 4 --anneal-attention 3")
    return folder


def test_gpt2_is_recorded(from_gpt2, gpt2):
    meta = json.loads((from_gpt2 / "meta.json").read_text())
    digest = hashlib.sha256((gpt2 / "model.safetensors").read_bytes()).hexdigest()
    assert meta["adapted"] == {"from": str(gpt2), "sha256": digest}
    assert meta["network"]["shifted"] and meta["network"]["architecture"] == "gpt2"
    record = provenance.read_record(from_gpt2 / provenance.NAME, from_gpt2)
    assert {"config.json", "model.safetensors"} <= {Path(name).name for name in record["inputs"]}


def test_before_training_the_teacher_is_gpt2_without_causality(gpt2, pipeline, tmp_path):
    """Visible tokens in, transformers' prediction of the next token out, at every position."""
    from transformers import GPT2LMHeadModel

    still = f"{TRAINING} --lr 1e-30 {MACHINE} --size 2x32x2 --adapt {gpt2}"
    done(f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/t/teacher {still}")
    denoiser = halfstep.load(tmp_path / "t/teacher", "cpu").denoiser
    theirs = GPT2LMHeadModel.from_pretrained(gpt2, attn_implementation="eager").eval()
    x = torch.randint(0, denoiser.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(x, attention_mask=torch.zeros(3, 1, 24, 24)).logits
        found = denoiser.log_p(denoiser.features(x, torch.zeros(3)))
    assert torch.allclose(found, logits.log_softmax(-1).roll(1, 1), atol=1e-4)


def test_a_round_from_gpt2_and_all_that_reads_it(from_gpt2, pipeline, tmp_path):
    """Student, samples, last words, likelihood, continuations, latency, export."""
    student = tmp_path / "models/stories-gpt2/own/round-1"
    options = f"--round 1 --rounds 2 --teacher-steps 16 {TRAINING} {MACHINE}"
    corpus = f"--corpus {pipeline.corpus}"
    done(f"distill-round --teacher {from_gpt2} {corpus} --output {student} {options}")
    model = halfstep.load(student, "cpu")
    assert model.meta["adapted"] == halfstep.load(from_gpt2, "cpu").meta["adapted"]
    assert type(model.network) is GPT2 and model.denoiser.shifted
    for sampler in ("ancestral", "first_hitting", "block"):
        (text,) = halfstep.generate(model, steps=4, prompt="Once", sampler=sampler)
        assert text.startswith("Once")
    out = f"--output {tmp_path}/rows.json {MACHINE}"
    for line in (
        f"score-lambada --checkpoint {student} {corpus} --lambada last_words --lambada-items 4",
        f"latency --checkpoint {student} --baseline {pipeline.baseline} --lengths 8 "
        "--batch-sizes 1 --benchmark-steps 4 --baselines halfstep --repeats 3",
    ):
        done(f"{line} {out}")
        assert json.loads((tmp_path / "rows.json").read_text())
    done(f"export --checkpoint {student} --output {tmp_path}/exported")
    card = (tmp_path / "exported/README.md").read_text()
    assert f"| adapted from | {model.meta['adapted']['from']} |" in card
    line = f"latency --checkpoint {student} --baseline {pipeline.baseline} --lengths 32"
    assert call(f"{line} {out}") == 1  # the window has 24 tokens


def test_prompts_are_continued(from_gpt2, pipeline, tmp_path):
    options = "--num-prompts 2 --per-prompt 2 --prompt-tokens 4 --continuation-tokens 4"
    place = f"--checkpoint {from_gpt2} --corpus {pipeline.corpus} --output {tmp_path}/texts"
    done(f"continue-prompts {place} --steps 4 {options} --document-tokens 8 {MACHINE}")
    assert (tmp_path / "texts/samples.json").exists()


ANNEALED = f"--num-steps 7 {TRAINING.replace('--num-steps 2', '')} --anneal-attention 5"


def weights_after(folder, line):
    done(line)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("adapt", ["gpt2", "baseline"])
def test_annealing_resumes_to_the_same_bits(adapt, gpt2, pipeline, tmp_path):
    """Stopped after every step, in and after annealing; another micro-batch; not annealed."""
    size = {"gpt2": f"--size 2x32x2 --adapt {gpt2}", "baseline": "--size tiny --adapt "}[adapt]
    size += str(pipeline.baseline) if adapt == "baseline" else ""
    line = f"pretrain --corpus {pipeline.corpus} {size} {ANNEALED} --dropout 0.1 {MACHINE} --output"
    folders = {name: tmp_path / name / "teacher" for name in ("whole", "parts", "small", "full")}
    whole = weights_after(folders["whole"], f"{line} {folders['whole']}")
    stops = 0
    while not (folders["parts"] / "meta.json").exists():
        try:
            done(f"{line} {folders['parts']} --time-limit 1e-9")
        except SystemExit as stop:
            assert stop.code == OUT_OF_TIME
            stops += 1
    assert stops == 6
    parts = load_file(folders["parts"] / "model.safetensors")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    still = line.replace("--dropout 0.1", "--dropout 0")
    one, other = (
        weights_after(folder, f"{still} {folder} {option}")
        for folder, option in (
            (folders["small"], ""),
            (folders["small"].with_name("other"), "--micro-batch 3"),
        )
    )
    full = weights_after(folders["full"], f"{still} {folders['full']} --anneal-attention 0")
    name = "vocab_embed.embedding"
    assert torch.allclose(one[name], other[name], atol=1e-5)
    assert not torch.allclose(one[name], full[name], atol=1e-5)


def test_two_ranks_that_shard_a_tied_table_train_as_one_process(gpt2, pipeline, tmp_path):
    """Its embedding and its readout add up their gradients, also while attention is annealed."""
    place = f"pretrain --corpus {pipeline.corpus} --size 2x32x2 --adapt {gpt2}"
    line = f"{place} {ANNEALED} --dropout 0 {MACHINE} --output"
    alone = weights_after(tmp_path / "a/teacher", f"{line} {tmp_path}/a/teacher")
    both = tmp_path / "b/teacher"
    found = launch(f"{line} {both}", 2, tmp_path / "log", note_batches, tmp_path, True)
    assert [code for code, _ in found] == [0, 0], found
    for name, value in load_file(both / "model.safetensors").items():
        expected = alone[name]
        if name.endswith("attn_qkv.bias"):  # the softmax cancels that of the keys: no gradient
            value, expected = (bias.view(3, -1)[[0, 2]] for bias in (value, expected))
        assert torch.allclose(value, expected, atol=1e-5), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--size 2x64x2 --adapt {gpt2}", "found size 2x32x2, expected 2x64x2; set network.size"),
        ("--size tiny --anneal-attention 1", "--anneal-attention: found 1 without --adapt"),
        ("--size tiny --architecture gpt2", "--architecture: found gpt2, which follows from"),
        ("--size 2x32x2 --adapt {short}", "its n_positions is 16, but the length of corpus .* 24"),
        ("--size 2x32x2 --adapt {large}", "its vocab_size is 301, but the vocab_size of corpus"),
        ("--size 2x32x2 --adapt {other}", "its tokenizer has other tokens than that of corpus"),
        ("--size 2x32x2 --adapt {bare}", "tokenizer"),
        ("--size small --adapt gpt2", "--adapt gpt2: the download failed .*no route to host"),
    ],
)
def test_refusals_of_gpt2_are_one_line(
    gpt2, pipeline, tmp_path, capsys, monkeypatch, options, sentence
):
    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    tokenizer, places = pipeline.corpus / "tokenizer.json", {"gpt2": gpt2}
    for name, vocabulary, length in (("short", 300, 16), ("large", 301, 24), ("bare", 300, 24)):
        places[name] = tmp_path / name
        if f"{{{name}}}" in options:
            save_gpt2(tmp_path / name, vocabulary, length, None if name == "bare" else tokenizer)
    if "{other}" in options:
        places["other"] = tmp_path / "other"
        save_gpt2(places["other"], 300, 24, tokenizer)
        about = json.loads(tokenizer.read_text())
        tokens = about["model"]["vocab"]
        first, second = list(tokens)[100:102]
        tokens[first], tokens[second] = tokens[second], tokens[first]
        (places["other"] / "tokenizer.json").write_text(json.dumps(about))
    line = f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/t/out {TRAINING} {MACHINE}"
    capsys.readouterr()
    assert call(f"{line} {options.format_map(places)}") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(sentence, error), error
    assert not (tmp_path / "t").exists()

"""Bad input through the real command line: exit code 1, one sentence on stderr, no traceback, nothing written that looks finished."""

import json
import os
import re
import shutil
import stat

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from small import CORPUS, MACHINE, ROUND, TRAINING, call

from halfstep.files import sha256
from halfstep.resolve import ConfigError, resolve


@pytest.fixture
def refused(capsys):
    def run(line: str) -> str:
        capsys.readouterr()
        assert call(line) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said, said
        assert said.startswith(f"halfstep {line.split()[0]}: ") and len(said) < 500, said
        return said

    return run


@pytest.fixture
def copy(pipeline, tmp_path):
    """A folder of the pipeline that may be spoiled."""
    return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def says(sentence: str, said: str) -> None:
    assert re.search(sentence, said), said


def flip(path, at=-9):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def rewrite(folder, change=lambda meta: None):
    """Change meta.json, its checksums made right again: what a wrong tool, not a bad disk, would leave."""
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    meta["sha256"] = {name: sha256(folder / name) for name in meta["sha256"]}
    (folder / "meta.json").write_text(json.dumps(meta))


def edit(folder, change):
    state = load_file(folder / "ema.safetensors")
    change(state)
    save_file(state, folder / "ema.safetensors")
    rewrite(folder)


def cut(folder, name="ema.safetensors"):
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def other_words(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ĠBartholomew"] = len(tokenizer["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rewrite(folder)


CHECKPOINTS = {
    "truncated": (cut, "ema.safetensors: sha256 .*the file is damaged; copy it again, or train again"),
    "truncated, with its own checksum": (lambda f: (cut(f), rewrite(f)), "ema.safetensors: not a complete safetensors file"),
    "flipped bit": (lambda f: flip(f / "ema.safetensors"), "ema.safetensors: sha256 .*the file is damaged"),
    "of another size": (lambda f: rewrite(f, lambda m: m["network"].update(size="mini")), "missing tensors, .*a network of another kind or size"),
    "of no size": (lambda f: rewrite(f, lambda m: m["network"].update(size="tinny")), "meta.json: network.size: found 'tinny': .*did you mean tiny"),
    "wrong vocabulary": (lambda f: rewrite(f, lambda m: m.update(vocab_size=299)), "tokenizer.json has 300 tokens, but vocab_size in meta.json is 299|vocab_size 299, but corpus .* has 300"),
    "wrong tokenizer": (other_words, "tokenizer.json has 301 tokens, but vocab_size in meta.json is 300|its tokenizer has other tokens"),
    "tokenizer changed": (lambda f: flip(f / "tokenizer.json", 100), "tokenizer.json: sha256 .*damaged"),
    "tokenizer missing": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing, but listed in meta.json"),
    "NaN": (lambda f: edit(f, lambda s: s["blocks.1.attn_out.weight"][0].fill_(float("nan"))), "blocks.1.attn_out.weight holds NaN or infinity"),
    "broken meta": (lambda f: (f / "meta.json").write_text('{"format": 1, '), "meta.json: not valid JSON"),
    "meta is a list": (lambda f: (f / "meta.json").write_text("[1]"), r"meta.json: format \[1\], but this halfstep reads format 1"),
    "meta lacks a key": (lambda f: rewrite(f, lambda m: m.pop("length")), "meta.json: length: found nothing, expected int"),
    "meta of no kind": (lambda f: rewrite(f, lambda m: m.update(kind="flow")), "meta.json: kind: found 'flow', allowed are diffusion, autoregressive"),
    "missing": (shutil.rmtree, "not a finished checkpoint, because meta.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_checkpoints(pipeline, copy, refused, tmp_path, fault):
    """Whoever reads a checkpoint: a writer of samples, and a round that makes it its teacher."""
    spoil, sentence = CHECKPOINTS[fault]
    teacher = copy(pipeline.teacher)
    spoil(teacher)
    for line in (
        f"generate --checkpoint {teacher} --output {tmp_path}/out --steps 4 --num-samples 2 {MACHINE}",
        f"distill-round --teacher {teacher} --corpus {pipeline.corpus} --output {tmp_path}/out/round-1 {ROUND}",
    ):
        says(sentence, refused(line))
    assert not list(tmp_path.glob("out/**/*.json"))


def test_token_files(pipeline, copy, refused, tmp_path):
    """A flipped bit among the tokens, a corpus that lacks its tokenizer or its manifest's keys."""
    for number, (spoil, sentence) in enumerate([
        (lambda f: flip(f / "train.bin", 1000), "train.bin: sha256 .*the file was changed or is damaged; run halfstep prepare-corpus again"),
        (lambda f: cut(f, "train.bin"), "train.bin: found .* bytes, expected"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: missing, though the manifest lists it"),
        (lambda f: (f / "manifest.json").write_text("[]"), r"manifest.json: format is \[\], expected 1"),
        (lambda f: (f / "manifest.json").write_text('{"format": 1}'), "manifest.json: has no dtype, eos_id, length"),
    ]):  # fmt: skip
        corpus = shutil.copytree(pipeline.corpus, tmp_path / str(number))
        spoil(corpus)
        for name in ("pretrain", "train-baseline"):
            says(
                sentence,
                refused(
                    f"{name} --corpus {corpus} --output {tmp_path}/out --size tiny {TRAINING} {MACHINE}"
                ),
            )
        says(
            sentence,
            refused(
                f"distill-round --teacher {pipeline.teacher} --corpus {corpus} --output {tmp_path}/out {ROUND}"
            ),
        )
    assert not (tmp_path / "out/meta.json").exists()


def test_a_corpus_with_other_words(pipeline, refused, tmp_path):
    """The same number of tokens, other tokens: neither a round nor a score mistakes one for the other."""
    corpus = tmp_path / "other"
    assert call(f"prepare-corpus --output {corpus} {CORPUS} --corpus-seed 77 --workers 1") == 0
    says(
        "its tokenizer has other tokens",
        refused(
            f"distill-round --teacher {pipeline.teacher} --corpus {corpus} --output {tmp_path}/out {ROUND}"
        ),
    )
    score = f"score-samples --samples {pipeline.samples} --output {tmp_path}/rows.json --judge {pipeline.baseline}/hf {MACHINE}"
    says("samples.*use another vocabulary than the corpus", refused(f"{score} --corpus {corpus}"))
    assert not (tmp_path / "rows.json").exists()


def test_sample_files(pipeline, copy, refused, tmp_path):
    score = f"score-samples --corpus {pipeline.corpus} --judge {pipeline.baseline}/hf --output {tmp_path}/rows.json {MACHINE}"
    for number, (spoil, sentence) in enumerate([
        (lambda f: flip(f / "samples.npy"), "samples.npy: sha256 .*the file has changed; run halfstep generate again"),
        (lambda f: (f / "samples.npy").unlink(), "samples.npy: no such file, though samples.json exists"),
        (lambda f: (f / "samples.json").write_text("{"), "samples.json: not valid JSON"),
        (lambda f: (f / "samples.json").write_text('{"sha256": "0"}'), "samples.json: has no .*run halfstep generate again"),
        (foreign, "token ids from .* to 300, the corpus stories has 0 to 299"),
    ]):  # fmt: skip
        samples = shutil.copytree(pipeline.samples, tmp_path / str(number))
        spoil(samples)
        says(sentence, refused(f"{score} --samples {samples}"))
    assert not (tmp_path / "rows.json").exists()


def foreign(folder):
    """A mask was left, as a wrong sampler would."""
    ids, facts = np.load(folder / "samples.npy"), json.loads((folder / "samples.json").read_text())
    ids[0, 3] = 300
    np.save(folder / "samples.npy", ids)
    (folder / "samples.json").write_text(
        json.dumps(facts | {"sha256": sha256(folder / "samples.npy")})
    )


def test_judges(pipeline, refused, tmp_path):
    score = f"score-corpus --corpus {pipeline.corpus} --output {tmp_path}/rows.json {MACHINE}"
    (tmp_path / "empty").mkdir()
    says(
        "judge: no config.json in .*empty, found nothing there",
        refused(f"{score} --judge {tmp_path}/empty"),
    )
    says("judge: no folder .*train the baseline first", refused(f"{score} --judge {tmp_path}/gone"))
    judge = shutil.copytree(pipeline.baseline / "hf", tmp_path / "cut")
    cut(judge, "model.safetensors")
    says(
        "judge: transformers cannot load .*cut.*make the folder again",
        refused(f"{score} --judge {judge}"),
    )


def test_prompts_and_temperatures(pipeline, refused, tmp_path):
    write = f"generate --checkpoint {pipeline.teacher} --output {tmp_path}/out --num-samples 2 {MACHINE}"
    says(
        "prompt: .* tokens with BOS, but a text of this model has 24; shorten the prompt",
        refused(f"{write} --steps 4 --prompt {'kite' * 40}"),
    )
    says(
        "temperature: found 0.0: input should be greater than 0",
        refused(f"{write} --steps 4 --temperature 0"),
    )
    with pytest.raises(
        ConfigError, match=r"^sampling\.temperature: found 0(\.0)?: input should be greater than 0$"
    ):
        resolve(yaml.safe_load("{preset: ci, sampling: {temperature: 0}}"))
    assert not (tmp_path / "out").exists()


def test_steps_above_the_length(pipeline, refused, tmp_path, capsys):
    """Ancestral sampling takes the paper's 1,024 steps on shorter texts, and says how many passes can do anything; first-hitting has no such steps."""
    write = f"generate --checkpoint {pipeline.teacher} --num-samples 2 {MACHINE}"
    assert call(f"{write} --output {tmp_path}/a --steps 1024") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 1024 steps for texts of 24 tokens: at most 24 steps reveal a token, and the others take no pass"
    ]
    assert json.loads((tmp_path / "a/samples.json").read_text())["network_evaluations"] <= 24
    assert (
        call(f"{write} --output {tmp_path}/b --steps 24") == 0
        and "note" not in capsys.readouterr().err
    )
    assert call(f"{write} --output {tmp_path}/c --steps 24 --sampler first_hitting") == 0
    said = refused(f"{write} --output {tmp_path}/d --steps 25 --sampler first_hitting")
    says(
        "steps: found 25, but sampler first_hitting reveals at least one of the 24 positions in each step; use at most 24 steps",
        said,
    )
    assert not (tmp_path / "d").exists()
    with pytest.raises(
        ConfigError,
        match=r"sampling\.steps: found 128, but sampler first_hitting reveals at least one of the 64 positions .*at most 64",
    ):
        resolve(yaml.safe_load("{preset: ci, sampling: {sampler: first_hitting, steps: [8, 128]}}"))
    assert resolve(yaml.safe_load("{preset: ci, sampling: {steps: [8, 128]}}")).sampling.steps == [
        8,
        128,
    ]


def test_devices(pipeline, refused, tmp_path):
    for device in ("gpu", "cuda:99"):
        said = refused(
            f"generate --checkpoint {pipeline.teacher} --output {tmp_path}/out --steps 4 --device {device}"
        )
        says(f"device: found '{device}', which torch cannot use .*; name cpu, or auto", said)


def test_a_rolling_state_that_was_cut(pipeline, refused, tmp_path):
    (tmp_path / "out/state").mkdir(parents=True)
    (tmp_path / "out/state/state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    said = refused(
        f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/out --size tiny {TRAINING} {MACHINE}"
    )
    says(
        "state.safetensors: not a whole file .*delete the folder .*state to start this training again",
        said,
    )


def commands(pipeline, output):
    return (
        f"pretrain --corpus {pipeline.corpus} --output {output} --size tiny {TRAINING} {MACHINE}",
        f"generate --checkpoint {pipeline.teacher} --output {output} --steps 4 --num-samples 2 --micro-batch 8 --device cpu",
        f"tabulate --table steps --metrics {pipeline.metrics} --output {output}/steps.csv",
        f"prepare-corpus --output {output} {CORPUS} --workers 1",
        f"merge-provenance --results {output}",
    )


def test_an_output_that_is_a_file(pipeline, refused, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        for line in commands(pipeline, output)[:4]:
            capsys.readouterr()
            assert call(line) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            says(
                f"halfstep {line.split()[0]}: {tmp_path}/file.*: .*there is a file|a part of the path is a file",
                last,
            )
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_may_not_be_written(pipeline, tmp_path, capsys, monkeypatch):
    """Root may write everywhere, so it becomes nobody for the call."""
    locked = tmp_path / "locked"
    locked.mkdir()
    for line in commands(pipeline, locked)[:4]:
        call(line)  # whatever is imported late, and read of the pipeline, is open before
    shutil.rmtree(locked)
    locked.mkdir()
    for folder in [
        *[pipeline.root, *pipeline.root.parents][:3],
        tmp_path,
        tmp_path.parent,
        tmp_path.parent.parent,
    ]:
        if folder.stat().st_uid == os.geteuid() and folder.name:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH | stat.S_IXGRP)
    locked.chmod(0o555)
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        for line in commands(pipeline, locked)[:4]:
            capsys.readouterr()
            assert call(line) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            says(
                f"halfstep {line.split()[0]}: {locked}.*: Permission denied; you may not read or write there",
                last,
            )
    finally:
        os.seteuid(before)
        locked.chmod(0o755)
    assert not list(locked.iterdir())

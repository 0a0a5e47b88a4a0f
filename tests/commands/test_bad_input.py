"""Bad input through the real command line.

The exit code is 1, stderr is one sentence without a traceback, and no output looks finished.
"""

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

from halfstep.errors import ConfigError
from halfstep.files import sha256
from halfstep.resolve import resolve


@pytest.fixture
def refused(capsys):
    """refused(line, pattern): the command fails with one sentence that matches the pattern."""

    def run(line: str, pattern: str) -> None:
        capsys.readouterr()
        assert call(line) == 1
        message = capsys.readouterr().err
        assert message.count("\n") == 1, message
        assert "Traceback" not in message, message
        assert message.startswith(f"halfstep {line.split()[0]}: "), message
        assert len(message) < 500, message
        assert re.search(pattern, message), message

    return run


@pytest.fixture
def copy(pipeline, tmp_path):
    """Copies a folder of the pipeline, so that a test may spoil it."""
    return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def flip(path, at=-9):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rewrite(folder, change=lambda meta: None):
    """Change meta.json and correct its checksums, as a wrong tool, not a bad disk, would do."""
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    meta["sha256"] = {name: sha256(folder / name) for name in meta["sha256"]}
    (folder / "meta.json").write_text(json.dumps(meta))


def cut_and_rewrite(folder):
    cut(folder / "ema.safetensors")
    rewrite(folder)


def set_nan(folder):
    state = load_file(folder / "ema.safetensors")
    state["blocks.1.attn_out.weight"][0].fill_(float("nan"))
    save_file(state, folder / "ema.safetensors")
    rewrite(folder)


def add_a_token(folder):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ĠBartholomew"] = len(tokenizer["model"]["vocab"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    rewrite(folder)


def meta(**changes):
    """A function that changes keys of meta.json; a change of None removes the key."""

    def change(meta):
        for key, value in changes.items():
            if value is None:
                meta.pop(key)
            elif isinstance(value, dict):
                meta[key].update(value)
            else:
                meta[key] = value

    return lambda folder: rewrite(folder, change)


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


CHECKPOINTS = {  # fault: (function that spoils the folder, pattern of the message)
    "truncated": (
        lambda folder: cut(folder / "ema.safetensors"),
        "ema.safetensors: sha256 .*the file is damaged; copy it again, or train again",
    ),
    "truncated, with its own checksum": (
        cut_and_rewrite,
        "ema.safetensors: not a complete safetensors file",
    ),
    "flipped bit": (
        lambda folder: flip(folder / "ema.safetensors"),
        "ema.safetensors: sha256 .*the file is damaged",
    ),
    "of another size": (
        meta(network={"size": "mini"}),
        "missing tensors, .*a network of another kind or size",
    ),
    "of no size": (
        meta(network={"size": "tinny"}),
        "meta.json: network.size: found 'tinny': .*did you mean tiny",
    ),
    "wrong vocabulary": (
        meta(vocab_size=299),
        "tokenizer.json has 300 tokens, but vocab_size in meta.json is 299"
        "|vocab_size 299, but corpus .* has 300",
    ),
    "wrong tokenizer": (
        add_a_token,
        "tokenizer.json has 301 tokens, but vocab_size in meta.json is 300"
        "|its tokenizer has other tokens",
    ),
    "tokenizer changed": (
        lambda folder: flip(folder / "tokenizer.json", 100),
        "tokenizer.json: sha256 .*damaged",
    ),
    "tokenizer missing": (
        remove("tokenizer.json"),
        "tokenizer.json: missing, but listed in meta.json",
    ),
    "NaN": (set_nan, "blocks.1.attn_out.weight holds NaN or infinity"),
    "broken meta": (write("meta.json", '{"format": 1, '), "meta.json: not valid JSON"),
    "meta is a list": (
        write("meta.json", "[1]"),
        r"meta.json: format \[1\], but this halfstep reads format 1",
    ),
    "meta lacks a key": (meta(length=None), "length: found nothing, expected a whole number"),
    "meta of no kind": (
        meta(kind="flow"),
        "meta.json: kind: found 'flow', allowed are diffusion, autoregressive",
    ),
    "missing": (shutil.rmtree, "not a finished checkpoint, because there is no such folder"),
}


@pytest.mark.parametrize("fault", CHECKPOINTS)
def test_checkpoints(pipeline, copy, refused, tmp_path, fault):
    """Both readers refuse it: a command that draws samples, and a round with it as the teacher."""
    spoil, pattern = CHECKPOINTS[fault]
    teacher = copy(pipeline.teacher)
    spoil(teacher)
    output = tmp_path / "out"
    refused(
        f"generate --checkpoint {teacher} --output {output} --steps 4 --num-samples 2 {MACHINE}",
        pattern,
    )
    refused(
        f"distill-round --teacher {teacher} --corpus {pipeline.corpus} "
        f"--output {output}/round-1 {ROUND}",
        pattern,
    )
    assert not list(tmp_path.glob("out/**/*.json"))


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (
            lambda folder: flip(folder / "train.bin", 1000),
            "train.bin: sha256 .*the file was changed or is damaged; "
            "run halfstep prepare-corpus again",
        ),
        (lambda folder: cut(folder / "train.bin"), "train.bin: found .* bytes, expected"),
        (remove("tokenizer.json"), "tokenizer.json: missing, though the manifest lists it"),
        (write("manifest.json", "[]"), r"manifest.json: format is \[\], expected 1"),
        (write("manifest.json", '{"format": 1}'), "length: found nothing, expected a whole num"),
    ],
    ids=["flipped bit", "cut", "no tokenizer", "manifest is a list", "manifest lacks keys"],
)
def test_token_files(pipeline, copy, refused, tmp_path, spoil, pattern):
    corpus, output = copy(pipeline.corpus), tmp_path / "out"
    spoil(corpus)
    files = f"--corpus {corpus} --output {output}"
    for name in ("pretrain", "train-baseline"):
        refused(f"{name} {files} --size tiny {TRAINING} {MACHINE}", pattern)
    refused(f"distill-round --teacher {pipeline.teacher} {files} {ROUND}", pattern)
    assert not (output / "meta.json").exists()


def test_a_corpus_with_other_tokens(pipeline, refused, tmp_path):
    """As many tokens, but other ones: neither a round nor a score confuses the two corpora."""
    corpus = tmp_path / "other"
    assert call(f"prepare-corpus --output {corpus} {CORPUS} --corpus-seed 77 --workers 1") == 0
    refused(
        f"distill-round --teacher {pipeline.teacher} --corpus {corpus} "
        f"--output {tmp_path}/out {ROUND}",
        "its tokenizer has other tokens",
    )
    refused(
        f"score-samples --samples {pipeline.samples} --corpus {corpus} "
        f"--judge {pipeline.baseline}/hf --output {tmp_path}/rows.json {MACHINE}",
        "samples.*use another vocabulary than the corpus",
    )
    assert not (tmp_path / "rows.json").exists()


def leave_a_mask(folder):
    """Put the mask among the tokens, as a wrong sampler would."""
    ids, facts = np.load(folder / "samples.npy"), json.loads((folder / "samples.json").read_text())
    ids[0, 3] = 300
    np.save(folder / "samples.npy", ids)
    facts["sha256"] = sha256(folder / "samples.npy")
    (folder / "samples.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (
            lambda folder: flip(folder / "samples.npy"),
            "samples.npy: sha256 .*the file has changed; run halfstep generate again",
        ),
        (remove("samples.npy"), "samples.npy: no such file, though samples.json exists"),
        (write("samples.json", "{"), "samples.json: not valid JSON"),
        (
            write("samples.json", '{"sha256": "0"}'),
            "samples.json: model: found nothing, expected text; run halfstep generate again",
        ),
        (leave_a_mask, "token ids from .* to 300, the corpus stories has 0 to 299"),
    ],
    ids=["flipped bit", "missing", "broken facts", "facts lack keys", "a mask"],
)
def test_sample_files(pipeline, copy, refused, tmp_path, spoil, pattern):
    samples = copy(pipeline.samples)
    spoil(samples)
    refused(
        f"score-samples --samples {samples} --corpus {pipeline.corpus} "
        f"--judge {pipeline.baseline}/hf --output {tmp_path}/rows.json {MACHINE}",
        pattern,
    )
    assert not (tmp_path / "rows.json").exists()


def test_judges(pipeline, refused, tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(pipeline.baseline / "hf", tmp_path / "cut")
    cut(tmp_path / "cut" / "model.safetensors")
    for name, pattern in (
        ("empty", "judge: no config.json in .*empty, found nothing there"),
        ("gone", "judge: no folder .*train the baseline first"),
        ("cut", "judge: transformers cannot load .*cut.*make the folder again"),
    ):
        refused(
            f"score-corpus --corpus {pipeline.corpus} --output {tmp_path}/rows.json "
            f"--judge {tmp_path}/{name} {MACHINE}",
            pattern,
        )


def test_prompts_and_temperatures(pipeline, refused, tmp_path):
    generate = f"generate --checkpoint {pipeline.teacher} --output {tmp_path}/out {MACHINE}"
    refused(
        f"{generate} --num-samples 2 --steps 4 --prompt {'kite' * 40}",
        "prompt: .* tokens with BOS, but a text of this model has 24; shorten the prompt",
    )
    refused(
        f"{generate} --num-samples 2 --steps 4 --temperature 0",
        "temperature: found 0.0: input should be greater than 0",
    )
    assert not (tmp_path / "out").exists()
    pattern = r"^sampling\.temperature: found 0(\.0)?: input should be greater than 0$"
    with pytest.raises(ConfigError, match=pattern):
        resolve(yaml.safe_load("{preset: ci, sampling: {temperature: 0}}"))


def test_more_steps_than_tokens_with_ancestral_sampling(pipeline, tmp_path, capsys):
    """The paper's 1,024 steps are allowed for shorter texts, with a note on the useful passes."""
    generate = f"generate --checkpoint {pipeline.teacher} --num-samples 2 {MACHINE}"
    assert call(f"{generate} --output {tmp_path}/a --steps 1024") == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: 1024 steps for texts of 24 tokens: at most 24 steps reveal a token, "
        "and the others take no pass"
    ]
    assert json.loads((tmp_path / "a/samples.json").read_text())["network_evaluations"] <= 24
    assert call(f"{generate} --output {tmp_path}/b --steps 24") == 0
    assert "note" not in capsys.readouterr().err
    config = yaml.safe_load("{preset: ci, sampling: {steps: [8, 128]}}")
    assert resolve(config).sampling.steps == [8, 128]


def test_more_steps_than_tokens_with_first_hitting(pipeline, refused, tmp_path):
    """Each of its steps reveals a token, so it cannot have more steps than tokens."""
    generate = f"generate --checkpoint {pipeline.teacher} --num-samples 2 {MACHINE}"
    generate += " --sampler first_hitting"
    assert call(f"{generate} --output {tmp_path}/c --steps 24") == 0
    refused(
        f"{generate} --output {tmp_path}/d --steps 25",
        "steps: found 25, but sampler first_hitting takes at most 24 steps to write texts of "
        "24 tokens; lower it, or choose another sampler",
    )
    assert not (tmp_path / "d").exists()
    pattern = (
        r"sampling\.steps: found 256, but sampler first_hitting takes at most 128 steps to write "
        "texts of 128 tokens"
    )
    with pytest.raises(ConfigError, match=pattern):
        resolve(yaml.safe_load("{preset: ci, sampling: {sampler: first_hitting, steps: [8, 256]}}"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_devices(pipeline, refused, tmp_path, device):
    refused(
        f"generate --checkpoint {pipeline.teacher} --output {tmp_path}/out --steps 4 "
        f"--device {device}",
        f"device: found '{device}', which torch cannot use .*; name cpu, or auto",
    )


def test_a_rolling_state_that_was_cut(pipeline, refused, tmp_path):
    (tmp_path / "out/state").mkdir(parents=True)
    (tmp_path / "out/state/state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    refused(
        f"pretrain --corpus {pipeline.corpus} --output {tmp_path}/out --size tiny "
        f"{TRAINING} {MACHINE}",
        "state.safetensors: not a whole file .*delete the folder .*state to start this training "
        "again",
    )


def commands(pipeline, output) -> list[str]:
    """Commands that write to `output`."""
    machine = "--micro-batch 8 --device cpu"
    return [
        f"pretrain --corpus {pipeline.corpus} --output {output} --size tiny {TRAINING} {MACHINE}",
        f"generate --checkpoint {pipeline.teacher} --output {output} --steps 4 --num-samples 2 "
        f"{machine}",
        f"tabulate --table steps --metrics {pipeline.metrics} --output {output}/steps.csv",
        f"prepare-corpus --output {output} {CORPUS} --workers 1",
    ]


def assert_fails(line, capsys, pattern) -> None:
    """The command fails and the last line on stderr matches; a progress bar may come before it."""
    capsys.readouterr()
    assert call(line) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(pattern, last), last


def test_an_output_that_is_a_file(pipeline, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        for line in commands(pipeline, output):
            prefix = f"halfstep {line.split()[0]}: {tmp_path}/file.*: "
            pattern = f"{prefix}.*there is a file|a part of the path is a file"
            assert_fails(line, capsys, pattern)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_may_not_be_written(pipeline, tmp_path, capsys):
    """Root may write everywhere, so the process becomes nobody for the call."""
    locked = tmp_path / "locked"
    locked.mkdir()
    for line in commands(pipeline, locked):
        call(line)  # so that everything that is imported or read later is open already
    shutil.rmtree(locked)
    locked.mkdir()
    roots = [*[pipeline.root, *pipeline.root.parents][:4], tmp_path, *tmp_path.parents]
    for folder in roots[:8]:  # under `pytest -n` the folders are one level deeper
        if folder.stat().st_uid == os.geteuid() and folder.name:
            folder.chmod(folder.stat().st_mode | stat.S_IXOTH | stat.S_IROTH | stat.S_IXGRP)
    locked.chmod(0o555)
    before = os.geteuid()
    try:
        if before == 0:
            os.seteuid(65534)
        for line in commands(pipeline, locked):
            prefix = f"halfstep {line.split()[0]}: {locked}.*: "
            pattern = f"{prefix}Permission denied; you may not read or write there"
            assert_fails(line, capsys, pattern)
    finally:
        os.seteuid(before)
        locked.chmod(0o755)
    assert not list(locked.iterdir())

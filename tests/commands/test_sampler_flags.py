"""Samplers that ask the network or a scorer, from the command line to samples.json and back."""

import json
import re
import shutil

import numpy as np
import pytest
from small import MACHINE

import halfstep
from halfstep.cli import main
from halfstep.commands.writers import encode_prompt
from halfstep.files import read_json, sha256

OPTIONS = {  # sampler: its flags, and what samples.json calls it
    "threshold": ("--threshold 0.02", "threshold(threshold=0.02)"),
    "entropy_bounded": ("--entropy-bound 20", "entropy_bounded(entropy_bound=20.0)"),
    "remask": ("--eta 0.3", "remask(remasking=cap, eta=0.3, by_confidence=False)"),
    "energy": ("--candidates 2", "energy(candidates=2, scored=1.0)"),
    "speculative": (
        "--draft-tokens 3",
        "speculative(draft_tokens=3, draft_passes=1, relaxation=0.0)",
    ),
}
ASKING = ("energy", "speculative")
OTHER = {  # another value of an option
    "threshold": "--threshold 0.5",
    "entropy_bounded": "--entropy-bound 1",
    "remask": "--eta 0.5",
    "energy": "--candidates 3",
    "speculative": "--relaxation 0.5",
}
PROMPT, FRAME = "Tom was", "Tom<|mask|> was<|mask|> a"


@pytest.fixture(scope="module")
def student(pipeline):
    return halfstep.load(pipeline.student, device="cpu")


@pytest.fixture
def generate(pipeline, capsys):
    """(sampler, *flags) -> exit code, standard output, standard error."""

    def run(sampler, *flags):
        scorer = ["--scorer", str(pipeline.baseline)] if sampler in ASKING else []
        line = ["generate", "--checkpoint", str(pipeline.student), "--sampler", sampler, *scorer]
        capsys.readouterr()
        code = main([*line, *MACHINE.split(), *flags])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("sampler", OPTIONS)
def test_samples_say_how_they_were_drawn(pipeline, generate, tmp_path, sampler):
    """They are kept when they are asked for again, and drawn again with another option."""
    flags, name = OPTIONS[sampler]
    output = ["--num-samples", "3", "--output", str(tmp_path / "x")]
    assert generate(sampler, *flags.split(), *output)[0] == 0
    about, ids = read_json(tmp_path / "x/samples.json"), np.load(tmp_path / "x/samples.npy")
    assert about["sampler"] == name and ids.shape == (3, 24) and ids.max() < 300
    own_pace = sampler in ("threshold", "entropy_bounded", "speculative")
    assert about["steps"] == (24 if own_pace else 8)
    assert 0 < about["network_evaluations"] <= about["steps"]
    if sampler in ASKING:
        assert about["scorer"] == halfstep.load(pipeline.baseline, "cpu").sha256
        assert about["autoregressive_passes"] > 0
    else:
        assert not {"scorer", "autoregressive_passes"} & about.keys()
    assert "kept, all 3 texts" in generate(sampler, *flags.split(), *output)[2]
    assert "kept" not in generate(sampler, *OTHER[sampler].split(), *output)[2]
    assert read_json(tmp_path / "x/samples.json")["sampler"] != name


@pytest.mark.parametrize(
    ("sampler", "prompt"),
    [(name, text) for name in OPTIONS for text in (PROMPT, FRAME)][:-1],  # see the faults
)
def test_given_tokens_stay(student, generate, tmp_path, sampler, prompt):
    output = ["--num-samples", "2", "--output", str(tmp_path), "--prompt", prompt]
    assert generate(sampler, *output)[0] == 0
    given = encode_prompt(student, prompt)
    ids, kept = np.load(tmp_path / "samples.npy")[:, : len(given)], given != student.mask_id
    assert (ids[:, kept] == given[kept].numpy()).all() and ids.max() < student.mask_id


@pytest.mark.parametrize("sampler", OPTIONS)
def test_printed_texts_say_what_they_took(generate, tmp_path, sampler):
    """Those of a sampler whose passes do not follow from its steps, and of one with a scorer."""
    number = ("--num-samples", "3")
    code, out, err = generate(sampler, *number)
    assert code == 0 and out.count("=== ") == 3
    found = re.findall(
        r"^([\d.]+) network evaluations a text \(([\d.]+) tokens each\)"
        r"(?:, ([\d.]+) passes of the autoregressive model)?$",
        err,
        re.MULTILINE,
    )
    if sampler == "remask":
        assert not found
        return
    ((evaluations, tokens, passes),) = found
    generate(sampler, *number, "--output", str(tmp_path))
    about = read_json(tmp_path / "samples.json")
    assert float(evaluations) == pytest.approx(about["network_evaluations"], abs=0.051)
    assert float(tokens) == pytest.approx(24 / about["network_evaluations"], abs=0.051)
    assert bool(passes) == (sampler in ASKING)
    if passes:
        assert float(passes) == pytest.approx(about["autoregressive_passes"], abs=0.051)


def test_other_samplers_say_nothing(generate):
    assert "evaluations" not in generate("ancestral")[2]


@pytest.mark.parametrize("sampler", OPTIONS)
def test_every_sampler_can_be_watched(generate, sampler):
    """Each pass is one line, and the text at the end is the one that is printed without it."""
    plain = generate(sampler)[1]
    code, out, _ = generate(sampler, "--watch")
    lines = [line for line in out.splitlines() if re.match(r"step \d+ of \d+ \| ", line)]
    assert code == 0 and lines and out.endswith(plain)
    assert re.search(r"\| (\d+) of \1 tokens", lines[-1])


def other_tokenizer(baseline, folder):
    """A copy of the baseline whose tokenizer numbers two tokens the other way round."""
    copy = shutil.copytree(baseline, folder / "baseline")
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    before = sha256(file)
    file.write_text(json.dumps(tokenizer))
    meta = copy / "meta.json"
    meta.write_text(meta.read_text().replace(before, sha256(file)))
    return copy


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--sampler energy", "scorer: found none, but sampler energy asks an autoregressive model"),
        ("--sampler energy --scorer {student}", "scorer: found .*, a diffusion model, but"),
        ("--sampler energy --scorer {other}", "scorer: found .* with a vocabulary of 300 tokens"),
        ("--sampler energy --scorer {root}/no", "no: not a finished checkpoint"),
        ("--sampler ancestral --threshold 0.5", "threshold: found 0.5, but sampler ancestral has"),
        ("--sampler ancestral --scorer {baseline}", "scorer: found .*, but sampler ancestral has"),
        ("--sampler threshold --threshold 1.5", "threshold: .*1.5.*less than or equal to 1"),
        ("--sampler remask --eta 2", "eta: .*2.*less than or equal to 1"),
        ("--sampler energy --scorer {baseline} --candidates 0", "candidates: .*greater than 0"),
        (
            "--sampler speculative --scorer {baseline} --prompt Tom<|mask|>.",
            "sampler speculative continues texts from left to right",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(pipeline, tmp_path, capsys, line, sentence):
    """Nothing is written."""
    other = other_tokenizer(pipeline.baseline, tmp_path) if "{other}" in line else None
    words = line.format(other=other, **vars(pipeline)).split()
    output = tmp_path / "x"
    call = ["generate", "--checkpoint", str(pipeline.student), "--output", str(output), *words]
    assert main([*call, *MACHINE.split()]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err and re.search(sentence, err), err
    assert not (output / "samples.json").exists()

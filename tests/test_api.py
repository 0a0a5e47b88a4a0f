"""The public API: `load` and `generate`, and one sentence for everything they cannot do."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from small import MACHINE, done

import halfstep
from halfstep import HalfstepError
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import SAMPLERS, sample


@pytest.fixture(scope="module")
def student(pipeline):
    return halfstep.load(pipeline.student, device="cpu")


@pytest.fixture(scope="module")
def attentive(pipeline):
    """A student whose predictions depend on the whole text, which two training steps do not do."""
    model, generator = halfstep.load(pipeline.student, device="cpu"), torch.Generator()
    with torch.no_grad():
        for block in model.network.blocks:
            block.adaLN_modulation.bias.fill_(1)
        model.network.output_layer.linear.weight.normal_(generator=generator.manual_seed(0))
    return model


@pytest.fixture(scope="module")
def baseline(pipeline):
    return halfstep.load(pipeline.baseline, device="cpu")


def test_names_and_defaults():
    assert set(halfstep.__all__) == {"HalfstepError", "generate", "load"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", halfstep.__version__)
    load, generate = (inspect.signature(f).parameters for f in (halfstep.load, halfstep.generate))
    defaults = {name: p.default for name, p in load.items()}
    assert defaults.pop("path") is inspect.Parameter.empty
    assert defaults == {"device": "auto", "weights": "ema", "precision": "float32"}
    by_name = [name for name, p in generate.items() if p.kind is p.KEYWORD_ONLY]
    assert by_name == [
        *("sampler", "sampler_options", "scorer", "temperature", "top_p", "micro_batch")
    ]
    assert [p.default for p in generate.values()][1:5] == [None, 1, "", 1]
    assert all(p.kind is not p.VAR_KEYWORD for p in generate.values())


def test_auto_is_the_first_gpu_or_the_cpu(pipeline):
    expected = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert str(halfstep.load(pipeline.student).device) == expected


def test_repr_is_short_and_has_no_weights(student, baseline, pipeline):
    parameters = sum(p.numel() for p in student.network.parameters())
    assert repr(student) == (
        f"Model(diffusion, size tiny ({parameters / 1e6:.1f}M parameters), vocabulary 300, "
        "length 24, round 1, 8 steps, on cpu)"
    )
    assert repr(baseline).startswith("Model(autoregressive, size tiny (")
    assert "round 0" in repr(halfstep.load(pipeline.teacher))
    assert all(len(repr(model)) < 120 for model in (student, baseline))


@pytest.mark.parametrize("kind", ["student", "baseline"])
def test_texts_are_those_of_the_command(pipeline, kind, tmp_path):
    """Text i of a seed is the same whatever num_samples and micro_batch, and as in the files."""
    folder = getattr(pipeline, kind)
    model = halfstep.load(folder, "cpu")
    steps = {} if kind == "baseline" else {"steps": 4}
    options = steps | {"prompt": "Tom", "seed": 3, "temperature": 0.8}
    texts = halfstep.generate(model, num_samples=5, **options)
    same = halfstep.generate(model, num_samples=3, micro_batch=2, **options)
    assert len(set(texts)) == 5 and same == texts[:3] and all(t.startswith("Tom") for t in texts)
    flags = "--steps 4 --num-samples 5 --prompt Tom --sampling-seed 3 --temperature 0.8"
    done(f"generate --checkpoint {folder} --output {tmp_path} {flags} {MACHINE}")
    ids = np.load(tmp_path / "samples.npy").tolist()
    assert model.tokenizer.decode_batch(ids, skip_special_tokens=True) == texts
    weights = json.loads((tmp_path / "samples.json").read_text())["checkpoint"]
    assert weights == model.sha256


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Tom was"},
        {"prompt": "Tom<|mask|><|mask|> was"},
        {"seed": 2},
        {"sampler": "block"},
        {"sampler": "first_hitting"},
        {"sampler": "ancestral_float32"},
        {"sampler": "threshold"},
        {"sampler": "entropy_bounded", "sampler_options": {"entropy_bound": 1.0}},
        {"sampler": "remask", "sampler_options": {"eta": 0.5}},
        {"temperature": 0.5},
    ],
    ids=str,
)
def test_an_option_changes_the_texts(attentive, change):
    assert halfstep.generate(attentive, num_samples=4) != halfstep.generate(
        attentive, num_samples=4, **change
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_text_does_not_depend_on_its_batch(attentive, baseline, sampler):
    """`micro_batch` is a matter of speed: also where texts of a batch end at different times."""
    options = {"sampler": sampler, "num_samples": 6, "steps": 12, "seed": 5}
    options |= {"scorer": baseline} if sampler in ("energy", "speculative") else {}
    if sampler == "speculative":
        options |= {"sampler_options": {"draft_tokens": 5, "draft_passes": 2}}
    texts = halfstep.generate(attentive, **options)
    assert len(set(texts)) > 3
    assert texts == halfstep.generate(attentive, **options, micro_batch=1)
    assert texts == halfstep.generate(attentive, **options, micro_batch=4)


def test_every_option_reaches_the_sampler(student, monkeypatch):
    """The network of this test is hardly trained, so not every option shows in its texts."""
    calls = []

    def spy(*arguments, **options):
        calls.append((arguments[1:], options))
        return sample(*arguments, **options)

    monkeypatch.setattr("halfstep.commands.writers.sample", spy)
    halfstep.generate(
        student, 5, 3, "Tom", 7, sampler="first_hitting", temperature=0.5, micro_batch=2
    )
    assert [arguments for arguments, _ in calls] == [(2, 24, 5), (1, 24, 5)]
    assert {options["sampler"] for _, options in calls} == {"first_hitting"}
    assert [options["draws"] for _, options in calls] == [Draws(7, 0, 0.5), Draws(7, 2, 0.5)]


@pytest.mark.parametrize(
    ("sampler", "steps"), [("threshold", 24), ("remask", 8), ("energy", 8), ("speculative", 24)]
)
def test_a_sampler_has_its_options_its_scorer_and_its_steps(
    student, baseline, monkeypatch, sampler, steps
):
    """`threshold` and `speculative` may take a step for each token where no step count is named."""
    calls = []

    def spy(*arguments, **options):
        calls.append((arguments[3], options))
        return sample(*arguments, **options)

    monkeypatch.setattr("halfstep.commands.writers.sample", spy)
    asked = {"scorer": baseline} if sampler in ("energy", "speculative") else {}
    own = {"threshold": {"threshold": 0.5}, "energy": {"candidates": 2}}.get(sampler, {})
    halfstep.generate(student, sampler=sampler, sampler_options=own, **asked)
    ((found, options),) = calls
    assert found == steps and own.items() <= options.items()
    assert ("scorer" in options) == bool(asked)


def test_the_scorer_writes_the_law_of_its_model(student, baseline, pipeline):
    """A loaded model and the checkpoint folder that the command takes give the same texts."""
    options = {"num_samples": 3, "prompt": "Tom", "sampler": "speculative"}
    texts = halfstep.generate(student, scorer=baseline, **options)
    raw = halfstep.load(pipeline.baseline, "cpu", "raw")
    assert texts != halfstep.generate(student, scorer=raw, **options)
    assert texts == halfstep.generate(student, scorer=baseline, **options)


def test_the_weights_and_the_nucleus_change_the_texts(pipeline, baseline):
    raw, ema = (halfstep.load(pipeline.baseline, "cpu", name) for name in ("raw", "ema"))
    assert raw.sha256 != ema.sha256 == baseline.sha256
    texts = halfstep.generate(baseline, num_samples=4)
    assert texts != halfstep.generate(baseline, num_samples=4, top_p=0.1)


FAULTS = {  # arguments: sentence
    "no texts": ({"num_samples": 0}, "num_samples: found 0: input should be greater than 0"),
    "half a text": ({"num_samples": 1.5}, r"num_samples: found 1\.5: input should be a valid int"),
    "no steps": ({"steps": 0}, "steps: found 0, expected a whole number above zero"),
    "half a step": ({"steps": 2.5}, r"steps: found 2\.5, expected a whole number above zero"),
    "too many steps": (
        {"steps": 25, "sampler": "first_hitting"},
        "steps: found 25, but sampler first_hitting takes at most 24 steps",
    ),
    "sampler": (
        {"sampler": "ancestrall"},
        "sampler: found 'ancestrall': allowed are 'ancestral', .*; did you mean ancestral",
    ),
    "cold": ({"temperature": 0}, r"temperature: found 0(\.0)?: input should be greater than 0"),
    "nucleus": ({"top_p": 0.9}, "top_p: found 0.9, but only an autoregressive model draws from"),
    "seed": ({"seed": -1}, "^seed: found -1: input should be greater than or equal to 0"),
    "batch": ({"micro_batch": 0}, "micro_batch: found 0: input should be greater than 0"),
    "option of no sampler": (
        {"sampler": "threshold", "sampler_options": {"temperature": 2}},
        "sampler_options: found 'temperature', expected some of by_confidence, .*; leave it out",
    ),
    "option of another sampler": (
        {"sampler_options": {"threshold": 0.8}},
        "threshold: found 0.8, but sampler ancestral has no such option, it is one of threshold",
    ),
    "option out of range": (
        {"sampler": "threshold", "sampler_options": {"threshold": 2}},
        "threshold: found 2: input should be less than or equal to 1",
    ),
    "no options": ({"sampler_options": [0.8]}, r"sampler_options: found \[0.8\], expected names"),
    "no scorer": (
        {"sampler": "energy"},
        "scorer: found none, but sampler energy asks an autoregressive model",
    ),
    "a folder as scorer": (
        {"sampler": "energy", "scorer": "baseline"},
        "scorer: found 'baseline', expected an autoregressive model; load it",
    ),
    "long prompt": ({"prompt": "kite " * 40}, "prompt: .* has 24; shorten the prompt"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_diffusion_model_cannot_do(student, fault):
    arguments, sentence = FAULTS[fault]
    with pytest.raises(HalfstepError, match=sentence) as error:
        halfstep.generate(student, **arguments)
    assert "\n" not in str(error.value)


def test_a_scorer_fits_its_model_and_its_sampler(student, baseline, pipeline):
    low = halfstep.load(pipeline.baseline, "cpu", precision="bfloat16")
    for scorer, sampler, sentence in (
        (student, "energy", "scorer: found a model, a diffusion model, but sampler energy asks"),
        (baseline, "threshold", "scorer: found a model, but sampler threshold asks none; leave"),
        (
            low,
            "energy",
            "scorer: .* on cpu in bfloat16, but the diffusion model is on cpu in float",
        ),
    ):
        with pytest.raises(HalfstepError, match=sentence) as error:
            halfstep.generate(student, sampler=sampler, scorer=scorer)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sampler_options": {}}, "^sampler_options: found {}, but .* has no sampler"),
        ({"steps": 16}, "^steps: found 16, but .* takes one step per token; leave it out"),
        ({"steps": 8}, "^steps: found 8, but .* takes one step per token; leave it out"),
        ({"sampler": "ancestral"}, "^sampler: found .ancestral., but an autoregressive model"),
        ({"sampler": "block"}, "^sampler: found 'block', but an autoregressive model has no"),
        ({"top_p": 0}, "top_p: found 0.*: input should be greater than 0"),
        ({"top_p": 1.5}, "top_p: found 1.5: input should be less than or equal to 1"),
        ({"prompt": "Tom<|mask|>"}, "prompt: .*an autoregressive model cannot fill"),
    ],
)
def test_what_an_autoregressive_model_cannot_do(baseline, arguments, sentence):
    with pytest.raises(HalfstepError, match=sentence) as error:
        halfstep.generate(baseline, **arguments)
    assert "\n" not in str(error.value)


def test_no_argument_is_swallowed(student):
    for unknown in ({"weights": "raw"}, {"draw_dtype": "float64"}):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            halfstep.generate(student, **unknown)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"path": "nowhere"},
            "^nowhere: not a finished checkpoint, because there is no such folder",
        ),
        ({"device": "gpu"}, "device: found 'gpu', which torch cannot use"),
        ({"device": "cuda:99"}, "device: found 'cuda:99', which torch cannot use"),
        ({"weights": "mean"}, "weights: found 'mean', allowed are raw, ema, best"),
        ({"precision": "half"}, "precision: found 'half', allowed are float32, bfloat16"),
    ],
)
def test_what_cannot_be_loaded(pipeline, arguments, sentence):
    with pytest.raises(HalfstepError, match=sentence) as error:
        halfstep.load(**{"path": pipeline.student, **arguments})
    assert "\n" not in str(error.value)

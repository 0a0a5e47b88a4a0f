"""Exported models are good citizens of transformers: each property against halfstep or by itself.

The weights are random and large enough that attention, time and every norm have an effect.
"""

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
import safetensors.torch
import torch
from small import call, done
from tokenizers import Tokenizer
from torch import nn

import halfstep
from halfstep.checkpoint import build_network, save_checkpoint
from halfstep.commands import export_model
from halfstep.commands.export_model import TOLERANCE, with_mask_token
from halfstep.commands.import_weights import without_mask_token
from halfstep.data.tokenizer import train_bpe
from halfstep.files import read_json
from halfstep.metrics.protocols import PROTOCOLS

BATCH, LENGTH = 3, 12


def write_checkpoint(source, folder, weights, **network):
    """A checkpoint like `source`, with other weights: weights(name, parameter) fills them."""
    meta = json.loads((source / "meta.json").read_text())
    meta["network"] |= network
    torch.manual_seed(0)
    new = build_network(meta)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            weights(name, parameter)
    state = new.state_dict()
    tensors = {"model.safetensors": state, "ema.safetensors": state}
    meta.pop("sha256")
    save_checkpoint(folder, tensors, meta, source / "tokenizer.json")
    return folder


def normal(name, parameter):
    parameter.normal_(std=0.1)


def like_trained(name, parameter):
    """Sharp attention, and log-probabilities of about -30, as in the weights of a long training."""
    parameter.normal_(std=1.0 if "attn_qkv" in name else 0.15)


@pytest.fixture(scope="module")
def export(pipeline, tmp_path_factory):
    """Checkpoint and export of random weights, and a function that loads the export."""
    from halfstep.exported.modeling_halfstep import HalfstepForMaskedLM

    root = tmp_path_factory.mktemp("export")
    checkpoint = write_checkpoint(pipeline.teacher, root / "m/teacher", normal)
    folder = root / "exported"
    done(f"export --checkpoint {checkpoint} --output {folder}")

    def load(**options):
        return HalfstepForMaskedLM.from_pretrained(folder, **options).eval()

    ours = halfstep.load(checkpoint)
    return SimpleNamespace(checkpoint=checkpoint, folder=folder, load=load, ours=ours, model=load())


def texts(model, rows=BATCH, length=LENGTH, share=0.5):
    """Random ids of which about `share` are masked, the first of each row among them."""
    generator = torch.Generator().manual_seed(length)
    mask = model.config.mask_token_id
    x = torch.randint(0, mask, (rows, length), generator=generator)
    hidden = torch.rand(x.shape, generator=generator) < share
    hidden[:, 0] = True
    return x.masked_fill(hidden, mask)


def clean(model, x):
    """The text of which x shows the visible tokens."""
    mask = model.config.mask_token_id
    return torch.where(x == mask, torch.arange(x.shape[1]) % mask, x)


def assert_same(found, expected, tolerance=TOLERANCE):
    """Equal log-probabilities, up to a share of the largest."""
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite())
    largest = expected[finite].abs().max()
    assert (found[finite] - expected[finite]).abs().max() <= tolerance * largest


# Precision


@pytest.mark.parametrize("weights", [normal, like_trained])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_log_p_is_that_of_halfstep(weights, implementation, pipeline, tmp_path):
    """Within the bound that the card states, also for weights as they are after a long training."""
    from halfstep.exported.modeling_halfstep import HalfstepForMaskedLM

    checkpoint = write_checkpoint(pipeline.teacher, tmp_path / "m/teacher", weights)
    done(f"export --checkpoint {checkpoint} --output {tmp_path / 'exported'}")
    assert f"at most {TOLERANCE:g} times" in (tmp_path / "exported/README.md").read_text()
    theirs = HalfstepForMaskedLM.from_pretrained(
        tmp_path / "exported", attn_implementation=implementation
    ).eval()
    ours = halfstep.load(checkpoint).denoiser
    x = texts(theirs, 8, 24)
    masked = x == ours.mask_id
    expected = ours.log_p(ours.features(x, torch.full((8,), 0.5))[masked])
    if weights is like_trained:
        assert expected.min() < -15
    with torch.no_grad():
        assert_same(theirs(x).logits[masked][:, :-1], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["from_pretrained", "to"])
def test_half_precision(dtype, way, export):
    """Forward, backward and sampling; the angles of the rotary embedding are not rounded."""
    model = export.load(dtype=dtype) if way == "from_pretrained" else export.load().to(dtype)
    assert model.dtype == dtype
    x = texts(model)
    output = model(x, labels=clean(model, x))
    assert output.logits.dtype == torch.float32
    with torch.no_grad():
        assert_same(output.logits, export.model(x).logits, 4 * torch.finfo(dtype).eps)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.sample(num_samples=2, steps=2).max() < model.config.mask_token_id
    exact = export.model.backbone.rotary_emb.inv_freq
    assert torch.equal(model.float().backbone.rotary_emb.inv_freq, exact)


def test_autocast(export):
    x = texts(export.model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = export.model(x).logits
    assert_same(found, export.model(x).logits, 4 * torch.finfo(torch.bfloat16).eps)


# The attention mask

KINDS = {
    "int64": lambda mask: mask.long(),
    "int32": lambda mask: mask.int(),
    "bool": lambda mask: mask,
    "float32": lambda mask: mask.float(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_padded_row_is_the_row_alone(kind, side, implementation, export):
    model = export.load(attn_implementation=implementation)
    rows = [texts(model, 1, length)[0] for length in (5, 9, 16)]
    x = torch.full((3, 16), model.config.pad_token_id)
    mask = torch.zeros(x.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        free = 16 - len(row)
        first = {"left": free, "right": 0, "both": free // 2}[side]
        x[i, first : first + len(row)] = row
        mask[i, first : first + len(row)] = True
    with torch.no_grad():
        padded = model(x, attention_mask=KINDS[kind](mask)).logits
        for i, row in enumerate(rows):
            assert_same(padded[i][mask[i]], model(row[None]).logits[0])


def test_padding_has_no_effect_whatever_it_is(export):
    """The same bits with any ids as padding; without the mask they differ."""
    x, mask = texts(export.model), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[:, -4:] = 0
    other = x.clone()
    other[:, -4:] = (x[:, -4:] + 7) % export.model.config.mask_token_id
    with torch.no_grad():
        first, second = (export.model(y, attention_mask=mask).logits[:, :-4] for y in (x, other))
        assert torch.equal(first, second)
        assert not torch.equal(export.model(x).logits[:, :-4], first)


def test_a_mask_of_ones_changes_no_bit_and_an_empty_row_is_not_nan(export):
    x = texts(export.model)
    ones = torch.ones_like(x)
    with torch.no_grad():
        expected = export.model(x).logits
        assert torch.equal(export.model(x, attention_mask=ones).logits, expected)
        ones[0] = 0
        for implementation in ("sdpa", "eager"):
            found = export.load(attn_implementation=implementation)(x, attention_mask=ones).logits
            assert not found.isnan().any()
            assert_same(found[1:], expected[1:])


def test_prompts_of_several_lengths_are_filled_in_together(export):
    """sample() of a padded batch keeps the given tokens and writes the masked ones."""
    mask = export.model.config.mask_token_id
    x = torch.tensor([[5, mask, 7, 0, 0], [5, 6, mask, mask, 9]])
    attention_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    filled = export.model.sample(steps=3, input_ids=x, attention_mask=attention_mask)
    assert torch.equal(filled[x != mask], x[x != mask])
    assert filled.max() < mask
    assert (x == mask).sum() == 3  # the argument is not changed


# The time


@pytest.mark.parametrize("schedule", export_model.EXPORTED_SCHEDULES)
def test_a_time_conditioned_network(schedule, pipeline, tmp_path):
    """With t it is ours; without, t is the time with the row's share of masked tokens."""
    from halfstep.exported.modeling_halfstep import HalfstepForMaskedLM

    options = {"time_conditioning": True, "schedule": schedule}
    checkpoint = write_checkpoint(pipeline.teacher, tmp_path / "m/teacher", normal, **options)
    done(f"export --checkpoint {checkpoint} --output {tmp_path / 'exported'}")
    theirs = HalfstepForMaskedLM.from_pretrained(tmp_path / "exported").eval()
    ours = halfstep.load(checkpoint).denoiser
    x = texts(theirs)
    masked = x == ours.mask_id
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        assert_same(theirs(x, t=t).logits[masked][:, :-1], ours.log_p(ours.features(x, t)[masked]))
        share = masked.double().mean(-1)
        grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        nearest = (1 - ours.schedule.alpha(grid) - share[:, None]).abs().argmin(-1)
        found, expected = theirs(x).logits, theirs(x, t=grid[nearest].float()).logits
        assert_same(found, expected, 1e-3)
        assert not torch.equal(found, theirs(x, t=t).logits)
        padded = torch.cat([x, torch.zeros_like(x)], -1)
        mask = torch.cat([torch.ones_like(x), torch.zeros_like(x)], -1)
        assert_same(theirs(padded, attention_mask=mask).logits[:, :LENGTH], found)


@pytest.mark.parametrize("time_conditioning", [False, True])
def test_it_compiles_to_one_graph(time_conditioning, export):
    """No argument check or default time needs the values of a tensor while torch.compile traces."""
    config = copy.deepcopy(export.model.config)
    config.time_conditioning = time_conditioning
    model = type(export.model)(config).eval()
    model.load_state_dict(export.model.state_dict())
    x, mask = texts(model), torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(x, attention_mask=mask).logits, model(x, attention_mask=mask).logits)


# Tokens


def test_special_tokens_are_set_in_configuration_and_tokenizer(export):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(export.folder)
    config = export.model.config
    ids = {"bos": export.ours.eos_id, "eos": export.ours.eos_id, "pad": export.ours.eos_id}
    for name, number in {**ids, "mask": export.ours.mask_id}.items():
        assert getattr(config, f"{name}_token_id") == number
        assert getattr(tokenizer, f"{name}_token_id") == number
    assert len(tokenizer) == config.vocab_size
    batch = tokenizer(["Mia", "the <|mask|> was here"], padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (batch["input_ids"] == config.mask_token_id).sum() == 1
    plain = export.ours.tokenizer
    assert batch["input_ids"][1].tolist() == [
        *plain.encode("the").ids,
        config.mask_token_id,
        *plain.encode(" was here").ids,
    ]


HOLES = {"a hole in the ids": 7, "no hole": 0}


@pytest.mark.parametrize("holes", HOLES)
def test_the_mask_token_has_its_id(holes):
    """Vocabularies with holes, with a token of the mask's name, with settings that add tokens."""
    about = json.loads(train_bpe(["the cat sat on the mat <|mask|>"], 270).to_str())
    vocabulary = about["model"]["vocab"]
    mask_id = max(vocabulary.values()) + 2 + HOLES[holes]
    vocabulary["<|mask|>"] = mask_id - 1
    about["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    eos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    about["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, eos],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    tokenizer = Tokenizer.from_str(json.dumps(about))
    text, mask = with_mask_token(tokenizer, mask_id)
    exported = Tokenizer.from_str(text)
    assert exported.token_to_id(mask["content"]) == mask_id
    assert exported.id_to_token(mask_id - 1) == "<|mask|>"
    sentence = "the cat sat on the mat"
    plain = Tokenizer.from_str(json.dumps(about | {"truncation": None, "post_processor": None}))
    assert exported.encode(sentence).ids == plain.encode(sentence).ids
    assert exported.encode(f"cat {mask['content']} sat").ids.count(mask_id) == 1
    assert without_mask_token(exported, mask_id).to_str() == plain.to_str()
    assert without_mask_token(plain, mask_id - 1).get_vocab() == plain.get_vocab()


# The interface of transformers

ALONE = """
import sys; sys.modules["halfstep"] = None
import json, torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer, pipeline
folder, saved = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
code_before = [name for name in sys.modules if "modeling_halfstep" in name]
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
again = AutoTokenizer.from_pretrained(folder, config=model.config)
backbone = AutoModel.from_pretrained(folder, trust_remote_code=True)
x = torch.full((2, 9), tokenizer.mask_token_id)
fill = pipeline("fill-mask", model=folder, trust_remote_code=True)
answers = fill(["Mia and the <|mask|> was", "a <|mask|> here"], batch_size=2, top_k=3)
model.save_pretrained(saved); tokenizer.save_pretrained(saved)
loaded, info = AutoModelForMaskedLM.from_pretrained(
    saved, trust_remote_code=True, output_loading_info=True)
print(json.dumps({
    "code_before": code_before,
    "tokens": [tokenizer.mask_token_id, again.mask_token_id, tokenizer.pad_token_id],
    "backbone": type(backbone).__name__,
    "same_features": torch.equal(
        backbone(x).last_hidden_state, model.backbone(x).last_hidden_state),
    "answers": answers,
    "info": {key: sorted(value) for key, value in info.items()},
    "same_after_saving": torch.equal(loaded(x).logits, model(x).logits),
    "same_tokens": AutoTokenizer.from_pretrained(saved, config=loaded.config)(
        "the <|mask|> was")["input_ids"] == tokenizer("the <|mask|> was")["input_ids"],
}))
"""


def test_transformers_alone(export, tmp_path):
    """AutoTokenizer without code, AutoModel, fill-mask and save_pretrained, without halfstep."""
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(export.folder), str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Do you wish to run" not in run.stdout
    found = json.loads(run.stdout.splitlines()[-1])
    mask, eos = export.ours.mask_id, export.ours.eos_id
    assert found["code_before"] == []
    assert found["tokens"] == [mask, mask, eos]
    assert found["backbone"] == "HalfstepModel"
    assert found["same_features"]
    assert found["same_after_saving"]
    assert found["same_tokens"]
    assert not any(found["info"].values())
    for text, answers in zip(["Mia and the ", "a "], found["answers"], strict=True):
        x = export.ours.tokenizer.encode(text.strip()).ids
        end = " was" if text.startswith("Mia") else " here"
        x = torch.tensor([[*x, mask, *export.ours.tokenizer.encode(end).ids]])
        denoiser = export.ours.denoiser
        p = denoiser.log_p(denoiser.features(x, torch.ones(1), x == mask)).exp()[0]
        assert [answer["token"] for answer in answers] == p.topk(3).indices.tolist()
        assert [answer["score"] for answer in answers] == pytest.approx(p.topk(3).values.tolist())
        sequence = text.strip() + answers[0]["token_str"] + end
        assert answers[0]["sequence"] == sequence


def test_hidden_states_and_tuples(export):
    model, x = export.model, texts(export.model)
    with torch.no_grad():
        output = model(x, output_hidden_states=True)
        states = output.hidden_states
        assert len(states) == model.config.num_hidden_layers + 1
        assert torch.equal(states[0], model.get_input_embeddings()(x))
        last = model.backbone(x).last_hidden_state
        assert torch.equal(states[-1], last)
        features = export.ours.denoiser.features(x, torch.zeros(BATCH))
        assert torch.allclose(last, features, atol=1e-4)
        assert model(x).hidden_states is None
        (logits,) = model(x, return_dict=False)
        assert torch.equal(logits, output.logits)
        loss, logits, hidden = model(
            x, labels=clean(model, x), output_hidden_states=True, return_dict=False
        )
        assert loss.ndim == 0
        assert torch.equal(logits, output.logits)
        assert len(hidden) == len(states)
    by_config = export.load(return_dict=False, output_hidden_states=True)
    assert len(by_config(x)) == 2


def test_embeddings(export):
    model = export.load()
    shape = (model.config.vocab_size, model.config.hidden_size)
    assert model.get_input_embeddings().weight is model.backbone.vocab_embed.embedding
    assert model.get_output_embeddings() is model.backbone.output_layer.linear
    assert model.backbone.get_input_embeddings() is model.get_input_embeddings()
    assert not torch.equal(
        model.get_input_embeddings().weight, model.get_output_embeddings().weight
    )
    table, readout = nn.Embedding(*shape), nn.Linear(shape[1], shape[0])
    keys = model.state_dict().keys()
    model.set_input_embeddings(table)
    model.set_output_embeddings(readout)
    assert model.state_dict().keys() == keys
    assert model.get_input_embeddings().weight is table.weight
    x = texts(model)
    with torch.no_grad():
        features = model.backbone(x).last_hidden_state
        masked = x == model.config.mask_token_id
        expected = readout(features)[..., :-1].log_softmax(-1)
        assert_same(model(x).logits[masked][:, :-1], expected[masked])
    assert model.resize_token_embeddings(shape[0]) is model.get_input_embeddings()


def test_the_loss_is_the_mean_over_the_labels(export):
    model, x = export.model, texts(export.model)
    masked = x == model.config.mask_token_id
    text = clean(model, x)
    output = model(x, labels=text.masked_fill(~masked, -100))
    picked = output.logits.gather(-1, text[..., None])[..., 0]
    assert output.loss.item() == pytest.approx(-picked[masked].mean().item())
    assert model(x, labels=text).loss.item() == pytest.approx(-picked.mean().item())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(
    reentrant, export, monkeypatch
):
    from halfstep.exported import modeling_halfstep as module

    calls = Counter()

    def spy(q, k, v, keys):
        calls["attention"] += 1
        return nn.functional.scaled_dot_product_attention(q, k, v, keys)

    monkeypatch.setitem(module.ATTENTION, "sdpa", spy)
    x = texts(export.model)
    labels = clean(export.model, x)
    gradients = []
    blocks = export.model.config.num_hidden_layers
    for checkpointing in (False, True):
        model = export.load().train()
        assert model.supports_gradient_checkpointing
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # the method will have another name
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        calls.clear()
        model(x, labels=labels).loss.backward()
        assert calls["attention"] == blocks * (1 + checkpointing)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_attention_can_be_changed_later(export):
    model, x = export.load(), texts(export.model)
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    with torch.no_grad():
        assert_same(model(x).logits, export.model(x).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_every_bit(dtype, export, tmp_path):
    """bfloat16 weights are saved in bfloat16, but the angles in float32."""
    first = export.load(dtype=dtype)
    first.save_pretrained(tmp_path)
    second = type(first).from_pretrained(tmp_path)
    assert second.dtype == dtype
    assert first.state_dict().keys() == second.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value)
        assert (value.dtype == torch.float32) == (dtype == torch.float32 or "inv_freq" in key)
    assert read_json(tmp_path / "config.json")["mask_token_id"] == first.config.mask_token_id


def test_a_copy_and_a_double(export):
    x = texts(export.model)
    double = copy.deepcopy(export.model).double()
    with torch.no_grad():
        assert_same(copy.deepcopy(export.model)(x).logits, export.model(x).logits, 1e-6)
        assert_same(double(x).logits, export.model(x).logits)


def test_an_empty_model_is_filled_from_a_state(export):
    """Built without memory on the meta device, then given its weights."""
    with torch.device("meta"):
        empty = type(export.model)(export.model.config)
    assert {p.device.type for p in empty.state_dict().values()} == {"meta"}
    x = texts(export.model)
    assert empty(x.to("meta")).logits.shape == (*x.shape, export.model.config.vocab_size)
    empty = empty.to_empty(device="cpu").eval()
    empty.load_state_dict(export.model.state_dict())
    with torch.no_grad():
        assert_same(empty(x).logits, export.model(x).logits, 1e-6)


def test_tensors_that_a_file_lacks_are_initialized(export, tmp_path):
    """The angles by their formula, a weight as before a training; all others stay as they are."""
    shutil.copytree(export.folder, tmp_path / "f")
    state = safetensors.torch.load_file(tmp_path / "f/model.safetensors")
    lost = ("backbone.rotary_emb.inv_freq", "backbone.blocks.1.norm1.weight")
    for key in lost:
        state.pop(key)
    safetensors.torch.save_file(state, tmp_path / "f/model.safetensors", {"format": "pt"})
    loaded = type(export.model).from_pretrained(tmp_path / "f")
    expected = export.model.state_dict() | {lost[1]: torch.ones(export.model.config.hidden_size)}
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_a_new_model_predicts_all_tokens_alike(export):
    """Before a training the readout is zero, as in halfstep."""
    new = type(export.model)(export.model.config)
    x = texts(new)
    log_p = new(x).logits[x == new.config.mask_token_id][:, :-1]
    assert torch.allclose(log_p.exp(), torch.full_like(log_p, 1 / log_p.shape[-1]))
    assert new.backbone.vocab_embed.embedding.std() > 0


# A full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


def files_of(folder):
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    return {
        name: (folder / name).read_bytes()
        for name in (*names, "modeling_halfstep.py", "README.md")
        if (folder / name).is_file()
    }


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_leaves_no_torn_export(
    function, export, pipeline, tmp_path, monkeypatch, capsys
):
    """The n-th write fails, for every n: one sentence, and what can be loaded is complete."""
    output, complete = tmp_path / "out", files_of(export.folder)
    real, calls = getattr(os, function), []
    n = 0
    while True:
        n += 1
        done(f"export --checkpoint {pipeline.student} --output {output}")
        calls.clear()

        def fail(*arguments, number=n):
            calls.append(arguments)
            if len(calls) == number:
                raise FULL
            return real(*arguments)

        capsys.readouterr()
        monkeypatch.setattr(os, function, fail)
        code = call(f"export --checkpoint {export.checkpoint} --output {output}")
        monkeypatch.setattr(os, function, real)
        if code == 0:
            break
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        assert "No space left on device; free some space" in message
        if (output / "config.json").exists():
            assert files_of(output) == complete
        assert not list(output.glob("*.part"))
        done(f"export --checkpoint {export.checkpoint} --output {output}")
        assert files_of(output) == complete
    assert n > len(complete)


def test_a_disk_that_is_full_for_safetensors(export, tmp_path, monkeypatch, capsys):
    """Its writer raises no OSError."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"

    def fail(*_, **__):
        raise safetensors.SafetensorError(text)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    assert call(f"export --checkpoint {export.checkpoint} --output {tmp_path / 'out'}") == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "model.safetensors: No space left on device; free some space" in message
    assert not (tmp_path / "out/config.json").exists()


METRICS = tuple(f"| {metric} |" for metric in PROTOCOLS)


def test_the_card_names_every_number(pipeline, tmp_path):
    """Rows of this model only, each with protocol, version and interval."""
    samples = pipeline.metrics / "teacher/samples.json"
    done(
        f"export --checkpoint {pipeline.teacher} --output {tmp_path / 'card'} "
        f"--metrics {samples} {pipeline.metrics}/data.json"
    )
    card = (tmp_path / "card/README.md").read_text()
    rows = json.loads(samples.read_text())
    lines = [line for line in card.splitlines() if line.startswith(METRICS)]
    assert len(lines) == len(rows)
    for row in rows:
        values = (f"{row['value']:.4g}", f"{row['high']:.4g}")
        cells = [f"| {part} |" for part in (row["metric"], row["protocol"], *values)]
        assert any(all(cell in line for cell in cells) for line in lines)
    assert "stories" in card
    assert "model.sample" in card


def test_the_card_leaves_out_rows_of_other_weights(pipeline, tmp_path, capsys):
    samples = pipeline.metrics / "teacher/samples.json"  # of the average
    done(
        f"export --checkpoint {pipeline.teacher} --output {tmp_path} --weights raw "
        f"--metrics {samples}"
    )
    assert "No metric was measured with these weights" in (tmp_path / "README.md").read_text()
    assert "are not on the card" in capsys.readouterr().err
    inputs = json.loads((tmp_path / "provenance.json").read_text())["inputs"]
    names = {Path(path).name for path in inputs}
    assert {"model.safetensors", "tokenizer.json", "meta.json"} <= names


def test_the_card_of_a_student(pipeline, tmp_path):
    done(f"export --checkpoint {pipeline.student} --output {tmp_path}")
    card = (tmp_path / "README.md").read_text()
    assert "meant for **8 sampling steps**" in card
    assert "No metric was measured" in card
    assert "kl_backward" in card


class Api:
    """The hub's client, which records its calls."""

    calls: ClassVar[list[tuple[str, str]]] = []

    def create_repo(self, name, **options):
        self.calls.append(("repo", name))

    def create_branch(self, name, branch, **options):
        self.calls.append(("branch", branch))

    def upload_folder(self, repo_id, folder_path, revision, **options):
        assert (Path(folder_path) / "modeling_halfstep.py").is_file()
        self.calls.append(("upload", revision))


def test_one_revision_per_round(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    done(f"export --checkpoint {pipeline.student} --output {tmp_path / 's'} --push me/mine")
    done(f"export --checkpoint {pipeline.teacher} --output {tmp_path / 't'} --push me/mine")
    assert Api.calls == [
        ("repo", "me/mine"),
        ("branch", "kl_backward-round-1"),
        ("upload", "kl_backward-round-1"),
        ("repo", "me/mine"),
        ("upload", "main"),
    ]


def test_a_failed_upload_is_one_sentence(pipeline, tmp_path, monkeypatch, capsys):
    def refuse(self, *_, **__):
        raise OSError("401 unauthorized")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "create_repo", refuse)
    line = f"export --checkpoint {pipeline.teacher} --output {tmp_path / 'u'} --push me/mine"
    assert call(line) == 1
    expected = "--push me/mine: the upload failed (OSError: 401 unauthorized)"
    assert expected in capsys.readouterr().err


def test_the_baseline_is_not_exported(pipeline, tmp_path):
    assert call(f"export --checkpoint {pipeline.baseline} --output {tmp_path / 'v'}") == 1


def test_the_exported_file_has_the_noise_schedules_of_the_package():
    """(1 - eps) times its share of masked tokens is 1 - alpha(t)."""
    from halfstep.diffusion.schedules import SCHEDULES
    from halfstep.exported import modeling_halfstep as exported

    assert tuple(exported.SHARES) == export_model.EXPORTED_SCHEDULES
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for name, share in exported.SHARES.items():
        masked = (1 - exported.EPS) * share(t)
        assert torch.allclose(masked, 1 - SCHEDULES[name]().alpha(t), atol=1e-12)


@pytest.mark.parametrize("schedule", export_model.EXPORTED_SCHEDULES)
def test_an_exported_model_samples_with_its_own_schedule(schedule):
    """After the first of two steps alpha(1/2) of the positions are revealed, eps apart."""
    from halfstep.diffusion.schedules import SCHEDULES
    from halfstep.exported.modeling_halfstep import HalfstepConfig, HalfstepForMaskedLM

    shape = {"hidden_dim": 8, "n_blocks": 1, "n_heads": 2, "model_length": 500, "vocab_size": 5}
    model = HalfstepForMaskedLM(HalfstepConfig(**shape, schedule=schedule))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    visible = []
    forward = model.forward

    def spy(input_ids, **options):
        visible.append((input_ids != 4).double().mean().item())
        return forward(input_ids, **options)

    model.forward = spy
    model.sample(num_samples=8, steps=2, generator=torch.Generator().manual_seed(0))
    expected = SCHEDULES[schedule]().alpha(torch.tensor(0.5)).item()
    assert visible == [0, pytest.approx(expected, abs=0.03)]


def test_an_export_names_its_schedule_or_refuses(pipeline, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "models" / "x" / "teacher"
    shutil.copytree(pipeline.teacher, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["network"]["schedule"] = "cosine"
    (folder / "meta.json").write_text(json.dumps(meta))
    done(f"export --checkpoint {folder} --output {tmp_path / 'cosine'}")
    assert json.loads((tmp_path / "cosine/config.json").read_text())["schedule"] == "cosine"
    monkeypatch.setattr(export_model, "EXPORTED_SCHEDULES", ("loglinear",))
    assert call(f"export --checkpoint {folder} --output {tmp_path / 'refused'}") == 1
    assert "network.schedule: found 'cosine'" in capsys.readouterr().err


# Adapted from autoregressive models


ADAPTED = [
    {"shifted": True},
    {"shifted": True, "architecture": "gpt2"},
    {"shifted": False, "architecture": "gpt2"},
]


@pytest.fixture(scope="module", params=ADAPTED, ids=lambda options: " ".join(options))
def adapted(request, pipeline, tmp_path_factory):
    """An exported denoiser as it is adapted: ours, its folder, and theirs."""
    from halfstep.exported.modeling_halfstep import HalfstepForMaskedLM

    root = tmp_path_factory.mktemp("adapted")
    checkpoint = write_checkpoint(pipeline.teacher, root / "m/teacher", normal, **request.param)
    done(f"export --checkpoint {checkpoint} --output {root / 'exported'}")
    model = HalfstepForMaskedLM.from_pretrained(root / "exported").eval()
    return SimpleNamespace(
        checkpoint=checkpoint, folder=root / "exported", ours=halfstep.load(checkpoint), model=model
    )


@torch.no_grad()
def test_an_adapted_denoiser_is_that_of_halfstep(adapted):
    denoiser, x = adapted.ours.denoiser, texts(adapted.model, 8, 24)
    masked = x == denoiser.mask_id
    expected = denoiser.log_p(denoiser.features(x, torch.full((8,), 0.5))[masked])
    assert_same(adapted.model(x).logits[masked][:, :-1], expected)
    eager = type(adapted.model).from_pretrained(adapted.folder, attn_implementation="eager").eval()
    assert_same(eager(x).logits, adapted.model(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_of_an_adapted_denoiser(adapted, side):
    """The first token is predicted from the last real one; positions are counted without padding.

    An embedding of positions knows only those of a whole window.
    """
    rows = [texts(adapted.model, 1, length)[0] for length in (5, 9, 16)]
    x = torch.full((4, 16), adapted.model.config.pad_token_id)
    mask = torch.zeros_like(x)
    for i, row in enumerate(rows):
        free = 16 - len(row)
        first = {"left": free, "right": 0, "both": free // 2}[side]
        x[i, first : first + len(row)], mask[i, first : first + len(row)] = row, 1
    padded = adapted.model(x, attention_mask=mask).logits
    assert not padded.isnan().any()  # the last row is padding only
    for i, row in enumerate(rows):
        assert_same(padded[i][mask[i] == 1], adapted.model(row[None]).logits[0])


def test_an_adapted_denoiser_samples_trains_and_compiles(adapted, tmp_path):
    model = copy.deepcopy(adapted.model)
    ids = model.sample(num_samples=2, steps=3, generator=torch.Generator().manual_seed(1))
    assert ids.shape == (2, 24) and ids.max() < model.config.mask_token_id
    x = texts(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_same(compiled(x).logits, model(x).logits)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with torch.no_grad():
        assert not model.to(torch.bfloat16)(x).logits.isnan().any()
    again(x, labels=clean(again, x)).loss.backward()
    trained = {name for name, p in again.named_parameters() if p.grad is not None}
    assert trained == dict(again.named_parameters()).keys()


def test_an_adapted_denoiser_comes_back(adapted, tmp_path):
    """import of an export keeps the bits, the shift and the architecture."""
    done(f"import --source {adapted.folder} --output {tmp_path / 'm/teacher'}")
    found = halfstep.load(tmp_path / "m/teacher")
    assert found.meta["network"] == adapted.ours.meta["network"]
    for name, value in adapted.ours.network.state_dict().items():
        assert torch.equal(found.network.state_dict()[name], value)


def test_an_export_of_gpt2_without_its_heads_is_refused(pipeline, tmp_path, capsys):
    checkpoint = write_checkpoint(
        pipeline.teacher, tmp_path / "m/teacher", normal, architecture="gpt2"
    )
    done(f"export --checkpoint {checkpoint} --output {tmp_path / 'e'}")
    config = json.loads((tmp_path / "e/config.json").read_text())
    for heads in (None, 0, 3, "two"):
        (tmp_path / "e/config.json").write_text(json.dumps(config | {"n_heads": heads}))
        assert call(f"import --source {tmp_path / 'e'} --output {tmp_path / 'x/teacher'}") == 1
        assert "fit no denoiser" in capsys.readouterr().err

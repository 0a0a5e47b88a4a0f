"""Checkpoints: every bit back, and one clear sentence for every way a folder can be wrong."""

import json

import pydantic
import pytest
import torch
from safetensors.torch import load_file, save_file

import halfstep
from halfstep import checkpoint
from halfstep.config import SIZES, Network, size_of_shape
from halfstep.data.tokenizer import train_bpe
from halfstep.errors import HalfstepError
from halfstep.resolve import explain

META = {
    "kind": "diffusion",
    "network": Network(size="tiny").model_dump(),
    "vocab_size": 300,
    "eos_id": 0,
    "length": 16,
    "round": 0,
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with three sets of weights.

    The average holds parameters only, as some published ones do.
    """
    tokenizer = train_bpe(["a small red kite"] * 3, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    torch.manual_seed(0)
    tensors = {}
    for name in checkpoint.FILES.values():
        network = checkpoint.build_network(META)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.1)
        tensors[name] = (
            dict(network.named_parameters()) if name == "ema.safetensors" else network.state_dict()
        )
    tensors["optimizer.safetensors"] = {"step:a": torch.tensor(3.0)}
    checkpoint.save_checkpoint(tmp_path / "model", tensors, META, tmp_path / "tokenizer.json")
    return tmp_path / "model"


def test_a_size_has_one_spelling_and_gives_the_shape():
    for name, (blocks, width, heads) in SIZES.items():
        shapes = {name, f"{blocks}x{width}x{heads}", f"{blocks}x{width}x{heads}x128"}
        assert {Network(size=shape).size for shape in shapes} == {name}
        assert size_of_shape(blocks, width, heads) == name
    network = Network(size="2x48x3x8")
    assert (network.blocks, network.width, network.heads, network.cond_width) == (2, 48, 3, 8)
    assert size_of_shape(2, 48, 3, 8) == network.size
    for kind in checkpoint.KINDS:
        about = META | {"kind": kind, "network": network.model_dump()}
        assert len(checkpoint.build_network(about).blocks) == 2


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("smaller", "did you mean small"),
        ("6x256", "allowed are 'tiny'"),
        ("0x256x4", "allowed are 'tiny'"),
        ("200x256x4", "allowed are 'tiny'"),
        ("6x256x4x8x8", "allowed are 'tiny'"),
        ("6x100000x4", "allowed are 'tiny'"),
        ("6x250x4", "the width 250 must be a multiple of 2 x 4 heads"),
        ("6x12x4", "the width 12 must be a multiple of 2 x 4 heads"),
    ],
)
def test_other_sizes_are_refused(size, message):
    with pytest.raises(pydantic.ValidationError) as refused:
        Network(size=size)
    (line,) = explain(refused.value, Network)
    assert line.startswith(f"size: found '{size}'")
    assert message in line


@pytest.mark.parametrize("weights", checkpoint.FILES)
def test_round_trip(folder, weights):
    model = halfstep.load(folder, "cpu", weights)
    for key, value in load_file(folder / checkpoint.FILES[weights]).items():
        assert torch.equal(model.network.state_dict()[key], value), key
    assert torch.equal(
        model.network.rotary_emb.inv_freq, checkpoint.build_network(META).rotary_emb.inv_freq
    )
    assert not model.network.training and not any(
        p.requires_grad for p in model.network.parameters()
    )
    assert (model.kind, model.length, model.vocab_size, model.eos_id, model.mask_id) == (
        "diffusion",
        16,
        300,
        0,
        300,
    )
    assert model.denoiser.mask_id == 300 and model.denoiser.ignores_time
    assert (
        model.sha256
        == json.loads((folder / "meta.json").read_text())["sha256"][checkpoint.FILES[weights]]
    )
    assert model.tokenizer.decode(model.tokenizer.encode("a red kite").ids) == "a red kite"


def test_the_average_is_what_is_loaded_by_default(folder):
    assert torch.equal(
        halfstep.load(folder, "cpu").network.vocab_embed.embedding,
        load_file(folder / "ema.safetensors")["vocab_embed.embedding"],
    )


def test_kinds_and_time_conditioning():
    meta = META | {"network": {"size": "tiny", "time_conditioning": True}}
    assert not checkpoint.build_denoiser(checkpoint.build_network(meta), meta).ignores_time
    assert type(checkpoint.build_network(META | {"kind": "autoregressive"})).__name__ == "GPT"
    assert (
        checkpoint.build_network(META, dropout=0.25).blocks[0].dropout == 0.25
        and checkpoint.build_network(META).blocks[0].dropout == 0
    )


def test_meta_comes_last_and_goes_first(folder, monkeypatch, tmp_path):
    """A crash while a checkpoint is written over leaves no meta.json, so no checkpoint."""

    def broken(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_atomic", broken)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(
            folder, {"model.safetensors": {"a": torch.ones(1)}}, META, tmp_path / "tokenizer.json"
        )
    with pytest.raises(
        HalfstepError, match="not a finished checkpoint, because meta.json is missing"
    ):
        halfstep.load(folder)


def test_meta_names_every_file_by_its_checksum(folder):
    sums = json.loads((folder / "meta.json").read_text())["sha256"]
    assert (
        set(sums)
        == {*checkpoint.FILES.values(), "optimizer.safetensors", "tokenizer.json"}
        == {p.name for p in folder.iterdir()} - {"meta.json"}
    )


def rewrite(folder, **changes):
    """Change meta.json, and make its checksums right again."""
    from halfstep.files import sha256

    meta = json.loads((folder / "meta.json").read_text()) | changes
    meta["sha256"] = {
        name: sha256(folder / name) for name in meta["sha256"] if (folder / name).exists()
    }
    (folder / "meta.json").write_text(json.dumps(meta))


def flip(folder):
    path = folder / "ema.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)


def truncate(folder):
    path = folder / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def edit(folder, change):
    state = load_file(folder / "ema.safetensors")
    change(state)
    save_file(state, folder / "ema.safetensors")
    rewrite(folder)


FAULTS = {
    "no folder": (
        lambda f: [p.unlink() for p in f.iterdir()] and f.rmdir(),
        r"not a finished checkpoint, because there is no such folder",
    ),
    "broken meta": (
        lambda f: (f / "meta.json").write_text('{"format": 1, '),
        r"meta\.json: not valid JSON",
    ),
    "other format": (
        lambda f: rewrite(f, format=99),
        "format 99, but this halfstep reads format 1",
    ),
    "flipped bit": (flip, "the file is damaged"),
    "truncated": (truncate, "the file is damaged"),
    "missing file": (
        lambda f: (f / "ema.safetensors").unlink(),
        "missing, but listed in meta.json",
    ),
    "not listed": (
        lambda f: ((f / "ema.safetensors").unlink(), rewrite(f)),
        "has no ema.safetensors; it holds model.safetensors",
    ),
    "wrong vocabulary": (
        lambda f: rewrite(f, vocab_size=301),
        r"has shape \[301(, 128)?\], but the network expects \[302(, 128)?\]",
    ),
    "another size": (
        lambda f: rewrite(f, network={"size": "mini"}),
        "[0-9]+ missing tensors, the first is blocks.3",
    ),
    "NaN": (
        lambda f: edit(f, lambda s: s["blocks.1.attn_out.weight"][0].fill_(float("nan"))),
        "blocks.1.attn_out.weight holds NaN",
    ),
    "lacks one": (
        lambda f: edit(f, lambda s: s.pop("blocks.2.norm1.weight")),
        "1 missing tensors, the first is blocks.2.norm1.weight",
    ),
    "has another": (
        lambda f: edit(f, lambda s: s.update(extra=torch.ones(2))),
        "1 unknown tensors, the first is extra",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_one_sentence(folder, fault):
    spoil, sentence = FAULTS[fault]
    spoil(folder)
    with pytest.raises(HalfstepError, match=sentence) as error:
        halfstep.load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_unknown_weights(folder):
    with pytest.raises(HalfstepError, match="weights: found 'last', allowed are raw, ema, best"):
        halfstep.load(folder, weights="last")

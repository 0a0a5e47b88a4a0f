"""The network: sizes and parameter names of published checkpoints, members of a Denoiser."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from halfstep.config import SIZES
from halfstep.diffusion.schedules import LogLinear
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT

PUBLISHED = json.loads((Path(__file__).parents[1] / "parity" / "state_dict_keys.json").read_text())
EXACT = {
    "small": 169_627_218,
    "medium": 424_477_010,
    "large": 863_158_098,
}  # SDTT Table 2: 169M, 424M, 863M


def on_meta(make, vocabulary, size):
    blocks, width, heads = SIZES[size]
    with torch.device("meta"):
        return make(vocabulary, width, blocks, heads)


def tiny(**more) -> DiT:
    torch.manual_seed(0)
    network = DiT(11, 32, 2, 2, cond_width=16, **more)
    for p in network.parameters():  # adaLN and head begin at zero: give every path a part
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return network.eval()


@pytest.mark.parametrize("size", EXACT)
def test_parameters_of_the_published_sizes(size):
    network = on_meta(DiT, 50257, size)
    assert (
        sum(p.numel() for p in network.parameters())
        == EXACT[size]
        == PUBLISHED[f"dit-{size}"]["n_params"]
    )


@pytest.mark.parametrize(("size", "billions"), [("1.3B", 1.3), ("3B", 3), ("8B", 8)])
def test_parameters_of_the_sizes_that_were_only_timed(size, billions):
    assert sum(p.numel() for p in on_meta(DiT, 50257, size).parameters()) / 1e9 == pytest.approx(
        billions, rel=0.15
    )


@pytest.mark.parametrize("size", EXACT)
@pytest.mark.parametrize("kind", ["dit", "ar"])
def test_names_and_shapes_of_the_published_checkpoints(kind, size):
    """Exactly the published names.

    The baseline differs in two things: no column for the mask token and no bias in the head.
    """
    network = on_meta(DiT if kind == "dit" else GPT, 50257, size)
    theirs = PUBLISHED[f"{kind}-{size}"]
    assert len(network.blocks) == theirs["config"]["n_blocks"]
    ours = {k: list(v.shape) for k, v in network.state_dict().items()}
    for i in range(1, len(network.blocks)):
        block = {k: ours.pop(k) for k in list(ours) if k.startswith(f"blocks.{i}.")}
        assert block == {
            k.replace("blocks.0.", f"blocks.{i}."): v
            for k, v in theirs["state_dict"].items()
            if k.startswith("blocks.0.")
        }
    expected = dict(theirs["state_dict"])
    if kind == "ar":
        assert expected.pop("output_layer.linear.bias") == [50258]
        for key in ("vocab_embed.embedding", "output_layer.linear.weight"):
            expected[key] = [50257, expected[key][1]]
    assert ours == expected
    assert [n for n, _ in network.named_buffers()] == [
        "rotary_emb.inv_freq"
    ]  # in the state, not among the parameters


def test_a_fresh_network_says_nothing():
    """adaLN-zero and a zero head make every token equally likely at every position."""
    torch.manual_seed(0)
    network = DiT(11, 32, 2, 2)
    h = network(torch.randint(0, 12, (2, 9)))
    assert torch.allclose(
        SubsDenoiser(network, LogLinear()).log_p(h.flatten(0, 1)).exp(),
        torch.full((18, 11), 1 / 11),
    )


def test_every_position_sees_both_sides_and_its_own_place():
    network = tiny()
    x = torch.randint(0, 11, (1, 8), generator=torch.Generator().manual_seed(1))
    base = network(x)
    for changed in (0, 7):
        other = x.clone()
        other[0, changed] = (x[0, changed] + 1) % 11
        assert ((network(other) - base).abs().amax(-1) > 1e-5).all()
    assert not torch.allclose(network(x.flip(1)).flip(1), base, atol=1e-3)
    assert torch.allclose(
        network(torch.cat([x, x.flip(1)]))[:1], base, atol=1e-5
    )  # texts of a batch do not see one another


def test_dropout_is_for_training_only():
    network = tiny(dropout=0.5)
    x = torch.zeros(1, 8, dtype=torch.long)
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.allclose(network(x), network(x))


def test_denoiser_reads_out_the_data_tokens_only():
    network = tiny()
    model, x = SubsDenoiser(network, LogLinear()), torch.full((2, 5), 11)
    h = model.features(x, torch.tensor([0.1, 0.9]))
    log_p = model.log_p(h.flatten(0, 1))
    weight, bias = model.readout
    assert (
        model.mask_id == 11
        and log_p.shape == (10, 11)
        and weight.shape == (12, 32)
        and bias.shape == (11,)
    )
    assert torch.allclose(model.logits(h.flatten(0, 1)).log_softmax(-1), log_p, atol=1e-5)
    assert torch.allclose(log_p.exp().sum(-1), torch.ones(10), atol=1e-6)
    logits = network.output_layer.linear(h.flatten(0, 1))
    logits[:, 11] = -torch.inf
    assert torch.allclose(log_p, logits.log_softmax(-1)[:, :11], atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [lambda: SubsDenoiser(tiny(), LogLinear()), lambda: GPT(11, 32, 2, 2)],
    ids=["denoiser", "gpt"],
)
def test_log_probabilities_are_float32_inside_autocast(make):
    """Logits are not rounded to bfloat16, which would move the draws (deviation Q12)."""
    model, h = make(), torch.randn(20, 32, generator=torch.Generator().manual_seed(2))
    expected = model.log_p(h)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.log_p(h)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_time_conditioning():
    """A time-conditioned network gets sigma(t) of each text; for any other, t changes nothing."""
    network, x, t = tiny(), torch.full((3, 5), 11), torch.tensor([0.1, 0.5, 0.999])
    blind, knowing = (
        SubsDenoiser(network, LogLinear()),
        SubsDenoiser(network, LogLinear(), time_conditioning=True),
    )
    assert blind.ignores_time and not knowing.ignores_time
    assert torch.equal(blind.features(x, t), network(x)) and torch.equal(
        knowing.features(x, t), network(x, LogLinear().sigma(t))
    )
    found = knowing.features(x, t)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert torch.allclose(found[1:2], knowing.features(x[1:2], t[1:2]), atol=1e-5)


@pytest.mark.parametrize("conditioned", [False, True])
def test_asked_for_some_positions_it_says_there_what_it_says_of_all(conditioned):
    """Values and gradients of every weight; each of three texts has its own noise level."""
    denoiser = SubsDenoiser(tiny(), LogLinear(), conditioned)
    x, t = (
        torch.randint(0, 12, (3, 5), generator=torch.Generator().manual_seed(1)),
        torch.tensor([0.1, 0.5, 0.999]),
    )
    where = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    pull = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    found, expected = denoiser.features(x, t, where), denoiser.features(x, t)[where]
    assert torch.equal(denoiser.features(x, t, where.nonzero(as_tuple=True)), found)
    assert found.shape == (5, 32) and torch.allclose(found, expected, atol=1e-5)
    ours, theirs = (
        torch.autograd.grad(
            (h * pull).sum(), list(denoiser.network.parameters()), allow_unused=True
        )
        for h in (found, expected)
    )
    for (name, _), one, other in zip(
        denoiser.network.named_parameters(), ours, theirs, strict=True
    ):
        assert (one is None) == (other is None) and (
            one is None or torch.allclose(one, other, atol=1e-4, rtol=1e-4)
        ), name


def test_a_network_on_the_meta_device_imports_no_compiler():
    """Checkpoints are checked against one each time that they are read; the import takes 1 s."""
    code = (
        "import sys, torch"
        "\nfrom halfstep.models.dit import DiT"
        "\nfrom halfstep.models.gpt import GPT"
        "\nwith torch.device('meta'): DiT(30, 16, 1, 2); GPT(30, 16, 1, 2)"
        "\nassert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

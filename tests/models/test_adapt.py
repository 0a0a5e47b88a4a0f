"""A denoiser that is adapted from an autoregressive network computes what that one computed."""

import pytest
import torch

from halfstep.diffusion.schedules import LogLinear
from halfstep.models.adapt import adapt_weights, annealed_pairs
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT

V, WIDTH, HEADS = 11, 32, 4


def causal(blocks: int) -> GPT:
    torch.manual_seed(0)
    net = GPT(V, WIDTH, blocks, HEADS).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return net


def adapted(gpt: GPT) -> SubsDenoiser:
    dit = DiT(V, WIDTH, len(gpt.blocks), HEADS).eval()
    adapt_weights(gpt, dit)
    return SubsDenoiser(dit, LogLinear(), shifted=True)


@torch.no_grad()
@pytest.mark.parametrize(("blocks", "length"), [(1, 9), (1, 2), (3, 1)])
def test_what_sees_the_same_tokens_predicts_the_same(blocks, length):
    """The last position sees the whole text, in one causal block as without causality.

    Its output predicts the token after the text; shifted cyclically, that is the first one.
    """
    gpt = causal(blocks)
    denoiser = adapted(gpt)
    x = torch.randint(0, V, (4, length), generator=torch.Generator().manual_seed(1))
    expected = gpt.log_p(gpt(x)[:, -1])
    found = denoiser.log_p(denoiser.features(x, torch.zeros(4))[:, 0])
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
def test_all_weights_are_kept_and_the_mask_is_the_mean_token():
    gpt = causal(2)
    dit = adapted(gpt).network
    own = dit.state_dict()
    for name, value in gpt.state_dict().items():
        rows = slice(0, len(value)) if value.ndim else ...
        assert torch.equal(own[name][rows], value), name
    assert torch.allclose(dit.vocab_embed.embedding[V], gpt.vocab_embed.embedding.mean(0))
    assert not own["output_layer.linear.bias"].any()
    assert not own["output_layer.linear.weight"][V].any()


@pytest.mark.parametrize(
    "shape", [(V + 1, WIDTH, 2, HEADS), (V, 16, 2, HEADS), (V, WIDTH, 3, HEADS), (V, WIDTH, 2, 2)]
)
def test_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match="vocabulary, width, blocks and heads are"):
        adapt_weights(causal(2), DiT(*shape))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_annealed_attention_is_causal_and_a_share_of_the_rest(share):
    """Every earlier position and a random share of the later ones; a function of the seed."""
    n = 200
    pairs, past = annealed_pairs(n, share, 7), torch.ones(n, n, dtype=torch.bool).tril()
    assert pairs[past].all()
    assert pairs[~past].double().mean() == pytest.approx(share, abs=0.02)
    assert torch.equal(pairs, annealed_pairs(n, share, 7))
    assert share in (0, 1) or not torch.equal(pairs, annealed_pairs(n, share, 8))


@torch.no_grad()
def test_a_denoiser_that_reads_the_past_is_the_causal_network():
    """Before the first pair is added, outputs are those of the autoregressive network, shifted."""
    gpt = causal(3)
    denoiser, x = adapted(gpt), torch.randint(0, V, (4, 9))
    reading = denoiser.reading(annealed_pairs(9, 0.0, 1))
    expected = gpt.log_p(gpt(x)).roll(1, 1)
    assert torch.allclose(reading.log_p(reading.features(x, torch.zeros(4))), expected, atol=1e-5)
    where = torch.tensor([0, 3, 3]), torch.tensor([4, 0, 8])
    found = reading.log_p(reading.features(x, torch.zeros(4), where))
    assert torch.allclose(found, expected[where], atol=1e-5)
    whole = denoiser.features(x, torch.zeros(4))
    assert torch.allclose(
        denoiser.reading(annealed_pairs(9, 1.0, 1)).features(x, torch.zeros(4)), whole, atol=1e-5
    )

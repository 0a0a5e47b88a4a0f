"""Caches between the steps of masked diffusion: keys and values of a block, and predictions."""

import pytest
import torch
from oracle import Language, Perfect

from halfstep.diffusion.block_sampler import block, blocks
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import inverse_cdf, uniforms
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT


@pytest.mark.parametrize("steps", [3, 16, 200])
def test_a_prediction_cache_is_what_the_plan_already_saves(steps):
    """The plan takes the passes of MDLM's cached sampler and writes the same texts.

    That sampler (arXiv 2406.07524, section 5) keeps a prediction until a token changes; here it is
    a loop over all steps. For a network that ignores time a plan has nothing left to cache.
    """
    language = Language(3, 5, seed=2)
    ours, theirs, N = Perfect(language), Perfect(language), 40
    found = sample(ours, N, language.L, steps, draws=Draws(seed=3))
    u = uniforms(3, 0, N, 2 * language.L)
    texts, kept, passes = (
        torch.full((N, language.L), language.mask_id),
        [None] * N,
        torch.zeros(N, dtype=torch.long),
    )
    alpha = LogLinear().alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    hidden = (1 - alpha) / (1 - alpha[0])
    for step in range(steps):
        last = step == steps - 1
        for i in range(N):
            reveal = (texts[i] == language.mask_id) & (
                (u[i, : language.L] >= hidden[step + 1]) | last
            )
            if not reveal.any():
                continue  # the text stays as it is, and so does the prediction
            if kept[i] is None:
                kept[i] = theirs.features(texts[i][None], torch.zeros(1))[0]
                passes[i] += 1
            texts[i, reveal] = inverse_cdf(
                theirs.log_p(kept[i][reveal]), u[i, language.L :][reveal]
            )
            kept[i] = None
    assert (
        torch.equal(found.ids, texts)
        and torch.equal(found.network_evaluations, passes)
        and (passes.max() < steps or steps == 3)
    )


def small(L=40):
    torch.manual_seed(0)
    network = DiT(11, 32, 2, 4).eval().requires_grad_(False)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return SubsDenoiser(network, LogLinear()), torch.randint(
        0, 12, (3, L), generator=torch.Generator().manual_seed(1)
    )


def test_kept_keys_are_exact_where_nothing_outside_of_the_block_changed():
    """With one layer, a pass over a block equals a whole pass in which other keys are unchanged."""
    denoiser, x = small()
    denoiser.network.blocks = denoiser.network.blocks[:1]
    places, t = torch.arange(8, 24), torch.zeros(3)
    _, kept = denoiser.features_and_kv(x, t, places)
    x[:, 8:24] = (x[:, 8:24] + 1) % 12
    found, _ = denoiser.features_and_kv(x, t, places, kept)
    assert torch.allclose(found, denoiser.features(x, torch.zeros(3))[:, 8:24], atol=1e-5)


def test_block_keeps_what_is_given_counts_shares_and_equals_whole_passes_in_one_step_each():
    denoiser, x = small()
    given = torch.full((40,), denoiser.mask_id)
    given[:5] = torch.arange(5)
    one = sample(denoiser, 6, 40, 12, sampler="block", draws=Draws(seed=1), given=given)
    assert (one.ids[:, :5] == given[:5]).all() and (one.ids < denoiser.mask_id).all()
    assert (
        blocks(40, 12) == [(0, 16, 4), (16, 32, 4), (32, 40, 4)]
        and 3 < one.network_evaluations[0] <= 3 + 3 * (16 + 16 + 8) / 40
    )
    assert blocks(40, 2) == [(0, 20, 1), (20, 40, 1)]
    x, draws = given.expand(6, -1), Draws(seed=1)
    kept, whole = (block(denoiser, x, draws, 3, keep_kv).ids for keep_kv in (True, False))
    assert torch.equal(kept, whole)  # a whole pass for each block, and nothing after it


def test_block_refuses_a_denoiser_without_keys_and_values():
    class Plain:
        mask_id, vocab_size = 3, 3

    x = torch.full((1, 4), 3)
    with pytest.raises(HalfstepError, match="Plain keeps no keys and values; use another sampler"):
        block(Plain(), x, Draws(), 2)

"""What there is to cache between the steps of masked diffusion, and who keeps it."""

import pytest
import torch
from oracle import Language, Perfect

from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.draws import inverse_cdf, uniforms


@pytest.mark.parametrize("steps", [3, 16, 200])
def test_a_prediction_cache_is_what_the_plan_already_saves(steps):
    """MDLM's cached sampler (arXiv 2406.07524, section 5: a prediction is kept until a token changes), written as a loop over all steps, takes
    the same passes and writes the same texts as the plan, which visits no step in which nothing changes: for a network that ignores time
    there is nothing left to keep."""
    language = Language(3, 5, seed=2)
    ours, theirs, N = Perfect(language), Perfect(language), 40
    found = sample(ours, N, language.L, steps, schedule=LogLinear(), seed=3)
    u = uniforms(3, 0, N, 2 * language.L)
    texts, kept, passes = torch.full((N, language.L), language.mask_id), [None] * N, torch.zeros(N, dtype=torch.long)
    alpha = LogLinear().alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    hidden = (1 - alpha) / (1 - alpha[0])
    for step in range(steps):
        last = step == steps - 1
        for i in range(N):
            reveal = (texts[i] == language.mask_id) & ((u[i, : language.L] >= hidden[step + 1]) | last)
            if not reveal.any():
                continue  # the text stays as it is, and so does the prediction
            if kept[i] is None:
                kept[i] = theirs.features(texts[i][None], torch.zeros(1))[0]
                passes[i] += 1
            texts[i, reveal] = inverse_cdf(theirs.log_p(kept[i][reveal]), u[i, language.L :][reveal])
            kept[i] = None
    assert torch.equal(found.ids, texts) and torch.equal(found.network_evaluations, passes) and (passes.max() < steps or steps == 3)

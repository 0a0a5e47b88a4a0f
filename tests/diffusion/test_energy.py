"""`energy` against the exact law of its self-normalized importance sampling."""

from itertools import combinations_with_replacement, product
from math import factorial, prod

import pytest
import torch
from oracle import Language, Perfect, PerfectReader, chi_square, reveal_chance

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.errors import HalfstepError

ALPHA = 1e-4 / 20
DRAWS = 10_000
TINY = Language(2, 3, seed=1, sharpness=2.5)


def chosen_law(q: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """Law [n] of the candidate that is chosen of k from q[n], in proportion to weight[n]."""
    law = torch.zeros_like(q)
    for sets in combinations_with_replacement(range(len(q)), k):
        counts = [sets.count(i) for i in range(len(q))]
        ways = factorial(k) / prod(factorial(count) for count in counts)
        chance = ways * (q ** torch.tensor(counts)).prod()
        share = torch.tensor(counts) * weight
        if chance > 0:
            law += chance * share / share.sum()
    return law


def energy_law(denoiser, scorer, steps, start, k, scored=1.0) -> torch.Tensor:
    """Law over states [S]: a step chooses a whole text, and reveals each position with chance r."""
    language, table = denoiser.language, denoiser.table(1.0)
    law = {tuple(start.tolist()): 1.0}
    for step in range(steps):
        r = reveal_chance(1 - step / steps, 1 - (step + 1) / steps)
        count = k if step >= round(steps * (1 - scored)) else 1
        then: dict = {}
        for state, chance in law.items():
            masked = [i for i, v in enumerate(state) if v == language.V]
            p = table[language.index(torch.tensor(state))]
            texts, q, log_q = [], [], []
            for tokens in product(range(language.V), repeat=len(masked)):
                text = list(state)
                parts = [p[i, v].item() for i, v in zip(masked, tokens, strict=True)]
                for i, v in zip(masked, tokens, strict=True):
                    text[i] = v
                texts.append(text)
                q.append(torch.tensor(parts, dtype=torch.float64).prod())
                rest = [part for i, part in zip(masked, parts, strict=True) if i]
                log_q.append(torch.tensor(rest, dtype=torch.float64).prod())
            p_ar = scorer.token_log_p(torch.tensor(texts)).double().sum(-1).exp()
            chosen = chosen_law(torch.stack(q), p_ar / torch.stack(log_q), count)
            for text, part in zip(texts, chosen.tolist(), strict=True):
                for shown in product([False, True], repeat=len(masked)):
                    after, share = list(state), chance * part
                    for i, s in zip(masked, shown, strict=True):
                        after[i], share = text[i] if s else language.V, share * (r if s else 1 - r)
                    if share:
                        then[tuple(after)] = then.get(tuple(after), 0) + share
        law = then
    out = torch.zeros(len(language.states), dtype=torch.float64)
    for state, chance in law.items():
        out[language.index(torch.tensor(state))] += chance
    return out


@pytest.mark.parametrize("scored", [1.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_law(k, steps, scored):
    denoiser, scorer = Perfect(TINY), PerfectReader(TINY)
    for frame in ([2, 2, 2], [2, 1, 2]):
        start = torch.tensor(frame)
        law = energy_law(denoiser, scorer, steps, start, k, scored)
        out = sample(
            denoiser,
            DRAWS,
            3,
            steps,
            sampler="energy",
            draws=Draws(seed=4),
            given=start,
            scorer=scorer,
            candidates=k,
            scored=scored,
        )
        counts = TINY.index(out.ids).bincount(minlength=len(law))
        assert chi_square(counts, law) > ALPHA
        if k > 1 and scored == 1:  # each pass of the denoiser has k of the scorer
            assert torch.equal(out.autoregressive_passes, k * out.network_evaluations)


def test_the_error_falls_as_one_over_k():
    """In one step: with one candidate the product of marginals, with many the language."""
    denoiser, scorer, start = Perfect(TINY), PerfectReader(TINY), torch.tensor([2, 2, 2])
    texts = TINY.index(TINY.texts)
    errors = {
        k: (energy_law(denoiser, scorer, 1, start, k)[texts] - TINY.p).abs().sum().item() / 2
        for k in (1, 2, 4, 8)
    }
    assert errors[1] > 0.2
    assert 0.35 < errors[8] / errors[4] < 0.65  # halved when k is doubled
    out = sample(
        denoiser, DRAWS, 3, 1, sampler="energy", draws=Draws(seed=5), scorer=scorer, candidates=64
    )
    counts = TINY.text_index(out.ids).bincount(minlength=8).double()
    assert (counts / DRAWS - TINY.p).abs().sum() / 2 < 1.5 * errors[8] * 8 / 64 + 0.02


def test_bad_input():
    denoiser, scorer = Perfect(TINY), PerfectReader(TINY)

    def run(**options):
        sample(denoiser, 1, 3, 2, sampler="energy", **options)

    with pytest.raises(HalfstepError, match="scorer: found none, but sampler energy asks"):
        run()
    with pytest.raises(HalfstepError, match="candidates: found 0, expected a whole number"):
        run(scorer=scorer, candidates=0)
    with pytest.raises(HalfstepError, match="scored: found 0, expected a share"):
        run(scorer=scorer, scored=0)
    other = PerfectReader(Language(3, 3))
    with pytest.raises(HalfstepError, match="vocabulary of 3 tokens.* diffusion model has 2"):
        run(scorer=other)

"""`threshold` and `entropy_bounded` against their exact laws on an enumerated language."""

import pytest
import torch
from oracle import Language, Perfect, chi_square, law_of_choice

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.errors import HalfstepError

ALPHA = 1e-4 / 40  # corrected for the number of chi-square tests here
DRAWS = 10_000
SMALL, LONG = Language(4, 3, seed=2, sharpness=2.5), Language(3, 5, seed=3, sharpness=2.5)
GAPPY = Language(3, 4, seed=4, forbidden=70)  # most texts cannot be, so some tokens are certain


def surest(p, masked, least):
    """The masked positions, surest first, and how many of them must be revealed."""
    return sorted(masked, key=lambda i: -p[i].max().item()), -(-len(masked) // least)


def above(bound):
    def choose(p, masked, passes):
        order, least = surest(p, masked, passes)
        return [i for n, i in enumerate(order) if n < least or p[i].max() >= bound - 1e-7]

    return choose


def entropies(p):
    return -(p * p.clamp(min=1e-300).log()).sum(-1)


def within(bound):
    def choose(p, masked, passes):
        order = sorted(masked, key=lambda i: entropies(p)[i].item())
        least, chosen = -(-len(masked) // passes), []
        for i in order:
            h = [entropies(p)[j].item() for j in [*chosen, i]]
            if len(chosen) < least or sum(h) - max(h) <= bound + 1e-9:
                chosen.append(i)
        return chosen

    return choose


RULES = {"threshold": above, "entropy_bounded": within}
OPTION = {"threshold": "threshold", "entropy_bounded": "entropy_bound"}


@pytest.mark.parametrize("language", [SMALL, LONG, GAPPY], ids=["small", "long", "gappy"])
@pytest.mark.parametrize(
    ("sampler", "bound"),
    [("threshold", b) for b in (0.3, 0.6, 1.0)] + [("entropy_bounded", b) for b in (0.0, 0.7, 5.0)],
)
@pytest.mark.parametrize("steps", [2, 9])
def test_law(language, sampler, bound, steps):
    denoiser, start = Perfect(language), torch.full((language.L,), language.mask_id)
    option = {OPTION[sampler]: bound}
    out = sample(denoiser, DRAWS, language.L, steps, sampler=sampler, draws=Draws(seed=3), **option)
    law, passes = law_of_choice(denoiser, steps, start, RULES[sampler](bound))
    counts = language.index(out.ids).bincount(minlength=len(law))
    assert chi_square(counts, law) > ALPHA
    found = out.network_evaluations.double()
    assert abs(found.mean() - passes) <= 5 * found.std() / DRAWS**0.5 + 1e-9


@pytest.mark.parametrize("sampler", RULES)
def test_law_of_infilling_at_a_temperature(sampler):
    """The temperature changes the tokens, and not the choice of the positions."""
    frame, temperature = torch.tensor([3, 3, 1, 3, 3]), 0.6
    bound = {"threshold": 0.6, "entropy_bounded": 0.5}[sampler]
    plain, cooled = Perfect(LONG), Perfect(LONG)
    cooled.table = lambda t: (LONG.posterior.log() / temperature).softmax(-1).nan_to_num(1 / LONG.V)

    def choose(p, masked, passes):
        warm = (p.log() * temperature).softmax(-1)
        return RULES[sampler](bound)(warm, masked, passes)

    law, _ = law_of_choice(cooled, 5, frame, choose)
    out = sample(
        plain,
        DRAWS,
        5,
        5,
        sampler=sampler,
        draws=Draws(seed=4, temperature=temperature),
        given=frame,
        **{OPTION[sampler]: bound},
    )
    assert (out.ids[:, 2] == 1).all()
    assert chi_square(LONG.index(out.ids).bincount(minlength=len(law)), law) > ALPHA


@pytest.mark.parametrize("language", [SMALL, LONG, GAPPY], ids=["small", "long", "gappy"])
def test_the_entropy_bound_bounds_the_error(language):
    """KL(language, law) is at most the bound times the number of passes; with 0 there is none."""
    denoiser, start = Perfect(language), torch.full((language.L,), language.mask_id)
    errors = []
    for bound in (0.0, 0.05, 0.3, 1.0):
        law, _ = law_of_choice(denoiser, language.L, start, within(bound))
        q = law[language.index(language.texts)]
        there = language.p > 0
        errors.append((language.p[there] * (language.log_p - q.log())[there]).sum().item())
        assert -1e-12 <= errors[-1] <= bound * language.L + 1e-12
    assert errors[0] < 1e-12 and errors[-1] > 1e-3  # the test can tell


def test_certain_tokens_take_no_pass_of_their_own():
    """Where the visible tokens decide all others, one pass reveals them."""
    language = Language(3, 4, seed=1)
    language.p[:] = 0
    language.p[language.text_index(torch.tensor([[0, 1, 2, 0], [1, 2, 0, 1]]))] = 0.5
    sure = Language.__new__(Language)
    sure.__dict__ = dict(language.__dict__)
    hot = torch.nn.functional.one_hot(language.texts, 3).double()
    chance = language.fits @ language.p
    sure.posterior = torch.einsum("st,t,tlv->slv", language.fits, language.p, hot)
    sure.posterior /= chance.clamp(min=1e-300)[:, None, None]
    for sampler in RULES:
        out = sample(Perfect(sure), 200, 4, 4, sampler=sampler, draws=Draws(seed=1))
        assert out.network_evaluations.unique().tolist() == [2]
        texts = {tuple(text) for text in out.ids.tolist()}
        assert texts == {(0, 1, 2, 0), (1, 2, 0, 1)}


@pytest.mark.parametrize(
    ("sampler", "option", "value"),
    [
        ("threshold", "threshold", 0.0),
        ("threshold", "threshold", 1.5),
        ("entropy_bounded", "entropy_bound", -0.1),
        ("entropy_bounded", "entropy_bound", float("inf")),
    ],
)
def test_impossible_bounds_are_refused(sampler, option, value):
    with pytest.raises(HalfstepError, match=f"{option}: found {value:g}, expected"):
        sample(Perfect(SMALL), 1, 3, 3, sampler=sampler, **{option: value})

"""`remask` against ReMDM's transitions on an enumerated language."""

from itertools import product

import pytest
import torch
from oracle import Language, Perfect, chi_square, loglinear, remasking_law

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.errors import HalfstepError

ALPHA = 1e-4 / 20  # corrected for the number of chi-square tests here
DRAWS = 10_000
SMALL, LONG = Language(4, 3, seed=2), Language(3, 5, seed=3)
FRAMES = {"free": torch.full((3,), 4), "given": torch.tensor([4, 2, 4])}


def path(kind: str, steps: int, eta: float) -> tuple[list, list]:
    """alphas [n + 1] and sigmas [n] of ReMDM's section 4, with the loop of its experiments."""
    left = [1 - i / steps for i in range(steps + 1)]
    times = left
    if kind == "loop":
        times = [1 - 0.9 * (1 - t) / 0.45 if t > 0.55 else 0.1 if t > 0.05 else 2 * t for t in left]
    alphas = [float(loglinear(t)) for t in times]
    sigmas = []
    for i in range(steps):
        most = min(1.0, (1 - alphas[i + 1]) / alphas[i])
        loops = times[i] == times[i + 1] == 0.1
        sigmas.append(
            {"cap": min(eta, most), "rescale": eta * most, "loop": min(eta, most) * loops}[kind]
        )
    sigmas[-1] = 0.0
    return alphas, sigmas


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize(
    ("kind", "eta", "steps"),
    [
        ("cap", 0.3, 4),
        ("cap", 1.0, 6),
        ("rescale", 0.5, 5),
        ("rescale", 1.0, 4),
        ("loop", 0.08, 20),
    ],
)
def test_law(kind, eta, steps, frame):
    denoiser, start = Perfect(SMALL), FRAMES[frame]
    law = remasking_law(denoiser, *path(kind, steps, eta), start)
    options = {"remasking": kind, "eta": eta}
    draws = Draws(seed=7)
    out = sample(denoiser, DRAWS, 3, steps, sampler="remask", draws=draws, given=start, **options)
    counts = SMALL.index(out.ids).bincount(minlength=len(law))
    assert chi_square(counts, law) > ALPHA
    assert out.network_evaluations.max() <= steps
    if frame == "free" and eta >= 0.5:  # the test can tell: without remasking another law
        plain = remasking_law(denoiser, *path(kind, steps, 0.0), start)
        assert chi_square(counts, plain) < 1e-6


def by_confidence_law(denoiser, alphas, sigmas, start) -> torch.Tensor:
    """Law over states [S] of ReMDM-conf: a state remembers the chance that each token had."""
    language, table = denoiser.language, denoiser.table(1.0)
    L, V = language.L, language.V
    law = {(tuple(start.tolist()), (0.0,) * L): 1.0}
    for a_t, a_s, sigma in zip(alphas[:-1], alphas[1:], sigmas, strict=True):
        shown = (a_s - a_t) / (1 - a_t)
        then: dict = {}
        for (state, memory), chance in law.items():
            p = table[language.index(torch.tensor(state))]
            free = [i for i in range(L) if state[i] != V and start[i] == V]
            weights = torch.tensor([-memory[i] for i in free]).softmax(0).tolist()
            choices = []
            for i in range(L):
                if state[i] == V:
                    tokens = [(v, p[i, v].item(), shown * p[i, v].item()) for v in range(V)]
                    choices.append([*tokens, (V, 0.0, 1 - shown)])
                elif i in free:
                    s = sigma * weights[free.index(i)]
                    choices.append([(V, 0.0, s), (state[i], memory[i], 1 - s)])
                else:
                    choices.append([(state[i], memory[i], 1.0)])
            for picks in product(*choices):
                q = chance
                for _, _, part in picks:
                    q *= part
                if q > 0:
                    key = tuple(v for v, _, _ in picks), tuple(m for _, m, _ in picks)
                    then[key] = then.get(key, 0) + q
        law = then
    out = torch.zeros(len(language.states), dtype=torch.float64)
    for (state, _), chance in law.items():
        out[language.index(torch.tensor(state))] += chance
    return out


@pytest.mark.parametrize("kind", ["cap", "rescale"])
def test_law_by_confidence(kind):
    language = Language(3, 3, seed=5)
    denoiser, start = Perfect(language), torch.full((3,), 3)
    law = by_confidence_law(denoiser, *path(kind, 3, 0.9), start)
    options = {"remasking": kind, "eta": 0.9, "by_confidence": True}
    out = sample(denoiser, DRAWS, 3, 3, sampler="remask", draws=Draws(seed=8), **options)
    counts = language.index(out.ids).bincount(minlength=len(law))
    assert chi_square(counts, law) > ALPHA
    plain = remasking_law(denoiser, *path(kind, 3, 0.0), start)
    assert chi_square(counts, plain) < 1e-6  # the test can tell


@pytest.mark.parametrize("kind", ["cap", "rescale"])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("by_confidence", [False, True])
def test_without_remasking_it_is_ancestral_to_the_bit(kind, steps, by_confidence):
    for denoiser in (Perfect(LONG), Perfect(LONG, heat=2.0)):
        given = torch.tensor([3, 3, 1, 3, 3])
        plain = sample(denoiser, 200, 5, steps, draws=Draws(seed=2), given=given)
        options = {"remasking": kind, "eta": 0.0, "by_confidence": by_confidence}
        out = sample(
            denoiser,
            200,
            5,
            steps,
            sampler="remask",
            draws=Draws(seed=2),
            given=given,
            **options,
        )
        assert torch.equal(out.ids, plain.ids)
        assert torch.equal(out.network_evaluations, plain.network_evaluations)


@pytest.mark.parametrize("eta", [-0.1, 1.2])
def test_an_impossible_chance_is_refused(eta):
    with pytest.raises(HalfstepError, match=f"eta: found {eta:g}, expected a probability"):
        sample(Perfect(SMALL), 1, 3, 3, sampler="remask", eta=eta)

"""Suffix likelihood and guesses against languages that are known exactly."""

from itertools import combinations, product
from math import log

import numpy as np
import pytest
import torch
from known import Language, Stubborn

from halfstep.kernels.categorical import uniforms
from halfstep.metrics import likelihood
from halfstep.metrics.likelihood import (
    Question,
    autoregressive_nll,
    confident_guess,
    diffusion_nll,
    monte_carlo_nll,
    suffix_masks,
)


def random_language(length: int, vocabulary: int = 3) -> Language:
    windows = list(product(range(vocabulary), repeat=length))
    p = np.random.default_rng(length).dirichlet(np.full(len(windows), 0.5))
    return Language(dict(zip(windows, p, strict=True)), vocabulary)


def log_conditional(language: Language, q: Question) -> float:
    """-log p(suffix | everything else) by summing windows."""
    around = sum(
        p
        for w, p in language.windows.items()
        if w[: q.start] == q.ids[: q.start] and w[q.end :] == q.ids[q.end :]
    )
    return -log(language.windows[q.ids] / around)


def mask_nll(denoiser, q: Question, mask) -> float:
    """sum over the masked suffix tokens of -log p, one window, no batch."""
    x = torch.tensor([q.ids])
    where = torch.zeros_like(x, dtype=torch.bool)
    where[0, q.start : q.end] = torch.tensor(mask)
    log_p = denoiser.log_p(
        denoiser.features(x.masked_fill(where, denoiser.mask_id), torch.full((1,), 0.5)).flatten(
            0, 1
        )
    )
    return -sum(log_p[i, q.ids[i]].item() for i in where[0].nonzero()[:, 0].tolist())


QUESTIONS = [
    Question(ids, start, end)
    for ids in [(0, 1, 2, 0, 1), (2, 2, 1, 0, 0)]
    for start, end in [(1, 4), (2, 4), (3, 4), (0, 5), (4, 5)]
]


def test_a_perfect_denoisers_bound_is_the_exact_likelihood():
    language = random_language(5)
    nelbo, _ = diffusion_nll(language, QUESTIONS, micro_batch=3)
    np.testing.assert_allclose(nelbo, [log_conditional(language, q) for q in QUESTIONS], rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_enumeration_is_the_integral_over_time(n):
    """int_0^1 dt/t sum_S t^k (1-t)^(n-k) nll(S) by Gauss-Legendre quadrature, which is exact for this polynomial."""
    denoiser, q = Stubborn(4), Question((3, *[i % 4 for i in range(n)], 2), 1, 1 + n)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    t, dt = (nodes + 1) / 2, weights / 2
    masks = [m for m in product([False, True], repeat=n) if any(m)]
    integral = sum(
        mask_nll(denoiser, q, m) * (dt * t ** (sum(m) - 1) * (1 - t) ** (n - sum(m))).sum()
        for m in masks
    )
    assert diffusion_nll(denoiser, [q], micro_batch=8)[0][0] == pytest.approx(integral, rel=1e-6)


def test_enumeration_agrees_with_sampled_times_and_masks():
    """MDLM's estimator as written: t uniform, every token masked with chance t, weight 1 / t."""
    denoiser, q, rng = Stubborn(4), Question((3, 0, 1, 2, 2), 1, 4), np.random.default_rng(0)
    table = {m: mask_nll(denoiser, q, m) for m in product([False, True], repeat=3)}
    t = rng.random(40_000)
    masks = rng.random((len(t), 3)) < t[:, None]
    draws = np.array([table[tuple(m)] for m in masks.tolist()]) / t
    exact = diffusion_nll(denoiser, [q], micro_batch=8)[0][0]
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(t) ** 0.5
    assert abs(draws.mean() - exact) < 0.05 * exact  # and that says something


def test_longer_suffixes_are_estimated_without_bias(monkeypatch):
    denoiser, q = Stubborn(4), Question((3, *[i % 4 for i in range(9)], 2), 1, 10)
    draws = np.array([diffusion_nll(denoiser, [q], 64, seed=seed)[0][0] for seed in range(12)])
    again = diffusion_nll(denoiser, [q], 5, seed=3)[0][0]
    monkeypatch.setattr(likelihood, "EXACT", 9)
    exact = diffusion_nll(denoiser, [q], 64)[0][0]
    assert abs(draws.mean() - exact) < 4 * draws.std(ddof=1) / len(draws) ** 0.5
    assert draws.std() < 0.1 * exact and draws.std() > 0
    assert again == pytest.approx(draws[3], rel=1e-9)  # whatever the batch


def lattice_law(denoiser, q: Question, draws: int, min_t: float) -> tuple[float, float]:
    """Mean and variance of (1/K) sum_i f_i / t_i on the lattice t_i = eps + (1 - eps)(i + u) / K: masks enumerated, u by quadrature.

    Given u the f_i are independent, so Var = E_u[sum_i Var(f_i / t_i)] / K^2 + Var_u(mean).
    """
    n = q.end - q.start
    masks = [m for m in product([False, True], repeat=n) if any(m)]
    table, k = (
        np.array([mask_nll(denoiser, q, m) for m in masks]),
        np.array([sum(m) for m in masks]),
    )
    u, weights = np.polynomial.legendre.leggauss(200)
    t = (
        min_t + (1 - min_t) * (np.arange(draws) + (u[:, None] + 1) / 2)[..., None] / draws
    )  # [U, K, 1]
    chance = t**k * (1 - t) ** (n - k)
    mean, square = (chance * table / t).sum(-1), (chance * (table / t) ** 2).sum(-1)  # [U, K]
    total, within = mean.mean(1), (square - mean**2).sum(1) / draws**2
    value = (weights / 2 * total).sum()
    return value, (weights / 2 * (within + (total - value) ** 2)).sum()


def test_monte_carlo_has_the_mean_and_the_noise_that_theory_says(monkeypatch):
    """Over independent questions: its mean, and its variance with a smallest time large enough for the variance to be measured."""
    denoiser, N = Stubborn(4), 1500
    q = Question((3, 0, 1, 2, 2), 1, 4)
    exact = diffusion_nll(denoiser, [q], micro_batch=8)[0][0]
    table = {m: mask_nll(denoiser, q, m) for m in product([False, True], repeat=3)}
    value, _ = lattice_law(denoiser, q, likelihood.MC_DRAWS, likelihood.MC_MIN_T)
    assert value == pytest.approx(
        exact, rel=1e-4
    )  # without bias, but for the share below the smallest time
    monkeypatch.setattr(likelihood, "MC_MIN_T", 0.05)
    value, variance = lattice_law(denoiser, q, likelihood.MC_DRAWS, 0.05)
    drawn = []
    for i in range(
        N
    ):  # the estimator's own masks and weights, read in a table instead of the denoiser
        masks, weights, times = likelihood.drawn_masks(uniforms(5, i, 1, 32 * 4)[0].view(32, 4))
        cells = (times - 0.05) / 0.95 * 32
        assert (
            masks.any(1).all()
            and np.ptp(cells % 1) < 1e-9
            and len(set(cells.astype(int))) == len(cells)
            and cells.max() < 32
        )  # one offset, a lattice
        drawn.append(sum(w * table[tuple(m)] for m, w in zip(masks.tolist(), weights, strict=True)))
    drawn = np.array(drawn)
    assert abs(drawn.mean() - value) < 4 * (variance / N) ** 0.5
    spread = (drawn - drawn.mean()) ** 2
    assert abs(drawn.var(ddof=1) - variance) < 4 * spread.std() / N**0.5
    assert (
        4 * spread.std() / N**0.5 < 0.3 * variance
    )  # and that says something: 24 draws instead of 32 would have a third more
    few = monte_carlo_nll(denoiser, [q] * 6, micro_batch=5, seed=5)
    np.testing.assert_allclose(few, drawn[:6], rtol=1e-5)
    np.testing.assert_allclose(
        few, monte_carlo_nll(denoiser, [q] * 6, micro_batch=64, seed=5), rtol=1e-12
    )


def test_masks_are_all_subsets_and_their_weights_sum_to_the_length():
    masks, weights = suffix_masks(4, None)
    assert sorted(map(tuple, masks.tolist())) == sorted(
        m for m in product([False, True], repeat=4) if any(m)
    )
    assert masks[0].all() and (masks.sum(1) * weights).sum() == pytest.approx(4)
    assert {len(c) for c in combinations(range(4), 2)} == {2} and weights[
        masks.sum(1) == 2
    ] == pytest.approx(np.full(6, 1 / 12))
    masks, weights = suffix_masks(8, torch.rand(128, 9, dtype=torch.float64))
    assert masks[0].all() and weights[0] == 0 and (masks.sum(1) * weights).sum() == pytest.approx(8)
    assert np.bincount(masks[1:].sum(1)).tolist() == [0] + [16] * 8


def test_batches_never_pad_and_change_nothing():
    languages = {length: random_language(length) for length in (3, 4, 5)}
    merged = Language(
        {w: p for language in languages.values() for w, p in language.windows.items()}, 3
    )
    rng = np.random.default_rng(0)
    questions = []
    for i in range(14):
        length = 3 + i % 3
        start = int(rng.integers(0, length - 1))
        questions.append(
            Question(
                tuple(rng.integers(0, 3, length).tolist()),
                start,
                int(rng.integers(start + 1, length + 1)),
            )
        )
    one, two = diffusion_nll(merged, questions, 1), diffusion_nll(merged, questions, 9)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)
    assert (one[1] == two[1]).all()
    assert (confident_guess(merged, questions, 1) == confident_guess(merged, questions, 9)).all()


def test_vocabulary_rows_are_read_at_masked_positions_only():
    language = random_language(5)
    diffusion_nll(language, [Question((0, 1, 2, 0, 1), 1, 4)], 8)
    assert language.asked == 3 * 2**2  # sum of the sizes of the 7 masks


def test_parallel_and_confident_guesses_differ_as_they_should():
    """Marginals say (0, 1), a pair that never occurs; the likeliest first token, then the second given it, says (0, 0)."""
    pairs = {(0, 0): 0.32, (0, 2): 0.28, (1, 1): 0.4}
    language = Language({(0, *pair, 0): p for pair, p in pairs.items()}, 3)
    questions = [Question((0, *pair, 0), 1, 3) for pair in pairs]
    assert diffusion_nll(language, questions, 2)[1].tolist() == [False, False, False]
    assert confident_guess(language, questions, 2).tolist() == [True, False, False]
    language = Language({(0, 0, 0, 0): 0.6, (0, 1, 1, 0): 0.4}, 3)
    questions = [Question((0, a, a, 0), 1, 3) for a in (0, 1)]
    assert diffusion_nll(language, questions, 2)[1].tolist() == [True, False]
    assert confident_guess(language, questions, 2).tolist() == [True, False]
    pairs = {
        (0, 0): 0.3,
        (0, 1): 0.32,
        (1, 0): 0.38,
    }  # marginals say (0, 0), though after either 0 the other token is likelier a 1
    questions = [Question((0, *pair, 0), 1, 3) for pair in pairs]
    language = Language({(0, *pair, 0): p for pair, p in pairs.items()}, 3)
    assert diffusion_nll(language, questions, 2)[1].tolist() == [True, False, False]
    assert confident_guess(language, questions, 2).tolist() == [
        False,
        False,
        True,
    ]  # 0.68 for the second 0, then 0.38 against 0.3


def test_confidence_decides_the_order():
    """The second is the surer one (0.68 against 0.6); written first it makes (1, 1) the guess, the first one first would make it (0, 0)."""
    pairs = {(0, 0): 0.32, (0, 1): 0.28, (1, 1): 0.4}
    language = Language({(0, *pair, 0): p for pair, p in pairs.items()}, 3)
    assert confident_guess(
        language, [Question((0, *pair, 0), 1, 3) for pair in pairs], 4
    ).tolist() == [False, False, True]


class Bigrams:
    """A 'network' whose features are its input tokens: the next token's law is a row of a table."""

    def __init__(self):
        self.p = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.5, 0.25, 0.25]])

    def __call__(self, x):
        return x[..., None]

    def log_p(self, h):
        return self.p[h[:, 0]].log()


def test_autoregressive_likelihood_by_hand():
    questions = [
        Question((0, 1, 2, 0), 1, 3),
        Question((0, 2, 1, 0), 1, 3),
        Question((0, 1, 2, 0, 0), 2, 4),
        Question((0, 0, 2, 0), 2, 3),
    ]
    nll, right = autoregressive_nll(Bigrams(), questions, 2)
    np.testing.assert_allclose(np.exp(-nll), [0.6 * 0.6, 0.3 * 0.25, 0.6 * 0.5, 0.3], rtol=1e-6)
    assert right.tolist() == [True, False, True, False]

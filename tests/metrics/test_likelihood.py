"""Likelihood and guesses of suffixes, against languages with known probabilities."""

from itertools import product
from math import log

import numpy as np
import pytest
import torch
from known import Language, Stubborn

from halfstep.diffusion.schedules import Cosine
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


def exact_nll(language: Language, q: Question) -> float:
    """-log p(suffix | everything else) by summing windows."""
    around = 0.0
    for window, p in language.windows.items():
        if window[: q.start] == q.ids[: q.start] and window[q.end :] == q.ids[q.end :]:
            around += p
    return -log(language.windows[q.ids] / around)


def mask_nll(denoiser, q: Question, mask, t: float = 0.5) -> float:
    """sum over the masked suffix tokens of -log p, from one window alone."""
    x = torch.tensor([q.ids])
    where = torch.zeros_like(x, dtype=torch.bool)
    where[0, q.start : q.end] = torch.tensor(mask)
    h = denoiser.features(x.masked_fill(where, denoiser.mask_id), torch.full((1,), t))
    log_p = denoiser.log_p(h.flatten(0, 1))
    return -sum(log_p[i, q.ids[i]].item() for i in where[0].nonzero()[:, 0].tolist())


def all_masks(n: int) -> list[tuple[bool, ...]]:
    """Every mask of n tokens but the empty one."""
    return [mask for mask in product([False, True], repeat=n) if any(mask)]


def long_question(n: int) -> Question:
    """A suffix of n tokens between two tokens of context."""
    return Question((3, *[i % 4 for i in range(n)], 2), 1, 1 + n)


QUESTIONS = [
    Question(ids, start, end)
    for ids in [(0, 1, 2, 0, 1), (2, 2, 1, 0, 0)]
    for start, end in [(1, 4), (2, 4), (3, 4), (0, 5), (4, 5)]
]


def test_a_perfect_denoisers_bound_is_the_exact_likelihood():
    language = random_language(5)
    nelbo, _ = diffusion_nll(language, QUESTIONS, micro_batch=3)
    np.testing.assert_allclose(nelbo, [exact_nll(language, q) for q in QUESTIONS], rtol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_enumeration_is_the_integral_over_time(n):
    """int_0^1 dt/t sum_S t^k (1-t)^(n-k) nll(S), by a quadrature exact for this polynomial."""
    denoiser, q = Stubborn(4), long_question(n)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    t, dt = (nodes + 1) / 2, weights / 2
    integral = 0.0
    for mask in all_masks(n):
        k = sum(mask)
        integral += mask_nll(denoiser, q, mask) * (dt * t ** (k - 1) * (1 - t) ** (n - k)).sum()
    assert diffusion_nll(denoiser, [q], micro_batch=8)[0][0] == pytest.approx(integral, rel=1e-6)


class Clock(Stubborn):
    """A denoiser that uses t: it sharpens or flattens its probabilities with time."""

    ignores_time = False

    def features(self, xt, t, where=None):
        table = super().features(xt, t) * (0.2 + 3 * t.double())[:, None, None]
        return table if where is None else table[where]


@pytest.mark.parametrize("n", [1, 3, 6])
def test_the_bound_is_the_same_under_any_schedule(n):
    """The NELBO (MDLM eq. 10) of a denoiser that uses t, by quadrature under the cosine schedule.

    With the time k / (n + 1) for k masked tokens it is a denoiser of xt alone, whatever the
    schedule. So it has one NELBO under all schedules that end with all tokens masked.
    """
    denoiser, q = Clock(4), long_question(n)
    schedule = Cosine(eps=0.0)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = torch.from_numpy((nodes + 1) / 2)
    masked, rate = 1 - schedule.alpha(t), -schedule.alpha_prime(t) / (1 - schedule.alpha(t))
    integral = 0.0
    for mask in all_masks(n):
        k = sum(mask)
        chance = (rate * masked**k * (1 - masked) ** (n - k)).numpy()
        integral += mask_nll(denoiser, q, mask, k / (n + 1)) * (weights / 2 * chance).sum()
    assert diffusion_nll(denoiser, [q], micro_batch=8)[0][0] == pytest.approx(integral, rel=1e-6)


def test_enumeration_agrees_with_sampled_times_and_masks():
    """MDLM's estimator as written: t uniform, every token masked with chance t, weight 1 / t."""
    denoiser, q, rng = Stubborn(4), Question((3, 0, 1, 2, 2), 1, 4), np.random.default_rng(0)
    table = {mask: mask_nll(denoiser, q, mask) for mask in product([False, True], repeat=3)}
    t = rng.random(40_000)
    masks = rng.random((len(t), 3)) < t[:, None]
    draws = np.array([table[tuple(mask)] for mask in masks.tolist()]) / t
    exact = diffusion_nll(denoiser, [q], micro_batch=8)[0][0]
    assert abs(draws.mean() - exact) < 4 * draws.std() / len(t) ** 0.5
    assert abs(draws.mean() - exact) < 0.05 * exact  # the noise is small enough to tell


def test_longer_suffixes_are_estimated_without_bias(monkeypatch):
    denoiser, q = Stubborn(4), long_question(9)
    draws = np.array([diffusion_nll(denoiser, [q], 64, seed=seed)[0][0] for seed in range(12)])
    again = diffusion_nll(denoiser, [q], 5, seed=3)[0][0]
    monkeypatch.setattr(likelihood, "EXACT", 9)
    exact = diffusion_nll(denoiser, [q], 64)[0][0]
    assert abs(draws.mean() - exact) < 4 * draws.std(ddof=1) / len(draws) ** 0.5
    assert draws.std() < 0.1 * exact and draws.std() > 0
    assert again == pytest.approx(draws[3], rel=1e-9)  # in another batch


def lattice_law(denoiser, q: Question, draws: int, min_t: float) -> tuple[float, float]:
    """Mean and variance of (1/K) sum_i f_i / t_i on the lattice t_i = eps + (1 - eps)(i + u) / K.

    Masks are enumerated, u is integrated by quadrature. Given u the f_i are independent, so
    Var = E_u[sum_i Var(f_i / t_i)] / K^2 + Var_u(mean).
    """
    n = q.end - q.start
    masks = all_masks(n)
    table = np.array([mask_nll(denoiser, q, mask) for mask in masks])
    k = np.array([sum(mask) for mask in masks])
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u, weights = (nodes + 1) / 2, weights / 2
    t = min_t + (1 - min_t) * (np.arange(draws) + u[:, None])[..., None] / draws  # [U, K, 1]
    chance = t**k * (1 - t) ** (n - k)
    mean, square = (chance * table / t).sum(-1), (chance * (table / t) ** 2).sum(-1)  # [U, K]
    total, within = mean.mean(1), (square - mean**2).sum(1) / draws**2
    value = (weights * total).sum()
    return value, (weights * (within + (total - value) ** 2)).sum()


def test_the_monte_carlo_estimate_has_almost_no_bias():
    """Only the share below the smallest time is missing."""
    denoiser, q = Stubborn(4), Question((3, 0, 1, 2, 2), 1, 4)
    exact = diffusion_nll(denoiser, [q], micro_batch=8)[0][0]
    value, _ = lattice_law(denoiser, q, likelihood.MC_DRAWS, likelihood.MC_MIN_T)
    assert value == pytest.approx(exact, rel=1e-4)


def test_monte_carlo_has_the_mean_and_variance_of_theory(monkeypatch):
    """Over independent questions, with a smallest time at which the variance can be measured."""
    monkeypatch.setattr(likelihood, "MC_MIN_T", 0.05)
    denoiser, q, N = Stubborn(4), Question((3, 0, 1, 2, 2), 1, 4), 1500
    table = {mask: mask_nll(denoiser, q, mask) for mask in product([False, True], repeat=3)}
    value, variance = lattice_law(denoiser, q, likelihood.MC_DRAWS, 0.05)
    drawn = []
    for i in range(N):  # the estimator's own masks and weights, with the table as the denoiser
        masks, weights, times = likelihood.drawn_masks(uniforms(5, i, 1, 32 * 4)[0].view(32, 4))
        cells = (times - 0.05) / 0.95 * 32
        assert masks.any(1).all()
        assert np.ptp(cells % 1) < 1e-9  # one offset
        assert len(set(cells.astype(int))) == len(cells) and cells.max() < 32  # a lattice
        estimate = zip(weights, masks.tolist(), strict=True)
        drawn.append(sum(weight * table[tuple(mask)] for weight, mask in estimate))
    drawn = np.array(drawn)
    assert abs(drawn.mean() - value) < 4 * (variance / N) ** 0.5
    spread = (drawn - drawn.mean()) ** 2
    error = 4 * spread.std() / N**0.5
    assert abs(drawn.var(ddof=1) - variance) < error
    assert error < 0.3 * variance  # precise: 24 draws instead of 32 would add a third
    few = monte_carlo_nll(denoiser, [q] * 6, micro_batch=5, seed=5)
    np.testing.assert_allclose(few, drawn[:6], rtol=1e-5)
    again = monte_carlo_nll(denoiser, [q] * 6, micro_batch=64, seed=5)
    np.testing.assert_allclose(few, again, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_mask_is_read_once_where_time_does_not_matter(n, monkeypatch):
    """The draws of elbo-mc repeat masks. A denoiser of time reads each at its own time."""
    asked: list[tuple[tuple[bool, ...], float]] = []

    class Counted(Stubborn):
        def features(self, xt, t, where=None):
            asked.extend(zip(map(tuple, (xt == self.mask_id).tolist()), t.tolist(), strict=True))
            return super().features(xt, t, where)

    questions = [long_question(n)] * 4
    once = monte_carlo_nll(Counted(4), questions, 8, seed=2)
    masks = [mask for mask, _ in asked]
    assert len(masks) <= len(questions) * min(2**n - 1, likelihood.MC_DRAWS)
    monkeypatch.setattr(Counted, "ignores_time", False)
    asked.clear()
    np.testing.assert_allclose(monte_carlo_nll(Counted(4), questions, 8, seed=2), once, rtol=1e-12)
    assert {mask for mask, _ in asked} == set(masks)
    assert len({t for _, t in asked}) == len(asked) > len(masks)


def test_masks_are_all_subsets_and_their_weights_sum_to_the_length():
    masks, weights = suffix_masks(4, None)
    assert sorted(map(tuple, masks.tolist())) == sorted(all_masks(4))
    assert masks[0].all() and (masks.sum(1) * weights).sum() == pytest.approx(4)
    assert weights[masks.sum(1) == 2] == pytest.approx(np.full(6, 1 / 12))
    masks, weights = suffix_masks(8, torch.rand(128, 9, dtype=torch.float64))
    assert masks[0].all() and weights[0] == 0 and (masks.sum(1) * weights).sum() == pytest.approx(8)
    assert np.bincount(masks[1:].sum(1)).tolist() == [0] + [16] * 8


def test_batches_never_pad_and_change_nothing():
    windows = {}
    for length in (3, 4, 5):
        windows |= random_language(length).windows
    merged = Language(windows, 3)
    rng = np.random.default_rng(0)
    questions = []
    for i in range(14):
        length = 3 + i % 3
        start = int(rng.integers(0, length - 1))
        ids = tuple(rng.integers(0, 3, length).tolist())
        questions.append(Question(ids, start, int(rng.integers(start + 1, length + 1))))
    one, two = diffusion_nll(merged, questions, 1), diffusion_nll(merged, questions, 9)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-12)
    assert (one[1] == two[1]).all()
    assert (confident_guess(merged, questions, 1) == confident_guess(merged, questions, 9)).all()


def test_logits_are_computed_at_masked_positions_only():
    language = random_language(5)
    diffusion_nll(language, [Question((0, 1, 2, 0, 1), 1, 4)], 8)
    assert language.asked == 3 * 2**2  # sum of the sizes of the 7 masks


def pair_language(pairs):
    """A language of two tokens between two EOS, and the question for each pair."""
    windows = {(0, *pair, 0): p for pair, p in pairs.items()}
    return Language(windows, 3), [Question(window, 1, 3) for window in windows]


@pytest.mark.parametrize(
    "pairs, parallel, confident",
    [
        # Marginals give (0, 1), which never occurs; the likeliest first token, then the second
        # given it, give (0, 0).
        ({(0, 0): 0.32, (0, 2): 0.28, (1, 1): 0.4}, [False] * 3, [True, False, False]),
        ({(0, 0): 0.6, (1, 1): 0.4}, [True, False], [True, False]),
        # Marginals give (0, 0), but next to either 0 a 1 is likelier. The second token is the surer
        # one (0.68 for 0); given it, 1 (0.38) beats 0 (0.3).
        (
            {(0, 0): 0.3, (0, 1): 0.32, (1, 0): 0.38},
            [True, False, False],
            [False, False, True],
        ),
    ],
)
def test_parallel_and_confident_guesses_differ_as_they_should(pairs, parallel, confident):
    language, questions = pair_language(pairs)
    assert diffusion_nll(language, questions, 2)[1].tolist() == parallel
    assert confident_guess(language, questions, 2).tolist() == confident


def test_the_most_confident_token_is_written_first():
    """The second token is the surer one (0.68 against 0.6), and written first it leads to (1, 1).

    The first token, written first, would lead to (0, 0).
    """
    language, questions = pair_language({(0, 0): 0.32, (0, 1): 0.28, (1, 1): 0.4})
    assert confident_guess(language, questions, 4).tolist() == [False, False, True]


class Bigrams:
    """A network with its input tokens as features: a row of a table gives the next token."""

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

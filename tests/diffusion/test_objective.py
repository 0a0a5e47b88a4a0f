"""Masking, the reverse posterior and the NELBO against an enumerated language."""

import pytest
import torch
from oracle import EPS, Language, Perfect, chi_square, masked_loss, reveal_chance
from oracle import nelbo as exact_nelbo

from halfstep.diffusion.masking import corrupt, reveal_probability
from halfstep.diffusion.objective import nelbo, nelbo_weight, stratified_times
from halfstep.diffusion.schedules import LogLinear

LANGUAGE = Language(4, 4, seed=7)


class Bent:
    """alpha(t) = 1 - 0.9 t^2: a schedule whose weight is not 1 / t."""

    def alpha(self, t):
        return 1 - 0.9 * t**2

    def alpha_prime(self, t):
        return -1.8 * t


def test_oracle_nelbo_of_the_perfect_denoiser_is_the_entropy():
    assert abs(exact_nelbo(LANGUAGE, eps=0.0) - LANGUAGE.entropy) < 1e-9
    assert (
        abs(masked_loss(LANGUAGE, 1.0) - (-(p := LANGUAGE.posterior[-1]) * p.log()).sum().item())
        < 1e-12
    )  # all masked: sum of marginal entropies


def test_corrupt_masks_with_the_chance_of_the_schedule_and_leaves_the_rest():
    x0 = torch.randint(0, 5, (4, 50_000), generator=torch.Generator().manual_seed(1))
    u = torch.rand(4, 50_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0.0, 0.01, 0.5, 1.0], dtype=torch.float64)
    xt = corrupt(x0, t, u, LogLinear(), 5)
    masked = xt == 5
    assert torch.equal(xt[~masked], x0[~masked]) and masked[0].sum() == 0
    for i, share in enumerate(((1 - EPS) * t).tolist()):
        law = torch.tensor([1 - share, share], dtype=torch.float64)
        assert chi_square(masked[i].long().bincount(minlength=2), law) > 1e-5
    assert (
        0 < (~masked[3]).sum() < 120
    )  # a thousandth stays visible at t = 1 (MDLM's eps), about 50 here
    assert torch.equal(masked[2], u[2] < (1 - EPS) * 0.5)


def test_reveal_probability():
    """(t - s) / t when log-linear, exactly 1 at s = 0; two steps compose to one."""
    t = torch.tensor([1e-5, 0.03, 0.5, 1.0], dtype=torch.float64)
    for share in (0.0, 0.3, 0.999):
        s = share * t
        assert torch.allclose(reveal_probability(t, s, LogLinear()), (t - s) / t, rtol=1e-9)
        assert torch.allclose(
            reveal_probability(t, s, LogLinear()),
            torch.tensor(
                [reveal_chance(*p) for p in zip(t.tolist(), s.tolist(), strict=True)]
            ).double(),
        )
        for schedule in (LogLinear(), Bent()):
            halfway = (t + s) / 2
            two = (1 - reveal_probability(t, halfway, schedule)) * (
                1 - reveal_probability(halfway, s, schedule)
            )
            assert torch.allclose(two, 1 - reveal_probability(t, s, schedule), atol=1e-9)
    assert (reveal_probability(t, torch.zeros_like(t), LogLinear()) == 1).all()


def test_stratified_times_are_one_in_each_stratum_and_uniform():
    u = torch.rand(500, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    t = torch.stack([stratified_times(row, 0.0) for row in u])
    assert torch.equal((t * 16).floor().long(), torch.arange(16).expand(500, 16))
    assert torch.allclose(t * 16 % 1, u, atol=1e-12)
    shifted = stratified_times(u[0], 0.2)
    assert torch.allclose(shifted, 0.2 + 0.8 * t[0]) and shifted.min() >= 0.2 and shifted.max() < 1
    edge = stratified_times(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), 1e-3)
    assert edge[0] == 1e-3 and edge[1] <= 1


def test_weight_is_one_over_t():
    t = torch.tensor([1e-5, 1e-3, 0.2, 1.0], dtype=torch.float64)
    assert torch.allclose(nelbo_weight(t, LogLinear()), 1 / t, rtol=1e-9)
    assert torch.allclose(nelbo_weight(t[1:].float(), LogLinear()), (1 / t[1:]).float(), rtol=1e-4)
    assert torch.allclose(nelbo_weight(t, Bent()), 1.8 * t / (0.9 * t**2))


@pytest.mark.parametrize("heat", [0.0, 1.5])
def test_nelbo_of_given_draws_is_its_sum(heat):
    """Against loops over rows and positions."""
    denoiser, generator = Perfect(LANGUAGE, heat), torch.Generator().manual_seed(4)
    x0 = torch.randint(0, 4, (40, 4), generator=generator)
    t, u = (
        torch.rand(40, generator=generator, dtype=torch.float64),
        torch.rand(40, 4, generator=generator, dtype=torch.float64),
    )
    expected = 0.0
    for row in range(40):
        hidden = u[row] < (1 - EPS) * t[row]
        p = denoiser.table(t[row].item())[LANGUAGE.index(x0[row].masked_fill(hidden, 4))]
        expected += sum(
            -p[i, x0[row, i]].log().item() / t[row].item() for i in range(4) if hidden[i]
        )
    found = nelbo(denoiser, x0, t, u)
    assert (
        found.dtype == torch.float32
        and found.shape == ()
        and abs(found.item() / expected - 1) < 1e-5
    )


def test_nelbo_estimate_is_the_exact_bound():
    """The mean NELBO of the exact denoiser is the integral over [min_t, 1].

    The mean is over texts, stratified times and masks.
    """
    N, min_t, generator = 60_000, 1e-3, torch.Generator().manual_seed(5)
    x0 = LANGUAGE.texts[torch.multinomial(LANGUAGE.p, N, replacement=True, generator=generator)]
    t = stratified_times(torch.rand(N, generator=generator, dtype=torch.float64), min_t)
    u = torch.rand(N, 4, generator=generator, dtype=torch.float64)
    exact = exact_nelbo(LANGUAGE, min_t, 1.0) / (1 - min_t)
    totals = torch.stack(
        [nelbo(Perfect(LANGUAGE), *(a[k::60] for a in (x0, t, u))) for k in range(60)]
    ) / (N / 60)
    assert abs(totals.mean().item() - exact) < 4.5 * totals.std().item() / 60**0.5
    assert totals.std().item() / 60**0.5 < 0.01 * exact  # the test can tell one percent
    assert abs(exact - LANGUAGE.entropy) < 0.01 * exact


def test_nothing_masked_costs_nothing():
    x0, t = torch.zeros(3, 4, dtype=torch.long), torch.full((3,), 1e-3, dtype=torch.float64)
    assert nelbo(Perfect(LANGUAGE), x0, t, torch.ones(3, 4, dtype=torch.float64)).item() == 0

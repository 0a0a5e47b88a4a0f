"""Draws: uniforms that belong to a sample, and categorical draws against exact cumulative sums."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from oracle import chi_square

from halfstep.kernels.categorical import draw_from, inverse_cdf, uniforms

LAST = 1 - 2**-53  # the largest uniform there is


def test_uniforms_belong_to_the_sample_not_to_the_batch():
    whole = uniforms(7, 0, 10, 5)
    parts = torch.cat([uniforms(7, 0, 3, 5), uniforms(7, 3, 1, 5), uniforms(7, 4, 6, 5)])
    assert whole.dtype == torch.float64 and torch.equal(whole, parts)
    assert torch.equal(whole[:, :2], uniforms(7, 0, 10, 2))
    assert uniforms(7, 0, 0, 5).shape == (0, 5)


def test_uniforms_differ_between_samples_seeds_and_places_and_are_flat():
    u = torch.cat([uniforms(seed, 0, 50, 40) for seed in (0, 1, 2**40)])
    assert len(u.unique()) == u.numel() and 0 <= u.min() and u.max() < 1
    counts = torch.histc(u, 20, 0, 1)
    assert chi_square(counts, torch.full((20,), 1 / 20, dtype=torch.float64)) > 1e-4
    centered = u - 0.5
    for a, b in (
        (centered[:-1], centered[1:]),
        (centered[:, :-1], centered[:, 1:]),
    ):  # neighbors by sample and by place: variance 1/144 each
        assert abs((a * b).sum().item()) / (a.numel() ** 0.5 / 12) < 4


@pytest.mark.parametrize("V", [1, 2, 3, 5, 16, 17, 31, 257, 1000, 50257])
def test_inverse_cdf_equals_numpy_in_float64(V):
    N = 2000 if V < 10_000 else 100
    generator = torch.Generator().manual_seed(V)
    log_p = 3 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    u = torch.rand(N, generator=generator, dtype=torch.float64)
    p = np.exp(log_p.numpy() - log_p.numpy().max(1, keepdims=True))
    cdf = p.cumsum(1) / p.sum(1, keepdims=True)
    expected = (cdf <= u.numpy()[:, None]).sum(1)
    found = inverse_cdf(log_p, u)
    assert found.dtype == torch.int64 and found.tolist() == expected.tolist()
    single = inverse_cdf(
        log_p.float(), u
    ).numpy()  # float32 probabilities: the same token, unless u is within 1e-6 of a boundary
    below = np.where(single > 0, cdf[np.arange(N), single - 1], 0)
    assert (u.numpy() >= below - 1e-6).all() and (
        u.numpy() <= cdf[np.arange(N), single] + 1e-6
    ).all()
    assert (single == expected).mean() > 0.99


def test_inverse_cdf_is_the_smallest_token_whose_cdf_exceeds_u():
    log_p = torch.tensor(
        [0.25, 0.5, 0.0, 0.25], dtype=torch.float64
    ).log()  # dyadic: every sum is exact
    u = torch.tensor([0, 0.25 - 2**-54, 0.25, 0.75 - 2**-53, 0.75, LAST], dtype=torch.float64)
    assert inverse_cdf(log_p.expand(6, 4), u).tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("V", [2, 7, 10, 49, 50, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_cdf_never_gives_a_token_without_mass(V, dtype):
    """A single allowed token is drawn at any place, also at the ends of the unit interval.

    Then half of the tokens are forbidden.
    """
    u = torch.tensor([0.0, 2**-53, 0.5, LAST], dtype=torch.float64)
    for v in range(V):
        row = torch.full((V,), -torch.inf, dtype=dtype)
        row[v] = -200.0
        assert inverse_cdf(row.expand(4, V), u).tolist() == [v] * 4
    generator = torch.Generator().manual_seed(V)
    log_p = 5 * torch.randn(400, V, generator=generator, dtype=dtype)
    log_p[torch.rand(400, V, generator=generator) < 0.5] = -torch.inf
    log_p[:, V // 2] = 0
    for value in u:
        token = inverse_cdf(log_p, value.expand(400))
        assert log_p[torch.arange(400), token].isfinite().all()
    allowed = log_p.isfinite()
    assert torch.equal(inverse_cdf(log_p, u[:1].expand(400)), allowed.to(torch.uint8).argmax(1))
    lasts = V - 1 - allowed.flip(1).to(torch.uint8).argmax(1)
    mass = log_p.double().softmax(1)[torch.arange(400), lasts]
    clear = mass > 1e-12  # above rounding, the largest uniform means the last token with mass
    assert clear.sum() > 200 and torch.equal(
        inverse_cdf(log_p, u[-1:].expand(400))[clear], lasts[clear]
    )


def test_inverse_cdf_keeps_the_tail_that_float32_noise_cuts_off():
    """A flat tail of 1e-3 over 50,257 tokens has its exact share among the draws.

    The released code at reveal probability 1/1024 has 0.15 of it.
    """
    V, N = 50257, 4000
    log_p = torch.full((V,), float(np.log(1e-3 / (V - 1))))
    log_p[0] = float(np.log1p(-1e-3))
    u = (
        torch.arange(N, dtype=torch.float64) + 0.5
    ) / N  # an even grid: the tail's share is right to one draw
    tail = (inverse_cdf(log_p.expand(100, V), u[-100:]) > 0).sum().item()
    assert abs(tail - N * 1e-3) <= 1
    tiny = torch.tensor([[0.0, float(np.log(1e-12))]])
    u = torch.tensor([1 - 1e-11, 1 - 1e-13], dtype=torch.float64)
    assert inverse_cdf(tiny.expand(2, 2), u).tolist() == [0, 1]


def test_draws_from_probabilities_are_those_of_inverse_cdf():
    """Whatever their sum; the last uniform below 1 gives no token without a probability."""
    p = torch.rand(50, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    p[:, 60:] = 0
    u = uniforms(3, 0, 50, 8)
    tokens = draw_from(p, u)
    expected = [inverse_cdf(p.log(), column) for column in u.unbind(1)]
    assert torch.equal(tokens, torch.stack(expected, 1))
    assert torch.equal(draw_from(p, u[:, 0]), expected[0])
    last = torch.full((50,), 1 - 2**-53, dtype=torch.float64)
    assert (p.gather(1, draw_from(p, last)[:, None]) > 0).all()
    assert (p.gather(1, draw_from(p, torch.zeros_like(last))[:, None]) > 0).all()


def test_inverse_cdf_has_the_exact_law():
    p = torch.tensor([[0.5, 0.0, 0.2, 0.05, 0.0, 0.249, 0.001]], dtype=torch.float64)
    found = inverse_cdf(p.log().expand(200_000, 7), uniforms(3, 0, 1, 200_000)[0])
    assert chi_square(found.bincount(minlength=7), p[0]) > 1e-5


def test_inverse_cdf_needs_no_normalised_rows():
    generator = torch.Generator().manual_seed(1)
    log_p, u = torch.randn(2, 300, 50, generator=generator, dtype=torch.float64)
    u = u[:, 0].sigmoid()
    assert (
        inverse_cdf(log_p, u).tolist()
        == inverse_cdf(log_p + 300, u).tolist()
        == inverse_cdf(log_p - 3000, u).tolist()
    )


def test_row_against_fractions():
    """Exact rational arithmetic just below and above every boundary of a row over 37 tokens."""
    weights = [1, 3, 0, 2, 5, 0, 0, 1] * 4 + [0, 16, 0, 4, 60]
    total, log_w = sum(weights), torch.tensor(weights, dtype=torch.float64).log()
    for v in range(len(weights)):
        edge = sum(weights[: v + 1]) / total
        for u in {edge - 2**-48, edge + 2**-48} - {1 + 2**-48}:
            expected = next(
                k
                for k in range(len(weights))
                if Fraction(sum(weights[: k + 1]), total) > Fraction(u)
            )
            assert (
                inverse_cdf(log_w[None], torch.tensor([u], dtype=torch.float64)).item() == expected
            )

"""Noise schedules: each row is a schedule, has its closed form, and travels with the denoiser."""

import math
from typing import get_args

import pytest
import torch
from oracle import Language, Perfect, ScheduleOf, chi_square
from oracle import nelbo as exact_nelbo

from halfstep import checkpoint
from halfstep.config import Network
from halfstep.diffusion.masking import corrupt
from halfstep.diffusion.objective import nelbo, nelbo_weight
from halfstep.diffusion.schedules import SCHEDULES, masked_share

EPS = 1e-3
CLOSED = {  # alpha(t), as published
    "loglinear": lambda t: 1 - (1 - EPS) * t,
    "cosine": lambda t: 1 - (1 - EPS) * torch.cos(math.pi / 2 * (1 - t)),  # MD4, arXiv 2406.04329
}
EACH = pytest.mark.parametrize("name", SCHEDULES)


@EACH
def test_a_schedule_is_one(name):
    """alpha falls from 1 to about 0, alpha_prime is its derivative, sigma is -log alpha.

    sigma has no cancellation at small t.
    """
    schedule = SCHEDULES[name]()
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert alpha[0] == 1 and 0 < alpha[-1] < 0.01 and (alpha.diff() < 0).all()
    by_autograd = ScheduleOf(schedule.alpha)
    assert torch.allclose(schedule.alpha_prime(t), by_autograd.alpha_prime(t), atol=1e-12)
    assert torch.allclose(schedule.sigma(t), by_autograd.sigma(t), atol=1e-12)
    small = torch.tensor([1e-5])
    expected = by_autograd.sigma(small.double()).item()
    assert schedule.sigma(small).item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", CLOSED)
def test_published_closed_form(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(SCHEDULES[name]().alpha(t), CLOSED[name](t), atol=1e-12)


def test_cosine_weight_is_md4s():
    """-alpha' / (1 - alpha) = (pi / 2) cot(pi t / 2) (MD4, arXiv 2406.04329), whatever eps."""
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    found = nelbo_weight(t, SCHEDULES["cosine"]())
    assert torch.allclose(found, math.pi / 2 / torch.tan(math.pi / 2 * t), rtol=1e-9)


@EACH
def test_the_nelbo_does_not_depend_on_the_schedule(name):
    """Its integral over all times is the same for each schedule (MDLM).

    A change of variables in 1 - alpha shows it.
    """
    language, schedule, N = Language(3, 3, seed=5), SCHEDULES[name](), 200_000
    generator = torch.Generator().manual_seed(1)
    t = (torch.arange(N) + torch.rand(N, generator=generator, dtype=torch.float64)) / N
    t = 1e-3 + (1 - 1e-3) * t
    x0 = language.texts[torch.multinomial(language.p, N, True, generator=generator)]
    u = torch.rand(N, language.L, generator=generator, dtype=torch.float64)
    denoiser = Perfect(language, alpha=schedule.alpha)
    found = (1 - 1e-3) * nelbo(denoiser, x0, t, u).item() / N
    low = (1 - schedule.alpha(torch.tensor(1e-3))).item() / (1 - EPS)
    assert found == pytest.approx(exact_nelbo(language, low, 1.0), rel=0.02)


@EACH
def test_masked_share_is_that_of_corrupted_text(name):
    schedule, N = SCHEDULES[name](), 400_000
    t, u = torch.rand(2, N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for dt in (0.0, 0.25):
        s = (t - dt).clamp(min=0)
        masked = (corrupt(torch.zeros(N, 1), s, u[:, None], schedule, 1) == 1).double().mean()
        assert masked_share(schedule, dt) == pytest.approx(masked.item(), abs=0.003)


def test_the_configuration_names_every_schedule():
    """A row of SCHEDULES that `network.schedule` does not allow could not be used."""
    assert set(get_args(Network.model_fields["schedule"].annotation)) == SCHEDULES.keys()


@EACH
def test_a_denoiser_has_the_schedule_of_its_checkpoint(name):
    meta = {
        "kind": "diffusion",
        "vocab_size": 7,
        "network": Network(size="tiny", schedule=name).model_dump(),
    }
    denoiser = checkpoint.build_denoiser(checkpoint.build_network(meta), meta)
    assert isinstance(denoiser.schedule, SCHEDULES[name])
    assert denoiser.inference_copy.schedule is denoiser.schedule


def test_checkpoints_without_a_schedule_are_log_linear():
    """Checkpoints of earlier versions name no schedule."""
    meta = {
        "kind": "diffusion",
        "vocab_size": 7,
        "network": {"size": "tiny", "time_conditioning": False},
    }
    denoiser = checkpoint.build_denoiser(checkpoint.build_network(meta), meta)
    assert isinstance(denoiser.schedule, SCHEDULES["loglinear"])


def test_the_oracle_can_tell_schedules_apart():
    """Each schedule fits its own law of the number of masked tokens, and not the other one."""
    half = torch.full((20_000,), 0.5, dtype=torch.float64)
    u = torch.rand(20_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    k = torch.arange(5, dtype=torch.float64)
    choose = torch.tensor([math.comb(4, n) for n in range(5)], dtype=torch.float64)
    for name, schedule in SCHEDULES.items():
        xt = corrupt(torch.zeros(20_000, 4, dtype=torch.long), half, u, schedule(), 1)
        counts = xt.sum(1).bincount(minlength=5)
        for other, alpha in CLOSED.items():
            m = 1 - alpha(half[0])
            law = choose * m**k * (1 - m) ** (4 - k)
            assert (chi_square(counts, law) > 1e-4) == (name == other)

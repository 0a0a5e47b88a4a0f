"""Divergences: definitions, torch's own numbers, and finite differences in float64.

A new row of DIVERGENCES is tested by being there.
"""

from typing import get_args

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from halfstep.config import Distillation
from halfstep.distill.divergences import DIVERGENCES, GRADIENTS, kl_backward, kl_forward, mse, tvd

every = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def pair(N=6, V=9, seed=0):
    logits = torch.randn(
        2, N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (2 * logits).log_softmax(-1)


def test_the_configuration_knows_them_all():
    assert {
        DIVERGENCES[name] for name in ("kl_backward", "kl_forward", "mse", "tvd", "l1_log_p")
    } <= set(GRADIENTS)
    assert set(get_args(Distillation.model_fields["divergence"].annotation)) == set(DIVERGENCES)


@every
def test_one_number_per_row_zero_where_equal_and_only_there(divergence):
    log_p, log_q = pair()
    assert divergence(log_p, log_q).shape == (6,) and (divergence(log_p, log_q) > 1e-3).all()
    assert divergence(log_p, log_p).abs().max() < 1e-14
    mixed = torch.cat([log_p[:3], log_q[3:]])
    assert torch.equal(divergence(mixed, log_q) > 0, torch.tensor([True] * 3 + [False] * 3))
    nudged = (log_p + 1e-3 * torch.eye(6, 9, dtype=torch.float64)).log_softmax(-1)
    assert (divergence(nudged, log_p) > 0).all()


@every
def test_gradient_by_finite_differences(divergence):
    log_p, log_q = pair(N=4, V=5, seed=1)
    logits = (log_p + 0.3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: divergence(x.log_softmax(-1), log_q), (logits,), eps=1e-6, atol=1e-7
    )
    assert torch.autograd.gradcheck(
        lambda x: divergence(x, log_q), (logits,), eps=1e-6, atol=1e-7
    )  # log_p's own gradient too: readout_loss takes it
    equal = log_q.clone().requires_grad_()  # the minimum is flat; tvd has its kink there
    (gradient,) = torch.autograd.grad(divergence(equal.log_softmax(-1), log_q).sum(), equal)
    assert gradient.isfinite().all() and (divergence is tvd or gradient.abs().max() < 1e-12)


@pytest.mark.parametrize("divergence", GRADIENTS)
def test_the_closed_form_is_the_gradient(divergence):
    log_p, log_q = pair(N=5, V=30, seed=3)
    z = (log_p + 0.3).requires_grad_()
    value = divergence(z.log_softmax(-1), log_q)
    (expected,) = torch.autograd.grad(value.sum(), z)
    gradient = log_q.clone()
    found = GRADIENTS[divergence](log_p.clone(), gradient)
    torch.testing.assert_close(
        (found, gradient), (value.detach(), expected), rtol=1e-12, atol=1e-14
    )


@every
def test_float32_agrees_with_float64_for_a_large_vocabulary(divergence):
    log_p, log_q = pair(N=3, V=50257, seed=2)
    assert torch.allclose(
        divergence(log_p.float(), log_q.float()).double(), divergence(log_p, log_q), rtol=1e-5
    )


@every
def test_nearly_certain_rows_stay_finite(divergence):
    """Logits 80 apart: exp underflows in float32, nothing may become NaN."""
    log_p = (80 * torch.eye(2, 5)).log_softmax(-1).requires_grad_()
    log_q = (80 * torch.eye(2, 5).flip(0)).log_softmax(-1)
    value = divergence(log_p, log_q)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_definitions():
    log_p, log_q = pair(seed=3)
    p, q = log_p.exp(), log_q.exp()
    student, teacher = Categorical(logits=log_p), Categorical(logits=log_q)
    assert torch.allclose(kl_backward(log_p, log_q), kl_divergence(student, teacher))
    assert torch.allclose(kl_forward(log_p, log_q), kl_divergence(teacher, student))
    assert torch.allclose(
        kl_forward(log_p, log_q), kl_backward(log_q, log_p)
    ) and not torch.allclose(kl_forward(log_p, log_q), kl_backward(log_p, log_q))
    assert torch.allclose(
        mse(log_p, log_q),
        torch.stack(
            [
                sum((a - b) ** 2 for a, b in zip(*row, strict=True)) / 9
                for row in zip(log_p, log_q, strict=True)
            ]
        ),
    )
    greatest = torch.where(p > q, p - q, torch.zeros_like(p)).sum(
        -1
    )  # the event on which they differ most
    assert torch.allclose(tvd(log_p, log_q), greatest) and (tvd(log_p, log_q) < 1).all()
    assert (tvd(log_p, log_q) <= (kl_forward(log_p, log_q) / 2).sqrt()).all()  # Pinsker


def test_tvd_of_disjoint_rows_is_one():
    log_p = (1000 * torch.eye(4)).log_softmax(-1)
    assert torch.allclose(tvd(log_p, log_p.roll(1, 0)), torch.ones(4))

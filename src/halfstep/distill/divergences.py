"""Divergences between student and teacher: (log_p[N, V], log_q[N, V]) -> [N]; student first, teacher second, no reduction.

To add one: write the function, put it in the dict at the foot, add its name to `Distillation.divergence`; the tests find it. Its gradient is
found by autograd, unless GRADIENTS has a written one, which saves memory traffic: (log_p, log_q) -> the losses [N] and their gradient [N, V] by the
student's logits; both arguments are written over.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def kl_backward(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p (log p - log q): the paper's KLD (SDTT appendix B); seeks the teacher's modes."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def kl_forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v q (log q - log p): covers the teacher's mass."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def mse(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over the vocabulary of the squared difference of log-probabilities (SDTT eq. 11)."""
    return (log_p - log_q).square().mean(-1)


def tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Total variation distance: half the sum of |p - q| (SDTT eq. 10)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def l1_log_p(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of |log p - log q|: what the released code calls tvd. Which of the two made the paper's TVD curves is not known."""
    return (log_p - log_q).abs().sum(-1)


DIVERGENCES = {"kl_backward": kl_backward, "kl_forward": kl_forward, "mse": mse, "tvd": tvd, "l1_log_p": l1_log_p}


def _kl_backward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p (log p - log q - KL)."""
    d, p = torch.sub(log_p, log_q, out=log_q), log_p.exp_()
    value = torch.linalg.vecdot(p, d)
    return value, d.sub_(value[:, None]).mul_(p)


def _kl_forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p - q."""
    q = log_q.exp()
    value = torch.linalg.vecdot(q, log_q.sub_(log_p))
    return value, log_p.exp_().sub_(q)


def _through_log_p(g: Tensor, log_p: Tensor) -> Tensor:
    """The gradient by the logits of g by log p: g - p sum(g), into log_p."""
    return torch.addcmul(g, log_p.exp_(), -g.sum(-1, keepdim=True), out=log_p)


def _mse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """2 d / V through log p, d = log p - log q."""
    d = torch.sub(log_p, log_q, out=log_q)
    value = torch.linalg.vecdot(d, d) / d.shape[-1]
    return value, _through_log_p(d.mul_(2 / d.shape[-1]), log_p)


def _tvd(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """p (s - sum(p s)) / 2, s the sign of p - q; |p - q| sums to p s - q s."""
    p, d = log_p.exp_(), log_q.exp_()
    torch.sub(p, d, out=d)
    value = torch.linalg.vector_norm(d, 1, -1) / 2
    s = d.sign_()
    return value, s.sub_(torch.linalg.vecdot(p, s)[:, None]).mul_(p).div_(2)


def _l1_log_p(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of log p - log q, through log p."""
    d = torch.sub(log_p, log_q, out=log_q)
    value = torch.linalg.vector_norm(d, 1, -1)
    return value, _through_log_p(d.sign_(), log_p)


GRADIENTS: dict[Callable, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    kl_backward: _kl_backward, kl_forward: _kl_forward, mse: _mse, tvd: _tvd, l1_log_p: _l1_log_p,
}  # fmt: skip

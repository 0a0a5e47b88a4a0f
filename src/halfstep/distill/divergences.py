"""Divergences between student and teacher: (log_p[N, V], log_q[N, V]) -> [N].

The student comes first, the teacher second; no reduction.

To add one: write the function, add it to DIVERGENCES, and add its name to `Divergence` in
config/training.py. Its gradient comes from autograd, unless GRADIENTS has a closed form, which
needs fewer passes over [N, V].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Divergence
from halfstep.kernels.logits import exp_


def kl_backward(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v p (log p - log q), the paper's KLD (SDTT appendix B).

    It seeks the modes of the teacher.
    """
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
    """Sum of |log p - log q|, which the released code calls tvd.

    Which of the two made the paper's TVD curves is unknown.
    """
    return (log_p - log_q).abs().sum(-1)


DIVERGENCES: dict[str, Divergence] = {
    "kl_backward": kl_backward,
    "kl_forward": kl_forward,
    "mse": mse,
    "tvd": tvd,
    "l1_log_p": l1_log_p,
}


# Closed forms: (log_p[N, V], log_q[N, V]) -> D[N]; they overwrite log_p, and write the gradient
# dD/dz in the student's logits z to log_q. With log p = log_softmax(z) and dD = sum_v g_v d log
# p_v, the gradient is g - p sum_v g_v.

# The two KL are summed as p (log p - log q) + q - p; the last two terms add up to zero over a row.
# Rounding of a row's normalizer then cancels to first order. Without them it would be as large as
# the divergence of a student that has just been copied from its teacher. For p - q `exp_` is too
# coarse.


def _kl_backward(log_p: Tensor, log_q: Tensor) -> Tensor:
    q = log_q.exp()
    g, p = torch.sub(log_p, log_q, out=log_q), log_p.exp_()
    g *= p
    D = q.sub_(p).add_(g).sum(-1)
    g -= p.mul_(g.sum(-1, keepdim=True))
    return D


def _kl_forward(log_p: Tensor, log_q: Tensor) -> Tensor:
    q, p = log_q.exp(), log_p.exp()
    difference, g = log_p.sub_(log_q), torch.sub(p, q, out=log_q)
    return g.sub(difference.mul_(q)).sum(-1)


def _mse(log_p: Tensor, log_q: Tensor) -> Tensor:
    g, p = torch.sub(log_p, log_q, out=log_q), exp_(log_p)
    D = g.square().mean(-1)
    g.sub_(p.mul_(g.sum(-1, keepdim=True))).mul_(2 / p.shape[-1])
    return D


def _tvd(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp_()
    g = torch.sub(p, log_q.exp_(), out=log_q)
    D = g.abs().sum(-1) / 2
    g.sign_().mul_(p).div_(2)
    g -= p.mul_(g.sum(-1, keepdim=True))
    return D


def _l1_log_p(log_p: Tensor, log_q: Tensor) -> Tensor:
    g, p = torch.sub(log_p, log_q, out=log_q), exp_(log_p)
    D = g.abs().sum(-1)
    g.sign_()
    g -= p.mul_(g.sum(-1, keepdim=True))
    return D


GRADIENTS: dict[Divergence, Callable[[Tensor, Tensor], Tensor]] = {
    kl_backward: _kl_backward,
    kl_forward: _kl_forward,
    mse: _mse,
    tvd: _tvd,
    l1_log_p: _l1_log_p,
}

"""Divergences between student and teacher: (log_p[N, V], log_q[N, V]) -> [N]; student first, teacher second, no reduction.

To add one: write the function, put it in the dict at the foot, add its name to `Distillation.divergence`; the tests find it.
"""

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

"""Noise schedules: the chance alpha(t) that a token is still visible at time t in [0, 1], and its slope."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLinear:
    """alpha(t) = 1 - (1 - eps) t (MDLM appendix E.1): sigma(t) = -log alpha(t) is log-linear; eps keeps sigma(1) finite."""

    eps: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.eps))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level -log alpha(t), what a time-conditioned network is fed."""
        return -torch.log1p(-(1 - self.eps) * t)


SCHEDULES = {"log_linear": LogLinear}

"""Noise schedules: the probability alpha(t) that a token is still visible at time t.

To add one: write the class, add it to SCHEDULES, and add its name to `Network.schedule` in
config/networks.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Schedule


@dataclass(frozen=True)
class LogLinear:
    """alpha(t) = 1 - (1 - eps) t (MDLM appendix E.1).

    sigma(t) = -log alpha(t) is log-linear; eps keeps sigma(1) finite.
    """

    eps: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -(1 - self.eps))

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t)


@dataclass(frozen=True)
class Cosine:
    """alpha(t) = 1 - (1 - eps) sin(pi t / 2), MaskGIT's cosine schedule.

    Source: MaskGIT (arXiv 2202.04200, section 3.3) in its progress 1 - t; MD4 (arXiv 2406.04329) in
    t. Compared with LogLinear, fewer tokens are revealed in the first sampling steps and more in
    the last.
    """

    eps: float = 1e-3

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.eps) * torch.sin(math.pi / 2 * t)

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -(1 - self.eps) * math.pi / 2 * torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * torch.sin(math.pi / 2 * t))


SCHEDULES: dict[str, Callable[[], Schedule]] = {"loglinear": LogLinear, "cosine": Cosine}


def masked_share(schedule: Schedule, dt: float = 0.0, points: int = 4096) -> float:
    """Share of tokens that are masked, `dt` later in the reverse process, over all times.

    Mean over t ~ U[0, 1] of 1 - alpha(max(t - dt, 0)).
    """
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    return (1 - schedule.alpha((t - dt).clamp(min=0))).mean().item()

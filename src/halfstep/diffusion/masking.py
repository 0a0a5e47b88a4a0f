"""The absorbing process: the forward marginal, and the one reverse posterior that all code uses."""

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Schedule


def corrupt(x0: Tensor, t: Tensor, u: Tensor, schedule: Schedule, mask_id: int) -> Tensor:
    """Draw xt ~ q(xt | x0): mask each token with probability 1 - alpha(t) (MDLM eq. 4).

    x0[B, L] int64, t[B] float64, uniforms u[B, L] -> xt[B, L].
    """
    return x0.masked_fill(u < 1 - schedule.alpha(t)[:, None], mask_id)


def reveal_probability(t: Tensor, s: Tensor, schedule: Schedule) -> Tensor:
    """Probability that a token masked at t is visible at s < t (MDLM eq. 7).

    It is (alpha_s - alpha_t) / (1 - alpha_t). A revealed token is drawn from p(x0 | xt), whatever t
    and s. For the log-linear schedule the probability is (t - s) / t.
    """
    return (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))


def mask_indices(where: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """nonzero(as_tuple=True) of a host mask, on `device`, without waiting for the device."""
    return tuple(to_device(index, device) for index in where.nonzero(as_tuple=True))


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`; the host continues before the copy has arrived."""
    if device.type == "cuda":
        return index.pin_memory().to(device, non_blocking=True)
    return index.to(device)

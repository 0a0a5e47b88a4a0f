"""The absorbing process: its forward marginal, and the one reverse posterior that everything uses."""

import torch
from torch import Tensor


def corrupt(x0: Tensor, t: Tensor, u: Tensor, schedule, mask_id: int) -> Tensor:
    """xt ~ q(xt | x0): every token is masked with chance 1 - alpha(t) (MDLM eq. 4), where its uniform u[B, L] says so.

    x0[B, L] int64, t[B] float64 -> xt[B, L].
    """
    return x0.masked_fill(u < 1 - schedule.alpha(t)[:, None], mask_id)


def mask_indices(where: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """A mask on the host as its nonzero(as_tuple=True) on `device`: counted here, so nothing waits for the device."""
    return tuple(to_device(index, device) for index in where.nonzero(as_tuple=True))


def to_device(index: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on `device`; the host goes on before it has arrived."""
    return (
        index.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else index.to(device)
    )


def reveal_probability(t: Tensor, s: Tensor, schedule) -> Tensor:
    """Chance that a token masked at t is visible at s < t: (alpha_s - alpha_t) / (1 - alpha_t) (MDLM eq. 7).

    A revealed token is drawn from p(x0 | xt), whatever t and s; for the log-linear schedule the chance is (t - s) / t.
    """
    return (schedule.alpha(s) - schedule.alpha(t)) / (1 - schedule.alpha(t))

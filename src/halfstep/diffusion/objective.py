"""MDLM's objective: the continuous-time negative evidence lower bound of masked diffusion."""

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Schedule
from halfstep.diffusion.masking import corrupt, mask_indices, to_device
from halfstep.diffusion.readout import cross_entropy


def stratified_times(u: Tensor, min_t: float) -> Tensor:
    """Times t[B] in [min_t, 1), one in each of B equal strata (MDLM section 3.5).

    Uniforms u[B] -> (u_i + i) / B, rescaled.
    """
    B = len(u)
    t = (u + torch.arange(B, dtype=u.dtype, device=u.device)) / B
    return min_t + (1 - min_t) * t


def nelbo_weight(t: Tensor, schedule: Schedule) -> Tensor:
    """Weight -alpha'(t) / (1 - alpha(t)) of a masked token's cross-entropy (MDLM eq. 10).

    It is 1 / t for the log-linear schedule.
    """
    return -schedule.alpha_prime(t) / (1 - schedule.alpha(t))


def nelbo(denoiser: Denoiser, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """One-sample estimate of the NELBO in nats, summed over the batch (MDLM eq. 10).

    Divide by B L for nats per token. x0[B, L] int64, times t[B], masking uniforms u[B, L] -> scalar
    float32 on the denoiser's device. The arguments are on the host, so nothing waits for the
    device. Logits are computed at masked positions only.
    """
    xt = corrupt(x0, t, u, denoiser.schedule, denoiser.mask_id)
    where, device = xt == denoiser.mask_id, denoiser.readout[0].device
    h = denoiser.features(to_device(xt, device), to_device(t, device), mask_indices(where, device))
    weight = nelbo_weight(t, denoiser.schedule).float()[:, None].expand_as(x0)[where]
    tokens = to_device(x0[where], device)
    return cross_entropy(h, denoiser.readout, tokens, to_device(weight, device))

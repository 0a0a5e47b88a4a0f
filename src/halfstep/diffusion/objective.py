"""MDLM's objective: the continuous-time negative evidence lower bound of masked diffusion."""

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Schedule
from halfstep.diffusion.masking import corrupt, mask_indices
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
    float32. Logits are computed at masked positions only.
    """
    xt = corrupt(x0, t, u, denoiser.schedule, denoiser.mask_id)
    # The only wait for the device, before the pass is launched.
    masked = mask_indices((xt == denoiser.mask_id).cpu(), xt.device)
    h = denoiser.features(xt, t, masked)
    weight = nelbo_weight(t, denoiser.schedule).float()[:, None].expand_as(x0)[masked]
    return cross_entropy(h, denoiser.readout, x0[masked], weight)

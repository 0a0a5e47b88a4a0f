"""The plain version of each hot path, written from the equations, for `make bench` to compare with.

It holds full [B, L, V] float32 log-probabilities. It makes a Gumbel draw over the whole vocabulary
at every position of every step, and a pass and readout of the teacher for every substep. Divergence
and cross-entropy are of full tensors. The distribution of its samples, and the value and gradient
of its losses, are those of halfstep; tests/benchmarks/test_bench.py checks it.
"""

import torch
from torch import Tensor

from halfstep.diffusion.masking import corrupt, reveal_probability
from halfstep.distill.targets import MIN_T


def log_p(denoiser, x: Tensor, t: Tensor) -> Tensor:
    """log p(x0 | xt), [B, L, V] float32, at every position."""
    weight, bias = denoiser.readout
    h = denoiser.features(x, t).float()
    return torch.nn.functional.linear(h, weight[: len(bias)].float(), bias.float()).log_softmax(-1)


def gumbel_draw(log_q: Tensor) -> Tensor:
    """argmax over the last dimension of log_q + Gumbel noise: one draw from each softmax."""
    noise = -(torch.rand_like(log_q).clamp_(min=1e-20).log().neg().clamp_(min=1e-20)).log()
    return (log_q + noise).argmax(-1)


def reveal(denoiser, x: Tensor, scores: Tensor, chance: Tensor) -> Tensor:
    """One reverse step (MDLM eq. 7), with the probability r of a reveal in chance[B].

    A masked position takes a token v with probability r p_v and stays masked with 1 - r.
    """
    r = chance.float()[:, None, None].expand(*x.shape, 1)
    outcomes = torch.cat([scores + r.log(), (1 - r).log()], -1)  # the last one is the mask
    drawn = gumbel_draw(outcomes)
    drawn = drawn.masked_fill(drawn == scores.shape[-1], denoiser.mask_id)
    return torch.where(x == denoiser.mask_id, drawn, x)


@torch.no_grad()
def sample(
    denoiser,
    num_samples: int,
    length: int,
    steps: int,
    schedule,
    device="cpu",
    stop: int | None = None,
) -> Tensor:
    """Ancestral sampling, ids [N, L].

    stop: end after this many steps, to measure the time per step (all steps cost the same).
    """
    x = torch.full((num_samples, length), denoiser.mask_id, device=device)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
    for i in range(steps if stop is None else min(stop, steps)):
        scores = log_p(denoiser, x, t[i].float().expand(num_samples))
        chance = reveal_probability(t[i], t[i + 1], schedule)
        x = reveal(denoiser, x, scores, chance.expand(num_samples))
    return x


@torch.no_grad()
def teacher_targets(teacher, xt: Tensor, t: Tensor, dt: float, substeps: int, schedule) -> Tensor:
    """Algorithm 1 of SDTT: log-targets [B, L, V].

    The target of a position is the prediction of the last substep in which it was masked.
    """
    x, target = xt, None
    for i in range(substeps):
        now = (t.double() - i * dt).clamp(min=MIN_T)
        scores = log_p(teacher, x, now.to(t.dtype))
        masked = (x == teacher.mask_id)[..., None]
        target = scores if target is None else torch.where(masked, scores, target)
        x = reveal(teacher, x, scores, reveal_probability(now, (now - dt).clamp(min=0), schedule))
    return target


def distillation_loss(
    student, teacher, divergence, xt: Tensor, t: Tensor, dt: float, substeps: int, schedule
) -> Tensor:
    """Sum over the masked positions of D(student, target of the teacher)."""
    target = teacher_targets(teacher, xt, t, dt, substeps, schedule)
    return (divergence(log_p(student, xt, t), target) * (xt == student.mask_id)).sum()


def pretraining_loss(denoiser, x0: Tensor, t: Tensor, u: Tensor, schedule) -> Tensor:
    """Sum over the batch of MDLM's estimate of the NELBO (eq. 10), in nats."""
    xt = corrupt(x0, t, u, schedule, denoiser.mask_id)
    nll = -log_p(denoiser, xt, t).gather(-1, x0[..., None])[..., 0]
    weight = -schedule.alpha_prime(t) / (1 - schedule.alpha(t))
    return (nll * (xt == denoiser.mask_id) * weight.float()[:, None]).sum()

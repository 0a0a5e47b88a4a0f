"""The teacher's targets: Algorithm 1 of SDTT, in features."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from halfstep.diffusion.masking import mask_indices, reveal_probability
from halfstep.diffusion.readout import readout_loss
from halfstep.diffusion.samplers import draw_tokens
from halfstep.distill.divergences import GRADIENTS
from halfstep.kernels.logits import CACHED, log_softmax_, logits, pad_rows, row_chunks

MIN_T = 1e-5


def exact_times(t: Tensor, dt: float, substeps: int) -> Tensor:
    """t_i = max(t - i dt, 1e-5), [substeps, B] (Algorithm 1, line 3)."""
    i = torch.arange(substeps, dtype=t.dtype, device=t.device)
    return (t - i[:, None] * dt).clamp(min=MIN_T)


def released_times(t: Tensor, dt: float, substeps: int) -> Tensor:
    """The released code's grid: t_i = t w_i + (1 - t) (t - substeps dt), w = linspace(1, 0, substeps). It weighs the end by 1 - t
    where an interpolation would take 1 - w_i, so its first reveal is about 30% too rare in early rounds."""
    w = torch.linspace(1, 0, substeps, dtype=t.dtype, device=t.device)
    return (t * w[:, None] + (1 - t) * (t - substeps * dt)).clamp(min=MIN_T)


TEACHER_TIMES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "exact": exact_times,
    "released": released_times,
}


def reveal_substep(t: Tensor, dt: float, u: Tensor, schedule) -> Tensor:
    """Substep in which each position of u[B, L] is revealed, [B, L]; `substeps` where it stays masked. t[substeps, B] are the starts.

    A substep from t_i reveals a masked position with its own chance; the product of staying masked falls with i, and a position is
    revealed in the first substep after which it is at or below the position's one uniform: the same law as a draw in every substep.
    """
    chance = reveal_probability(t, (t - dt).clamp(min=0), schedule)  # [substeps, B]
    hidden = (1 - chance).cumprod(0)
    return (u[None] < hidden[:, :, None]).sum(0)


@torch.no_grad()
def teacher_targets(
    teacher,
    xt: Tensor,
    t: Tensor,
    dt: float,
    substeps: int,
    u_reveal: Tensor,
    u_token: Tensor,
    schedule,
    times: str = "exact",
) -> Tensor:
    """Algorithm 1 (SDTT): what the teacher, moving `substeps` times by dt from xt, would say at each masked position.

    A position revealed in substep i keeps that substep's prediction; one still masked keeps the last substep's. Predictions are returned
    as features h[N, D] of the N masked positions in row order (read them out with the teacher's readout). The last substep's draw cannot change a
    target and is not made; a text in which nothing was revealed needs no further pass of a teacher that ignores time.
    xt[B, L], t[B], uniforms u_reveal[B, L] and u_token[B, L] (float64).
    """
    starts = TEACHER_TIMES[times](t.double(), dt, substeps)
    step_of = (
        reveal_substep(starts, dt, u_reveal, schedule).masked_fill(xt != teacher.mask_id, -1).cpu()
    )  # the one wait for the device, before all passes
    masked, at = step_of >= 0, partial(mask_indices, device=xt.device)
    x = xt.clone()
    h = teacher.features(x, starts[0].to(t.dtype), at(masked))
    for i in range(substeps - 1):
        reveal = step_of == i
        if reveal.any():
            x[at(reveal)] = draw_tokens(teacher, h[at(reveal[masked])], u_token[at(reveal)])
        changed = reveal.any(1) if teacher.ignores_time else torch.ones_like(reveal[:, 0])
        left = (step_of > i) & changed[:, None]  # whose prediction may still change
        if left.any():
            some = at(changed)
            h[at(left[masked])] = teacher.features(
                x[some], starts[i + 1][some].to(t.dtype), at(left[changed])
            ).to(h.dtype)
    return h


def divergence_loss(
    divergence: Callable[[Tensor, Tensor], Tensor],
    h: Tensor,
    readout,
    h_teacher: Tensor,
    teacher_readout,
) -> Tensor:
    """sum_n D(student_n, teacher_n) over rows h[N, D] and h_teacher[N, D], each with its own readout; no [N, V] tensor outlives a piece."""
    weight, bias = (p.detach() for p in teacher_readout)
    h_teacher = pad_rows(h_teacher)

    def log_q(rows: slice) -> Tensor:
        with torch.no_grad():
            return log_softmax_(logits(h_teacher[rows], weight, bias))

    def gradient(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_q, D = logits(h_teacher[rows], weight, bias), torch.empty_like(log_p[:, 0])
        for few in row_chunks(*log_p.shape, h.device, CACHED):
            D[few] = closed(log_p[few], log_softmax_(log_q[few]))
        return D, log_q

    closed = GRADIENTS.get(divergence)
    return readout_loss(
        h, readout, lambda log_p, rows: divergence(log_p, log_q(rows)), gradient if closed else None
    )

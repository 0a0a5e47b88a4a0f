"""The teacher's targets: Algorithm 1 of SDTT, in features."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Divergence, Readout, Schedule
from halfstep.diffusion.masking import mask_indices, reveal_probability, to_device
from halfstep.diffusion.plans import draw_tokens
from halfstep.diffusion.readout import readout_loss
from halfstep.distill.divergences import GRADIENTS
from halfstep.kernels.logits import CACHED, log_softmax_, logits, pad_rows, row_chunks

MIN_T = 1e-5


def exact_times(t: Tensor, dt: float, substeps: int) -> Tensor:
    """t_i = max(t - i dt, 1e-5), [substeps, B] (Algorithm 1, line 3)."""
    i = torch.arange(substeps, dtype=t.dtype, device=t.device)
    return (t - i[:, None] * dt).clamp(min=MIN_T)


def released_times(t: Tensor, dt: float, substeps: int) -> Tensor:
    """The grid of the released code, [substeps, B].

    t_i = t w_i + (1 - t) (t - substeps dt) with w = linspace(1, 0, substeps).

    The weight of the interval's end is 1 - t, where an interpolation has 1 - w_i. So its first
    reveal is about 30% too rare in early rounds.
    """
    w = torch.linspace(1, 0, substeps, dtype=t.dtype, device=t.device)
    return (t * w[:, None] + (1 - t) * (t - substeps * dt)).clamp(min=MIN_T)


TEACHER_TIMES: dict[str, Callable[[Tensor, float, int], Tensor]] = {
    "exact": exact_times,
    "released": released_times,
}


def reveal_substep(t: Tensor, dt: float, u: Tensor, schedule: Schedule) -> Tensor:
    """Substep in which each position of u[B, L] is revealed, [B, L].

    `substeps` stands for a position that stays masked; t[substeps, B] are the starts.

    A substep from t_i reveals a masked position with its reveal probability. The probability of
    staying masked falls with i. A position is revealed in the first substep after which that
    probability is at most its one uniform: the same law as one draw in every substep.
    """
    chance = reveal_probability(t, (t - dt).clamp(min=0), schedule)  # [substeps, B]
    hidden = (1 - chance).cumprod(0)
    return (u[None] < hidden[:, :, None]).sum(0)


@torch.no_grad()
def teacher_targets(  # noqa: PLR0913 (the arguments of Algorithm 1)
    teacher: Denoiser,
    xt: Tensor,
    t: Tensor,
    dt: float,
    substeps: int,
    u_reveal: Tensor,
    u_token: Tensor,
    times: str = "exact",
    all_passes: bool = False,
) -> Tensor:
    """Targets of a round (SDTT Algorithm 1), as features of the teacher.

    The target of a masked position is the prediction of the teacher when it takes `substeps` steps
    of size dt from xt.

    A position revealed in substep i keeps the prediction of that substep; a position that stays
    masked keeps the last one. Returns features h[N, D] of the N masked positions in row order; read
    them out with the teacher's readout. xt[B, L] int64, t[B], uniforms u_reveal[B, L] and
    u_token[B, L] float64 are on the host, so nothing waits for the device; `times` is a key of
    TEACHER_TIMES.

    Two shortcuts do not change the law: the last substep draws no tokens, since they cannot change
    a target; and a text in which nothing was revealed takes no further pass of a teacher that
    ignores time. With `all_passes` every text takes all of them, whatever was revealed, as ranks
    that share the network of a teacher must.
    """
    starts = TEACHER_TIMES[times](t.double(), dt, substeps)
    step_of = reveal_substep(starts, dt, u_reveal, teacher.schedule)
    step_of = step_of.masked_fill(xt != teacher.mask_id, -1)
    device = teacher.readout[0].device
    masked, at = step_of >= 0, partial(mask_indices, device=device)
    starts = starts.to(t.dtype)
    x = to_device(xt.clone(), device)
    h = teacher.features(x, to_device(starts[0], device), at(masked))
    for i in range(substeps - 1):
        reveal = step_of == i
        if reveal.any():
            u = to_device(u_token[reveal], device)
            x[at(reveal)] = draw_tokens(teacher, h[at(reveal[masked])], u)
        some = teacher.ignores_time and not all_passes
        changed = reveal.any(1) if some else torch.ones_like(reveal[:, 0])
        left = (step_of > i) & changed[:, None]  # positions whose prediction may still change
        if all_passes or left.any():
            t_next = to_device(starts[i + 1][changed], device)
            new = teacher.features(x[at(changed)], t_next, at(left[changed]))
            h[at(left[masked])] = new.to(h.dtype)
    return h


def divergence_loss(
    divergence: Divergence,
    h: Tensor,
    readout: Readout,
    h_teacher: Tensor,
    teacher_readout: Readout,
) -> Tensor:
    """sum_n D(student_n, teacher_n) of features h[N, D] and h_teacher[N, D]; scalar float32.

    Student and teacher each have their own readout.

    No [N, V] tensor exists for more than one chunk of rows. A divergence with a closed gradient
    (GRADIENTS) uses it.
    """
    weight, bias = (p.detach() for p in teacher_readout)
    h_teacher = pad_rows(h_teacher)
    closed = GRADIENTS.get(divergence)

    def value(log_p: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            log_q = log_softmax_(logits(h_teacher[rows], weight, bias))
        return divergence(log_p, log_q)

    if closed is None:
        return readout_loss(h, readout, value)

    def value_and_gradient(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        log_q, D = logits(h_teacher[rows], weight, bias), torch.empty_like(log_p[:, 0])
        N, V = log_p.shape
        for few in row_chunks(N, V, h.device, CACHED):
            D[few] = closed(log_p[few], log_softmax_(log_q[few]))
        gradient = log_q  # which the closed form has overwritten
        return D, gradient

    return readout_loss(h, readout, value, value_and_gradient)

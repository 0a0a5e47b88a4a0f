"""Samplers: a plan says at which step each position is revealed (no network needed), one loop carries it out.

Masked diffusion reveals a position at a time that does not depend on the network, and then draws it from p(x0 | xt). So the
steps of all positions are drawn first; each text visits only its own non-empty steps, and only revealed rows are read out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from halfstep.diffusion.block import write_blocks
from halfstep.diffusion.masking import mask_indices, reveal_probability, to_device
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import (
    float32_uniforms,
    inverse_cdf_chunked,
    released_race,
    uniforms,
)
from halfstep.kernels.logits import CACHED, row_chunks, vocab_chunks


@dataclass(frozen=True)
class Samples:
    """ids[N, L] int64 and network_evaluations[N], passes that each text took."""

    ids: Tensor
    network_evaluations: Tensor


def ancestral(u: Tensor, steps: int, schedule) -> Tensor:
    """Step (0 .. steps-1) at which each position is revealed, [B, L], from one uniform u[B, L] each.

    Ancestral sampling (MDLM eq. 7) on the grid t_i = 1 - i / steps leaves a position masked after step i with chance
    prod_j (1 - alpha_{t_{j+1}}) / (1 - alpha_{t_j}) = (1 - alpha_{t_{i+1}}) / (1 - alpha_1); it is revealed in the first step at
    whose end that chance falls to u or below. The last step ends at t = 0 and reveals all that is left.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=u.device)
    hidden = (1 - schedule.alpha(t)) / (1 - schedule.alpha(t[0]))
    return torch.searchsorted(
        -hidden[1:-1].contiguous(), -u
    )  # hidden falls: count of steps after which u is still hidden


def first_hitting(u: Tensor, steps: int, schedule) -> Tensor:
    """First-hitting order (Zheng et al., arXiv 2409.02908, section 4): a uniform random order of the free positions (u >= 0), revealed in
    `steps` nearly equal groups, [B, L]. With a step for each it is the exact limit of ancestral sampling with infinitely many steps.
    """
    free = (u >= 0).sum(1, keepdim=True)
    rank = u.argsort(1, descending=True).argsort(1)
    return rank * free.clamp(max=steps) // free.clamp(min=1)


SAMPLERS: dict[str, Callable[[Tensor, int, object], Tensor]] = {
    "ancestral": ancestral,
    "analytic": ancestral,  # Tweedie tau-leaping (SEDD, arXiv 2310.16834) has the same transition law under absorbing noise
    "first_hitting": first_hitting,
}


def draw_tokens(denoiser, h: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Tokens [N] from p(x0 | xt) of features h[N, D] by their uniforms u[N], a piece of the rows at a time."""

    def tempered(z: Tensor) -> Tensor:
        return z if temperature == 1 else z.div_(temperature)

    drawn, words = (
        torch.empty(len(h), dtype=torch.long, device=h.device),
        vocab_chunks(len(denoiser.readout[1]), h.device),
    )
    for rows in row_chunks(len(h), words[0].stop, h.device, CACHED):
        x = h[rows]
        drawn[rows] = inverse_cdf_chunked(
            lambda some, x=x: tempered(denoiser.logits(x, some)),
            lambda place, x=x: tempered(denoiser.logits_at(x, place)),
            words,
            u[rows],
        )
    return drawn


@torch.no_grad()
def run_plan(
    denoiser,
    x: Tensor,
    plan: Tensor,
    times: Tensor,
    u: Tensor,
    temperature: float = 1.0,
    on_pass: Callable[[int], None] | None = None,
) -> Samples:
    """Reveal x's masked positions at the steps of plan[B, L]; the j-th non-empty steps of all texts share one pass.

    x[B, L] holds the mask token where text is wanted and any tokens that are given; times[steps] is t at the start of each step;
    u[B, L] float64 draws each position's token. `on_pass` gets the number of texts that a pass serves.
    """
    given, x = x.cpu(), x.clone()
    step_of = plan.cpu().masked_fill(
        given != denoiser.mask_id, -1
    )  # all that decides what a pass holds is known here: no pass waits for a device
    order = step_of.sort(
        1
    ).values  # a text's non-empty steps, ascending, given positions (-1) first
    fresh = (order >= 0) & (order != torch.nn.functional.pad(order, (1, 0), value=-1)[:, :-1])
    passes = fresh.sum(1)
    visits = torch.full((len(x), int(passes.max()) if len(x) else 0), -1, dtype=torch.long)
    rows, columns = fresh.nonzero(as_tuple=True)
    visits[rows, (fresh.cumsum(1) - 1)[rows, columns]] = order[rows, columns]
    for j in range(visits.shape[1]):
        going = passes > j
        now = visits[going, j]
        alike = j == 0 and denoiser.ignores_time and bool((given[going] == given[going][:1]).all())
        (alive,), (texts, columns) = (
            mask_indices(going, x.device),
            mask_indices(step_of[going] == now[:, None], x.device),
        )
        t = times[to_device(now, x.device)]
        if alike:  # nothing is written yet: one text's features are all texts'
            h = denoiser.features(x[alive[:1]], t[:1])[0, columns]
        else:
            h = denoiser.features(x[alive], t, (texts, columns))
        rows = alive[texts]
        x[rows, columns] = draw_tokens(denoiser, h, u[rows, columns], temperature)
        if on_pass:
            on_pass(len(alive))
    return Samples(x, passes.to(x.device))


@torch.no_grad()
def run_released(
    denoiser,
    x: Tensor,
    times: Tensor,
    schedule,
    seed: int,
    first: int,
    temperature: float = 1.0,
    on_pass: Callable[[int], None] | None = None,
) -> Samples:
    """Ancestral sampling with the released code's noise: in each step every masked position runs a race between all tokens and the mask.

    times[steps + 1] falls from 1 to 0; text i of x[B, L] is number first + i of the seed. The weights are
    q = [p(x0 | xt) r, 1 - r] with r the step's chance of a reveal. Costs a whole-vocabulary draw per masked position and step: for comparisons.
    """
    x = x.clone()
    passes = torch.zeros(len(x), dtype=torch.long)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        masked = x == denoiser.mask_id
        alive = masked.any(1).nonzero()[:, 0]
        if not len(alive):
            break
        passes[alive.cpu()] += 1
        h = denoiser.features(x[alive], t.float().expand(len(alive)))
        r = reveal_probability(t, s, schedule).float()
        for i, text in enumerate(alive.tolist()):
            where = masked[text].nonzero()[:, 0]
            p = (denoiser.log_p(h[i, where]) / temperature).softmax(-1).float()
            q = torch.cat([p * r, (1 - r).expand(len(p), 1)], -1)
            x[text, where] = released_race(
                q, float32_uniforms(seed, first + text, step, *q.shape).to(q.device)
            )  # the last outcome is the mask
        if on_pass:
            on_pass(len(alive))
    return Samples(x, passes.to(x.device))


def sample(
    denoiser, num_samples: int, length: int, steps: int, *, schedule, sampler: str = "ancestral", seed: int = 1, first: int = 0,
    temperature: float = 1.0, given: Tensor | None = None, device: str | torch.device = "cpu", on_pass: Callable[[int], None] | None = None,
    draw_dtype: str = "float64",
) -> Samples:  # fmt: skip
    """Write texts first .. first+num_samples-1 of `seed`, each of `length` tokens, in at most `steps` network passes.

    given[length], or given[num_samples, length] with a row for each text, int64 fixes positions (a prompt, or an infilling frame) and holds
    the mask token elsewhere.
    """
    if given is not None and given.shape not in ((length,), (num_samples, length)):
        raise HalfstepError(
            f"given: found shape {list(given.shape)}, expected [{length}], the length of a text, or [{num_samples}, {length}], with the mask token "
            "where text is wanted"
        )
    for name, value in (("steps", steps), ("temperature", temperature)):
        if value <= 0:
            raise HalfstepError(f"{name}: found {value}, expected a number above zero")
    given = torch.full((length,), denoiser.mask_id) if given is None else given
    x = given.to(device).expand(num_samples, length)
    if draw_dtype != "float64":
        if draw_dtype != "float32-released" or sampler != "ancestral":
            raise HalfstepError(
                f"draw_dtype: found {draw_dtype!r} with sampler {sampler!r}, expected float64, or float32-released with sampler ancestral, which "
                "alone has the released code's noise"
            )
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=device)
        return run_released(denoiser, x, times, schedule, seed, first, temperature, on_pass)
    u = uniforms(seed, first, num_samples, 2 * length).to(device)
    if sampler == "block":
        return Samples(
            *write_blocks(
                denoiser,
                x,
                u,
                steps,
                ancestral,
                partial(draw_tokens, temperature=temperature),
                schedule,
            )
        )
    plan = SAMPLERS[sampler](
        u[:, :length].masked_fill(x != denoiser.mask_id, -1), steps, schedule
    )  # given positions take no step
    times = torch.linspace(1, 0, steps + 1, device=device)[:-1]
    return run_plan(denoiser, x, plan, times, u[:, length:], temperature, on_pass)

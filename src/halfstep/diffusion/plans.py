"""Reveal plans, which are drawn before the network runs, and the loop that executes them.

Masked diffusion reveals a position at a time that does not depend on the network, and then draws
its token from p(x0 | xt). So the steps of all positions are drawn first. Each text takes a pass
only for its own non-empty steps, and only revealed positions are read out.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Draws, Samples, Schedule
from halfstep.diffusion.masking import mask_indices, to_device
from halfstep.kernels.categorical import inverse_cdf_chunked
from halfstep.kernels.logits import CACHED, log_softmax_, row_chunks, vocab_chunks

Plan = Callable[[Tensor, int, Schedule], Tensor]
"""(uniforms u[B, L], steps, schedule) -> step of each position [B, L]; u < 0 marks given ones."""


def ancestral_plan(u: Tensor, steps: int, schedule: Schedule) -> Tensor:
    """Step (0 to steps - 1) at which ancestral sampling reveals each position, [B, L].

    Ancestral sampling (MDLM eq. 7) on the grid t_i = 1 - i / steps leaves a position masked after
    step i with probability prod_j (1 - alpha_{t_{j+1}}) / (1 - alpha_{t_j}) = (1 - alpha_{t_{i+1}})
    / (1 - alpha_1). The position is revealed in the first step after which that probability is at
    most u. The last step ends at t = 0 and reveals all that is left.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=u.device)
    hidden = (1 - schedule.alpha(t)) / (1 - schedule.alpha(t[0]))
    # `hidden` falls: count the steps after which u is still below it.
    return torch.searchsorted(-hidden[1:-1].contiguous(), -u)


def first_hitting_plan(u: Tensor, steps: int, schedule: Schedule) -> Tensor:
    """Steps [B, L] of a uniform random order of the free positions (u >= 0), in equal groups.

    The `steps` groups are equal up to one position. First-hitting sampling (Zheng et al., arXiv
    2409.02908, section 4): with one step per position it is the exact limit of ancestral sampling
    with infinitely many steps, whatever the schedule.
    """
    free = (u >= 0).sum(1, keepdim=True)
    rank = u.argsort(1, descending=True).argsort(1)
    return rank * free.clamp(max=steps) // free.clamp(min=1)


def draw_tokens(denoiser: Denoiser, h: Tensor, u: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw tokens [N] from p(x0 | xt) of features h[N, D] by their uniforms u[N], in chunks."""
    tokens = torch.empty(len(h), dtype=torch.long, device=h.device)
    chunks = vocab_chunks(denoiser.vocab_size, h.device)
    for rows in row_chunks(len(h), chunks[0].stop, h.device, CACHED):
        x = h[rows]

        def logits(chunk: slice, x: Tensor = x) -> Tensor:
            return _divide_(denoiser.logits(x, chunk), temperature)

        def logits_at(place: Tensor, x: Tensor = x) -> Tensor:
            return _divide_(denoiser.logits_at(x, place), temperature)

        tokens[rows] = inverse_cdf_chunked(logits, logits_at, chunks, u[rows])
    return tokens


def normalized(
    denoiser: Denoiser, h: Tensor, temperature: float = 1.0
) -> Iterator[tuple[slice, Tensor]]:
    """log p(x0 | xt) at a temperature for chunks of the rows of h[N, D]: (rows, [n, V])."""
    chunks = vocab_chunks(denoiser.vocab_size, h.device)
    for rows in row_chunks(len(h), denoiser.vocab_size, h.device):
        z = torch.cat([denoiser.logits(h[rows], chunk) for chunk in chunks], -1)
        yield rows, log_softmax_(_divide_(z, temperature))


def _divide_(z: Tensor, temperature: float) -> Tensor:
    return z if temperature == 1 else z.div_(temperature)


@torch.no_grad()
def run_plan(
    denoiser: Denoiser, x: Tensor, plan: Tensor, times: Tensor, u: Tensor, temperature: float = 1.0
) -> Samples:
    """Reveal the masked positions of x[B, L] at the steps of plan[B, L].

    The j-th non-empty steps of all texts share one pass, whichever steps they are. x holds the mask
    token where text is wanted and any tokens that are given; times[steps] is t at the start of each
    step; u[B, L] float64 draws each position's token.
    """
    # Indices are computed on the host, so no pass waits for the device.
    given, x = x.cpu(), x.clone()
    step_of = plan.cpu().masked_fill(given != denoiser.mask_id, -1)
    visits, passes = _visits(step_of)
    for j in range(visits.shape[1]):
        going = passes > j
        now = visits[going, j]
        (alive,) = mask_indices(going, x.device)
        texts, columns = mask_indices(step_of[going] == now[:, None], x.device)
        t = times[to_device(now, x.device)]
        first_pass_alike = (
            j == 0 and denoiser.ignores_time and bool((given[going] == given[going][:1]).all())
        )
        if first_pass_alike:  # the features of one text serve all
            h = denoiser.features(x[alive[:1]], t[:1])[0, columns]
        else:
            h = denoiser.features(x[alive], t, (texts, columns))
        rows = alive[texts]
        x[rows, columns] = draw_tokens(denoiser, h, u[rows, columns], temperature)
    return Samples(x, passes.to(x.device))


def _visits(step_of: Tensor) -> tuple[Tensor, Tensor]:
    """The non-empty steps of each text, and their numbers [B].

    The steps ascend, [B, most of them], filled up with -1; a step of -1 is no step.
    """
    order = step_of.sort(1).values
    is_new = (order >= 0) & (order != F.pad(order, (1, 0), value=-1)[:, :-1])
    passes = is_new.sum(1)
    most = int(passes.max()) if len(step_of) else 0
    visits = torch.full((len(step_of), most), -1, dtype=torch.long)
    rows, columns = is_new.nonzero(as_tuple=True)
    visits[rows, (is_new.cumsum(1) - 1)[rows, columns]] = order[rows, columns]
    return visits, passes


def write_planned(denoiser: Denoiser, x: Tensor, draws: Draws, steps: int, plan: Plan) -> Samples:
    """Draw a plan for the masked positions of x[N, L] and execute it in at most `steps` passes."""
    N, L = x.shape
    u_reveal, u_token = draws.uniforms(N, 2 * L).to(x.device).split(L, 1)
    free = u_reveal.masked_fill(x != denoiser.mask_id, -1)  # given positions take no step
    step_of = plan(free, steps, denoiser.schedule)
    times = torch.linspace(1, 0, steps + 1, device=x.device)[:-1]
    return run_plan(denoiser, x, step_of, times, u_token, draws.temperature)

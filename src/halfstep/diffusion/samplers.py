"""The samplers, one row of SAMPLERS each, and `sample`, which writes texts with one of them.

To add one: write a `SamplerFunction` (contracts.py), add a row to SAMPLERS, and add its name to
`DrawOptions.sampler` in config/measuring.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from halfstep.diffusion.block_sampler import block
from halfstep.diffusion.contracts import Denoiser, Draws, SamplerFunction, Samples
from halfstep.diffusion.masking import reveal_probability
from halfstep.diffusion.plans import ancestral_plan, first_hitting_plan, write_planned
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import float32_uniforms, released_race


def ancestral(denoiser: Denoiser, x: Tensor, draws: Draws, steps: int) -> Samples:
    """Ancestral sampling (MDLM eq. 7) in `steps` equal time steps; empty steps take no pass."""
    return write_planned(denoiser, x, draws, steps, ancestral_plan)


def first_hitting(denoiser: Denoiser, x: Tensor, draws: Draws, steps: int) -> Samples:
    """First-hitting sampling (arXiv 2409.02908): a random order, in `steps` nearly equal groups."""
    return write_planned(denoiser, x, draws, steps, first_hitting_plan)


@torch.no_grad()
def ancestral_float32(denoiser: Denoiser, x: Tensor, draws: Draws, steps: int) -> Samples:
    """Ancestral sampling with the released code's float32 noise.

    In each step every masked position runs a race between all tokens and the mask.

    The weights are q = [p(x0 | xt) r, 1 - r], with r the step's reveal probability. It draws over
    the whole vocabulary for every masked position and step, so it is slow: for comparisons only.
    """
    x = x.clone()
    passes = torch.zeros(len(x), dtype=torch.long)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    for step, (t, s) in enumerate(pairwise(times)):
        masked = x == denoiser.mask_id
        alive = masked.any(1).nonzero()[:, 0]
        if not len(alive):
            break
        passes[alive.cpu()] += 1
        h = denoiser.features(x[alive], t.float().expand(len(alive)))
        r = reveal_probability(t, s, denoiser.schedule).float()
        for i, text in enumerate(alive.tolist()):
            where = masked[text].nonzero()[:, 0]
            p = (denoiser.log_p(h[i, where]) / draws.temperature).softmax(-1).float()
            q = torch.cat([p * r, (1 - r).expand(len(p), 1)], -1)  # the last outcome is the mask
            u = float32_uniforms(draws.seed, draws.first + text, step, *q.shape)
            x[text, where] = released_race(q, u.to(q.device))
    return Samples(x, passes.to(x.device))


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: the function, its largest useful step count, the noise of its draws.

    max_steps(length) is the limit (default: none).
    """

    write: SamplerFunction
    max_steps: Callable[[int], int] | None = None
    draw_dtype: str = "float64"

    def check_steps(self, name: str, steps: int, length: int) -> None:
        """Raise HalfstepError if the sampler has no use for as many steps at this length."""
        most = self.max_steps(length) if self.max_steps else steps
        if steps > most:
            raise HalfstepError(
                f"steps: found {steps}, but sampler {name} takes at most {most} steps to write "
                f"texts of {length} tokens; lower it, or choose another sampler"
            )


SAMPLERS: dict[str, Sampler] = {
    "ancestral": Sampler(ancestral),
    # Tweedie tau-leaping (SEDD, arXiv 2310.16834) has the same transition law under absorbing
    # noise.
    "analytic": Sampler(ancestral),
    "first_hitting": Sampler(first_hitting, max_steps=lambda length: length),
    "block": Sampler(block),
    "ancestral_float32": Sampler(ancestral_float32, draw_dtype="float32-released"),
}


def sample(  # noqa: PLR0913 (the four of every sampler, and what it writes)
    denoiser: Denoiser,
    num_samples: int,
    length: int,
    steps: int,
    *,
    sampler: str = "ancestral",
    draws: Draws | None = None,
    given: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Samples:
    """Write `num_samples` texts of `length` tokens in at most `steps` sampling steps.

    `given` int64, [length] or [num_samples, length], fixes positions (a prompt, or a frame to fill
    in) and holds the mask token elsewhere. Text i has the random numbers of draws.first + i. Raises
    HalfstepError for impossible arguments.
    """
    draws = draws or Draws()
    if sampler not in SAMPLERS:
        raise HalfstepError(f"sampler: found {sampler!r}, allowed are {', '.join(SAMPLERS)}")
    for name, value in (("steps", steps), ("temperature", draws.temperature)):
        if value <= 0:
            raise HalfstepError(f"{name}: found {value}, expected a number above zero")
    if given is None:
        given = torch.full((length,), denoiser.mask_id)
    if given.shape not in ((length,), (num_samples, length)):
        raise HalfstepError(
            f"given: found shape {list(given.shape)}, expected [{length}], the length of a text, "
            f"or [{num_samples}, {length}], with the mask token where text is wanted"
        )
    x = given.to(device).expand(num_samples, length)
    return SAMPLERS[sampler].write(denoiser, x, draws, steps)

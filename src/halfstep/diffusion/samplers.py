"""The samplers, one row of SAMPLERS each, and `sample`, which writes texts with one of them.

To add one: write a `SamplerFunction` (contracts.py), add a row to SAMPLERS, and add its name to
`DrawOptions.sampler` in config/measuring.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import Parameter, signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from halfstep.diffusion.adaptive import entropy_bounded, threshold
from halfstep.diffusion.block_sampler import block
from halfstep.diffusion.contracts import Denoiser, Draws, SamplerFunction, Samples
from halfstep.diffusion.energy import energy
from halfstep.diffusion.masking import reveal_probability
from halfstep.diffusion.plans import ancestral_plan, first_hitting_plan, write_planned
from halfstep.diffusion.remasking import remask
from halfstep.diffusion.speculative import speculative
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
    """A row of SAMPLERS: the function, and what its callers must know.

    max_steps: (length) -> the largest useful step count (default: there is none)
    draw_dtype: the noise of its draws
    own_pace: it takes as many steps as it needs, and the step count is only a limit
    by_time: the time of a pass says which of the equal steps it is
    needs_first: the first token of a text must be given
    """

    write: SamplerFunction
    max_steps: Callable[[int], int] | None = None
    draw_dtype: str = "float64"
    own_pace: bool = False
    by_time: bool = True
    needs_first: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Its own options with their defaults; `scorer` is among them if it asks one."""
        parameters = signature(self.write).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is Parameter.KEYWORD_ONLY}

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
    "threshold": Sampler(threshold, own_pace=True, by_time=False),
    "entropy_bounded": Sampler(entropy_bounded, own_pace=True, by_time=False),
    "remask": Sampler(remask, by_time=False),
    "energy": Sampler(energy),
    "speculative": Sampler(speculative, own_pace=True, by_time=False, needs_first=True),
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
    **options: Any,
) -> Samples:
    """Write `num_samples` texts of `length` tokens in at most `steps` sampling steps.

    `given` int64, [length] or [num_samples, length], fixes positions (a prompt, or a frame to fill
    in) and holds the mask token elsewhere. Text i has the random numbers of draws.first + i.
    `options` are the sampler's own, such as threshold=0.9. Raises HalfstepError for impossible
    arguments.
    """
    draws = draws or Draws()
    check_options(sampler, options)
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
    return SAMPLERS[sampler].write(denoiser, x, draws, steps, **options)


def check_options(sampler: str, options: Iterable[str]) -> None:
    """Raise HalfstepError unless there is such a sampler, and it has options of these names."""
    if sampler not in SAMPLERS:
        raise HalfstepError(f"sampler: found {sampler!r}, allowed are {', '.join(SAMPLERS)}")
    for name in options:
        if name not in SAMPLERS[sampler].options:
            knowing = [other for other, row in SAMPLERS.items() if name in row.options]
            theirs = f", it is one of {' and '.join(knowing)}" if knowing else ""
            raise HalfstepError(
                f"{name}: found a value, but sampler {sampler} has no such option{theirs}; "
                "leave it out"
            )

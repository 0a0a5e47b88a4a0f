"""The sampler `remask`: ancestral sampling in which revealed tokens may be taken back (ReMDM)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Draws, Samples, Schedule
from halfstep.diffusion.plans import draw_tokens, normalized
from halfstep.errors import HalfstepError

Remasking = Literal["cap", "rescale", "loop"]
LOOP = 0.55, 0.05  # shares of the steps that remain when the loop begins and ends (ReMDM, t_on)
HELD = 0.1  # time of the loop: 0.9 of the tokens are visible under the log-linear schedule


@dataclass(frozen=True)
class RemaskingPath:
    """Times and chances of a remasking sampler with n steps, float64.

    times [n + 1]: from 1 to 0
    chance [n]: probability sigma that a revealed token is masked again in step i
    hidden [n + 1]: probability that a position masked at time 1 is still masked after i steps. One
        that is masked again after step j is still masked after step i with hidden[i] / hidden[j]
    """

    times: Tensor
    chance: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, schedule: Schedule, steps: int, kind: Remasking, eta: float) -> "RemaskingPath":
        """The path of a kind (ReMDM, arXiv 2503.00307, section 4).

        sigma is at most (1 - alpha_s) / alpha_t and 1. cap: min(eta, that); rescale: eta times
        that; loop: eta while time stands still at HELD, and 0 before and after.
        """
        left = torch.linspace(1, 0, steps + 1, dtype=torch.float64)  # share of steps that remain
        times = left
        if kind == "loop":
            begin, end = LOOP
            falling, last = 1 - (1 - left) / (1 - begin) * (1 - HELD), HELD * left / end
            times = torch.where(left > begin, falling, last.clamp(max=HELD))
        alpha = schedule.alpha(times)
        masked, visible = 1 - alpha[1:], alpha[:-1]  # 1 - alpha_s, alpha_t
        most = (masked / visible).clamp(max=1)
        chance = eta * most if kind == "rescale" else most.clamp(max=eta)
        if kind == "loop":
            chance = torch.where(times[:-1] == times[1:], chance, 0)
        chance[-1] = 0  # nothing is masked at the end
        # (1 - alpha_s - sigma alpha_t) / (1 - alpha_t), as ancestral sampling's factor and a second
        factors = 1 - chance * visible / torch.where(chance > 0, masked, 1)
        hidden = (1 - alpha) / (1 - alpha[0])
        hidden[1:] *= factors.cumprod(0)
        return cls(times, chance, hidden)


@torch.no_grad()
def remask(
    denoiser: Denoiser,
    x: Tensor,
    draws: Draws,
    steps: int,
    *,
    remasking: Remasking = "cap",
    eta: float = 0.02,
    by_confidence: bool = False,
) -> Samples:
    """Ancestral sampling that masks revealed tokens again with a chance (ReMDM, arXiv 2503.00307).

    With eta = 0 it is `ancestral`, to the bit. `RemaskingPath` has the chances of each kind. With
    `by_confidence` a revealed token has a share of the chance, the softmax over all revealed
    tokens of minus the probability that each had when it was drawn (ReMDM-conf), and masked
    positions are revealed as without remasking.
    """
    if not 0 <= eta <= 1:
        raise HalfstepError(f"eta: found {eta:g}, expected a probability from 0 to 1; change it")
    path = RemaskingPath.of(denoiser.schedule, steps, remasking, eta)
    plain = RemaskingPath.of(denoiser.schedule, steps, remasking, 0) if by_confidence else path
    hidden, chance = plain.hidden.to(x.device), path.chance.tolist()
    x, free = x.clone(), x == denoiser.mask_id
    N, L = x.shape
    u_reveal, u_token = draws.uniforms(N, 2 * L).to(x.device).split(L, 1)
    level = torch.ones_like(u_reveal)  # `hidden` at the time at which a position was masked
    confidence = torch.zeros_like(u_reveal)
    passes = torch.zeros(N, dtype=torch.long, device=x.device)
    for step, sigma in enumerate(chance):
        masked = x == denoiser.mask_id
        shown = free & ~masked
        reveal = masked & ((hidden[step + 1] <= u_reveal * level) | (step == steps - 1))
        alive = reveal.any(1).nonzero()[:, 0]
        if len(alive):
            passes[alive] += 1
            texts, columns = where = reveal[alive].nonzero(as_tuple=True)
            rows = alive[texts]
            t = torch.full((len(alive),), float(path.times[step]), device=x.device)
            h = denoiser.features(x[alive], t, where)
            tokens = draw_tokens(denoiser, h, u_token[rows, columns], draws.temperature)
            x[rows, columns] = tokens
            if by_confidence:
                confidence[rows, columns] = _chance_of(denoiser, h, tokens)
        if sigma > 0 and bool(shown.any()):
            fresh = draws.uniforms(N, 3 * L, stream=step + 1).to(x.device)
            again, next_reveal, next_token = fresh.split(L, 1)
            share = (-confidence).masked_fill(~shown, -torch.inf).softmax(1) if by_confidence else 1
            back = shown & (again < sigma * share)
            x = x.masked_fill(back, denoiser.mask_id)
            level = torch.where(back, hidden[step + 1], level)
            u_reveal = torch.where(back, next_reveal, u_reveal)
            u_token = torch.where(back, next_token, u_token)
    return Samples(x, passes)


def _chance_of(denoiser: Denoiser, h: Tensor, tokens: Tensor) -> Tensor:
    """p(x0 | xt) of tokens[N] at the positions of h[N, D]: [N] float64."""
    chances = [
        log_p.gather(1, tokens[rows, None])[:, 0].double().exp()
        for rows, log_p in normalized(denoiser, h)
    ]
    return torch.cat(chances)

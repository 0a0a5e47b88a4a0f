"""Samplers that ask the network which positions to reveal: `threshold` and `entropy_bounded`.

Both choose positions by their predictions, and then draw the tokens of all chosen ones from
p(x0 | xt) independently of each other. The choice depends on the visible tokens alone, not on what
is drawn. So with an exact denoiser each single token has its true conditional law, and one token a
pass gives the language, in whatever order. Several tokens of one pass are independent: this is the
only bias.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Draws, Samples
from halfstep.diffusion.plans import draw_tokens, normalized
from halfstep.errors import HalfstepError

Choose = Callable[[Tensor, Tensor], Tensor]
"""(score[B, L], least[B]) -> bool [B, L]: the positions to reveal, of those with a finite score.

Positions with lower scores come first; at least least[b] of text b are chosen.
"""


def threshold(
    denoiser: Denoiser, x: Tensor, draws: Draws, steps: int, *, threshold: float = 0.9
) -> Samples:
    """Reveal the positions whose likeliest token has at least this probability.

    At least one position is revealed in a pass, the surest one, and at least as many as are needed
    to end after `steps` passes. With threshold 1 that is the order by confidence of LLaDA (arXiv
    2502.09992); the rule itself is that of Fast-dLLM (arXiv 2505.22618), and the idea to compute as
    confidence asks for is CALM's (arXiv 2207.07061). Unlike theirs, the confidence is that of the
    position and not of a drawn token, and the temperature does not change it: a choice that looks
    at the drawn token would sharpen the law.
    """
    if not 0 < threshold <= 1:
        raise HalfstepError(
            f"threshold: found {threshold:g}, expected a probability above 0 and up to 1; change it"
        )

    def choose(surprise: Tensor, least: Tensor) -> Tensor:
        rank = surprise.argsort(stable=True, dim=1).argsort(1)
        return ((-surprise).exp() >= threshold) | (rank < least[:, None])

    return _write(denoiser, x, draws, steps, lambda log_p: -log_p.amax(-1), choose)


def entropy_bounded(
    denoiser: Denoiser, x: Tensor, draws: Draws, steps: int, *, entropy_bound: float = 0.1
) -> Samples:
    """Reveal the largest set of positions whose joint error is bounded (EB-sampler).

    EB-sampler is arXiv 2505.24857. The positions of lowest entropy H are taken as long as
    sum H - max H stays at or below `entropy_bound` nats. With an exact denoiser this bounds the
    KL divergence from their joint law to the product that is drawn, in each pass, and so the KL
    divergence of the language from the sampler's law by the bound times the number of passes. With
    0, only positions without a choice are revealed together with another one. At least as many
    positions are revealed as are needed to end after `steps` passes: then the bound is not kept.
    """
    if not 0 <= entropy_bound < torch.inf:
        raise HalfstepError(
            f"entropy_bound: found {entropy_bound:g}, expected 0 nats or more; change it"
        )

    def entropy(log_p: Tensor) -> Tensor:
        return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)

    def choose(entropies: Tensor, least: Tensor) -> Tensor:
        ascending, order = entropies.sort(stable=True, dim=1)
        before = ascending.nan_to_num(posinf=0).cumsum(1).roll(1, 1)  # all but the largest
        before[:, 0] = 0
        place = torch.arange(entropies.shape[1], device=entropies.device)
        within = (before <= entropy_bound) & ascending.isfinite() | (place < least[:, None])
        return torch.zeros_like(within).scatter_(1, order, within)

    return _write(denoiser, x, draws, steps, entropy, choose)


@torch.no_grad()
def _write(
    denoiser: Denoiser,
    x: Tensor,
    draws: Draws,
    steps: int,
    score: Callable[[Tensor], Tensor],
    choose: Choose,
) -> Samples:
    """Reveal in each pass the positions that `choose` takes by the scores of log p[n, V]: [n].

    A pass has the time at which as large a share of the free positions is masked, under the
    log-linear schedule. All texts without a prompt share the first pass.
    """
    x, masked = x.clone(), x == denoiser.mask_id
    N, L = x.shape
    u = draws.uniforms(N, L).to(x.device)
    free, passes = masked.sum(1), torch.zeros(N, dtype=torch.long, device=x.device)
    for step in range(steps):
        alive = masked.any(1).nonzero()[:, 0]
        if not len(alive):
            break
        passes[alive] += 1
        alike = step == 0 and denoiser.ignores_time and bool((x[alive] == x[alive[:1]]).all())
        asked = alive[:1] if alike else alive
        left = masked[asked].sum(1)
        where = masked[asked].nonzero(as_tuple=True)
        h = denoiser.features(x[asked], (left / free[asked]).float(), where)
        scores = torch.full((len(asked), L), torch.inf, device=x.device)
        scores[where] = torch.cat([score(log_p) for _, log_p in normalized(denoiser, h)]).float()
        chosen = choose(scores, -(-left // (steps - step)))
        h, copies = h[chosen[where]], len(alive) // len(asked)
        texts, columns = chosen.repeat(copies, 1).nonzero(as_tuple=True)
        rows = alive[texts]
        x[rows, columns] = draw_tokens(
            denoiser, h.repeat(copies, 1), u[rows, columns], draws.temperature
        )
        masked = x == denoiser.mask_id
    return Samples(x, passes)

"""The sampler `energy`: whole candidate texts, re-weighted by an autoregressive model (EDLM)."""

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Autoregressor, Denoiser, Draws, Samples
from halfstep.diffusion.plans import ancestral_plan, normalized
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import draw_from, inverse_cdf


@torch.no_grad()
def energy(
    denoiser: Denoiser,
    x: Tensor,
    draws: Draws,
    steps: int,
    *,
    scorer: Autoregressor | None = None,
    candidates: int = 8,
    scored: float = 1.0,
) -> Samples:
    """Ancestral sampling whose steps choose among `candidates` texts (EDLM, arXiv 2410.21357).

    A step draws k texts from the denoiser's product law q(x0 | xt), chooses one of them with a
    chance in proportion to p(x0) / q(x0 | xt), where p is the scorer's probability (EDLM's
    autoregressive energy; self-normalized importance sampling), and reveals its own positions with
    the tokens of that text. With an exact scorer the error of a step falls as 1/k: a step with many
    candidates draws its tokens from their true joint law. With one candidate it is `ancestral`.
    The scorer is given the first token: position 0 keeps the law of the denoiser.

    Only the last steps are re-weighted if `scored`, their share, is below 1. Each of them takes k
    passes of the scorer for each text.
    """
    scorer = needed_scorer("energy", denoiser, scorer)
    if candidates < 1:
        raise HalfstepError(
            f"candidates: found {candidates}, expected a whole number above zero; change it"
        )
    if not 0 < scored <= 1:
        raise HalfstepError(
            f"scored: found {scored:g}, expected a share of the steps above 0 and up to 1; "
            "change it"
        )
    x = x.clone()
    N, L = x.shape
    u_reveal, u_token = draws.uniforms(N, 2 * L).to(x.device).split(L, 1)
    free = u_reveal.masked_fill(x != denoiser.mask_id, -1)
    plan = ancestral_plan(free, steps, denoiser.schedule).masked_fill(free < 0, -1)
    passes = torch.zeros(N, dtype=torch.long, device=x.device)
    scorings = torch.zeros_like(passes)
    for step in range(steps):
        alive = (plan == step).any(1).nonzero()[:, 0]
        if not len(alive):
            continue
        passes[alive] += 1
        count = candidates if step >= round(steps * (1 - scored)) else 1
        fresh = draws.uniforms(N, count * L + 1, stream=step + 1).to(x.device)[alive]
        u = fresh[:, :-1].view(-1, count, L)
        u[:, 0] = u_token[alive]  # so that a single candidate is ancestral's
        t = torch.full((len(alive),), 1 - step / steps, device=x.device)
        texts, log_q = draw_candidates(denoiser, x[alive], t, u, draws.temperature)
        chosen = texts[:, 0]
        if count > 1:
            scorings[alive] += count
            log_p = torch.stack([scorer.token_log_p(text).sum(-1) for text in texts.unbind(1)], 1)
            choice = inverse_cdf(log_p.double() - log_q, fresh[:, -1])
            chosen = texts[torch.arange(len(alive), device=x.device), choice]
        x[alive] = torch.where(plan[alive] == step, chosen, x[alive])
    return Samples(x, passes, scorings)


def draw_candidates(
    denoiser: Denoiser, xt: Tensor, t: Tensor, u: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Texts [B, k, L] drawn from the product law of x0 given xt[B, L] by u[B, k, L], and log q.

    log q [B, k] float64 leaves out position 0.
    """
    where = texts, columns = (xt == denoiser.mask_id).nonzero(as_tuple=True)
    h = denoiser.features(xt, t, where)
    drawn = xt[:, None].repeat(1, u.shape[1], 1)
    log_q = torch.zeros(u.shape, dtype=torch.float64, device=xt.device)
    for rows, log_p in normalized(denoiser, h, temperature):
        place = texts[rows], slice(None), columns[rows]
        tokens = draw_from(log_p.double().exp(), u[place])
        drawn[place] = tokens
        log_q[place] = log_p.gather(1, tokens).double()
    return drawn, log_q[..., 1:].sum(-1)


def needed_scorer(sampler: str, denoiser: Denoiser, scorer: Autoregressor | None) -> Autoregressor:
    """The scorer, which must be there and have the denoiser's vocabulary (HalfstepError)."""
    if scorer is None:
        raise HalfstepError(
            f"scorer: found none, but sampler {sampler} asks an autoregressive model; name one"
        )
    if scorer.vocab_size != denoiser.vocab_size:
        raise HalfstepError(
            f"scorer: found a vocabulary of {scorer.vocab_size:,} tokens, but the diffusion model "
            f"has {denoiser.vocab_size:,}; choose a scorer with the same tokenizer"
        )
    return scorer

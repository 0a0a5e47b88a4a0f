"""The sampler `block`: blocks from left to right, with a KV cache of all other positions.

Each block begins with a pass over the whole text; its later passes compute the block's positions
only. For a bidirectional network this is an approximation: within a block, the positions outside of
it do not see what is being written. A cache of predictions needs no sampler: a reveal plan takes no
pass for a step that changes nothing (tests/diffusion/test_block_sampler.py).
"""

import torch
from torch import Tensor

from halfstep.diffusion.contracts import Denoiser, Draws, Samples, kv_denoiser
from halfstep.diffusion.plans import ancestral_plan, draw_tokens
from halfstep.errors import HalfstepError

SIZE = 16  # tokens per block; more where there are fewer steps than blocks of this size


def blocks(length: int, steps: int) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block; the steps add up to at most `steps`."""
    size = min(length, max(SIZE, -(-length // steps)))
    starts = range(0, length, size)
    return [(start, min(start + size, length), steps // len(starts)) for start in starts]


@torch.no_grad()
def block(denoiser: Denoiser, x: Tensor, draws: Draws, steps: int, keep_kv: bool = True) -> Samples:
    """Ancestral sampling within each block of x[N, L].

    A pass over one block counts as its share of a network evaluation. With keep_kv=False every pass
    computes the whole text. The texts of a batch share their passes, so network evaluations depend
    on the batch; with a time-conditioned network so do the texts, whose first pass in a block has
    the time of the first reveal in the batch.
    """
    keeping = kv_denoiser(denoiser)
    if keeping is None:
        raise HalfstepError(
            f"sampler: found block, but {type(denoiser).__name__} keeps no keys and values; "
            "use another sampler"
        )
    x, evaluations = x.clone(), 0.0
    N, L = x.shape
    u_reveal, u_token = draws.uniforms(N, 2 * L).to(x.device).split(L, 1)
    first_step = 0
    for start, end, count in blocks(L, steps):
        part, kv = slice(start, end), None
        places = torch.arange(start, end, device=x.device)
        plan = ancestral_plan(u_reveal[:, part], count, denoiser.schedule)
        plan = plan.masked_fill(x[:, part] != denoiser.mask_id, -1)
        for step in range(count):
            reveal = plan == step
            if not reveal.any():
                continue
            t = torch.full((N,), 1 - (first_step + step) / steps, device=x.device)
            if kv is None or not keep_kv:
                h, kv = keeping.features_and_kv(x, t, places)
                evaluations += 1
            else:
                h, kv = keeping.features_and_kv(x, t, places, kv)
                evaluations += (end - start) / L
            new = x[:, part].clone()
            new[reveal] = draw_tokens(
                denoiser, h[reveal], u_token[:, part][reveal], draws.temperature
            )
            x[:, part] = new
        first_step += count
    return Samples(x, torch.full((N,), evaluations, dtype=torch.float64, device=x.device))

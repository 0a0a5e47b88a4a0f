"""A sampler that keeps keys and values: blocks from left to right, a whole pass at the start of each, and passes over the block alone after it.

For a bidirectional network that is an approximation: within a block, what lies outside of it does not see what is being written.
A cache of predictions needs no sampler of its own: the reveal plan visits no step that changes nothing (tests/diffusion/test_block.py).
"""

import torch
from torch import Tensor

SIZE = 16  # tokens of a block; more where there are fewer steps than such blocks


def blocks(length: int, steps: int) -> list[tuple[int, int, int]]:
    """(start, end, steps) of each block, at most `steps` steps in all."""
    size = min(length, max(SIZE, -(-length // steps)))
    starts = range(0, length, size)
    return [(start, min(start + size, length), steps // len(starts)) for start in starts]


@torch.no_grad()
def write_blocks(
    denoiser, x: Tensor, u: Tensor, steps: int, plan_of, draw, schedule, keep: bool = True
) -> tuple[Tensor, Tensor]:
    """Texts [N, L] from x[N, L], and passes [N], one over a block counted as its share of a whole one.

    u[N, 2 L] float64: the first half reveals (plan_of, within each block), the second half draws (draw). keep=False runs whole passes only.
    """
    x, passes, done = x.clone(), 0.0, 0
    L = x.shape[1]
    for start, end, count in blocks(L, steps):
        piece, kept = slice(start, end), None
        plan = plan_of(u[:, piece], count, schedule).masked_fill(
            x[:, piece] != denoiser.mask_id, -1
        )
        for step in range(count):
            reveal = plan == step
            done += 1
            if not reveal.any():
                continue
            t = torch.full((len(x),), 1 - (done - 1) / steps, device=x.device)
            if kept is None or not keep:
                h, kept = denoiser.features_and_keys(x, t)
                h, passes = h[:, piece], passes + 1
            else:
                h, kept = denoiser.features_and_keys(x[:, piece], t, start, kept)
                passes += (end - start) / L
            new = x[:, piece].clone()
            new[reveal] = draw(denoiser, h[reveal], u[:, L + start : L + end][reveal])
            x[:, piece] = new
    return x, torch.full((len(x),), passes, dtype=torch.float64, device=x.device)

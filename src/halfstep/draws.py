"""Random numbers that belong to a sample, and categorical draws: exact to float64, or with the released code's float32 noise.

Sample i of a seed owns its uniforms, whatever batch, device or process it is drawn in.
"""

import numpy as np
import torch
from torch import Tensor


def uniforms(seed: int, first: int, count: int, n: int) -> Tensor:
    """[count, n] float64 uniforms on [0, 1): row i belongs to sample `first + i` of `seed` (counter-based, Philox)."""
    rows = [np.random.Generator(np.random.Philox(key=[seed, first + i])).random(n) for i in range(count)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, n, dtype=torch.float64)


def inverse_cdf(z: Tensor, u: Tensor) -> Tensor:
    """One draw a row from softmax(z[N, V]) by its uniform u[N] (float64): the smallest v with CDF(v) > u.

    The CDF is searched on two levels (blocks of about sqrt(V), then inside one block): a row costs one exponential of V numbers and one sum, and
    no noise over the vocabulary. Blocks are summed in the precision of z (their relative error is that of a probability), searched in float64: float32 noise over V tokens truncates the tail
    of the law and acts as a lower temperature (Zheng et al., arXiv 2409.02908). Returns [N] int64.
    """
    N, V = z.shape
    width = max(1, int(V**0.5))
    whole = V - V % width
    p = (z - z.amax(-1, keepdim=True)).exp_()
    blocks = p[:, :whole].unflatten(-1, (-1, width)).sum(-1)
    blocks = torch.cat([blocks, p[:, whole:].sum(-1, keepdim=True)], -1).double().cumsum(-1)
    goal = u.to(p.device, torch.float64)[:, None] * blocks[:, -1:]
    block = (blocks <= goal).sum(-1, keepdim=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    place = block * width + torch.arange(width, device=p.device)
    inside = p.gather(-1, place.clamp(max=V - 1)).masked_fill_(place >= V, 0).double()
    cdf = inside.cumsum(-1)
    rest = (goal - before) / (blocks.gather(-1, block) - before)  # of this block, as its own sum was rounded
    offset = (cdf <= rest * cdf[:, -1:]).sum(-1, keepdim=True)
    last = width - 1 - inside.flip(-1).ne(0).to(torch.uint8).argmax(-1, keepdim=True)  # rounding never leaves the support
    return (block * width + torch.minimum(offset, last))[:, 0]


def float32_uniforms(seed: int, sample: int, step: int, rows: int, n: int) -> Tensor:
    """[rows, n] float32 uniforms on the grid k / 2^24 of torch.rand, of one step of one sample (another stream than `uniforms`)."""
    stream = np.random.Philox(key=[seed, sample], counter=[0, 0, 0, step + 1])
    return torch.from_numpy(np.random.Generator(stream).random((rows, n), dtype=np.float32))


def released_race(q: Tensor, u: Tensor) -> Tensor:
    """One draw a row from weights q[N, K] by noise u[N, K], as the released code draws: argmax_k q_k / (1e-10 - log(u_k + 1e-10)), [N].

    An exponential race in float32. u ends at 1 - 2^-24, so no noise is below 6e-8 and outcomes of little weight never win: where a step
    reveals one position in 1,024 the text comes out as if at a lower temperature (REFERENCE Q8, docs/deviations.md).
    """
    return (q / (1e-10 - (u + 1e-10).log())).argmax(-1)

"""Random numbers that belong to a sample, and categorical draws: exact to float64, or with the released code's float32 noise.

Sample i of a seed owns its uniforms, whatever batch, device or process it is drawn in.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from halfstep.kernels.logits import exp_

WIDTH = 32  # words of a block of the CDF


def uniforms(seed: int, first: int, count: int, n: int) -> Tensor:
    """[count, n] float64 uniforms on [0, 1): row i belongs to sample `first + i` of `seed` (counter-based, Philox)."""
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, first + i])).random(n) for i in range(count)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, n, dtype=torch.float64)


def inverse_cdf(z: Tensor, u: Tensor) -> Tensor:
    """One draw a row from softmax(z[N, V]) by its uniform u[N] (float64): the smallest v with CDF(v) > u, [N] int64."""
    return inverse_cdf_chunked(
        lambda words: z[:, words].clone(),
        lambda place: z.gather(-1, place),
        [slice(0, z.shape[1])],
        u,
    )


def inverse_cdf_chunked(
    logits: Callable[[slice], Tensor],
    logits_at: Callable[[Tensor], Tensor],
    pieces: Iterable[slice],
    u: Tensor,
) -> Tensor:
    """`inverse_cdf` of logits z[N, V] that are never there at once: logits(words) are those of a slice of the vocabulary, [N, words], and are
    overwritten; logits_at(place[N, n]) are a row's own; `pieces` are the slices, in order, each but the last of whole
    blocks (ValueError). [N] int64.

    The CDF is searched on two levels, blocks of WIDTH words and then inside one block, whose logits are asked for again: a row costs one exponential
    of V numbers and one sum, and no noise over the vocabulary. Blocks are summed in the precision of z (their relative error is that of a
    probability), searched in float64: float32 noise over V tokens truncates the tail of the law and acts as a lower temperature (Zheng et al.,
    arXiv 2409.02908).
    """
    sums, tops, V = [], [], 0
    for words in pieces:
        if words.start % WIDTH:
            raise ValueError(
                f"a piece begins at word {words.start}, which is inside of a block of {WIDTH}"
            )
        z = logits(words)
        V = words.stop
        top = z.amax(-1, keepdim=True).clamp_(
            min=torch.finfo(z.dtype).min
        )  # a piece may have no mass
        p = exp_(z.sub_(top))
        whole = p.shape[1] - p.shape[1] % WIDTH
        blocks = p[:, :whole].unflatten(-1, (-1, WIDTH)).sum(-1)
        sums.append(
            blocks
            if whole == p.shape[1]
            else torch.cat([blocks, p[:, whole:].sum(-1, keepdim=True)], -1)
        )
        tops.append(top)
    top = torch.cat(tops, -1).amax(-1, keepdim=True)
    cdf = (
        torch.cat([s * (t - top).exp() for s, t in zip(sums, tops, strict=True)], -1)
        .double()
        .cumsum(-1)
    )
    goal = u.to(cdf.device, torch.float64)[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, goal, right=True).clamp_(max=cdf.shape[1] - 1)
    before = torch.where(block > 0, cdf.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    place = block * WIDTH + torch.arange(WIDTH, device=cdf.device)
    inside = exp_(logits_at(place.clamp(max=V - 1)) - top).masked_fill_(place >= V, 0).double()
    steps = inside.cumsum(-1)
    rest = (goal - before) / (
        cdf.gather(-1, block) - before
    )  # of this block, as its own sum was rounded
    offset = (steps <= rest * steps[:, -1:]).sum(-1, keepdim=True)
    last = (
        WIDTH - 1 - inside.flip(-1).ne(0).to(torch.uint8).argmax(-1, keepdim=True)
    )  # rounding never leaves the support
    return (block * WIDTH + torch.minimum(offset, last))[:, 0]


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

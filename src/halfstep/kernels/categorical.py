"""Random numbers that belong to a sample, and categorical draws from logits.

Draws are exact to float64, or have the float32 noise of the released code.

Sample i of a seed has its own uniforms, whichever batch, device or process draws it.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from halfstep.kernels.logits import exp_

WIDTH = 32  # tokens in one block of the CDF


def uniforms(seed: int, first: int, count: int, n: int, stream: int = 0) -> Tensor:
    """[count, n] float64 uniforms on [0, 1): row i belongs to sample first + i of `seed`.

    Counter-based (Philox). Each sample has 2^63 independent streams.
    """
    counter = [0, 0, stream, 0]
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, first + i], counter=counter)).random(n)
        for i in range(count)
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, n, dtype=torch.float64)


def inverse_cdf(z: Tensor, u: Tensor) -> Tensor:
    """Draw one token per row from softmax(z[N, V]) by its uniform u[N] float64: [N] int64.

    The token is the smallest v with CDF(v) > u.
    """
    return inverse_cdf_chunked(
        lambda chunk: z[:, chunk].clone(),
        lambda tokens: z.gather(-1, tokens),
        [slice(0, z.shape[1])],
        u,
    )


def inverse_cdf_chunked(
    logits: Callable[[slice], Tensor],
    logits_at: Callable[[Tensor], Tensor],
    chunks: Iterable[slice],
    u: Tensor,
) -> Tensor:
    """`inverse_cdf` for logits of which one chunk of the vocabulary exists at a time, [N] int64.

    logits(chunk) -> z[:, chunk], which is overwritten; logits_at(tokens[N, n]) -> z at these tokens
    of each row, [N, n]. `chunks` are slices in order; each starts at a multiple of WIDTH
    (ValueError otherwise).

    The CDF is searched on two levels: blocks of WIDTH tokens, then inside one block, whose logits
    are computed again. A row costs V exponentials and one sum, and no noise over the vocabulary.
    Blocks are summed in the precision of z (the relative error is that of one probability) and
    searched in float64: float32 noise over V tokens would truncate the tail and act as a lower
    temperature (Zheng et al., arXiv 2409.02908).
    """
    sums, tops, V = [], [], 0
    for chunk in chunks:
        z, V = logits(chunk), chunk.stop
        block_sums, top = _block_sums(z, chunk.start)
        sums.append(block_sums)
        tops.append(top)
    top = torch.cat(tops, -1).amax(-1, keepdim=True)
    scaled = [s * (t - top).exp() for s, t in zip(sums, tops, strict=True)]
    cdf = torch.cat(scaled, -1).double().cumsum(-1)
    goal = u.to(cdf.device, torch.float64)[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, goal, right=True).clamp_(max=cdf.shape[1] - 1)
    before = torch.where(block > 0, cdf.gather(-1, (block - 1).clamp_(min=0)), 0.0)
    tokens = block * WIDTH + torch.arange(WIDTH, device=cdf.device)
    inside = exp_(logits_at(tokens.clamp(max=V - 1)) - top)
    inside = inside.masked_fill_(tokens >= V, 0).double()
    steps = inside.cumsum(-1)
    # The part of the block that u asks for, relative to the block's own rounded sum.
    rest = (goal - before) / (cdf.gather(-1, block) - before)
    offset = (steps <= rest * steps[:, -1:]).sum(-1, keepdim=True)
    # Rounding must not leave the support: at most the last token of the block that has a
    # probability.
    last = WIDTH - 1 - inside.flip(-1).ne(0).to(torch.uint8).argmax(-1, keepdim=True)
    return (block * WIDTH + torch.minimum(offset, last))[:, 0]


def _block_sums(z: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Sums of exp(z - top) over blocks of WIDTH tokens, and top[N, 1]; overwrites z.

    top is the largest logit of each row.
    """
    if start % WIDTH:
        raise ValueError(f"a chunk starts at token {start}, which is inside a block of {WIDTH}")
    # A chunk may hold no probability at all: all its logits are -inf.
    top = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)
    p = exp_(z.sub_(top))
    whole = p.shape[1] - p.shape[1] % WIDTH
    blocks = p[:, :whole].unflatten(-1, (-1, WIDTH)).sum(-1)
    if whole < p.shape[1]:
        blocks = torch.cat([blocks, p[:, whole:].sum(-1, keepdim=True)], -1)
    return blocks, top


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probability reaches top_p; the rest get -inf.

    Nucleus sampling (Holtzman et al., arXiv 1904.09751).

    log_p[N, V] -> [N, V], not renormalized.
    """
    if top_p >= 1:
        return log_p
    values, order = log_p.sort(-1, descending=True)
    p = values.exp()
    values = values.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.empty_like(log_p).scatter_(-1, order, values)


def draw_from(p: Tensor, u: Tensor) -> Tensor:
    """Draw tokens in proportion to p[N, V] float64 by the uniforms u[N] or u[N, k]: int64 as u.

    The token is the smallest v with CDF(v) > u, as in `inverse_cdf`.
    """
    cdf = p.cumsum(-1)
    total = cdf[:, -1:]
    goal = torch.minimum(u.view(len(p), -1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cdf, goal, right=True).view(u.shape)


def float32_uniforms(seed: int, sample: int, step: int, rows: int, n: int) -> Tensor:
    """[rows, n] float32 uniforms of one step of one sample, on torch.rand's grid k / 2^24.

    Their stream is independent of that of `uniforms`.
    """
    stream = np.random.Philox(key=[seed, sample], counter=[0, 0, 0, step + 1])
    return torch.from_numpy(np.random.Generator(stream).random((rows, n), dtype=np.float32))


def released_race(q: Tensor, u: Tensor) -> Tensor:
    """Draw one outcome per row as the released code does: q[N, K], u[N, K] -> [N].

    argmax_k q_k / (1e-10 - log(u_k + 1e-10)).

    This is an exponential race in float32. Since u ends at 1 - 2^-24, no noise is below 6e-8, and
    unlikely outcomes never win. Where a step reveals one position in 1,024, the text comes out as
    if drawn at a lower temperature (docs/deviations.md, Q8).
    """
    return (q / (1e-10 - (u + 1e-10).log())).argmax(-1)

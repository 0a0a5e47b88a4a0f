"""The paper's network: a diffusion transformer over tokens (MDLM section 5; SDTT Table 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.diffusion.contracts import Readout, Where
from halfstep.models.layers import Block, Embedding, Head, Rotary

FEWEST = 16  # rows of a product from which on its last bits do not depend on their number (MKL)


class TimeEmbedding(nn.Module):
    """Noise level sigma[B] -> conditioning [B, cond_width].

    Features [cos, sin] of width 256, then a two-layer MLP.
    """

    def __init__(self, cond_width: int, frequencies: int = 128):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * frequencies, cond_width), nn.SiLU(), nn.Linear(cond_width, cond_width)
        )
        self.frequencies = frequencies

    def forward(self, sigma: Tensor) -> Tensor:
        i = torch.arange(self.frequencies, device=sigma.device, dtype=torch.float32)
        angles = sigma.float()[:, None] * 1e4 ** -(i / self.frequencies)
        return F.silu(self.mlp(torch.cat([angles.cos(), angles.sin()], -1)))


class BlockKV:
    """Keys and values of one block over the whole text.

    Later passes overwrite the positions that they compute.
    """

    def __init__(self) -> None:
        self.kv: tuple[Tensor, Tensor] | None = None
        self.positions: Tensor | None = None

    def at(self, positions: Tensor | None) -> BlockKV:
        """The next `append` writes at these positions, [l] or [B, l]; at all of them if None."""
        self.positions = positions
        return self

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows[K] of the texts alone, in this order."""
        self.kv = self.kv and (self.kv[0][rows], self.kv[1][rows])

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, l, head_width]; return those of all positions.

        The first call must cover the whole text.
        """
        if self.positions is None:
            self.kv = k, v
        elif self.kv is None:
            raise ValueError("the first pass must compute the whole text")
        else:
            places = self.positions.expand(len(k), -1)[:, None, :, None].expand_as(k)
            for old, new in zip(self.kv, (k, v), strict=True):
                old.scatter_(2, places, new)
        return self.kv


class DiT(nn.Module):
    """Bidirectional transformer with RoPE and adaLN over `vocabulary` tokens and a mask token.

    The mask token is the last id.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: int,
        heads: int,
        dropout: float = 0.0,
        cond_width: int = 128,
    ):
        super().__init__()
        self.vocab_embed = Embedding(vocabulary + 1, width)
        self.sigma_map = TimeEmbedding(cond_width)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, cond_width) for _ in range(blocks))
        self.output_layer = Head(width, vocabulary + 1, cond_width)
        self.vocabulary, self.heads = vocabulary, heads

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        where: Where = None,
        positions: Tensor | None = None,
        kept: list[BlockKV] | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """Token ids x[B, L] and noise levels sigma[B] -> features h[B, L, D].

        sigma is zero if None: the time-unconditional network of the paper.

        With `where` (a mask [B, L], or its nonzero(as_tuple=True)) only the features of these
        positions, in row order, h[N, D]: the last block's attention reads all positions, its output
        layer and MLP compute these. With `kept` and `positions`, [L] or [B, L], x are the tokens
        there, which read the keys and values of all other positions from `kept`. With pairs[L, L]
        bool, position i reads the positions j of which pairs[i, j] is true (all by default).
        """
        rows, N = wanted_rows(where, x)
        cond = self.sigma_map(torch.zeros(1, device=x.device) if sigma is None else sigma)
        everywhere = torch.arange(x.shape[1], device=x.device)
        angles = self.rotary_emb(everywhere if positions is None else positions)
        h = self.vocab_embed(x)
        for i, block in enumerate(self.blocks):
            cache = kept[i].at(positions) if kept else None
            h = block(h, angles, cond, cache, rows if block is self.blocks[-1] else None, pairs)
        return self.output_layer(h, cond, rows, x.shape[1])[:N]

    @property
    def readout(self) -> Readout:
        """Weight [V + 1, D], whose last row is the mask token's, and bias [V].

        The row stays: the backward pass of a slice would allocate a second [V + 1, D] tensor.
        """
        linear = self.output_layer.linear
        return linear.weight, linear.bias[:-1]


def wanted_rows(where: Where, x: Tensor) -> tuple[Tensor | None, int]:
    """The wanted positions as indices into the B L of x[B, L], and their number.

    There are FEWEST rows or more; surplus ones are of no interest. All positions are (None, B).
    """
    if where is None:
        return None, len(x)
    rows = _flat_indices(where, x.shape[1])
    N = len(rows)
    return F.pad(rows, (0, max(0, FEWEST - N))), N


def _flat_indices(where: Tensor | tuple[Tensor, ...], L: int) -> Tensor:
    """Positions as indices [N] into B texts of L tokens."""
    if isinstance(where, tuple):
        return where[0] * L + where[1]
    return where.flatten().nonzero()[:, 0]

"""GPT-2's architecture as the network of a denoiser: learned positions, biases, a tied readout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from halfstep.diffusion.contracts import Readout, Where
from halfstep.errors import HalfstepError
from halfstep.models.dit import BlockKV, wanted_rows
from halfstep.models.layers import Block, Embedding, LayerNorm


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019) with full attention, over `vocabulary` tokens and a mask token.

    Texts have up to `length` tokens, whose positions are embedded. All layers have biases, the
    embedding table is also the readout, and there is no input for the time. The mask token is the
    last id.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: int,
        heads: int,
        dropout: float = 0.0,
        length: int = 1024,
    ):
        super().__init__()
        self.vocab_embed = Embedding(vocabulary + 1, width)
        self.position_embed = Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, bias=True) for _ in range(blocks))
        self.norm_final = LayerNorm(width, bias=True)
        self.vocabulary, self.heads, self.length = vocabulary, heads, length

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        where: Where = None,
        positions: Tensor | None = None,
        kept: list[BlockKV] | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """Token ids x[B, L] -> features h[B, L, D]; arguments and shapes are those of `DiT`.

        `sigma` is not read. HalfstepError if a text is longer than `length`.
        """
        if positions is None and x.shape[1] > self.length:
            raise HalfstepError(
                f"length: found texts of {x.shape[1]} tokens, but this network has the positions "
                f"of {self.length}; use shorter texts, or another model"
            )
        everywhere = torch.arange(x.shape[1], device=x.device)
        rows, N = wanted_rows(where, x)
        h = self.vocab_embed(x)
        h = h + self.position_embed(everywhere if positions is None else positions)
        for i, block in enumerate(self.blocks):
            cache = kept[i].at(positions) if kept else None
            wanted = rows if block is self.blocks[-1] else None
            h = block(h, None, cache=cache, rows=wanted, pairs=pairs)
        return self.norm_final(h)[:N]

    @property
    def readout(self) -> Readout:
        """The embedding table [V + 1, D], whose last row is the mask token's, and zeros [V]."""
        table = self.vocab_embed.embedding
        return table, torch.zeros(self.vocabulary, device=table.device)

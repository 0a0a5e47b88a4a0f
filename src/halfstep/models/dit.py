"""The paper's denoiser network: a diffusion transformer over tokens (MDLM section 5; SDTT Table 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.diffusion.contracts import Where
from halfstep.models.layers import Block, Embedding, Head, Rotary

COND_WIDTH = 128
FEWEST = 16  # rows of a product whose last bits do not depend on how many there are (MKL)


class TimeEmbedding(nn.Module):
    """Noise level sigma[B] -> conditioning [B, cond_width]: [cos, sin] features of width 256, then a two-layer MLP."""

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
    """Keys and values of one block's whole pass; later passes write over the columns that they compute."""

    def __init__(self):
        self.kv: tuple[Tensor, Tensor] | None = None
        self.start = 0

    def at(self, start: int) -> "BlockKV":
        self.start = start
        return self

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.kv is None:
            self.kv = k.clone(), v.clone()
        for old, new in zip(self.kv, (k, v), strict=True):
            old[:, :, self.start : self.start + new.shape[2]] = new
        return self.kv


class DiT(nn.Module):
    """Bidirectional transformer with RoPE and adaLN over `vocabulary` data tokens and one mask token (the last id)."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: int,
        heads: int,
        dropout: float = 0.0,
        cond_width: int = COND_WIDTH,
    ):
        super().__init__()
        self.vocab_embed = Embedding(vocabulary + 1, width)
        self.sigma_map = TimeEmbedding(cond_width)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, cond_width) for _ in range(blocks))
        self.output_layer = Head(width, vocabulary + 1, cond_width)
        self.vocabulary = vocabulary

    def forward(
        self,
        x: Tensor,
        sigma: Tensor | None = None,
        where: Where = None,
        start: int = 0,
        kept: "list[BlockKV] | None" = None,
    ) -> Tensor:
        """Token ids x[B, L] and noise levels sigma[B] (zero when absent: the paper's time-unconditional network) -> h[B, L, D].

        Of the positions where[B, L] (a mask, or its nonzero(as_tuple=True)) alone, in row order, h[N, D]: the last block's attention is of all
        positions, its output and MLP of these. With `kept`, x are the tokens from `start` on, which see the keys and values of all others as they were left there.
        """
        rows, N = None, len(x)
        if where is not None:
            rows = (
                where[0] * x.shape[1] + where[1]
                if isinstance(where, tuple)
                else where.flatten().nonzero()[:, 0]
            )
            N = len(rows)
            rows = F.pad(rows, (0, max(0, FEWEST - N)))  # products of fewer rows end in other bits
        cond = self.sigma_map(torch.zeros(1, device=x.device) if sigma is None else sigma)
        angles = self.rotary_emb(torch.arange(start, start + x.shape[1], device=x.device))
        h = self.vocab_embed(x)
        for i, block in enumerate(self.blocks):
            h = block(
                h,
                angles,
                cond,
                kept[i].at(start) if kept else None,
                rows if block is self.blocks[-1] else None,
            )
        return self.output_layer(h, cond, rows, x.shape[1])[:N]

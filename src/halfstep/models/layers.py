"""The parts that the denoiser and its autoregressive peer share: norm, rotary positions, attention block.

Module names follow the published checkpoints (MDLM, SDTT), so that their weights load by key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.kernels.linear import Again, linear, mlp


class LayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, computed in float32 (eps 1e-5), and adaLN's modulation."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """x[..., D]; then times 1 + scale, plus shift. One shift and scale for all positions are the norm's own bias and weight."""
        if shift is None or shift.numel() != len(self.weight):
            h = F.layer_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5)
            return h if shift is None else torch.addcmul(shift, h, 1 + scale)
        return F.layer_norm(
            x.float(), x.shape[-1:], self.weight * (1 + scale.flatten()), shift.flatten(), eps=1e-5
        )

    def kept_as(
        self, x: Tensor, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Again]:
        """The same, and how to form it again from x, which the backward pass keeps anyway."""
        return self(x, shift, scale), (
            self.forward,
            tuple(t if t is None else t.detach() for t in (x, shift, scale)),
        )


class Embedding(nn.Module):
    """Token table [vocabulary, width]."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        nn.init.kaiming_uniform_(self.embedding, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.embedding)


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864), base 10,000, halves not interleaved."""

    def __init__(self, head_width: int):
        super().__init__()
        self.register_buffer(
            "inv_freq", 1e4 ** -(torch.arange(0, head_width, 2).float() / head_width)
        )

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [L, head_width] of integer positions [L]."""
        angles = torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x[..., L, head_width] by its positions' angles."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[:, :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[:, half:])
    return out.to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block; with `cond_width` its residual branches are shifted, scaled and gated (adaLN-zero, DiT)."""

    def __init__(self, width: int, heads: int, dropout: float, cond_width: int | None = None):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1 = LayerNorm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.adaLN_modulation = None
        if cond_width is not None:
            self.adaLN_modulation = nn.Linear(cond_width, 6 * width)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        cond: Tensor | None = None,
        cache=None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x[B, L, D] -> [B, L, D]. Bidirectional with `cond[B or 1, cond_width]`; causal without it. `cache` holds past keys and values.

        `rows[N]` of the B L positions: attention is of all, its output and the MLP of these alone -> [N, D].
        """
        shift_a = scale_a = shift_m = scale_m = None
        gate_a = gate_m = None
        L = x.shape[1]
        if self.adaLN_modulation is not None:
            shift_a, scale_a, *later = modulation(self.adaLN_modulation, cond).chunk(6, -1)
            gate_a, shift_m, scale_m, gate_m = (
                later if rows is None else (at_rows(m, rows, L) for m in later)
            )
        out = self.attend(*self.norm1.kept_as(x, shift_a, scale_a), angles, cond is None, cache)
        if rows is not None:
            x, out = x.flatten(0, 1)[rows], out.flatten(0, 1)[rows]
        x = gated(x, gate_a, F.dropout(linear(out, self.attn_out), self.dropout, self.training))
        h, again = self.norm2.kept_as(x, shift_m, scale_m)
        return gated(
            x,
            gate_m,
            F.dropout(mlp(h, self.mlp[0], self.mlp[2], again), self.dropout, self.training),
        )

    def attend(
        self, h: Tensor, again: Again, angles: tuple[Tensor, Tensor], causal: bool, cache
    ) -> Tensor:
        """What each position of h[B, L, D] gathers from those it sees, [B, L, D], its heads side by side."""
        B, L, D = h.shape
        qkv = (
            linear(h, self.attn_qkv, again)
            .view(B, L, 3, self.heads, D // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        (q, k), v = (
            rotate(qkv[:2], *angles),
            qkv[2].contiguous(),
        )  # a view would have a backward pass keep q and k as they were, too
        mask = None
        if cache is not None:
            k, v = cache.append(k, v)
            past = k.shape[2] - L
            if (
                causal and past and L > 1
            ):  # is_causal would count from the first key, not from the last
                mask = torch.ones(L, past + L, dtype=torch.bool, device=h.device).tril(past)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal and L > 1 and mask is None
        )
        return out.transpose(1, 2).reshape(B, L, D)


def modulation(linear: nn.Linear, cond: Tensor) -> Tensor:
    """adaLN's shifts, scales and gates [B or 1, 1, n D] of cond[B or 1, cond_width], float32 inside autocast too: a weight's gradient is the sum over
    all positions, whose rounding to bfloat16 would depend on how they are shared between micro-batches."""
    with torch.autocast(cond.device.type, enabled=False):
        return F.linear(cond.float(), linear.weight.float(), linear.bias.float())[:, None]


def at_rows(m: Tensor, rows: Tensor, L: int) -> Tensor:
    """A modulation m[B or 1, 1, D] of texts of L positions at rows[N] of those B L positions, [N or 1, D]."""
    return m[rows // L, 0] if len(m) > 1 else m[0]


def gated(x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    return x + y if gate is None else torch.addcmul(x, gate, y)


class Head(nn.Module):
    """Final norm and readout. `forward` stops at the features; vocabulary rows are read only where they are asked for."""

    def __init__(
        self, width: int, vocabulary: int, cond_width: int | None = None, bias: bool = True
    ):
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary, bias=bias)
        self.adaLN_modulation = None
        if cond_width is not None:
            self.adaLN_modulation = nn.Linear(cond_width, 2 * width)
            nn.init.zeros_(self.adaLN_modulation.weight)
            nn.init.zeros_(self.adaLN_modulation.bias)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Tensor, cond: Tensor | None = None, rows: Tensor | None = None, L: int = 1
    ) -> Tensor:
        """Features, before the vocabulary, of x[B, L, D], or of x[N, D] that are `rows` of the positions of texts of length L."""
        shift = scale = None
        if self.adaLN_modulation is not None:
            both = modulation(self.adaLN_modulation, cond)
            shift, scale = (both if rows is None else at_rows(both, rows, L)).chunk(2, -1)
        return self.norm_final(x, shift, scale)

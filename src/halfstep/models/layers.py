"""Layers shared by the denoiser and the autoregressive baseline.

Parameter names follow the published checkpoints (MDLM, SDTT), so that their weights load by name.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.kernels.linear import Recompute, linear, mlp


class KV(Protocol):
    """Memory of one block for keys and values of other passes."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, L, head_width]; return all that attention must read."""
        ...


class LayerNorm(nn.Module):
    """LayerNorm in float32 (eps 1e-5) with a weight, and adaLN's shift and scale.

    With `bias` it has one, as in GPT-2.
    """

    def __init__(self, width: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(
        self, x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """norm(x) (1 + scale) + shift, or norm(x) without them: x[..., D] -> [..., D] float32."""
        if shift is None or scale is None:
            return F.layer_norm(x.float(), x.shape[-1:], self.weight, self.bias, eps=1e-5)
        if shift.numel() == len(self.weight):  # the same for all positions
            weight = self.weight * (1 + scale.flatten())
            return F.layer_norm(x.float(), x.shape[-1:], weight, shift.flatten(), eps=1e-5)
        h = F.layer_norm(x.float(), x.shape[-1:], self.weight, eps=1e-5)
        return torch.addcmul(shift, h, 1 + scale)

    def with_recompute(
        self, x: Tensor, shift: Tensor | None, scale: Tensor | None
    ) -> tuple[Tensor, Recompute]:
        """`forward`, and how to compute it again from x, which the backward pass keeps anyway."""
        arguments = tuple(t if t is None else t.detach() for t in (x, shift, scale))
        return self(x, shift, scale), (self.forward, arguments)


class Embedding(nn.Module):
    """Token table [vocabulary, width]."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        nn.init.kaiming_uniform_(self.embedding, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x[...] int64 -> [..., width]."""
        return F.embedding(x, self.embedding)


class Rotary(nn.Module):
    """Rotary position embedding (RoFormer, arXiv 2104.09864), base 10,000, not interleaved."""

    inv_freq: Tensor

    def __init__(self, head_width: int):
        super().__init__()
        # On the CPU: on the meta device torch would import its compiler for these few numbers.
        exponents = torch.arange(0, head_width, 2, device="cpu").float() / head_width
        self.register_buffer("inv_freq", 1e4**-exponents)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [L, head_width] of integer positions [L], or [B, 1, L, head_width] of [B, L]."""
        angles = positions[..., None].to(self.inv_freq.dtype) * self.inv_freq
        angles = torch.cat([angles, angles], -1)
        if positions.dim() == 2:
            angles = angles[:, None]  # the same for all heads
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x[..., L, head_width] by the angles of its positions."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out.to(x.dtype)


class MLP(nn.Sequential):
    """Two linear layers with GELU's tanh form between them; a `Block` computes them by `mlp`."""

    def __init__(self, width: int):
        super().__init__(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    @property
    def up(self) -> nn.Linear:
        """The first layer, whose parameters are named 0.weight and 0.bias."""
        return cast(nn.Linear, self[0])

    @property
    def down(self) -> nn.Linear:
        """The last layer, whose parameters are named 2.weight and 2.bias."""
        return cast(nn.Linear, self[2])


class Block(nn.Module):
    """Pre-norm transformer block.

    With `cond_width` its residual branches are shifted, scaled and gated (adaLN-zero, DiT). With
    `bias` its norms and its attention have biases, as in GPT-2.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        cond_width: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1 = LayerNorm(width, bias)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=bias)
        self.attn_out = nn.Linear(width, width, bias=bias)
        self.norm2 = LayerNorm(width, bias)
        self.mlp = MLP(width)
        self.adaLN_modulation = None if cond_width is None else zero_linear(cond_width, 6 * width)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        cond: Tensor | None = None,
        cache: KV | None = None,
        rows: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> Tensor:
        """x[B, L, D] -> [B, L, D], with adaLN's input `cond[B or 1, cond_width]` if it has adaLN.

        `angles` rotate queries and keys; None where positions are embedded. `cache` holds the keys
        and values of other positions. With rows[N], indices into the B L positions, attention reads
        all positions, while its output layer and the MLP are computed for these rows only ->
        [N, D]. With pairs[L, L] bool, position i reads the positions j of which pairs[i, j] is
        true.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(
            cond, rows, x.shape[1]
        )
        h, again = self.norm1.with_recompute(x, shift_a, scale_a)
        out = self.attend(h, again, angles, cache, pairs)
        if rows is not None:
            x, out = x.flatten(0, 1)[rows], out.flatten(0, 1)[rows]
        out = F.dropout(linear(out, self.attn_out), self.dropout, self.training)
        x = gated(x, gate_a, out)
        h, again = self.norm2.with_recompute(x, shift_m, scale_m)
        out = F.dropout(mlp(h, self.mlp.up, self.mlp.down, again), self.dropout, self.training)
        return gated(x, gate_m, out)

    def _modulation(
        self, cond: Tensor | None, rows: Tensor | None, L: int
    ) -> list[Tensor] | list[None]:
        """Shift, scale and gate of the attention, then of the MLP.

        From the first gate on they are those of the rows.
        """
        if self.adaLN_modulation is None:
            return [None] * 6
        shift_a, scale_a, *later = modulation(self.adaLN_modulation, cond).chunk(6, -1)
        if rows is not None:
            later = [at_rows(m, rows, L) for m in later]
        return [shift_a, scale_a, *later]

    def attend(
        self,
        h: Tensor,
        again: Recompute,
        angles: tuple[Tensor, Tensor] | None,
        cache: KV | None,
        pairs: Tensor | None,
    ) -> Tensor:
        """Attention of h[B, L, D] without its output layer, heads concatenated: [B, L, D]."""
        B, L, D = h.shape
        qkv = linear(h, self.attn_qkv, again).view(B, L, 3, self.heads, D // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k = qkv[:2] if angles is None else rotate(qkv[:2], *angles)
        v = qkv[2].contiguous()  # a view would keep q and k before their rotation alive, too
        mask = pairs
        if cache is not None:
            k, v = cache.append(k, v)
            past = k.shape[2] - L
            if (
                self.causal and past and L > 1
            ):  # is_causal would align the first query with the first key
                mask = torch.ones(L, past + L, dtype=torch.bool, device=h.device).tril(past)
        is_causal = self.causal and L > 1 and mask is None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return out.transpose(1, 2).reshape(B, L, D)


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose weight and bias are zero."""
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def modulation(layer: nn.Linear, cond: Tensor | None) -> Tensor:
    """adaLN's shifts, scales and gates [B or 1, 1, n D] from cond[B or 1, cond_width].

    They are computed in float32, inside autocast too.

    The gradient of the weight is a sum over all positions. In bfloat16 its rounding would depend on
    the micro-batches.
    """
    if cond is None:
        raise TypeError("a network with adaLN needs cond[B or 1, cond_width], got None")
    with torch.autocast(cond.device.type, enabled=False):
        return F.linear(cond.float(), layer.weight.float(), layer.bias.float())[:, None]


def at_rows(m: Tensor, rows: Tensor, L: int) -> Tensor:
    """The modulation m[B or 1, 1, D] of each of rows[N], as [N or 1, D].

    Rows are indices into B texts of L positions.
    """
    return m[rows // L, 0] if len(m) > 1 else m[0]


def gated(x: Tensor, gate: Tensor | None, y: Tensor) -> Tensor:
    """x + gate y; x + y without a gate."""
    return x + y if gate is None else torch.addcmul(x, gate, y)


class Head(nn.Module):
    """Final norm and readout.

    `forward` returns features; logits are computed elsewhere, only where they are needed.
    """

    def __init__(
        self, width: int, vocabulary: int, cond_width: int | None = None, bias: bool = True
    ):
        super().__init__()
        self.norm_final = LayerNorm(width)
        self.linear = nn.Linear(width, vocabulary, bias=bias)
        self.adaLN_modulation = None
        if cond_width is not None:
            self.adaLN_modulation = zero_linear(cond_width, 2 * width)
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Tensor, cond: Tensor | None = None, rows: Tensor | None = None, L: int = 1
    ) -> Tensor:
        """Features of x[B, L, D], or of x[N, D] whose `rows` index the positions of texts."""
        if self.adaLN_modulation is None:
            return self.norm_final(x)
        both = modulation(self.adaLN_modulation, cond)
        if rows is not None:
            both = at_rows(both, rows, L)
        return self.norm_final(x, *both.chunk(2, -1))

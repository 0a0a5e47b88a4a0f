"""Autoregressive networks as samplers ask them: token log-probabilities, and reads part by part.

Both kinds of network are read in the same way. Keys and values are allocated once, the texts of a
batch may be at different positions, and a text may go back to an earlier position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.diffusion.contracts import Autoregressor, Reader
from halfstep.errors import HalfstepError, reason
from halfstep.kernels.linear import linear, mlp, pack_network
from halfstep.kernels.logits import log_softmax_, row_chunks
from halfstep.models.causal_lm import TOLERANCE, CausalLM
from halfstep.models.gpt import GPT, CastReadout
from halfstep.models.layers import Block

LOW_TOLERANCE = 5e-2  # between features of bfloat16 that should be equal, as a share of their norm
TAIL = 8  # tokens that the check of a network reads at two places at once


def autoregressor(network: GPT | CausalLM) -> Autoregressor:
    """The autoregressive model of a network in eval mode, whose weights must no longer change.

    It is made and used inside the same autocast, or outside of any. It has no gradients.
    """
    return _GPTScorer(network) if isinstance(network, GPT) else _CausalLMScorer(network)


class _GPTScorer:
    """An `Autoregressor`: GPT with packed matrices."""

    def __init__(self, gpt: GPT):
        self.gpt, self.logits, self.vocab_size = pack_network(gpt), CastReadout(gpt), gpt.vocabulary

    def token_log_p(self, x: Tensor) -> Tensor:
        """log p of the tokens 1 to L - 1 of x[B, L] int64, given those before: [B, L - 1]."""
        return _token_log_p(self.gpt, self.logits, x, self.vocab_size)

    def reader(self, texts: int, length: int) -> Reader:
        """A reader of texts of up to `length` tokens."""
        return _GPTReader(self.gpt, self.logits, texts, length)


class _CausalLMScorer:
    """An `Autoregressor`: a causal language model of transformers."""

    def __init__(self, network: CausalLM):
        self.network, self.vocab_size = network, network.vocabulary
        self.checked = 1  # length up to which its reads are known to be right

    def token_log_p(self, x: Tensor) -> Tensor:
        """log p of the tokens 1 to L - 1 of x[B, L] int64, given those before: [B, L - 1].

        HalfstepError if a text has more tokens than the model has positions.
        """
        self.network.check_length(x.shape[1])
        return _token_log_p(self.network, self.network.logits, x, self.vocab_size)

    def reader(self, texts: int, length: int) -> Reader:
        """A reader of texts of up to `length` tokens.

        HalfstepError if the model has fewer positions, or cannot read texts part by part.
        """
        self.network.check_length(length)
        if length > self.checked:
            _check_reads(self.network, length)
            self.checked = length
        return _CausalLMReader(self.network, texts, length)


@torch.no_grad()
def _token_log_p(
    features: Callable[[Tensor], Tensor], logits: Callable[[Tensor], Tensor], x: Tensor, V: int
) -> Tensor:
    """log p of each token of x[B, L] but the first, [B, L - 1]; some rows of logits at a time."""
    tokens = x[:, 1:].reshape(-1, 1)
    if not len(tokens):
        return torch.zeros(len(x), max(x.shape[1] - 1, 0), device=x.device)
    h = features(x[:, :-1]).flatten(0, 1)
    chunks = [
        log_softmax_(logits(h[rows])).gather(-1, tokens[rows])
        for rows in row_chunks(len(h), V, h.device)
    ]
    return torch.cat(chunks).view(len(x), -1)


@dataclass(frozen=True)
class _Place:
    """Where n new tokens of each of B texts go, and what they read.

    rows [B, 1] and positions [B, n], or [1, n] if all texts begin alike
    alike: the one slice of positions; None if the texts begin at different ones
    window: the largest number of tokens that a text then has
    """

    rows: Tensor
    positions: Tensor
    alike: slice | None
    window: int

    def of(self, table: Tensor) -> Tensor:
        """table[length, ...] at the positions: [B or 1, n, ...]."""
        return table[self.positions] if self.alike is None else table[self.alike][None]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What is added to attention's scores, [B or 1, 1, n, window]: 0, or -inf for later keys.

        A boolean mask would be converted to it in every block.
        """
        keys = torch.arange(self.window, device=self.positions.device)
        later = (keys > self.positions[..., None])[:, None]
        return torch.zeros(later.shape, dtype=dtype, device=keys.device).masked_fill_(
            later, -torch.inf
        )


class _Ends:
    """How many tokens of each of B texts are read; it checks where the next ones begin."""

    def __init__(self, texts: int, length: int, device: torch.device):
        self.ends, self.length = [0] * texts, length
        self.range = torch.arange(length, device=device)

    def place(self, tokens: Tensor, start: Tensor) -> _Place:
        """The place of tokens[B, n] that begin at start[B]. ValueError if they do not fit."""
        B, n, starts = len(self.ends), tokens.shape[-1], start.tolist()
        if tokens.shape != (B, n) or len(starts) != B or not n * B:
            raise ValueError(
                f"tokens and start: found shapes {list(tokens.shape)} and {list(start.shape)}, "
                f"expected [{B}, n] and [{B}] for the {B} texts of this reader, n at least 1"
            )
        for row, (begin, end) in enumerate(zip(starts, self.ends, strict=True)):
            if not 0 <= begin <= end or begin + n > self.length:
                raise ValueError(
                    f"start: found {begin} for {n} tokens of text {row}, of which {end} tokens are "
                    f"read; expected 0 to {end}, and an end of at most {self.length}"
                )
        self.ends = [begin + n for begin in starts]
        window, device = max(self.ends), self.range.device
        rows = torch.arange(B, device=device)[:, None]
        if window == min(self.ends):
            alike = slice(starts[0], window)
            return _Place(rows, self.range[None, alike], alike, window)
        return _Place(rows, start.to(device)[:, None] + self.range[:n], None, window)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the texts alone."""
        self.ends = [self.ends[row] for row in rows.tolist()]


class _Memory:
    """Keys and values of one block, for texts of up to `length` tokens at different positions."""

    def __init__(self, length: int):
        self.length = length
        self.kept: list[Tensor] = []  # keys and values [B, length, heads, head_width]

    def write(self, k: Tensor, v: Tensor, place: _Place) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, n, head_width]; return those of the window."""
        if not self.kept:
            self.kept = [self._zeros(k), self._zeros(v)]
        for kept, new in zip(self.kept, (k, v), strict=True):
            if place.alike is None:
                kept[place.rows, place.positions] = new.transpose(1, 2)
            else:
                kept[:, place.alike] = new.transpose(1, 2)
        k, v = (kept[:, : place.window].transpose(1, 2) for kept in self.kept)
        return k, v

    def _zeros(self, new: Tensor) -> Tensor:
        """Memory for keys like new[B, heads, n, head_width].

        It is cleared, because attention multiplies what is not yet written by zero, and NaN stays.
        """
        B, heads, _, head_width = new.shape
        return new.new_zeros(B, self.length, heads, head_width)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the texts alone."""
        self.kept = [kept.index_select(0, rows.to(kept.device)) for kept in self.kept]


class _GPTReader:
    """A `Reader` of GPT. A read of one token computes what a step of `Decoder` computes."""

    def __init__(self, gpt: GPT, logits: CastReadout, texts: int, length: int):
        self.gpt, self.logits = gpt, logits
        self.blocks = list(cast(Iterable[Block], gpt.blocks))
        self.cos, self.sin = (table[:, None, None] for table in gpt.rotation(length))
        self.ends = _Ends(texts, length, gpt.vocab_embed.embedding.device)
        self.memories = [_Memory(length) for _ in self.blocks]

    @torch.no_grad()
    def read(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Logits [B, n, V] float32 of the token after each of tokens[B, n] from start[B] on.

        ValueError if a start is beyond what was read, or an end beyond the reader's length.
        """
        place, (B, n) = self.ends.place(tokens, start), tokens.shape
        cos, sin = place.of(self.cos), place.of(self.sin)
        half = cos.shape[-1] // 2
        first = place.alike is not None and place.alike.start == 0
        mask = None
        if not first and (n > 1 or place.alike is None):
            mask = place.mask(self.logits.compute)
        x = F.embedding(tokens, self.gpt.vocab_embed.embedding)
        for block, memory in zip(self.blocks, self.memories, strict=True):
            qkv = linear(block.norm1.forward(x), block.attn_qkv).view(B, n, 3, block.heads, -1)
            qk, v = qkv[:, :, :2], qkv[:, :, 2]
            qk = (qk * cos + qk.roll(half, -1) * sin).to(v.dtype).transpose(1, 3)
            k, v = memory.write(qk[:, :, 1], v.transpose(1, 2), place)
            out = F.scaled_dot_product_attention(qk[:, :, 0], k, v, mask, is_causal=first and n > 1)
            x = x + linear(out.transpose(1, 2).reshape(B, n, -1), block.attn_out)
            x = x + mlp(block.norm2.forward(x), block.mlp.up, block.mlp.down)
        return self.logits(self.gpt.output_layer(x))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows[K] of the texts alone, in this order."""
        self.ends.keep(rows)
        for memory in self.memories:
            memory.keep(rows)


class _RowCache:
    """What transformers' models use of a Cache, for texts at different positions.

    The caches of transformers append to all texts alike. The models call these two methods where
    they are given positions and a mask with four dimensions. One that needs more is refused by
    `_check_reads`.
    """

    def __init__(self, memories: dict[int, _Memory], place: _Place, length: int):
        self.memories, self.place, self.length = memories, place, length

    def update(
        self, k: Tensor, v: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, n, head_width] of a layer; return those of the window."""
        memory = self.memories.setdefault(layer_idx, _Memory(self.length))
        return memory.write(k, v, self.place)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens before the new ones."""
        return self.place.window - self.place.positions.shape[1]


class _CausalLMReader:
    """A `Reader` of a causal language model of transformers."""

    def __init__(self, network: CausalLM, texts: int, length: int):
        self.network, self.length = network, length
        self.ends = _Ends(texts, length, network.model.device)
        self.memories: dict[int, _Memory] = {}  # of each layer

    @torch.no_grad()
    def features(self, tokens: Tensor, start: Tensor) -> Tensor:
        """As `read`, the features h[B, n, D]."""
        place, B = self.ends.place(tokens, start), len(tokens)
        return self.network.model(
            input_ids=tokens,
            attention_mask=place.mask(torch.float32).expand(B, -1, -1, -1),
            position_ids=place.positions.expand(B, -1),
            past_key_values=_RowCache(self.memories, place, self.length),
            use_cache=True,
        ).logits

    def read(self, tokens: Tensor, start: Tensor) -> Tensor:
        """Logits [B, n, V] float32 of the token after each of tokens[B, n] from start[B] on.

        ValueError if a start is beyond what was read, or an end beyond the reader's length.
        """
        return self.network.logits(self.features(tokens, start))

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows[K] of the texts alone, in this order."""
        self.ends.keep(rows)
        for memory in self.memories.values():
            memory.keep(rows)


@torch.no_grad()
def _check_reads(network: CausalLM, length: int) -> None:
    """HalfstepError unless the model reads texts of `length` tokens in parts as it does at once.

    Two copies of a text are read up to their last tokens, one with wrong tokens at its end. Then
    one copy goes on, while the other goes back and reads the right tokens.
    """
    device, tail = network.model.device, max(1, min(TAIL, length // 3))
    # A permutation of the vocabulary's first tokens, so that no two neighbors are equal.
    x = (torch.arange(length, device=device) * 7919 + 1)[None] % network.vocabulary
    later, earlier = slice(length - tail, length), slice(max(0, length - 2 * tail), length - tail)
    begun = x[:, : later.start].repeat(2, 1)
    begun[1, earlier] = (begun[1, earlier] + 1) % network.vocabulary
    fault = None
    try:
        wanted = network(x)[0]
        reader = _CausalLMReader(network, 2, length)
        reader.features(begun, torch.tensor([0, 0]))
        found = reader.features(
            torch.cat([x[:, later], x[:, earlier]]), torch.tensor([later.start, earlier.start])
        )
        wanted = torch.stack([wanted[later], wanted[earlier]])
        low = torch.is_autocast_enabled(device.type)
        error = ((found - wanted).norm() / wanted.norm()).item()
        if not error <= (LOW_TOLERANCE if low else TOLERANCE):
            fault = f"its features then differ by {error:.1e} of their norm"
    except Exception as error:  # what a model of transformers raises is not known
        fault = f"{type(error).__name__}: {reason(error)}"
    if fault:
        raise HalfstepError(
            f"baseline: {type(network.model).__name__} does not read texts part by part ({fault}); "
            "expected a transformer that reads the same from its KV cache; "
            "use another baseline, or a sampler that reads no text with it"
        )

"""The autoregressive baseline: a causal transformer, and a decoder with a static KV cache."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from halfstep.files import write_atomic, write_tensors
from halfstep.kernels.categorical import inverse_cdf, nucleus
from halfstep.kernels.linear import linear, matmul, mlp, pack_network, pack_weight
from halfstep.models.layers import Block, Embedding, Head, LayerNorm, Rotary


class KVCache:
    """Keys and values of one block, allocated once for the whole length."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        # Cleared: attention multiplies what a mask hides by zero, and NaN would stay.
        self.k = like.new_zeros(batch, heads, length, head_width)
        self.v = torch.zeros_like(self.k)
        self.end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v [B, heads, L, head_width] after the earlier ones; return all of them."""
        start, self.end = self.end, self.end + k.shape[2]
        self.k[:, :, start : self.end] = k
        self.v[:, :, start : self.end] = v
        return self.k[:, :, : self.end], self.v[:, :, : self.end]


class GPT(nn.Module):
    """Causal transformer with RoPE over `vocabulary` tokens.

    The head has no bias, like transformers' GPT-NeoX.
    """

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.vocab_embed = Embedding(vocabulary, width)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, causal=True) for _ in range(blocks)
        )
        self.output_layer = Head(width, vocabulary, bias=False)
        self.vocabulary, self.width, self.heads = vocabulary, width, heads

    def forward(self, x: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Token ids x[B, L] -> features h[B, L, D]; with caches, x continues their tokens."""
        start = caches[0].end if caches else 0
        angles = self.rotary_emb(torch.arange(start, start + x.shape[1], device=x.device))
        h = self.vocab_embed(x)
        for i, block in enumerate(self.blocks):
            h = block(h, angles, cache=caches[i] if caches else None)
        return self.output_layer(h)

    def log_p(self, h: Tensor) -> Tensor:
        """log p of the next token from features h[N, D]: [N, V], float32 inside autocast too."""
        with torch.autocast(h.device.type, enabled=False):
            return matmul(h.float(), self.output_layer.linear.weight.float()).log_softmax(-1)

    def new_caches(
        self, batch: int, length: int, dtype: torch.dtype | None = None
    ) -> list[KVCache]:
        """An empty cache for each block, for `batch` texts of up to `length` tokens."""
        like = self.vocab_embed.embedding.new_empty(0, dtype=dtype)
        head_width = self.width // self.heads
        return [KVCache(batch, self.heads, length, head_width, like) for _ in self.blocks]

    def rotation(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, head_width] of which q cos + q.roll(head_width / 2) sin rotates q.

        The first half of each sin is negated.
        """
        cos, sin = self.rotary_emb(torch.arange(length, device=self.vocab_embed.embedding.device))
        half = sin.shape[1] // 2
        return cos, torch.cat([-sin[:, :half], sin[:, half:]], 1)

    def decoder(self, batch: int, length: int, temperature: float, top_p: float) -> "Decoder":
        """A decoder of `batch` texts of `length` tokens."""
        return Decoder(self, batch, length, temperature, top_p)


def draw_token(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """Draw the next token of each text from its logits[N, V], by its uniform u[N]: [N] int64."""
    if temperature != 1:
        logits = logits / temperature
    if top_p < 1:
        logits = nucleus(logits.log_softmax(-1), top_p)
    return inverse_cdf(logits, u)


class CastReadout:
    """The readout of a network without gradients: features h[..., D] -> logits [..., V] float32.

    Inside autocast, matrix and features are rounded to its dtype. The matrix is rounded once, so a
    readout is made and used inside the same autocast, or outside of any.
    """

    def __init__(self, gpt: GPT):
        weight = gpt.output_layer.linear.weight
        kind = weight.device.type
        low = torch.is_autocast_enabled(kind)
        self.compute = torch.get_autocast_dtype(kind) if low else torch.float32
        rounded = weight.to(self.compute)
        with torch.autocast(kind, enabled=False):
            # A CPU has no product of low matrices with a float32 result, so there it is float32
            # again, with the rounded values.
            self.weight = rounded if weight.is_cuda else pack_weight(rounded.float())

    def __call__(self, h: Tensor) -> Tensor:
        """Logits of features h[..., D], a new tensor."""
        with torch.autocast(h.device.type, enabled=False):
            low = h.to(self.compute)
            if self.weight.dtype == torch.float32:
                return matmul(low.float(), self.weight)
            rows = torch.mm(low.flatten(0, -2), self.weight.t(), out_dtype=torch.float32)
            return rows.view(*h.shape[:-1], -1)


class Decoder:
    """Writes `batch` texts of `length` tokens, one per step, in memory allocated once.

    No step waits for the host or changes its shape. On CUDA a step is one CUDA graph, captured once
    for each window of keys (powers of two). On a CPU a step reads exactly the keys that exist,
    without a mask. It is made and used inside the same autocast, or outside of any.
    """

    SMALLEST = 64  # keys that the first graph reads

    def __init__(
        self,
        gpt: GPT,
        batch: int,
        length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ):
        table = gpt.vocab_embed.embedding
        device = table.device
        self.gpt, self.length = gpt, length
        self.temperature, self.top_p = temperature, top_p
        low = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if low else None
        self.caches = gpt.new_caches(batch, length, dtype)
        self.cos, self.sin = gpt.rotation(length)
        self.blocks = cast(Iterable[Block], pack_network(gpt).blocks)
        self.logits = CastReadout(gpt)
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.u = torch.zeros(batch, length, dtype=torch.float64, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.keys = torch.arange(length, device=device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    @torch.inference_mode()
    def write(self, start: Tensor, u: Tensor) -> Tensor:
        """Write texts [N, length] that begin with start[P] or [N, P].

        They are drawn by u[N, length] float64.
        """
        begun = start.shape[-1]
        self.ids[:, :begun] = start
        self.u.copy_(u)
        if begun > 1:
            for cache in self.caches:
                cache.end = 0
            self.gpt(self.ids[:, : begun - 1], self.caches)
        self.position.fill_(begun - 1)
        for position in range(begun - 1, self.length - 1):
            if self.ids.is_cuda:
                self._replay(min(max(self.SMALLEST, 1 << position.bit_length()), self.length))
            else:
                self.step(position + 1)
        return self.ids.clone()

    def step(self, window: int, masked: bool = False) -> None:
        """Read the token at `position`, draw the next one, advance.

        Reads the first `window` keys; `masked` hides those not yet written.
        """
        B, half = len(self.ids), self.cos.shape[1] // 2
        cos, sin = self.cos[self.position], self.sin[self.position]
        seen = (self.keys[:window] <= self.position)[None, None, None] if masked else None
        x = F.embedding(
            self.ids.index_select(1, self.position)[:, 0], self.gpt.vocab_embed.embedding
        )
        for block, cache in zip(self.blocks, self.caches, strict=True):
            qkv = linear(_norm(x, block.norm1), block.attn_qkv).view(B, 3, block.heads, -1)
            qk, v = qkv[:, :2], qkv[:, 2, :, None]
            qk = (qk * cos + qk.roll(half, -1) * sin).to(v.dtype)
            cache.k.index_copy_(2, self.position, qk[:, 1, :, None])
            cache.v.index_copy_(2, self.position, v)
            out = F.scaled_dot_product_attention(
                qk[:, 0, :, None], cache.k[:, :, :window], cache.v[:, :, :window], seen
            )
            x = x + linear(out.reshape(B, -1), block.attn_out)
            x = x + mlp(_norm(x, block.norm2), block.mlp.up, block.mlp.down)
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(_norm(x, self.gpt.output_layer.norm_final))
            self.position += 1
            u = self.u.index_select(1, self.position)[:, 0]
            drawn = draw_token(logits, self.temperature, self.top_p, u)
        self.ids.index_copy_(1, self.position, drawn[:, None])

    def _replay(self, window: int) -> None:
        """Run `step` over `window` keys as a CUDA graph, captured when first needed.

        The capture restores ids and position.
        """
        if window not in self.graphs:
            ids, position = self.ids.clone(), self.position.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self.step(window, masked=True)
                self.position.copy_(position)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step(window, masked=True)
            self.graphs[window] = graph
            self.ids.copy_(ids)
            self.position.copy_(position)
        self.graphs[window].replay()


def _norm(x: Tensor, norm: LayerNorm) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight, eps=1e-5)


def gpt_neox_config(gpt: GPT, length: int, eos_id: int) -> dict[str, Any]:
    """transformers' config.json of this network, for texts of up to `length` tokens."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": gpt.vocabulary,
        "hidden_size": gpt.width,
        "num_hidden_layers": len(gpt.blocks),
        "num_attention_heads": gpt.heads,
        "intermediate_size": 4 * gpt.width,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": length,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "attention_bias": False,
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
        "tie_word_embeddings": False,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "torch_dtype": "float32",
    }


def save_gpt_neox(
    gpt: GPT, folder: Path, length: int, eos_id: int, tokenizer: Path, eos: str
) -> None:
    """Write the network as a folder that transformers loads as a causal language model.

    The architecture is GPT-NeoX without parallel residual. `eos` is the token of the id.
    """
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in _gpt_neox_state(gpt).items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    config = gpt_neox_config(gpt, length, eos_id)
    write_atomic(folder / "config.json", json.dumps(config, indent=1))
    save_tokenizer(folder, length, tokenizer, eos)


def save_tokenizer(folder: Path, length: int, tokenizer: Path, eos: str) -> None:
    """Write the tokenizer of a folder for transformers, for texts of up to `length` tokens.

    `eos` is its token that ends a document, which is BOS too.
    """
    write_atomic(folder / "tokenizer.json", tokenizer.read_bytes())
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": eos,
        "model_max_length": length,
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(about, indent=1))


def _gpt_neox_state(gpt: GPT) -> dict[str, Tensor]:
    """The parameters under GPT-NeoX's names; its norms have a bias, which is zero here."""
    state: dict[str, Tensor] = {
        "gpt_neox.embed_in.weight": gpt.vocab_embed.embedding,
        "embed_out.weight": gpt.output_layer.linear.weight,
    }
    norms = {"gpt_neox.final_layer_norm": gpt.output_layer.norm_final}
    for i, block in enumerate(cast(Iterable[Block], gpt.blocks)):
        name = f"gpt_neox.layers.{i}"
        norms[f"{name}.input_layernorm"] = block.norm1
        norms[f"{name}.post_attention_layernorm"] = block.norm2
        # GPT-NeoX stores q, k and v of one head together.
        qkv = block.attn_qkv.weight.view(3, gpt.heads, -1, gpt.width).transpose(0, 1)
        state[f"{name}.attention.query_key_value.weight"] = qkv.reshape(3 * gpt.width, gpt.width)
        state[f"{name}.attention.dense.weight"] = block.attn_out.weight
        layers = {"dense_h_to_4h": block.mlp.up, "dense_4h_to_h": block.mlp.down}
        for theirs, layer in layers.items():
            state[f"{name}.mlp.{theirs}.weight"] = layer.weight
            state[f"{name}.mlp.{theirs}.bias"] = layer.bias
    for name, norm in norms.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = norm.weight, torch.zeros(gpt.width)
    return state

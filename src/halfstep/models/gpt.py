"""The autoregressive peer: the denoiser's blocks, causal, with a static key-value cache; baseline, and judge at laptop scale."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from halfstep.kernels.categorical import inverse_cdf, uniforms
from halfstep.kernels.linear import linear, matmul, mlp, pack_network, pack_weight
from halfstep.models.layers import Block, Embedding, Head, Rotary


class KVCache:
    """Keys and values of one block, allocated once for the whole length."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.k, self.v = (
            torch.empty(batch, heads, length, head_width, device=like.device, dtype=like.dtype)
            for _ in range(2)
        )
        self.end = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        start, self.end = self.end, self.end + k.shape[2]
        self.k[:, :, start : self.end] = k
        self.v[:, :, start : self.end] = v
        return self.k[:, :, : self.end], self.v[:, :, : self.end]


class GPT(nn.Module):
    """Causal transformer with RoPE over `vocabulary` tokens. The head has no bias, as transformers' GPT-NeoX has none."""

    def __init__(self, vocabulary: int, width: int, blocks: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.vocab_embed = Embedding(vocabulary, width)
        self.rotary_emb = Rotary(width // heads)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.output_layer = Head(width, vocabulary, bias=False)
        self.vocabulary = vocabulary

    def forward(self, x: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """Token ids x[B, L] -> features h[B, L, D]; with caches, x continues what they hold."""
        start = caches[0].end if caches else 0
        angles = self.rotary_emb(torch.arange(start, start + x.shape[1], device=x.device))
        h = self.vocab_embed(x)
        for i, block in enumerate(self.blocks):
            h = block(h, angles, cache=caches[i] if caches else None)
        return self.output_layer(h)

    def log_p(self, h: Tensor) -> Tensor:
        """log-probabilities [N, V] of the next token from features h[N, D], float32 inside autocast too."""
        with torch.autocast(h.device.type, enabled=False):
            return matmul(h.float(), self.output_layer.linear.weight.float()).log_softmax(-1)

    def new_caches(self, batch: int, length: int) -> list[KVCache]:
        table = self.vocab_embed.embedding
        heads = self.blocks[0].heads
        return [KVCache(batch, heads, length, table.shape[1] // heads, table) for _ in self.blocks]


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose mass reaches top_p (Holtzman et al., arXiv 1904.09751); the rest get -inf."""
    if top_p >= 1:
        return log_p
    values, order = log_p.sort(-1, descending=True)
    p = values.exp()
    values = values.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.empty_like(log_p).scatter_(-1, order, values)


class Decoder:
    """`batch` texts of `length` tokens, one token a step, in memory that is allocated once: keys, values, ids, uniforms, the position itself.

    Nothing in a step waits for the host or changes its shape, so on CUDA a step is one graph, captured once for each window of keys (powers
    of two); on a CPU, where what is launched is what is paid, it reads the exact window without a mask. `compute` is the autocast dtype.
    """

    SMALLEST = 64  # keys that the first graph reads

    def __init__(
        self,
        gpt: GPT,
        batch: int,
        length: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        compute: torch.dtype | None = None,
    ):
        table = gpt.vocab_embed.embedding
        self.gpt, self.length, self.temperature, self.top_p, self.compute = (
            gpt,
            length,
            temperature,
            top_p,
            compute,
        )
        with self._autocast():
            kind = (
                torch.get_autocast_dtype(table.device.type)
                if torch.is_autocast_enabled(table.device.type)
                else table.dtype
            )
        self.caches = [
            KVCache(
                batch,
                gpt.blocks[0].heads,
                length,
                table.shape[1] // gpt.blocks[0].heads,
                table.new_empty(0, dtype=kind),
            )
            for _ in gpt.blocks
        ]
        cos, sin = gpt.rotary_emb(torch.arange(length, device=table.device))
        self.cos, self.sin = (
            cos,
            torch.cat([-sin[:, : sin.shape[1] // 2], sin[:, sin.shape[1] // 2 :]], 1),
        )
        self.blocks, self.head = (
            pack_network(gpt).blocks,
            pack_weight(gpt.output_layer.linear.weight.float()),
        )  # cast once: the readout is float32 whatever the blocks are
        self.ids = torch.zeros(batch, length, dtype=torch.long, device=table.device)
        self.u = torch.zeros(batch, length, dtype=torch.float64, device=table.device)
        self.position = torch.zeros(1, dtype=torch.long, device=table.device)
        self.keys = torch.arange(length, device=table.device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def _autocast(self):
        return torch.autocast(
            self.gpt.vocab_embed.embedding.device.type,
            self.compute,
            enabled=self.compute is not None,
            cache_enabled=False,
        )

    @torch.inference_mode()
    def write(self, start: Tensor, u: Tensor, on_step: Callable[[], None] | None = None) -> Tensor:
        """Texts [N, length] that begin with start[P] or [N, P] and are drawn by u[N, length] float64."""
        begun = start.shape[-1]
        self.ids[:, :begun] = start
        self.u.copy_(u)
        with self._autocast():
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
                if on_step:
                    on_step()
        return self.ids.clone()

    def step(self, window: int, masked: bool = False) -> None:
        """Read the token at `position`, draw the next one, advance. The first `window` keys are read; `masked` hides those yet to come."""
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
            x = x + mlp(_norm(x, block.norm2), block.mlp[0], block.mlp[2])
        with torch.autocast(x.device.type, enabled=False):
            logits = matmul(_norm(x, self.gpt.output_layer.norm_final).float(), self.head)
            if self.temperature != 1:
                logits = logits / self.temperature
            if self.top_p < 1:
                logits = nucleus(logits.log_softmax(-1), self.top_p)
            self.position += 1
            drawn = inverse_cdf(logits, self.u.index_select(1, self.position)[:, 0])
        self.ids.index_copy_(1, self.position, drawn[:, None])

    def _replay(self, window: int) -> None:
        """The step over `window` keys as a CUDA graph, captured at first need; warming up and capturing leave ids and position as they were."""
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


def _norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], norm.weight, eps=1e-5)


def decode(
    gpt: GPT, num_samples: int, length: int, bos_id: int, *, seed: int, first: int = 0, temperature: float = 1.0, top_p: float = 1.0,
    prompt: Tensor | None = None, on_step: Callable[[], None] | None = None, decoder: Decoder | None = None,
) -> Tensor:  # fmt: skip
    """Write num_samples texts of `length` tokens, BOS (or the prompt ids [P], or [N, P] with a row for each text) first, one token per pass with
    the cache. [N, length] int64. A `decoder` of this shape that is given again keeps its memory and its graphs.
    """
    decoder = decoder or Decoder(gpt, num_samples, length, temperature, top_p)
    return decoder.write(
        torch.tensor([bos_id]) if prompt is None else prompt,
        uniforms(seed, first, num_samples, length),
        on_step,
    )


def gpt_neox_config(gpt: GPT, length: int, eos_id: int) -> dict:
    """transformers' config.json of this network, for texts of up to `length` tokens."""
    width, heads = gpt.vocab_embed.embedding.shape[1], gpt.blocks[0].heads
    return {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": gpt.vocabulary, "hidden_size": width,
        "num_hidden_layers": len(gpt.blocks), "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": length, "layer_norm_eps": 1e-5, "use_parallel_residual": False, "attention_bias": False,
        "rotary_pct": 1.0, "rotary_emb_base": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False, "bos_token_id": eos_id, "eos_token_id": eos_id, "attention_dropout": 0.0, "hidden_dropout": 0.0, "torch_dtype": "float32",
    }  # fmt: skip


def save_gpt_neox(gpt: GPT, folder: Path, length: int, eos_id: int, tokenizer: Path) -> None:
    """The same function as a folder that transformers loads (AutoModelForCausalLM: GPT-NeoX without parallel residual)."""
    folder.mkdir(parents=True, exist_ok=True)
    width, heads = gpt.vocab_embed.embedding.shape[1], gpt.blocks[0].heads
    out = {
        "gpt_neox.embed_in.weight": gpt.vocab_embed.embedding,
        "embed_out.weight": gpt.output_layer.linear.weight,
    }
    zeros = torch.zeros(width)

    def norm(name: str, layer: nn.Module) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = layer.weight, zeros

    for i, block in enumerate(gpt.blocks):
        name = f"gpt_neox.layers.{i}"
        norm(f"{name}.input_layernorm", block.norm1)
        norm(f"{name}.post_attention_layernorm", block.norm2)
        qkv = block.attn_qkv.weight.view(3, heads, width // heads, width).transpose(
            0, 1
        )  # GPT-NeoX keeps a head's q, k, v together
        out[f"{name}.attention.query_key_value.weight"] = qkv.reshape(3 * width, width)
        out[f"{name}.attention.dense.weight"] = block.attn_out.weight
        for ours, theirs in (("0", "dense_h_to_4h"), ("2", "dense_4h_to_h")):
            out[f"{name}.mlp.{theirs}.weight"] = block.mlp.get_parameter(f"{ours}.weight")
            out[f"{name}.mlp.{theirs}.bias"] = block.mlp.get_parameter(f"{ours}.bias")
    norm("gpt_neox.final_layer_norm", gpt.output_layer.norm_final)
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in out.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(gpt_neox_config(gpt, length, eos_id), indent=1))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    eos = "<|endoftext|>"
    kind = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": eos,
        "model_max_length": length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=1))

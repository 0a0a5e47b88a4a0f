"""The autoregressive peer: the denoiser's blocks, causal, with a static key-value cache; baseline, and judge at laptop scale."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from halfstep.draws import inverse_cdf, uniforms
from halfstep.models.layers import Block, Embedding, Head, Rotary


class Cache:
    """Keys and values of one block, allocated once for the whole length."""

    def __init__(self, batch: int, heads: int, length: int, head_width: int, like: Tensor):
        self.k, self.v = (torch.empty(batch, heads, length, head_width, device=like.device, dtype=like.dtype) for _ in range(2))
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

    def forward(self, x: Tensor, caches: list[Cache] | None = None) -> Tensor:
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
            return nn.functional.linear(h.float(), self.output_layer.linear.weight.float()).log_softmax(-1)

    def new_caches(self, batch: int, length: int) -> list[Cache]:
        table = self.vocab_embed.embedding
        heads = self.blocks[0].heads
        return [Cache(batch, heads, length, table.shape[1] // heads, table) for _ in self.blocks]


def nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Keep the fewest most likely tokens whose mass reaches top_p (Holtzman et al., arXiv 1904.09751); the rest get -inf."""
    if top_p >= 1:
        return log_p
    values, order = log_p.sort(-1, descending=True)
    p = values.exp()
    values = values.masked_fill(p.cumsum(-1) - p >= top_p, -torch.inf)
    return torch.empty_like(log_p).scatter_(-1, order, values)


@torch.no_grad()
def generate(
    gpt: GPT, num_samples: int, length: int, bos_id: int, *, seed: int, first: int = 0, temperature: float = 1.0, top_p: float = 1.0,
    prompt: Tensor | None = None, on_step: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Write num_samples texts of `length` tokens, BOS (or the prompt ids [P], or [N, P] with a row for each text) first, one token per pass with
    the cache. [N, length] int64.
    """
    start = torch.tensor([bos_id]) if prompt is None else prompt
    device = gpt.vocab_embed.embedding.device
    u = uniforms(seed, first, num_samples, length).to(device)
    ids = torch.empty(num_samples, length, dtype=torch.long, device=device)
    begun = start.shape[-1]
    ids[:, :begun] = start.to(device)
    caches = gpt.new_caches(num_samples, length)
    new = ids[:, :begun]
    for position in range(begun, length):
        log_p = gpt.log_p(gpt(new, caches)[:, -1])
        ids[:, position] = inverse_cdf(nucleus((log_p / temperature).log_softmax(-1), top_p), u[:, position])
        new = ids[:, position : position + 1]
        if on_step:
            on_step()
    return ids


def save_gpt_neox(gpt: GPT, folder: Path, length: int, eos_id: int, tokenizer: Path) -> None:
    """The same function as a folder that transformers loads (AutoModelForCausalLM: GPT-NeoX without parallel residual)."""
    folder.mkdir(parents=True, exist_ok=True)
    width, heads = gpt.vocab_embed.embedding.shape[1], gpt.blocks[0].heads
    out = {"gpt_neox.embed_in.weight": gpt.vocab_embed.embedding, "embed_out.weight": gpt.output_layer.linear.weight}
    zeros = torch.zeros(width)

    def norm(name: str, layer: nn.Module) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = layer.weight, zeros

    for i, block in enumerate(gpt.blocks):
        name = f"gpt_neox.layers.{i}"
        norm(f"{name}.input_layernorm", block.norm1)
        norm(f"{name}.post_attention_layernorm", block.norm2)
        qkv = block.attn_qkv.weight.view(3, heads, width // heads, width).transpose(0, 1)  # GPT-NeoX keeps a head's q, k, v together
        out[f"{name}.attention.query_key_value.weight"] = qkv.reshape(3 * width, width)
        out[f"{name}.attention.dense.weight"] = block.attn_out.weight
        for ours, theirs in (("0", "dense_h_to_4h"), ("2", "dense_4h_to_h")):
            out[f"{name}.mlp.{theirs}.weight"] = block.mlp.get_parameter(f"{ours}.weight")
            out[f"{name}.mlp.{theirs}.bias"] = block.mlp.get_parameter(f"{ours}.bias")
    norm("gpt_neox.final_layer_norm", gpt.output_layer.norm_final)
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in out.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["GPTNeoXForCausalLM"], "model_type": "gpt_neox", "vocab_size": gpt.vocabulary, "hidden_size": width,
        "num_hidden_layers": len(gpt.blocks), "num_attention_heads": heads, "intermediate_size": 4 * width, "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": length, "layer_norm_eps": 1e-5, "use_parallel_residual": False, "attention_bias": False,
        "rotary_pct": 1.0, "rotary_emb_base": 10000, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "tie_word_embeddings": False, "bos_token_id": eos_id, "eos_token_id": eos_id, "attention_dropout": 0.0, "hidden_dropout": 0.0, "torch_dtype": "float32",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    eos = "<|endoftext|>"
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "bos_token": eos, "model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind, indent=1))

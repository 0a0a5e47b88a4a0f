"""Autoregressive networks that are no training of ours: judges, and published baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.models.flops import Shape, causal_shape

GPT2_TOKENS = 50_257

# Autoregressive networks of the hub by name: blocks, width, tokens, weights of a block, precision.
KNOWN = {
    "distilgpt2": (6, 768, GPT2_TOKENS, None, "float32"),
    "gpt2": (12, 768, GPT2_TOKENS, None, "float32"),
    "gpt2-medium": (24, 1024, GPT2_TOKENS, None, "float32"),
    "gpt2-large": (36, 1280, GPT2_TOKENS, None, "float32"),
    "gpt2-xl": (48, 1600, GPT2_TOKENS, None, "float32"),
    "Llama-2-7b-hf": (32, 4096, 32_000, 4 * 4096**2 + 3 * 4096 * 11_008, "bfloat16"),
    "Meta-Llama-3-8B": (32, 4096, 128_256, 2 * 4096 * 5120 + 3 * 4096 * 14_336, "bfloat16"),
}


class UnknownWork(LookupError):
    """The work of a call cannot be known: its network or its judge is unknown."""


def known_network(name: str) -> tuple[Shape, str]:
    """An autoregressive network of the hub or of a folder, and the precision of its weights.

    Raises UnknownWork if neither KNOWN nor a config.json here describes it.
    """
    key = name.partition("@")[0].rpartition("/")[2]
    if key in KNOWN and not Path(name).is_dir():
        *numbers, precision = KNOWN[key]
        return causal_shape(*numbers), precision
    try:
        about: Any = read_json(_config_file(name))
        return _described_network(about)
    except (HalfstepError, KeyError, TypeError, ValueError) as error:
        raise UnknownWork(f"nothing describes {name}") from error


def _config_file(name: str) -> Path:
    """The config.json of a folder, or that of a hub name in the hub's cache."""
    if Path(name).is_dir():
        return Path(name) / "config.json"
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = name.partition("@")
    found = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    return Path(found if isinstance(found, str) else name)


def _described_network(about: dict[str, Any]) -> tuple[Shape, str]:
    """The network of a config.json of transformers; KeyError if it is of no kind known here."""

    def number(newer: str, older: str) -> int:
        return int(about[newer] if newer in about else about[older])

    width, blocks = number("hidden_size", "n_embd"), number("num_hidden_layers", "n_layer")
    heads = number("num_attention_heads", "n_head")
    read = width * int(about.get("num_key_value_heads") or heads) // heads
    hidden = int(about.get("intermediate_size") or about.get("n_inner") or 4 * width)
    matrices = 3 if about.get("hidden_act") == "silu" else 2  # a gated MLP has three
    weights = 2 * width * (width + read) + matrices * width * hidden
    stored = str(about.get("dtype") or about.get("torch_dtype"))
    precision = "bfloat16" if stored == "bfloat16" else "float32"
    return causal_shape(blocks, width, int(about["vocab_size"]), weights), precision

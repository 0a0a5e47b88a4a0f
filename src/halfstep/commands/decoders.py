"""The autoregressive decoders that `halfstep latency` times.

A row of BASELINES is a function that makes the decoders of a baseline. To add one, write such a
function and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.checkpoint import Model
from halfstep.commands.writers import text_writer
from halfstep.config import BenchmarkOptions, DrawOptions
from halfstep.errors import HalfstepError
from halfstep.models.gpt import GPT, gpt_neox_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 1
Write = Callable[[], Any]
"""A call that writes texts."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a student, or its autoregressive baseline."""

    name: str
    model: Model
    hf: Path | None = None
    """a baseline's folder for transformers; None with untrained weights"""

    @property
    def checkpoint(self) -> str | None:
        """The first digits of the weights' sha256; None with untrained weights."""
        return self.model.sha256[:16] or None

    @property
    def num_params(self) -> int:
        """Number of parameters of the network."""
        return sum(parameter.numel() for parameter in self.model.network.parameters())

    def writer(self, batch: int, length: int, steps: int) -> Write:
        """A call that writes `batch` texts of `length` tokens as `halfstep generate` does."""
        write = text_writer(self.model, length, steps, DrawOptions(sampling_seed=SEED))
        return partial(write, torch.empty(batch, 0, dtype=torch.long), 0)


@dataclass(frozen=True)
class TimedDecoder:
    """A way to write texts token by token, with a KV cache."""

    sampler: str
    """column `sampler` of its rows"""
    cache: str
    """how its KV cache is stored: static (allocated once), dynamic or paged"""
    writer: Callable[[int, int], Write]
    """(batch, length) -> a call that writes `batch` texts of `length` tokens"""
    longest: int | None = None
    """positions that its network has; None where there is no limit"""


def own_decoder(
    baseline: Side, options: BenchmarkOptions, device: torch.device
) -> list[TimedDecoder]:
    """Our decoder; there is none for a network of transformers."""
    if not isinstance(baseline.model.network, GPT):
        return []

    def writer(batch: int, length: int) -> Write:
        return baseline.writer(batch, length, length)

    return [TimedDecoder("kv_cache", "static", writer)]


def transformers_decoders(
    baseline: Side, options: BenchmarkOptions, device: torch.device
) -> list[TimedDecoder]:
    """transformers' `generate`, with each KV cache that the network can use."""
    _check_hf_folder(baseline, "transformers")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig
    except ImportError:
        raise HalfstepError(
            "baselines: transformers is not installed; pip install transformers, "
            "or leave it out of --baselines"
        ) from None
    network, eos_id = baseline.model.network, baseline.model.eos_id
    dtype, longest = getattr(torch, options.timed_dtype), None
    if baseline.hf is None:
        config = GPTNeoXConfig(**gpt_neox_config(network, max(options.lengths), eos_id))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        config = AutoConfig.from_pretrained(baseline.hf)
        if isinstance(network, GPT):  # its positions are rotary, so it has no limit
            config.max_position_embeddings = max(options.lengths)
        else:
            longest = getattr(config, "max_position_embeddings", None)
        model = AutoModelForCausalLM.from_pretrained(baseline.hf, config=config, dtype=dtype)
    model = model.to(device).eval()
    # All texts have the same length, so no token needs a check whether it is the last one.
    model.generation_config.eos_token_id = None
    caches = ["static", "dynamic"] if model._can_compile_fullgraph else ["dynamic"]
    return [
        TimedDecoder("transformers", cache, partial(_generate, model, eos_id, cache), longest)
        for cache in caches
    ]


def _generate(model: PreTrainedModel, eos_id: int, cache: str, batch: int, length: int) -> Write:
    start = torch.full((batch, 1), eos_id, device=model.device)
    how: dict[str, Any] = {
        "attention_mask": torch.ones_like(start),
        "max_new_tokens": length - 1,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "cache_implementation": cache,
        "pad_token_id": eos_id,
    }

    def write() -> Tensor:
        torch.manual_seed(SEED)
        return model.generate(start, **how)

    return write


def vllm_decoder(
    baseline: Side, options: BenchmarkOptions, device: torch.device
) -> list[TimedDecoder]:
    """vLLM, where it is installed."""
    _check_hf_folder(baseline, "vllm")
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise HalfstepError(
            "baselines: vllm is not installed here; pip install vllm (it needs a CUDA device), "
            "or leave it out of --baselines"
        ) from None
    if baseline.hf is None:
        raise HalfstepError(
            "baselines: vllm loads folders, and untrained networks have none; use it without --size"
        )
    engine = LLM(
        str(baseline.hf),
        skip_tokenizer_init=True,
        dtype=options.timed_dtype,
        max_model_len=max(options.lengths),
        seed=SEED,
    )

    def writer(batch: int, length: int) -> Write:
        how = SamplingParams(
            temperature=1.0, max_tokens=length - 1, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [baseline.model.eos_id]} for _ in range(batch)]
        return lambda: engine.generate(prompts, how, use_tqdm=False)

    return [TimedDecoder("vllm", "paged", writer)]


def _check_hf_folder(baseline: Side, name: str) -> None:
    if baseline.hf is not None and not (baseline.hf / "config.json").is_file():
        raise HalfstepError(
            f"{baseline.hf}: no config.json, so {name} cannot load it; train the baseline again, "
            f"or leave {name} out of baselines"
        )


BASELINES: dict[str, Callable[[Side, BenchmarkOptions, torch.device], list[TimedDecoder]]] = {
    "halfstep": own_decoder,
    "transformers": transformers_decoders,
    "vllm": vllm_decoder,
}

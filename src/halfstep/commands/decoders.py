"""What `halfstep latency` times: texts of a model, and the decoders of an autoregressive baseline.

A row of BASELINES is a function that makes the decoders of a baseline. To add one, write such a
function and a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from halfstep.checkpoint import Model
from halfstep.commands.writers import Writer, text_writer
from halfstep.config import BenchmarkOptions, DrawOptions
from halfstep.errors import HalfstepError
from halfstep.models.gpt import GPT, gpt_neox_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = DrawOptions().sampling_seed
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

    def writer(
        self, batch: int, length: int, steps: int, draws: TimedDraws, scorer: Model | None = None
    ) -> TimedTexts:
        """A call that writes `batch` texts of `length` tokens as `halfstep generate` does."""
        write = text_writer(self.model, length, steps, draws.options, scorer=scorer)
        return TimedTexts(write, batch, draws.variant is not None)


@dataclass(frozen=True)
class TimedDraws:
    """How texts are drawn, and the name of this way in the rows (None: as students are timed)."""

    variant: str | None = None
    options: DrawOptions = field(default_factory=DrawOptions)


@dataclass
class TimedTexts:
    """A call that writes `batch` texts, and the passes of each of them.

    It writes the same texts in each call, or where it `goes_on` the next ones, because the time of
    some samplers depends on the text.
    """

    write: Writer
    batch: int
    goes_on: bool
    evaluations: list[Tensor] = field(default_factory=list)
    """network evaluations [batch] of each call"""
    asked: list[Tensor] = field(default_factory=list)
    """autoregressive passes [batch] of each call; empty if the sampler asks no such model"""

    def __call__(self) -> None:
        first = self.batch * len(self.evaluations) if self.goes_on else 0
        texts = self.write(torch.empty(self.batch, 0, dtype=torch.long), first)
        self.evaluations.append(texts.network_evaluations)
        if texts.autoregressive_passes is not None:
            self.asked.append(texts.autoregressive_passes)

    def passes(self) -> tuple[float, float | None]:
        """Mean network evaluations and autoregressive passes of a text, without the warm-up's."""
        evaluations = torch.cat(self.evaluations[1:]).double().mean().item()
        asked = torch.cat(self.asked[1:]).double().mean().item() if self.asked else None
        return evaluations, asked


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
        return baseline.writer(batch, length, length, TimedDraws())

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

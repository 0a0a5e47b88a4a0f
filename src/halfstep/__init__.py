"""halfstep: masked diffusion language models that write in a few steps (SDTT, arXiv 2410.21035).

    import halfstep

    model = halfstep.load("results/models/stories-tiny/kl_backward/round-7")
    print(halfstep.generate(model, steps=8)[0])

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halfstep.errors import HalfstepError

if TYPE_CHECKING:
    from halfstep.checkpoint import Model

__version__ = "0.1.0"
__all__ = ["HalfstepError", "generate", "load"]


def load(
    path: str | Path,
    device: str = "auto",
    weights: Literal["ema", "raw", "best"] = "ema",
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Model:
    """Load a checkpoint folder, ready to generate. No configuration is needed.

    Example:
        model = halfstep.load("results/models/stories-tiny/kl_backward/round-7", device="cpu")

    Args:
        path: folder with meta.json and model.safetensors
        device: auto (the first CUDA device, or the CPU if there is none), cpu, cuda or cuda:1
        weights: ema (moving average), raw, or best (the average at the lowest held-out loss, where
            the training kept it)
        precision: float32, or bfloat16 for the products of matrices (autocast), which is faster on
            a GPU; logits are always float32, and draws float64

    Raises:
        HalfstepError: if the path is no checkpoint, a file is damaged or missing, the checkpoint
            has no such weights, or there is no such device or precision
    """
    from halfstep.checkpoint import load_checkpoint
    from halfstep.config import Machine
    from halfstep.distributed.device import find_device

    found = find_device(Machine(device=str(device)))
    return load_checkpoint(path, weights, str(found), precision)


def generate(  # noqa: PLR0913  the options of one draw, each by its name
    model: Model,
    steps: int | None = None,
    num_samples: int = 1,
    prompt: str = "",
    seed: int = 1,
    *,
    sampler: str | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    scorer: Model | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    micro_batch: int = 32,
) -> list[str]:
    """Write `num_samples` texts with a loaded model, without BOS and EOS.

    A text can hold parts of several documents, with a line <|endoftext|> between two of them.
    Text i depends only on the seed, i and the options, not on num_samples or micro_batch.

    Example:
        model = halfstep.load("results/models/stories-tiny/kl_backward/round-7")
        texts = halfstep.generate(model, steps=8, num_samples=4, prompt="At the park")

    Args:
        model: a model from `load`
        steps: sampling steps of a diffusion model (8); a sampler that takes as many as it needs has
            them as its limit (the tokens of a text); an autoregressive model takes one per token
        num_samples: number of texts
        prompt: text that each text begins with; each <|mask|> in it is one token to fill in, which
            only a diffusion model can, and each <|endoftext|> ends a document; a blank before a
            <|mask|>, or at the end, is part of the token that is written there
        seed: seed of the draws
        sampler: how a diffusion model reveals its tokens: ancestral (by default), analytic,
            first_hitting, block, ancestral_float32, threshold, entropy_bounded, remask, energy or
            speculative (`halfstep generate --help` explains them and their options)
        sampler_options: options of the sampler by name, such as {"threshold": 0.8}
        scorer: an autoregressive model from `load`, for the samplers energy and speculative; its
            tokenizer, device and precision are those of the model
        temperature: divisor of the logits before a draw
        top_p: nucleus of the draws of an autoregressive model
        micro_batch: texts per forward pass; affects only speed and memory

    Raises:
        HalfstepError: if an option is out of range, or has no effect on this kind of model
    """
    import pydantic

    from halfstep.checkpoint import Model
    from halfstep.commands.writers import (
        default_steps,
        draw_texts,
        encode_prompt,
        separate_documents,
        text_writer,
    )
    from halfstep.config import GenerateOptions, Machine
    from halfstep.resolve import explain

    if model.denoiser is None:
        chosen = {"steps": steps, "sampler": sampler, "sampler_options": sampler_options}
        for name, value in (chosen | {"scorer": scorer}).items():
            if value is not None:
                raise HalfstepError(
                    f"{name}: found {value!r}, but an autoregressive model has no sampler and "
                    "takes one step per token; leave it out"
                )
    if model.denoiser is not None and top_p != 1:
        raise HalfstepError(
            f"top_p: found {top_p!r}, but only an autoregressive model draws from a nucleus; "
            "leave it out"
        )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise HalfstepError(f"steps: found {steps!r}, expected a whole number above zero")
    chosen = _checked_options(sampler_options) | {
        "num_samples": num_samples,
        "sampling_seed": seed,
        "sampler": "ancestral" if sampler is None else sampler,
        "temperature": temperature,
        "top_p": top_p,
    }
    try:
        options = GenerateOptions.model_validate(chosen)
        machine = Machine(micro_batch=micro_batch)
    except pydantic.ValidationError as error:
        faults = [line.removeprefix("sampling_") for line in explain(error, GenerateOptions)]
        raise HalfstepError("; ".join(faults)) from None
    if not isinstance(scorer, Model | None):
        raise HalfstepError(
            f"scorer: found {scorer!r}, expected an autoregressive model; load it with "
            "halfstep.load"
        )
    if scorer is not None and not options.asks_scorer:
        raise HalfstepError(
            f"scorer: found a model, but sampler {options.sampler} asks none; leave it out"
        )
    steps = default_steps(model, options.sampler) if steps is None else steps
    write = text_writer(model, model.length, steps, options, scorer=scorer)
    prompts = encode_prompt(model, prompt).expand(num_samples, -1)
    texts = draw_texts(write, prompts, machine.micro_batch)
    assert texts is not None  # only ranks above 0 get None
    return separate_documents(model, texts)


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a sampler; HalfstepError if no sampler has one of these names."""
    from halfstep.config import OF_SAMPLERS

    if not isinstance(options, Mapping | None):
        raise HalfstepError(
            f"sampler_options: found {options!r}, expected names with values, such as "
            '{"threshold": 0.8}; change it'
        )
    names = [name for name in OF_SAMPLERS if name != "scorer"]  # which has its own argument
    for name in options or {}:
        if name not in names:
            raise HalfstepError(
                f"sampler_options: found {name!r}, expected some of {', '.join(names)}; leave it "
                "out"
            )
    return dict(options or {})

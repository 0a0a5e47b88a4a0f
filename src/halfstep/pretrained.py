"""Models that transformers loads or builds, without running code of theirs."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from halfstep.config import Network, size_of_shape
from halfstep.errors import HalfstepError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Keys of config.json that load other code: the model's own, or kernels from the hub.
LOADS_CODE = ("auto_map", "attn_implementation", "experts_implementation")
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
KINDS = {CAUSAL: "a causal language model", MASKED: "a masked language model"}
MOST_BLOCKS = 199  # as a network size may have
# Tensors of a masked language model's folder that predict no token: heads for other tasks.
OTHER_HEADS = ("pooler.", "seq_relationship.", "position_ids")


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder, as `load_pretrained`."""
    return load_pretrained(folder, CAUSAL)


def load_pretrained(folder: Path, auto: str, called: str = "") -> PreTrainedModel:
    """The model in config.json and model.safetensors of a folder, in float32 and in eval mode.

    `auto` is the class of transformers that loads it: CAUSAL or MASKED; `called` is what messages
    say for the folder. HalfstepError unless the file of weights holds exactly the tensors of the
    network that config.json describes. Nothing of the size that config.json claims is allocated
    before.
    """
    import torch
    import transformers
    from safetensors import safe_open

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    loader = getattr(transformers, auto)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        if config.num_hidden_layers > len(shapes):  # to build them would take long
            raise ValueError(f"{len(shapes)} tensors for {config.num_hidden_layers} blocks")
        with torch.device("meta"):
            expected = loader.from_config(config, trust_remote_code=False)
        needed, found = sum(p.numel() for p in expected.parameters()), sum(map(prod, shapes))
        if needed > found:
            raise ValueError(f"{found:,} weights for a network of {needed:,}")
        model, about = loader.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **local
        )
        known = OTHER_HEADS if auto == MASKED else ()
        for fault in ("missing_keys", "unexpected_keys"):
            keys = [key for key in sorted(about[fault]) if not any(name in key for name in known)]
            if keys:
                raise ValueError(f"{fault.replace('_', ' ')}, the first is {keys[0][:80]}")
    except Exception as error:  # transformers and safetensors each raise their own
        raise HalfstepError(
            f"{called or folder}: transformers cannot load it ({type(error).__name__}: "
            f"{reason(error)}); name {KINDS[auto]} with its own weights and with code in "
            "transformers"
        ) from None
    return model.eval().requires_grad_(False)


def build_pretrained(auto: str, config: dict[str, Any], dropout: float = 0.0) -> PreTrainedModel:
    """A new model of a configuration, the content of config.json, with this dropout everywhere.

    ValueError, or whatever transformers raises, if it builds no such model.
    """
    import torch
    import transformers

    plain = {
        key: dropout if "drop" in str(key) and type(value) in (int, float) else value
        for key, value in without_code(config).items()
    }
    known = transformers.AutoConfig.for_model(plain.pop("model_type"), **plain)
    if known.num_hidden_layers > MOST_BLOCKS:  # to build them would take long
        raise ValueError(f"found {known.num_hidden_layers} blocks, expected at most {MOST_BLOCKS}")
    loader = getattr(transformers, auto)
    return loader.from_config(known, trust_remote_code=False, dtype=torch.float32)


def without_code(config: Any) -> Any:
    """A configuration without the keys of LOADS_CODE, at any depth."""
    if not isinstance(config, dict):
        return config
    kept = {key for key in config if not any(word in str(key) for word in LOADS_CODE)}
    return {key: without_code(value) for key, value in config.items() if key in kept}


def size_of_model(config: PreTrainedConfig, source: str) -> str:
    """The size of a model of transformers, as blocks x width x heads."""
    try:
        shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        return Network(size=size_of_shape(*shape)).size
    except (AttributeError, pydantic.ValidationError) as error:
        raise HalfstepError(
            f"--source {source}: its blocks, width and heads have no size "
            f"({type(error).__name__}); name another model"
        ) from None

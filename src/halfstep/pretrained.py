"""Models that transformers loads or builds, without code of theirs that the user did not allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from halfstep.config import Network, size_of_shape
from halfstep.errors import HalfstepError, reason
from halfstep.remote_code import load_class

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

# Keys of config.json that load other code: the model's own, or kernels from the hub.
LOADS_CODE = ("auto_map", "attn_implementation", "experts_implementation")
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"
CONFIG = "AutoConfig"
ANY = "AutoModel"  # of code alone: transformers' own has no readout
KINDS = {CAUSAL: "a causal language model", MASKED: "a masked language model"}
KINDS[ANY] = "a language model"
MOST_BLOCKS = 199  # as a network size may have
# Tensors of a masked language model's folder that predict no token: heads for other tasks.
OTHER_HEADS = ("pooler.", "seq_relationship.", "position_ids")


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The causal language model of a folder, as `load_pretrained`."""
    return load_pretrained(folder, CAUSAL)


def load_pretrained(
    folder: Path, auto: str, called: str = "", code: Code | None = None
) -> PreTrainedModel:
    """The model in config.json and model.safetensors of a folder, in float32 and in eval mode.

    `auto` is the class of transformers that loads it: CAUSAL or MASKED, or any key of the auto_map
    of `code`; `called` is what messages say for the folder. HalfstepError unless the file of
    weights holds exactly the tensors of the network that config.json describes. Nothing of the size
    that config.json claims is allocated before.
    """
    import torch
    import transformers
    from safetensors import safe_open
    from safetensors.torch import load_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    reader, loader, build = _makers(auto, code)
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        config = reader.from_pretrained(folder, **local)
        if config.num_hidden_layers > len(shapes):  # to build them would take long
            raise ValueError(f"{len(shapes)} tensors for {config.num_hidden_layers} blocks")
        with torch.device("meta"):
            expected = build(config)
        needed, found = sum(p.numel() for p in expected.parameters()), sum(map(prod, shapes))
        if needed > found:
            raise ValueError(f"{found:,} weights for a network of {needed:,}")
        if code:
            model, about = _filled(build(config), load_file(folder / "model.safetensors"))
        else:
            model, about = loader.from_pretrained(
                folder, config=config, dtype=torch.float32, output_loading_info=True, **local
            )
        known = () if auto == CAUSAL else OTHER_HEADS
        for fault in ("missing_keys", "unexpected_keys"):
            keys = [key for key in sorted(about[fault]) if not any(name in key for name in known)]
            if keys:
                raise ValueError(f"{fault.replace('_', ' ')}, the first is {keys[0][:80]}")
    except Exception as error:  # transformers and safetensors each raise their own
        raise HalfstepError(
            f"{called or folder}: transformers cannot load it ({type(error).__name__}: "
            f"{reason(error)}); name {KINDS[auto]} with its own weights and with code "
            + (f"for transformers {transformers.__version__}" if code else "in transformers")
        ) from None
    return model.eval().requires_grad_(False)


def _filled(
    model: PreTrainedModel, tensors: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    """The model with these tensors, and the names that do not fit.

    from_pretrained asks more of a model than code of before transformers 5 has.
    """
    found = model.load_state_dict(tensors, strict=False)
    needed = dict(model.named_parameters()).keys()  # tied ones once
    missing = needed - tensors.keys()
    return model, {"missing_keys": missing, "unexpected_keys": set(found.unexpected_keys)}


@dataclass(frozen=True)
class Code:
    """The code of a model: its sha256, by which `remote_code` knows it, and its classes.

    auto_map: class of transformers -> module.Class
    """

    sha256: str
    auto_map: dict[str, str]


def _makers(auto: str, code: Code | None) -> tuple[Any, Any, Callable[..., PreTrainedModel]]:
    """The classes of a configuration and of a model, and how the second is built from the first."""
    import torch
    import transformers

    reader: Any = transformers.AutoConfig
    if code is None:
        if auto == ANY:
            raise ValueError(f"{ANY} of transformers has no readout")
        loader = getattr(transformers, auto)
        plain = partial(loader.from_config, trust_remote_code=False, dtype=torch.float32)
        return reader, loader, plain
    loader = load_class(code.sha256, code.auto_map[auto], transformers.PreTrainedModel)
    if not hasattr(loader, "all_tied_weights_keys"):
        loader.all_tied_weights_keys = {}  # code of before transformers 5 may not call post_init
    if CONFIG in code.auto_map:
        reader = load_class(code.sha256, code.auto_map[CONFIG], transformers.PreTrainedConfig)
    return reader, loader, partial(loader._from_config, dtype=torch.float32)


def build_pretrained(
    auto: str, config: dict[str, Any], dropout: float = 0.0, code: str | None = None
) -> PreTrainedModel:
    """A new model of a configuration, the content of config.json, with this dropout everywhere.

    `code` is the sha256 of the code that it brings, if it does. HalfstepError if the user has not
    allowed that; ValueError, or whatever transformers raises, if it builds no such model.
    """
    plain = {
        key: dropout if "drop" in str(key) and type(value) in (int, float) else value
        for key, value in without_code(config).items()
    }
    reader, _, build = _makers(auto, code_of(config, code) if code else None)
    if hasattr(reader, "for_model"):
        known = reader.for_model(plain.pop("model_type"), **plain)
    else:
        known = reader.from_dict(plain)
    if known.num_hidden_layers > MOST_BLOCKS:  # to build them would take long
        raise ValueError(f"found {known.num_hidden_layers} blocks, expected at most {MOST_BLOCKS}")
    return build(known)


def code_of(config: dict[str, Any], sha256: str) -> Code:
    """The code that a config.json names in its auto_map; ValueError if it names none."""
    names = config.get("auto_map")
    if not isinstance(names, dict) or not names.keys() & {MASKED, CAUSAL, ANY}:
        raise ValueError(f"auto_map names none of {MASKED}, {CAUSAL} and {ANY}")
    return Code(sha256, {key: str(name) for key, name in names.items()})


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

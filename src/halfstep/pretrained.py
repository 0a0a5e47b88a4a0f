"""Causal language models that transformers loads from a folder, without running code of theirs."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_causal_lm(folder: Path) -> PreTrainedModel:
    """The model in config.json and model.safetensors of a folder, in float32 and in eval mode.

    HalfstepError unless the file of weights holds exactly the tensors of the network that
    config.json describes. Nothing of the size that config.json claims is allocated before.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
        config = AutoConfig.from_pretrained(folder, **local)
        if config.num_hidden_layers > len(shapes):  # to build them would take long
            raise ValueError(f"{len(shapes)} tensors for {config.num_hidden_layers} blocks")
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        needed, found = sum(p.numel() for p in expected.parameters()), sum(map(prod, shapes))
        if needed > found:
            raise ValueError(f"{found:,} weights for a network of {needed:,}")
        model, about = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **local
        )
        for fault in ("missing_keys", "unexpected_keys"):
            if keys := sorted(about[fault]):
                raise ValueError(f"{fault.replace('_', ' ')}, the first is {keys[0][:80]}")
    except Exception as error:  # transformers and safetensors each raise their own
        raise HalfstepError(
            f"{folder}: transformers cannot load it ({type(error).__name__}: {reason(error)}); "
            "name a causal language model with its own weights and with code in transformers"
        ) from None
    return model.eval().requires_grad_(False)

"""LoRA (arXiv 2106.09685) by peft: small trained matrices next to the frozen layers of a network.

A layer W becomes W + (alpha / rank) B A. The network has two adapters, the teacher's and the
student's, and one copy of W. The student's is active, and alone is trained.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from halfstep.errors import HalfstepError

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

TEACHER, STUDENT = "teacher", "student"
LINEAR = ("Linear", "Conv1D")  # classes of linear layers; the second is that of GPT-2
READ_BY_WEIGHT = ("output_layer.", "adaLN_modulation")  # the readout, and layers without a call


def add_adapters(network: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ()) -> None:
    """Give the linear layers of a network two equal adapters, in place, and freeze its weights.

    B is zero, so that the network computes what it computed. A is drawn by torch's generator.
    `targets` are names of layers, or their last parts; by default all linear layers but the
    readout, and but those of adaLN. HalfstepError if no layer has such a name, or if peft is not
    installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise HalfstepError(
            "lora_rank: LoRA needs the package peft, which is not installed; run "
            "`pip install 'halfstep[lora]'`, or leave lora_rank out"
        ) from None

    layers = _chosen_layers(network, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        # Conv1D is transposed; and that there are two adapters is what we want.
        warnings.filterwarnings("ignore", message="fan_in_fan_out|Already found")
        for which in (TEACHER, STUDENT):
            inject_adapter_in_model(config, network, which)
    for _, layer in _adapted(network):
        layer.cast_input_dtype_enabled = False  # autocast does it, and keeps less
        layer.set_adapter(STUDENT)
    fill_adapter(network, TEACHER, adapter_tensors(network))


def linear_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers that can have adapters."""
    return [
        name
        for name, layer in network.named_modules()
        if type(layer).__name__ in LINEAR and not any(part in name for part in READ_BY_WEIGHT)
    ]


def _chosen_layers(network: nn.Module, targets: Sequence[str]) -> list[str]:
    layers = linear_layers(network)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            known = dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in layers)
            raise HalfstepError(
                f"lora_targets: found {target[:80]!r}, but no linear layer has this name; "
                f"choose from {', '.join(known)}"
            )
    endings = tuple(f".{target}" for target in targets)
    return [name for name in layers if not targets or f".{name}".endswith(endings)]


def _adapted(network: nn.Module) -> Iterator[tuple[str, LoraLayer | Any]]:
    """The layers that have adapters, with their names in the network without adapters."""
    from peft.tuners.lora import LoraLayer

    for name, layer in network.named_modules():
        if isinstance(layer, LoraLayer):
            yield name, layer


def adapter_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The parameters of the student's adapter by name."""
    return {name: p for name, p in network.named_parameters() if f".{STUDENT}." in name}


@torch.no_grad()
def fill_adapter(network: nn.Module, which: str, tensors: dict[str, Tensor]) -> None:
    """Copy the tensors of a student's adapter into the adapter `which`: TEACHER or STUDENT."""
    own = dict(network.named_parameters())
    for name, value in tensors.items():
        own[name.replace(f".{STUDENT}.", f".{which}.")].copy_(value)


@contextmanager
def teaching(network: nn.Module) -> Iterator[None]:
    """The teacher's adapter instead of the student's, and no dropout.

    No backward pass may be in here. Outside, blocks that compute their activations again do so with
    the student's adapter.
    """
    was_training = network.training
    network.eval()
    _activate(network, TEACHER)
    try:
        yield
    finally:
        _activate(network, STUDENT)
        network.train(was_training)


def _activate(network: nn.Module, which: str) -> None:
    """Let an adapter compute. The student's stays the one that learns, as FSDP2 has noted it."""
    for _, layer in _adapted(network):
        layer.set_adapter(which, inference_mode=which == TEACHER)
        for part in (layer.lora_A, layer.lora_B):
            part[STUDENT].requires_grad_(True)


@torch.no_grad()
def weight_changes(network: nn.Module, adapter: dict[str, Tensor]) -> dict[str, Tensor]:
    """(alpha / rank) B A of every adapted layer, by the name of W in the network without adapters.

    adapter: as `adapter_tensors` returns them
    """
    changes = {}
    for name, layer in _adapted(network):
        a, b = (adapter[f"{name}.lora_{part}.{STUDENT}.weight"] for part in "AB")
        change = (b @ a) * layer.scaling[STUDENT]
        changes[f"{name}.weight"] = change.t() if layer.fan_in_fan_out else change
    return changes

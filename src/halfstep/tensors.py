"""Checks of named tensors against the network that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Set
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError, excerpt

if TYPE_CHECKING:
    from torch import Tensor, nn

DAMAGED = "copy the whole folder again, or train again"


def check_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise HalfstepError unless `state` is finite and fits the network in every name and shape.

    Both may be on the meta device, where no value is known.
    """
    own = network.state_dict()
    needed = dict(network.named_parameters()).keys()
    _check_names(state, needed, own.keys(), path)
    for key, value in state.items():
        if not value.is_floating_point():
            raise HalfstepError(
                f"{path}: {key} holds {value.dtype}, expected floating-point numbers; {DAMAGED}"
            )
        _check_shape(key, value, own[key], path)
    check_finite(state, path)


def check_optimizer_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise HalfstepError unless `state` is AdamW's for every trained parameter of the network.

    Of a network with adapters it also holds these, and their average.
    """
    own = {}
    for name, p in network.named_parameters():
        if p.requires_grad:
            own |= {f"exp_avg:{name}": p, f"exp_avg_sq:{name}": p, f"step:{name}": p.new_empty(())}
        if p.requires_grad and ".lora_" in name:
            own |= {f"raw:{name}": p, f"ema:{name}": p}
    _check_names(state, own.keys(), own.keys(), path)
    for key, value in state.items():
        _check_shape(key, value, own[key], path)


def _check_names(found: Iterable[str], needed: Set[str], known: Set[str], path: Path) -> None:
    missing, unknown = sorted(needed - set(found)), sorted(set(found) - known)
    for fault, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            raise HalfstepError(
                f"{path}: {len(keys)} {fault} tensors, the first is {keys[0][:60]}; "
                "the file belongs to a network of another kind or size"
            )


def _check_shape(key: str, found: Tensor, expected: Tensor, path: Path) -> None:
    if found.shape != expected.shape:
        raise HalfstepError(
            f"{path}: {key} has shape {excerpt(list(found.shape))}, "
            f"but the network expects {list(expected.shape)}"
        )


def check_finite(state: dict[str, Tensor], path: Path) -> None:
    """Raise HalfstepError if a tensor holds NaN or infinity; those of the meta device do not."""
    for key, value in state.items():
        if not value.is_meta and not value.isfinite().all():
            raise HalfstepError(
                f"{path}: {key} holds NaN or infinity, because the training that wrote it "
                "diverged; use an earlier checkpoint"
            )

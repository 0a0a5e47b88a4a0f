"""Exponential moving average of the weights."""

import torch
from torch import Tensor, nn

from halfstep.distributed.group import shard_like
from halfstep.training.optim import trained_parameters


class EMA:
    """Moving average of the parameters that are trained: shadow <- d shadow + (1 - d) weights.

    At the n-th update d = min(decay, (1 + n) / (10 + n)), as in MDLM and SDTT. The average starts
    at `shadow`, or at the weights. `updates` is the number of updates that it already has.
    """

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        shadow: dict[str, Tensor] | None = None,
        updates: int = 0,
    ):
        self.decay, self.updates = decay, updates
        self.weights = trained_parameters(network)
        first = shadow or self.weights
        self.shadow = {name: shard_like(first[name], p) for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [p.detach() for p in self.weights.values()]
        torch._foreach_lerp_(list(self.shadow.values()), weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average; call it before and after the average is measured."""
        for name, p in self.weights.items():
            weights = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(weights)

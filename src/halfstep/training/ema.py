"""Exponential moving average of the weights."""

import torch
from torch import Tensor, nn

from halfstep.distributed.group import shard_like


class EMA:
    """shadow <- d shadow + (1 - d) weights with d = min(decay, (1 + n) / (10 + n)) at the n-th update (as MDLM and SDTT do)."""

    def __init__(
        self,
        network: nn.Module,
        decay: float,
        shadow: dict[str, Tensor] | None = None,
        updates: int = 0,
    ):
        self.decay, self.updates = decay, updates
        self.weights = dict(network.named_parameters())
        self.shadow = {
            k: shard_like(shadow[k] if shadow else p, p) for k, p in self.weights.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(
            list(self.shadow.values()), [p.detach() for p in self.weights.values()], 1 - decay
        )

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and shadow: call it before and after a measurement of the averaged network."""
        for key, p in self.weights.items():
            p_copy = p.detach().clone()
            p.copy_(self.shadow[key])
            self.shadow[key].copy_(p_copy)

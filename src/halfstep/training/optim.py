"""AdamW and its learning rate."""

import math

import torch
from torch import Tensor, nn

from halfstep.config import Training
from halfstep.distributed.group import shard_like

FLOOR = 1 / 50  # of lr, where linear and cosine decay end


def learning_rate(training: Training, step: int, warm: bool = True) -> float:
    """Rate of the update that follows `step` finished ones: linear warm-up (left out when the optimiser is carried over), then the decay."""
    warmup = training.warmup_steps if warm else 0
    if step < warmup:
        return training.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, training.num_steps - warmup)
    match training.lr_decay:
        case "linear":
            return training.lr * (1 - (1 - FLOOR) * done)
        case "cosine":
            return training.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)
    return training.lr


def adamw(network: nn.Module, training: Training) -> torch.optim.AdamW:
    """AdamW over all parameters, fused."""
    return torch.optim.AdamW(
        network.parameters(),
        training.lr,
        (0.9, training.beta2),
        eps=1e-8,
        weight_decay=training.weight_decay,
        fused=True,
    )


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimiser state by parameter name: `step|exp_avg|exp_avg_sq:name`."""
    return {
        f"{kind}:{name}": value
        for name, p in network.named_parameters()
        for kind, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """The inverse of `moments`."""
    for name, p in network.named_parameters():
        own = {
            key.split(":", 1)[0]: value
            for key, value in state.items()
            if key.split(":", 1)[1] == name
        }
        optimizer.state[p] = {
            kind: shard_like(v, p) for kind, v in own.items()
        }  # `step` too: the fused kernel reads it there

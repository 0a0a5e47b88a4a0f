"""AdamW, its learning rate, and its state by parameter name."""

import math

import torch
from torch import Tensor, nn

from halfstep.config import Training
from halfstep.distributed.group import shard_like

FLOOR = 1 / 50  # linear and cosine decay end at this fraction of lr


def learning_rate(training: Training, step: int, warm_up: bool = True) -> float:
    """Learning rate of the update after `step` finished ones: linear warm-up, then the decay.

    A training that continues with an optimizer state has no warm-up.
    """
    warmup_steps = training.warmup_steps if warm_up else 0
    if step < warmup_steps:
        return training.lr * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, training.num_steps - warmup_steps)
    match training.lr_decay:
        case "linear":
            return training.lr * (1 - (1 - FLOOR) * done)
        case "cosine":
            return training.lr * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * done)) / 2)
    return training.lr


def adamw(network: nn.Module, training: Training) -> torch.optim.AdamW:
    """Fused AdamW over all parameters."""
    betas = 0.9, training.beta2
    return torch.optim.AdamW(
        network.parameters(),
        training.lr,
        betas,
        eps=1e-8,
        weight_decay=training.weight_decay,
        fused=True,
    )


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state by parameter name, with the keys step:name, exp_avg:name, exp_avg_sq:name."""
    return {
        f"{kind}:{name}": value
        for name, p in network.named_parameters()
        for kind, value in optimizer.state[p].items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(
    network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Tensor]
) -> None:
    """Load what `optimizer_state` returned; every tensor is copied to its parameter's device.

    That includes `step`, because the fused kernel reads it on the device.
    """
    parameters = dict(network.named_parameters())
    for p in parameters.values():
        optimizer.state[p] = {}
    for key, value in state.items():
        kind, name = key.split(":", 1)
        if name in parameters:
            p = parameters[name]
            optimizer.state[p][kind] = shard_like(value, p)

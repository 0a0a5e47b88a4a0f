"""AdamW, its learning rate, and its state by parameter name."""

import math

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

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


class FusedAdamW:
    """AdamW over all parameters, with the state and the bits of torch.optim.AdamW(fused=True).

    It calls torch's functional `adamw`. The class torch.optim.AdamW imports torch._dynamo when it
    is made, which takes each training one to two seconds of a CPU.

    Attributes:
        lr: learning rate of the next step
        state: for each parameter that had a gradient its number of steps and its two moments
    """

    def __init__(self, network: nn.Module, training: Training):
        self._parameters: list[Tensor] = list(network.parameters())
        self._training = training
        self.lr = training.lr
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self._parameters}

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        updated = [p for p in self._parameters if p.grad is not None]
        for p in updated:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        adamw(
            updated,
            [p.grad for p in updated if p.grad is not None],
            [self.state[p]["exp_avg"] for p in updated],
            [self.state[p]["exp_avg_sq"] for p in updated],
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]["step"] for p in updated],
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=0.9,
            beta2=self._training.beta2,
            eps=1e-8,
            lr=self.lr,
            weight_decay=self._training.weight_decay,
        )

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self._parameters:
            p.grad = None


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: all, or those of an adapter."""
    return {name: p for name, p in network.named_parameters() if p.requires_grad}


def optimizer_state(network: nn.Module, optimizer: FusedAdamW) -> dict[str, Tensor]:
    """Optimizer state by parameter name, with the keys step:name, exp_avg:name, exp_avg_sq:name."""
    return {
        f"{kind}:{name}": value
        for name, p in network.named_parameters()
        for kind, value in optimizer.state[p].items()
    }


def load_optimizer_state(
    network: nn.Module, optimizer: FusedAdamW, state: dict[str, Tensor]
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

"""The blocks of a network in training: activations computed again, code compiled."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from halfstep.config import Machine
from halfstep.errors import HalfstepError, reason

SHAPES = 32  # versions of a block that are compiled: training or not, rows, lengths, batches


def prepare_blocks(network: nn.Module, machine: Machine, device: torch.device) -> None:
    """Change how the blocks of a network compute, in place, as `machine` asks.

    With machine.recompute their activations are not kept for the backward pass, which computes
    them again (activation checkpointing): the same bits, dropout included. With machine.compile
    torch.compile fuses what is between their products, which rounds otherwise. Names and values of
    the parameters stay.

    Raises HalfstepError if torch.compile does not work on this device.
    """
    if machine.compile:
        _check_compiler(device)
    for block in network.get_submodule("blocks").children():
        if machine.recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if machine.compile:
            block.compile()


def _check_compiler(device: torch.device) -> None:
    """Compile one sum, because torch finds only in the first pass that it has no compiler."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = SHAPES
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # of torch, of Triton, or of the compiler that they call
        raise HalfstepError(
            f"--compile: torch cannot compile for {device} here ({reason(error)}); install what it "
            "misses, most often a C++ compiler, or leave --compile out"
        ) from None

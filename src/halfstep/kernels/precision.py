"""The precision in which networks compute: autocast, TF32, and matrices that are cast once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def computing(device: torch.device, precision: str) -> Iterator[None]:
    """Compute the networks of `device` in `precision`, float32 or bfloat16, whatever is set around.

    bfloat16 is torch's autocast. On CUDA the float32 products that it leaves, which are those of
    the readouts, run in TF32, which is more exact than the bfloat16 around them. With float32 there
    is neither autocast nor TF32. Logits, softmax, divergences and draws are never bfloat16.

    Autocast keeps no casts of weights. So weights may change inside, passes without gradients leave
    nothing to later ones with gradients, and CUDA graphs hold no memory that is given back.
    """
    low = precision == "bfloat16"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if low and device.type == "cuda" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


CONV1D = "Conv1D"  # GPT-2's linear layer in transformers, which autocast casts too


def cast_matrices(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast matrices and biases to `dtype` in place, bit for bit as autocast does in every pass.

    Norms, embedding tables, adaLN and the readout stay float32, as they are inside autocast; so do
    adapters (LoRA), which are trained.
    """
    for name, module in network.named_modules():
        is_float32 = name.endswith(("adaLN_modulation", "output_layer.linear")) or ".lora_" in name
        is_linear = isinstance(module, nn.Linear) or type(module).__name__ == CONV1D
        if is_linear and not is_float32:
            module.to(dtype)
    return network

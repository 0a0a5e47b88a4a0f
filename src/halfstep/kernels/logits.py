"""Logits over the vocabulary and their normalization, in float32 and in fast chunks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfstep.kernels.linear import matmul

# Numbers in one chunk of rows. On a CPU 26 MiB: the allocator returns the pages of blocks above 32
# MiB to the system.
NUMBERS = {"cpu": 13 << 19, "cuda": 1 << 27}
CACHED = {**NUMBERS, "cpu": 1 << 20}  # numbers in a chunk that stays in a CPU's cache
# Rows per product, or a multiple: fast, and the last bits of a row do not depend on the rows next
# to it.
ROWS = 16
TOKENS = 4096  # tokens of the vocabulary that a draw reads at a time on a CPU


def row_chunks(
    N: int, width: int, device: torch.device, numbers: dict[str, int] = NUMBERS
) -> Iterator[slice]:
    """Slices that cut N rows of `width` numbers into chunks of at most `numbers`.

    A chunk has a multiple of ROWS rows, and at least ROWS.
    """
    most = numbers.get(device.type, numbers["cuda"])
    rows = max(ROWS, most // width // ROWS * ROWS)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def pad_rows(x: Tensor) -> Tensor:
    """x[N, ...] with rows of zeros appended, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def vocab_chunks(V: int, device: torch.device) -> list[slice]:
    """Chunks of the vocabulary that a draw reads in turn: TOKENS each on a CPU, else one chunk."""
    size = TOKENS if device.type == "cpu" else V
    return [slice(start, min(start + size, V)) for start in range(0, V, size)]


def logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h W' + b of h[N, D], weight[V or more, D] or packed [V, D], bias[V]: [N, V] float32.

    The result is float32 inside autocast too.

    Rows of the weight beyond V are not tokens and are left out.
    """
    with torch.autocast(h.device.type, enabled=False):
        rows = weight if weight.is_mkldnn else weight[: len(bias)].float()
        return matmul(h.float(), rows, bias.float())


def exp_(x: Tensor) -> Tensor:
    """e^x in place, as a power of two: a third of the time of `exp` on a CPU.

    Relative error |x| 2^-24 in float32.
    """
    return x.mul_(1 / math.log(2)).exp2_()


def log_softmax_(z: Tensor) -> Tensor:
    """log_softmax of logits z[N, V] over the vocabulary, in place. Not differentiable."""
    return torch.log_softmax(z, -1, out=z)

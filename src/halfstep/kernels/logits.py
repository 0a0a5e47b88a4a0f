"""Arithmetic over the vocabulary: logits and their normalisation, in float32, in pieces of the size that is fast."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfstep.kernels.linear import matmul

NUMBERS = {
    "cpu": 13 << 19,
    "cuda": 1 << 27,
}  # in one piece of rows: 26 MiB on a CPU, where the allocator gives pages back above 32 MiB
CACHED = {**NUMBERS, "cpu": 1 << 20}  # in one that stays in a CPU's cache
ROWS = 16  # sums and products of so many rows, or multiples, are fast, and a row's last bits do not depend on the rows beside it
WORDS = 4096


def row_chunks(
    N: int, width: int, device: torch.device, numbers: dict[str, int] = NUMBERS
) -> Iterator[slice]:
    """Slices that cut N rows of `width` numbers into pieces of at most `numbers`, a multiple of ROWS, ROWS at least."""
    rows = max(ROWS, numbers.get(device.type, numbers["cuda"]) // width // ROWS * ROWS)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def pad_rows(x: Tensor) -> Tensor:
    """x[N, ...] and zeros below it, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def vocab_chunks(V: int, device: torch.device) -> list[slice]:
    """Slices of the vocabulary that a draw reads in turn: WORDS each on a CPU, all of it on other devices."""
    count = WORDS if device.type == "cpu" else V
    return [slice(word, min(word + count, V)) for word in range(0, V, count)]


def logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h[N, D], weight[V or more, D] or [V, D] packed, bias[V] -> h W' + b, [N, V] float32 whatever the autocast. Rows beyond V are no words."""
    with torch.autocast(h.device.type, enabled=False):
        return matmul(
            h.float(), weight if weight.is_mkldnn else weight[: len(bias)].float(), bias.float()
        )


def exp_(x: Tensor) -> Tensor:
    """e^x, in place, as a power of two: on a CPU a third of the time of `exp`. Relative error |x| 2^-24 in float32."""
    return x.mul_(1 / math.log(2)).exp2_()


def log_softmax_(z: Tensor) -> Tensor:
    """Logits z[N, V] become log-probabilities, in place. Not differentiable."""
    return torch.log_softmax(z, -1, out=z)

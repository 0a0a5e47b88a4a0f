"""Arithmetic over the vocabulary: logits and their normalisation, in float32, in pieces of the size that is fast."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from halfstep.products import linear

NUMBERS = {"cpu": 13 << 19, "cuda": 1 << 27}  # in one piece of [rows, V]: 26 MiB on a CPU, where the allocator gives pages back above 32 MiB

ROWS = 32  # sums and products of so many rows, or multiples, are fast, and a row's last bits do not depend on the rows beside it
CACHED = 1 << 20  # numbers, 4 MiB
FEW = 16


def pieces(N: int, V: int, device: torch.device, cached: bool = False) -> Iterator[slice]:
    """Slices that cut N rows into pieces of at most NUMBERS numbers each, a multiple of ROWS, ROWS at least; or FEW rows that stay in a CPU's cache."""
    rows = max(ROWS, NUMBERS.get(device.type, NUMBERS["cuda"]) // V // ROWS * ROWS)
    if cached and device.type == "cpu":
        rows = FEW
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def fill_up(x: Tensor) -> Tensor:
    """x[N, ...] and zeros below it, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def tiles(N: int, V: int, device: torch.device) -> Iterator[tuple[slice, list[slice]]]:
    """Slices of N rows, each with slices of the vocabulary so that [rows, words] stays in a CPU's cache: a multiple of 32 words, 2,048 at least;
    the whole vocabulary on other devices."""
    if device.type != "cpu":
        yield from ((rows, [slice(0, V)]) for rows in pieces(N, V, device))
        return
    for start in range(0, N, CACHED >> 11):
        rows = slice(start, min(start + (CACHED >> 11), N))
        count = CACHED // (rows.stop - start) // 32 * 32
        yield rows, [slice(word, min(word + count, V)) for word in range(0, V, count)]


def logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h[N, D], weight[V or more, D], bias[V] -> h W' + b, [N, V] float32 whatever the autocast. Rows of the weight beyond V are no words."""
    with torch.autocast(h.device.type, enabled=False):
        return linear(h.float(), weight[: len(bias)].float(), bias.float())


def exp_(x: Tensor) -> Tensor:
    """e^x, in place, as a power of two: on a CPU a third of the time of `exp`. Relative error |x| 2^-24 in float32."""
    return x.mul_(1 / math.log(2)).exp2_()


def log_softmax_(z: Tensor) -> Tensor:
    """Logits z[N, V] become log-probabilities, in place. Not differentiable."""
    return torch.log_softmax(z, -1, out=z)

"""Arithmetic over the vocabulary: logits and their normalisation, in float32, in the layout and in pieces of the size that are fast."""

from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS = {"cpu": 13 << 19, "cuda": 1 << 27}  # in one piece of [rows, V]: 26 MiB on a CPU, where the allocator gives pages back above 32 MiB

ROWS = 32  # sums and products of so many rows, or multiples, are fast, and a row's last bits do not depend on the rows beside it
CACHED = 1 << 19  # numbers, 2 MiB


def pieces(N: int, V: int, device: torch.device) -> Iterator[slice]:
    """Slices that cut N rows into pieces of at most NUMBERS numbers each, a multiple of ROWS, ROWS at least."""
    rows = max(ROWS, NUMBERS.get(device.type, NUMBERS["cuda"]) // V // ROWS * ROWS)
    return (slice(start, min(start + rows, N)) for start in range(0, N, rows))


def fill_up(x: Tensor) -> Tensor:
    """x[N, ...] and zeros below it, up to a multiple of ROWS."""
    missing = -len(x) % ROWS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x


def words(N: int, V: int, device: torch.device) -> list[slice]:
    """Slices of the vocabulary, so that [N, words] stays in a CPU's cache, a multiple of 32 words, 1,024 at least; all of it on other devices."""
    count = max(1024, CACHED // max(N, 1) // 32 * 32) if device.type == "cpu" else V
    return [slice(start, min(start + count, V)) for start in range(0, V, count)]


def logits(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h[N, D], weight[V or more, D], bias[V] -> h W' + b, [N, V] float32 whatever the autocast. Rows of the weight beyond V are no words.

    On a CPU it is a view of a product [V, N]: with few rows and many words BLAS forms that one twice as fast.
    """
    h, weight, bias = h.float(), weight[: len(bias)].float(), bias.float()
    with torch.autocast(h.device.type, enabled=False):
        if h.device.type == "cpu":
            return torch.addmm(bias[:, None], weight, h.t()).t()
        return torch.nn.functional.linear(h, weight, bias)


def log_softmax_(z: Tensor) -> Tensor:
    """Logits z[N, V] become log-probabilities, in place; rows as in `torch.log_softmax`, whatever the layout. Not differentiable."""
    z -= z.amax(-1, keepdim=True)
    z -= z.exp().sum(-1, keepdim=True).log_()
    return z

"""Products with a layer's weights: large ones in float32 on a CPU by oneDNN, all others by torch's own `linear`.

oneDNN forms the shapes met here up to a third faster than the BLAS that torch links, and a row's last bits depend neither on how many rows there
are (from two on) nor on the words beside it.
"""

import copy
import math
import platform
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
LARGE = 1 << 17  # numbers in a weight: with fewer, a call of oneDNN costs more than it saves
ROWS = 128  # that a packed matrix will meet; with other numbers of rows the layout was the same
SCALE, CUBIC = 2 * (2 / math.pi) ** 0.5, 0.044715  # of GELU's tanh form

Again = (
    tuple[Callable[..., Tensor], tuple[Tensor | None, ...]] | None
)  # forms x once more of what a backward pass keeps anyway, so that x is not kept


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, again: Again = None) -> Tensor:
    """x W' + b: x[..., K], weight[N, K] or `pack`ed, bias[N] or None -> [..., N]."""
    if not (_plain(x, weight) and _large(weight)):
        return F.linear(x, weight, bias)
    return (
        _Product.apply(x, weight, bias, *(again or (None, ())))
        if _learns(x, weight, bias)
        else _product(x, weight, bias)
    )


def linear(x: Tensor, layer: nn.Linear, again: Again = None) -> Tensor:
    """layer(x): x[..., K] -> [..., N]."""
    return matmul(x, _matrix(x, layer), layer.bias, again)


def mlp(x: Tensor, up: nn.Linear, down: nn.Linear, again: Again = None) -> Tensor:
    """down(GELU(up(x))), the tanh form of GELU: x[..., K] -> [..., K]."""
    if not _plain(x, up.weight):
        return down(F.gelu(up(x), approximate="tanh"))
    if _learns(x, up.weight, down.weight):
        return _GELUProduct.apply(matmul(x, up.weight, up.bias, again), down.weight, down.bias)
    if _large(up.weight):
        y = torch.ops.mkldnn._linear_pointwise(x, _matrix(x, up), up.bias, "gelu", [], "tanh")
    else:
        z = F.linear(x, up.weight, up.bias)
        y = _gate(z).mul_(z)
    return _product(y, _matrix(y, down), down.bias)


def pack_weight(weight: Tensor) -> Tensor:
    """A matrix [N, K] in the layout that oneDNN reads, for `product`; itself where oneDNN does not form its products."""
    with torch.no_grad():
        return (
            torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
            if _plain(weight, weight) and _large(weight)
            else weight
        )


def pack_network(network: nn.Module) -> nn.Module:
    """A copy of the network that shares its tensors, which must no longer change; `linear` finds its large matrices `pack`ed."""
    twin = copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})
    for layer in twin.blocks.modules():
        if (
            isinstance(layer, nn.Linear)
            and (matrix := pack_weight(layer.weight)) is not layer.weight
        ):
            layer.packed = matrix
    return twin


def _matrix(x: Tensor, layer: nn.Linear) -> Tensor:
    weight = getattr(layer, "packed", layer.weight)
    return weight if _plain(x, weight) and not _learns(x, layer.weight) else layer.weight


def _plain(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
    )


def _large(weight: Tensor) -> bool:
    return ONEDNN and weight.numel() >= LARGE


def _learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return (
        torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        if _large(weight)
        else F.linear(x, weight, bias)
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, again, given):
        ctx.save_for_backward(weight, *(given if again else [x]))
        ctx.again = again
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, g):
        weight, *kept = ctx.saved_tensors
        return *_gradients(ctx, g, ctx.again(*kept) if ctx.again else kept[0], weight), None, None


class _GELUProduct(torch.autograd.Function):
    """GELU(z) W' + b. z is kept, not GELU(z), which is as large and formed again in a moment."""

    @staticmethod
    def forward(ctx, z, weight, bias):
        ctx.save_for_backward(z, weight)
        return _product(_gate(z).mul_(z), weight, bias)

    @staticmethod
    def backward(ctx, g):
        z, weight = ctx.saved_tensors
        gate = _gate(z)
        y = gate * z
        grad, *rest = _gradients(ctx, g, y, weight)
        if grad is not None:
            inner = y.mul_(
                z.square().mul_(3 * CUBIC * SCALE).add_(SCALE)
            )  # z gate' = z gate (1 - gate) times the inner slope
            grad *= inner.addcmul_(inner, gate, value=-1).add_(gate)
        return grad, *rest


def _gate(z: Tensor) -> Tensor:
    """GELU(z) = z gate(z): its (1 + tanh(a / 2)) / 2 is sigmoid(a), which torch forms in a fifth of the time of tanh."""
    return z.square().mul_(CUBIC * SCALE).add_(SCALE).mul_(z).sigmoid_()


def _gradients(
    ctx, g: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the sum of g * (x W' + b) in x, W and b, where they are asked for."""
    of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
    rows = g.reshape(-1, g.shape[-1])
    return (
        _product(g, weight.t()) if of_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )

"""Linear layers: large float32 products on a CPU by oneDNN, all others by torch's own `linear`.

For the shapes here oneDNN is up to a third faster than the BLAS that torch links. The last bits of
a row depend neither on the number of rows (from two on) nor on the columns next to it.
"""

import copy
import math
import platform
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
LARGE = 1 << 17  # numbers in a weight below which a call of oneDNN costs more than it saves
ROWS = 128  # expected rows of x for a packed weight; other values gave the same layout
SCALE, CUBIC = 2 * (2 / math.pi) ** 0.5, 0.044715  # constants of GELU's tanh form

Network = TypeVar("Network", bound=nn.Module)

Recompute = tuple[Callable[..., Tensor], tuple[Tensor | None, ...]] | None
"""A function and its arguments that compute a layer's input again, so that it is not kept."""


def matmul(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, again: Recompute = None
) -> Tensor:
    """x W' + b: x[..., K], weight[N, K], bias[N] or None -> [..., N].

    The weight may be packed by `pack_weight`.
    """
    if not (_plain(x, weight) and _large(weight)):
        return F.linear(x, weight, bias)
    if not _learns(x, weight, bias):
        return _product(x, weight, bias)
    return _Product.apply(x, weight, bias, *(again or (None, ())))


def linear(x: Tensor, layer: nn.Linear, again: Recompute = None) -> Tensor:
    """layer(x): x[..., K] -> [..., N]."""
    if type(layer) is not nn.Linear:  # one with an adapter
        return layer(x)
    return matmul(x, _matrix(x, layer), layer.bias, again)


def mlp(x: Tensor, up: nn.Linear, down: nn.Linear, again: Recompute = None) -> Tensor:
    """down(GELU(up(x))) with the tanh form of GELU: x[..., K] -> [..., K]."""
    if not _plain(x, up.weight) or {type(up), type(down)} != {nn.Linear}:
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
    """A weight [N, K] in oneDNN's layout, for `matmul`; unchanged where oneDNN is not used."""
    if not (_plain(weight, weight) and _large(weight)):
        return weight
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)


def pack_network(network: Network) -> Network:
    """A copy of the network whose large linear layers hold packed weights.

    It shares all tensors, which must not change from now on.
    """
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    twin = copy.deepcopy(network, tensors)
    for layer in twin.get_submodule("blocks").modules():
        if isinstance(layer, nn.Linear):
            packed = pack_weight(layer.weight)
            if packed is not layer.weight:
                layer.packed = packed
    return twin


def _matrix(x: Tensor, layer: nn.Linear) -> Tensor:
    """The packed weight if the layer has one that can be used for x, else the plain weight."""
    weight = getattr(layer, "packed", layer.weight)
    return weight if _plain(x, weight) and not _learns(x, layer.weight) else layer.weight


def _plain(x: Tensor, weight: Tensor) -> bool:
    """Is this a float32 product on a CPU, outside autocast?"""
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
    if _large(weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    """x W' + b, whose backward pass may recompute x instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        again: Callable[..., Tensor] | None,
        given: tuple[Tensor | None, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight, *(given if again else [x]))
        ctx.again = again
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        x = ctx.again(*kept) if ctx.again else kept[0]
        return *_gradients(ctx, g, x, weight), None, None


class _GELUProduct(torch.autograd.Function):
    """GELU(z) W' + b. z is kept and GELU(z), which is as large, is computed again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, weight)
        return _product(_gate(z).mul_(z), weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        gate = _gate(z)
        y = gate * z
        grad, *rest = _gradients(ctx, g, y, weight)
        if grad is not None:
            # GELU'(z) = gate + z gate', and z gate' = z gate (1 - gate) times the slope of gate's
            # argument.
            slope = z.square().mul_(3 * CUBIC * SCALE).add_(SCALE)
            inner = y.mul_(slope)
            grad *= inner.addcmul_(inner, gate, value=-1).add_(gate)
        return grad, *rest


def _gate(z: Tensor) -> Tensor:
    """GELU(z) / z = (1 + tanh(a / 2)) / 2 = sigmoid(a), which is five times faster than tanh."""
    return z.square().mul_(CUBIC * SCALE).add_(SCALE).mul_(z).sigmoid_()


def _gradients(
    ctx: Any, g: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(g * (x W' + b)) in x, W and b; None for those that are not needed."""
    of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
    rows = g.reshape(-1, g.shape[-1])
    return (
        _product(g, weight.t()) if of_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
        rows.sum(0) if of_bias else None,
    )

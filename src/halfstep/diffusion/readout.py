"""Losses from features: logits [N, V] exist for one chunk of rows at a time only."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.diffusion.contracts import Readout
from halfstep.kernels.linear import matmul
from halfstep.kernels.logits import exp_, log_softmax_, logits, pad_rows, row_chunks

RowLoss = Callable[[Tensor, slice], Tensor]
"""(log_p[n, V], the slice of rows that they are, padded) -> loss [n]"""

RowGradient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(log_p[n, V], their slice) -> loss [n], its gradient in the logits [n, V]; may overwrite log_p"""


class _Readout(torch.autograd.Function):
    """Compute the gradient with the value, chunk by chunk, and return it in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor,
        row_loss: RowLoss,
        row_gradient: RowGradient | None,
    ) -> Tensor:
        W, b = weight.detach().float(), bias.detach().float()
        if any(ctx.needs_input_grad[:3]):
            loss_and_gradient = row_gradient or _by_autograd(row_loss)
            total, *ctx.grads = _value_and_gradients(
                h, W, b, loss_and_gradient, row_gradient is None, ctx.needs_input_grad[1]
            )
        else:
            total = _value(h, W, b, row_loss)
        return total

    @staticmethod
    def backward(ctx: Any, out: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place, so a second backward pass fails
        return *(None if g is None else g.mul_(out) for g in grads), None, None


def _value(h: Tensor, W: Tensor, b: Tensor, row_loss: RowLoss) -> Tensor:
    total, N, rows = torch.zeros((), device=h.device), len(h), pad_rows(h.detach())
    for part in row_chunks(len(rows), len(b), h.device):
        log_p = log_softmax_(logits(rows[part].float(), W, b))
        total += row_loss(log_p, part)[: N - part.start].sum()
        del log_p  # before the next chunk is computed
    return total


def _value_and_gradients(
    h: Tensor,
    W: Tensor,
    b: Tensor,
    row_gradient: RowGradient,
    takes_logits: bool,
    learns_W: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The loss and its gradients in h, W and b; that in W, a large matrix, only if W learns."""
    total, N, rows = torch.zeros((), device=h.device), len(h), pad_rows(h.detach())
    grad_h, grad_b = torch.empty_like(rows), torch.zeros_like(b)
    grad_W = torch.zeros_like(W) if learns_W else None
    V = len(b)
    for part in row_chunks(len(rows), V, h.device):
        x, n = rows[part].float(), N - part.start  # the last chunk has n real rows
        z = logits(x, W, b)
        loss, g = row_gradient(z if takes_logits else log_softmax_(z), part)
        total += loss[:n].sum()
        g[n:] = 0
        grad_h[part] = matmul(g, W[:V].t())
        if grad_W is not None:
            grad_W[:V].addmm_(g.t(), x)
        grad_b += g.sum(0)
        del z, g  # before the next chunk is computed
    return total, grad_h[:N], grad_W, grad_b


def _by_autograd(row_loss: RowLoss) -> RowGradient:
    """Loss and gradient of any row loss, from logits[n, V] instead of log-probabilities."""

    def loss_and_gradient(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            loss = row_loss(z.log_softmax(-1), rows)
            return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    return loss_and_gradient


def readout_loss(
    h: Tensor, readout: Readout, row_loss: RowLoss, row_gradient: RowGradient | None = None
) -> Tensor:
    """sum_n row_loss(log_p[n]) with log_p = log_softmax(h W' + b); scalar float32.

    Value and gradient are exact and computed in chunks of rows.

    h[N, D]; readout = (W[V or more, D], b[V]). row_loss(log_p[n, V], rows) -> [n] must be
    differentiable in log_p. It gets the rows `rows` of h after `pad_rows`, so whatever it slices by
    `rows` must be padded too; rows beyond N do not count. A closed form `row_gradient` needs fewer
    passes over [n, V] than autograd.
    """
    if not torch.is_grad_enabled():  # an autograd.Function does not see this by itself
        h, readout = h.detach(), (readout[0].detach(), readout[1].detach())
    with torch.autocast(h.device.type, enabled=False):
        return _Readout.apply(h, *readout, row_loss, row_gradient)


def cross_entropy(h: Tensor, readout: Readout, x0: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight[n] * -log p(x0[n] | h[n]): h[N, D], x0[N] int64, weight[N] -> scalar float32."""
    x0, weight = pad_rows(x0), pad_rows(weight)

    def loss(log_p: Tensor, rows: slice) -> Tensor:
        return weight[rows] * F.nll_loss(log_p, x0[rows], reduction="none")

    def loss_and_gradient(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        w, truth = weight[rows, None], x0[rows, None]
        value = -w * log_p.gather(-1, truth)
        gradient = exp_(log_p).mul_(w).scatter_add_(-1, truth, -w.to(log_p.dtype))
        return value[:, 0], gradient

    return readout_loss(h, readout, loss, loss_and_gradient)

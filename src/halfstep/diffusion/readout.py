"""Losses read from features: [N, V] exists only for a piece of the rows at a time, forward and backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from halfstep.kernels.linear import matmul
from halfstep.kernels.logits import exp_, log_softmax_, logits, pad_rows, row_chunks

RowLoss = Callable[[Tensor, slice], Tensor]  # log_p[n, V], which of the rows, filled up -> [n]
RowGradient = Callable[
    [Tensor, slice], tuple[Tensor, Tensor]
]  # the same -> [n], and its gradient in the logits [n, V]


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, row_loss, row_gradient):
        wanted = any(ctx.needs_input_grad[:3])
        W, b, V = weight.detach().float(), bias.detach().float(), len(bias)
        total, N, rows = torch.zeros((), device=h.device), len(h), pad_rows(h.detach())
        grad_h, grad_W, grad_b = (
            (torch.empty_like(rows), torch.zeros_like(W), torch.zeros_like(b))
            if wanted
            else (None, None, None)
        )
        for part in row_chunks(len(rows), V, h.device):
            x, n = rows[part].float(), N - part.start  # of the last piece n rows are real
            z = logits(x, W, b)
            if not wanted:
                total += row_loss(log_softmax_(z), part)[:n].sum()
                continue
            loss, g = (row_gradient or _by_autograd(row_loss))(
                log_softmax_(z) if row_gradient else z, part
            )
            total += loss[:n].sum()
            g[n:] = 0
            grad_h[part] = matmul(g, W[:V].t())
            grad_W[:V].addmm_(g.t(), x)
            grad_b += g.sum(0)
            del z, g  # before the next piece is formed
        ctx.grads = (grad_h[:N], grad_W, grad_b) if wanted else None
        return total

    @staticmethod
    def backward(ctx, out):
        grads, ctx.grads = ctx.grads, None  # scaled in place, so spent: a second backward fails
        grad_h, grad_W, grad_b = (g.mul_(out) for g in grads)
        return grad_h, grad_W, grad_b, None, None


def _by_autograd(row_loss: RowLoss) -> RowGradient:
    """The gradient of any row loss, from logits[n, V]."""

    def gradient(z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            loss = row_loss(z.log_softmax(-1), rows)
            return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]

    return gradient


def readout_loss(
    h: Tensor,
    readout: tuple[Tensor, Tensor],
    row_loss: RowLoss,
    row_gradient: RowGradient | None = None,
) -> Tensor:
    """sum_n row_loss(log_p[n]) with log_p = log_softmax(h W' + b): exact value and gradient, float32, a piece of the rows at a time.

    h[N, D]; readout = W[V or more, D], b[V], the rows beyond V being no words. row_loss(log_p[n, V], rows) -> [n] for the slice `rows` of the rows,
    filled up with zeros to a multiple of ROWS (what is cut by `rows` should be `fill_up`ed too; rows beyond N count nothing), differentiable in
    log_p alone. row_gradient, where there is a closed form, gives value and gradient in the logits at once, and may overwrite log_p. The
    gradient is formed with the value, piece by piece, so no [N, V] tensor outlives its piece. Scalar float32.
    """
    if not torch.is_grad_enabled():  # autograd.Function would not know
        h, readout = h.detach(), [p.detach() for p in readout]
    with torch.autocast(h.device.type, enabled=False):
        return _Readout.apply(h, *readout, row_loss, row_gradient)


def cross_entropy(h: Tensor, readout: tuple[Tensor, Tensor], x0: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight[n] * -log p(x0[n] | h[n])."""

    x0, weight = pad_rows(x0), pad_rows(weight)

    def loss(log_p: Tensor, rows: slice) -> Tensor:
        return weight[rows] * F.nll_loss(log_p, x0[rows], reduction="none")

    def gradient(log_p: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        w, truth = weight[rows, None], x0[rows, None]
        value = -w * log_p.gather(-1, truth)
        return value[:, 0], exp_(log_p).mul_(w).scatter_add_(-1, truth, -w.to(log_p.dtype))

    return readout_loss(h, readout, loss, gradient)

"""Losses read from features: [N, V] exists only for a chunk of rows at a time, forward and backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 22  # numbers in one chunk of logits (16 MiB in float32)


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, row_loss):
        wanted = any(ctx.needs_input_grad[:3])
        W, b = weight.detach().float(), bias.detach().float()
        rows = max(16, CHUNK // W.shape[0])
        total = torch.zeros((), device=h.device)
        grad_h, grad_W, grad_b = (torch.empty_like(h), torch.zeros_like(W), torch.zeros_like(b)) if wanted else (None, None, None)
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            x = h[part].detach().float()
            with torch.set_grad_enabled(wanted):
                logits = torch.addmm(b, x, W.t()).detach().requires_grad_(wanted)
                loss = row_loss(logits.log_softmax(-1), part).sum()
            total += loss.detach()
            if wanted:
                (g,) = torch.autograd.grad(loss, logits)
                torch.mm(g, W, out=grad_h[part]) if h.dtype == torch.float32 else grad_h[part].copy_(g @ W)
                grad_W.addmm_(g.t(), x)
                grad_b += g.sum(0)
        ctx.grads = grad_h, grad_W, grad_b
        return total

    @staticmethod
    def backward(ctx, out):
        grads, ctx.grads = ctx.grads, None  # scaled in place, so spent: a second backward fails
        grad_h, grad_W, grad_b = (g.mul_(out) for g in grads)
        return grad_h, grad_W, grad_b, None


def readout_loss(h: Tensor, readout: tuple[Tensor, Tensor], row_loss: Callable[[Tensor, slice], Tensor]) -> Tensor:
    """sum_n row_loss(log_p[n]) with log_p = log_softmax(h W' + b): exact value and gradient, float32, in row chunks.

    h[N, D]; readout = W[V, D], b[V]; row_loss(log_p[n, V], rows) -> [n] for the slice `rows` of the N rows, differentiable in
    log_p alone. The gradient is formed with the value, chunk by chunk, so no [N, V] tensor outlives its chunk. Scalar float32.
    """
    if not torch.is_grad_enabled():  # autograd.Function would not know
        h, readout = h.detach(), [p.detach() for p in readout]
    with torch.autocast(h.device.type, enabled=False):
        return _Readout.apply(h, *readout, row_loss)


def cross_entropy(h: Tensor, readout: tuple[Tensor, Tensor], x0: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight[n] * -log p(x0[n] | h[n])."""
    return readout_loss(h, readout, lambda log_p, rows: weight[rows] * F.nll_loss(log_p, x0[rows], reduction="none"))

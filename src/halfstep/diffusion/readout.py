"""Losses read from features: [N, V] exists only for a chunk of rows at a time, forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 1 << 22  # numbers in one chunk of logits (16 MiB in float32)

Step = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def log_softmax_(logits: Tensor) -> Tensor:
    """log_softmax over the last dimension, in place: one kernel, no temporary."""
    return torch._log_softmax(logits, -1, False, out=logits)


def read(h: Tensor, W: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """log_softmax(h W' + b) into out[n, V]."""
    return log_softmax_(torch.addmm(b, h, W.t(), out=out))


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias, step):
        wanted = any(ctx.needs_input_grad[:3])
        W, b = weight.detach().float(), bias.detach().float()
        rows = max(16, CHUNK // W.shape[0])
        total = torch.zeros((), device=h.device)
        grad_h, grad_W, grad_b = (torch.empty_like(h), torch.zeros_like(W), torch.zeros_like(b)) if wanted else (None, None, None)
        buffer = W.new_empty(min(rows, len(h)), len(W))
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            x = h[part].detach().float()
            value, g = step(read(x, W, b, buffer[: len(x)]), part, wanted)
            total += value.detach().sum()
            if wanted:
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


def by_autograd(row_loss: Callable[[Tensor, slice], Tensor]) -> Step:
    """The step of a loss that has no written gradient: row_loss(log_p[n, V], rows) -> [n], differentiable in log_p alone."""

    def step(log_p: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        log_p = log_p.detach().requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            value = row_loss(log_p, rows)
        if not wanted:
            return value, None
        (g,) = torch.autograd.grad(value, log_p, torch.ones_like(value))
        return value, g - log_p.detach().exp_() * g.sum(-1, keepdim=True)

    return step


def readout_loss(h: Tensor, readout: tuple[Tensor, Tensor], step: Step) -> Tensor:
    """sum_n of a loss of log_p[n] = log_softmax(h W' + b): exact value and gradient, float32, in row chunks.

    h[N, D]; readout = W[V, D], b[V]; step(log_p[n, V], rows, wanted) -> the losses [n] of the slice `rows` of the N rows and, if wanted, their
    gradient [n, V] by the logits; it may write into log_p. `by_autograd` makes one of any formula. The gradient is formed with the value, chunk
    by chunk, so no [N, V] tensor outlives its chunk. Scalar float32.
    """
    if not torch.is_grad_enabled():  # autograd.Function would not know
        h, readout = h.detach(), [p.detach() for p in readout]
    with torch.autocast(h.device.type, enabled=False):
        return _Readout.apply(h, *readout, step)


def cross_entropy(h: Tensor, readout: tuple[Tensor, Tensor], x0: Tensor, weight: Tensor) -> Tensor:
    """sum_n weight[n] * -log p(x0[n] | h[n]); by the logits its gradient is weight (p - onehot(x0))."""

    def step(log_p: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor | None]:
        w, goal = weight[rows], x0[rows, None]
        value = w * -log_p.gather(-1, goal)[:, 0]
        if not wanted:
            return value, None
        g = log_p.exp_().mul_(w[:, None])
        return value, g.scatter_add_(-1, goal, -w[:, None].to(g.dtype))

    return readout_loss(h, readout, step)

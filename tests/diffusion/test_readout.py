"""Chunked losses from features: value and gradients of the plain formula in float64."""

import pytest
import torch
import torch.nn.functional as F

from halfstep.diffusion.readout import cross_entropy, readout_loss
from halfstep.distill.divergences import DIVERGENCES, GRADIENTS
from halfstep.kernels import logits as chunked

V, D = 53, 12


def case(N: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N)
    h, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    log_q = torch.randn(N, V, generator=generator).log_softmax(-1)
    x0, w = torch.randint(0, V, (N,), generator=generator), torch.rand(N, generator=generator)
    leaves = [p.to(dtype).requires_grad_() for p in (h, weight, bias)]
    return leaves, log_q, x0, w


def row_losses(log_q, x0, w):
    log_q, x0, w = (chunked.pad_rows(x) for x in (log_q, x0, w))
    losses = {
        name: lambda log_p, rows, d=d: d(log_p, log_q.to(log_p.dtype)[rows])
        for name, d in DIVERGENCES.items()
    }
    losses["cross_entropy"] = lambda log_p, rows: (
        w.to(log_p.dtype)[rows] * F.nll_loss(log_p, x0[rows], reduction="none")
    )
    return losses


def closed_form(divergence, log_q):
    def gradient(log_p, rows):
        g = chunked.pad_rows(log_q)[rows].clone()
        return GRADIENTS[divergence](log_p, g), g

    return gradient


def plain(leaves, row_loss):
    """The plain formula: all logits at once, in float64."""
    h, weight, bias = (p.detach().double().requires_grad_() for p in leaves)
    loss = row_loss((h @ weight.T + bias).log_softmax(-1), slice(0, len(h))).sum()
    return loss, torch.autograd.grad(loss, (h, weight, bias))


@pytest.mark.parametrize("loss", [*DIVERGENCES, "cross_entropy"])
@pytest.mark.parametrize("N", [0, 1, 32, 33, 70])
@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["chunks", "whole"])
@pytest.mark.parametrize("closed", [False, True], ids=["autograd", "closed"])
def test_value_and_gradients(monkeypatch, loss, N, chunk, closed):
    """Float32 against float64: relative 1e-5 of the largest entry.

    The smallest chunk has 32 rows, so 33 and 70 rows take several.
    """
    monkeypatch.setitem(chunked.NUMBERS, "cpu", chunk)
    if closed and DIVERGENCES.get(loss) not in {*GRADIENTS, None}:
        pytest.skip("no closed form was written of this divergence")
    leaves, log_q, x0, w = case(N)
    row_loss = row_losses(log_q, x0, w)[loss]
    expected, gradients = plain(leaves, row_loss)
    if closed and loss == "cross_entropy":
        found = cross_entropy(leaves[0], tuple(leaves[1:]), x0, w)
    else:
        found = readout_loss(
            leaves[0],
            tuple(leaves[1:]),
            row_loss,
            closed_form(DIVERGENCES[loss], log_q) if closed else None,
        )
    assert found.dtype == torch.float32 and found.shape == ()
    assert abs(found.item() - expected.item()) <= 1e-5 * max(1, abs(expected.item()))
    (found / 7).backward()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
        assert (
            (leaf.grad - gradient / 7).abs().max() <= 1e-5 * max(1, gradient.abs().max())
            if leaf.numel()
            else True
        )


def test_chunks_are_small(monkeypatch):
    monkeypatch.setitem(chunked.NUMBERS, "cpu", 40 * V)
    leaves, _log_q, _x0, _w = case(50)
    sizes = []

    def row_loss(log_p, rows):
        sizes.append(tuple(log_p.shape))
        assert rows.stop - rows.start == len(log_p)
        return log_p.sum(-1)

    readout_loss(leaves[0], tuple(leaves[1:]), row_loss)
    assert sizes == [(32, V), (32, V)]  # a multiple of 32 rows, the last piece filled up


@pytest.mark.parametrize("loss", [*GRADIENTS, "cross_entropy"])
def test_a_row_does_not_depend_on_the_rows_beside_it(loss):
    """Value and gradient of a row are the same bits for any number of rows.

    So only the sum depends on micro-batches and ranks.
    """
    leaves, log_q, x0, w = case(70)
    h, readout = leaves[0].detach(), tuple(p.detach() for p in leaves[1:])

    def found(rows):
        x = h[rows].clone().requires_grad_()
        if loss == "cross_entropy":
            value = cross_entropy(x, readout, x0[rows], w[rows])
        else:
            value = readout_loss(x, readout, lambda *_: None, closed_form(loss, log_q[rows]))
        return value.item(), torch.autograd.grad(value, x)[0]

    whole = [found(slice(n, n + 1)) for n in range(70)]
    assert sum(value for value, _ in whole) == pytest.approx(found(slice(None))[0], rel=1e-6)
    for first, last in ((0, 70), (0, 33), (3, 9), (20, 52)):
        gradient = found(slice(first, last))[1]
        assert all(torch.equal(gradient[n - first], whole[n][1][0]) for n in range(first, last)), (
            first,
            last,
        )


def test_cross_entropy_is_weighted():
    leaves, _, x0, w = case(30)
    found = cross_entropy(leaves[0], tuple(leaves[1:]), x0, w)
    logits = leaves[0] @ leaves[1].T + leaves[2]
    assert torch.allclose(
        found, (w * F.cross_entropy(logits, x0, reduction="none")).sum(), rtol=1e-5
    )


def test_gradient_reaches_what_lies_below_and_only_what_asks_for_it():
    """A slice of a larger readout (without the mask), a frozen bias, features from a layer."""
    generator = torch.Generator().manual_seed(1)
    layer, head = torch.nn.Linear(5, D), torch.nn.Linear(D, V + 1)
    x, x0 = torch.randn(20, 5, generator=generator), torch.randint(0, V, (20,), generator=generator)
    bias = torch.zeros(V)
    cross_entropy(layer(x), (head.weight[:-1], bias), x0, torch.ones(20)).backward()
    found = [p.grad.clone() for p in (layer.weight, layer.bias, head.weight)]
    layer.zero_grad(), head.zero_grad()
    F.cross_entropy(layer(x) @ head.weight[:-1].T, x0, reduction="sum").backward()
    for a, b in zip(found, (layer.weight.grad, layer.bias.grad, head.weight.grad), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert found[2][-1].abs().max() == 0 and bias.grad is None and head.bias.grad is None


def test_no_gradient_is_formed_where_none_is_wanted():
    """A held-out loss costs one forward pass: row_loss runs without a graph."""
    leaves, _log_q, _x0, _w = case(20)
    watched = []

    def row_loss(log_p, rows):
        watched.append(log_p.requires_grad)
        return log_p[:, 0]

    with torch.no_grad():
        found = readout_loss(leaves[0], tuple(leaves[1:]), row_loss)
    assert watched == [False] and not found.requires_grad
    readout_loss(leaves[0].detach(), tuple(p.detach() for p in leaves[1:]), row_loss)
    assert watched == [False, False]


def test_a_second_backward_fails_loudly():
    """A second backward pass fails, because the first one scales the kept gradient in place."""
    leaves, _log_q, x0, w = case(5)
    loss = 2 * cross_entropy(leaves[0], tuple(leaves[1:]), x0, w)
    loss.backward(retain_graph=True)
    with pytest.raises(Exception, match="NoneType|second"):
        loss.backward()


@pytest.mark.parametrize("loss", [*DIVERGENCES, "cross_entropy"])
def test_bfloat16_features_and_autocast(loss):
    """The readout is float32 inside autocast; gradients have the dtype of their leaves."""
    leaves, log_q, x0, w = case(40)
    row_loss = row_losses(log_q, x0, w)[loss]
    expected, gradients = plain(leaves, row_loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = readout_loss(leaves[0], tuple(leaves[1:]), row_loss)
    found.backward()
    assert found.dtype == torch.float32 and abs(found.item() / expected.item() - 1) < 1e-5
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert leaf.grad.dtype == torch.float32 and (leaf.grad - gradient).abs().max() < 1e-4 * max(
            1, gradient.abs().max()
        )

    half, *rest = leaves
    half = (
        half.detach().bfloat16().requires_grad_()
    )  # features of a network that computes in bfloat16
    expected, gradients = plain([half, *rest], row_loss)
    for leaf in rest:
        leaf.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        found = readout_loss(half, tuple(rest), row_loss)
    found.backward()
    assert found.dtype == torch.float32 and abs(found.item() / expected.item() - 1) < 1e-5
    assert (
        half.grad.dtype == torch.bfloat16
        and (half.grad - gradients[0]).abs().max() < 2**-8 * gradients[0].abs().max()
    )
    assert rest[0].grad.dtype == torch.float32 and (
        rest[0].grad - gradients[1]
    ).abs().max() < 1e-4 * max(1, gradients[1].abs().max())

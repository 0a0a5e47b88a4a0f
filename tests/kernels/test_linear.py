"""Linear layers and their backward passes against float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.kernels import linear as products
from halfstep.kernels.linear import linear, matmul, mlp, pack_network, pack_weight
from halfstep.kernels.logits import exp_, log_softmax_
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

SIZES = [(12, 20), (256, 768)]  # below and above LARGE
onednn = pytest.mark.skipif(not products.ONEDNN, reason="this torch has no oneDNN")


def layers(K: int, N: int) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(K)
    return nn.Linear(K, N), nn.Linear(N, K)


def gradients(run, *leaves):
    value = run(*leaves)
    return value, torch.autograd.grad(
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view_as(value)).sum(),
        leaves,
    )


@pytest.mark.parametrize(("K", "N"), SIZES)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,), (1,)])
def test_value_and_gradients(K, N, shape):
    (up, down), x = layers(K, N), torch.randn(*shape, K, requires_grad=True)

    def plain(x, W, b, V, c):
        return F.linear(F.gelu(F.linear(x, W, b), approximate="tanh"), V, c)

    def ours(x, *_):
        return mlp(x, up, down)

    leaves = (x, up.weight, up.bias, down.weight, down.bias)
    for run, by, some in (
        (ours, plain, leaves),
        (lambda x, W, b: matmul(x, W, b), F.linear, leaves[:3]),
        (lambda x, W: matmul(x, W), F.linear, leaves[:2]),
    ):
        found, grads = gradients(run, *some)
        expected, exact = gradients(by, *(leaf.detach().double().requires_grad_() for leaf in some))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        for a, b in zip(grads, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)
        with torch.no_grad():
            torch.testing.assert_close(run(*some), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("K", "N"), SIZES)
def test_only_gradients_that_are_asked_for(K, N):
    (up, down), x = layers(K, N), torch.randn(6, K)
    mlp(x, up.requires_grad_(False), down).sum().backward()
    assert up.weight.grad is None and down.weight.grad.abs().sum() > 0
    x.requires_grad_()
    mlp(x, up, down.requires_grad_(False)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not matmul(x.detach(), up.weight, up.bias).requires_grad


@onednn
@pytest.mark.parametrize(("K", "N"), [(256, 768), (1024, 256), (128, 4097)])
def test_a_row_does_not_depend_on_the_rows_and_words_beside_it(K, N):
    (layer, _), x = layers(K, N), torch.randn(300, K)
    with torch.no_grad():
        whole = linear(x, layer)
        for rows in (2, 3, 16, 31, 32, 100, 299):
            assert torch.equal(linear(x[:rows], layer), whole[:rows]), rows
        words = (
            matmul(x, layer.weight[:600], layer.bias[:600])
            if N * K > 600 * K >= products.LARGE
            else whole[:, :600]
        )
        assert torch.equal(words, whole[:, :600])
        assert torch.equal(matmul(x, pack_weight(layer.weight), layer.bias), whole)


def test_what_is_not_for_onednn_is_torchs(monkeypatch):
    """float64, autocast and small matrices use torch, bit for bit; so does a CPU without oneDNN."""
    (up, down), x = layers(256, 768), torch.randn(9, 256)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, up), up(x)) and torch.equal(
            mlp(x, up, down), down(F.gelu(up(x), approximate="tanh"))
        )
    wide, y = copy.deepcopy(up).double(), x.double()
    assert torch.equal(linear(y, wide), wide(y))
    monkeypatch.setattr(products, "ONEDNN", False)
    assert torch.equal(linear(x, up), up(x)) and pack_weight(up.weight) is up.weight
    torch.testing.assert_close(mlp(x, up, down), down(F.gelu(up(x), approximate="tanh")))


@onednn
def test_a_packed_network_writes_the_same_texts():
    """A packed network shares its tensors, and equals the network in autocast and in training."""
    torch.manual_seed(0)
    network = DiT(5000, 256, 2, 4)
    for p in network.parameters():
        nn.init.normal_(p, std=0.05)
    one, x, t = (
        SubsDenoiser(network.eval(), LogLinear()),
        torch.randint(0, 5001, (3, 20)),
        torch.zeros(3),
    )
    twin = one.inference_copy
    own, shared = network.state_dict(keep_vars=True), twin.network.state_dict(keep_vars=True)
    assert own.keys() == shared.keys() and all(own[name] is shared[name] for name in own)
    assert twin.network.blocks[0].attn_qkv.packed.is_mkldnn and not hasattr(
        network.blocks[0].attn_qkv, "packed"
    )
    with torch.no_grad():
        torch.testing.assert_close(twin.features(x, t), one.features(x, t), rtol=0, atol=0)
        h = one.features(x, t)[0]
        torch.testing.assert_close(
            twin.logits(h, slice(4096, 5000)), one.logits(h)[:, 4096:], rtol=0, atol=0
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(twin.features(x, t), one.features(x, t))
    assert torch.equal(
        sample(twin, 5, 20, 6).ids,
        sample(one, 5, 20, 6).ids,
    )
    first = twin.network.blocks[
        0
    ].attn_qkv.weight  # a pass that learns takes the weights themselves
    (gradient,) = torch.autograd.grad(twin.features(x, t).square().sum(), first)
    assert gradient.abs().max() > 0
    assert not hasattr(pack_network(DiT(40, 32, 1, 4)).blocks[0].attn_qkv, "packed")


def test_exp_is_e_to_the_x():
    x = torch.linspace(-80, 80, 100_001)
    error = (exp_(x.clone()).double() / x.double().exp() - 1).abs()
    assert (error <= 2**-23 + x.abs().double() * 2**-23).all()
    assert exp_(torch.tensor([-torch.inf, 0.0])).tolist() == [0, 1]
    y = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(exp_(y.clone()), y.exp(), rtol=1e-14, atol=0)


def test_log_softmax_in_place():
    z = torch.randn(40, 5003) * 3
    expected = z.double().log_softmax(-1)
    assert log_softmax_(z) is z
    torch.testing.assert_close(z.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("timed", [False, True], ids=["blind", "timed"])
def test_a_wide_network_learns_as_with_torchs_own_layers(monkeypatch, timed):
    """Features and all gradients, with features of some positions only."""
    torch.manual_seed(0)
    network = DiT(300, 256, 3, 4)
    for p in network.parameters():
        nn.init.normal_(p, std=0.04)
    x, sigma, where = (
        torch.randint(0, 301, (4, 18)),
        torch.rand(4) if timed else None,
        torch.rand(4, 18) < 0.6,
    )
    weight = torch.randn(int(where.sum()), 256)

    def learned() -> list[torch.Tensor]:
        h = network(x, sigma, where)
        return [
            h,
            *torch.autograd.grad((h * weight).sum(), [*network.parameters()], allow_unused=True),
        ]

    found = learned()
    monkeypatch.setattr(products, "_plain", lambda *_: False)
    for name, a, b in zip(
        ["features", *dict(network.named_parameters())], found, learned(), strict=True
    ):
        assert (a is b is None) or (a - b).abs().max() <= 3e-5 * b.abs().max(), name

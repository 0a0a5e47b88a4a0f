"""Blocks whose activations are computed again, or whose code is compiled, compute the same."""

import copy
import shutil

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from halfstep.config import Machine
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.models.dit import DiT
from halfstep.training.blocks import prepare_blocks

CPU = torch.device("cpu")
X = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))
WHERE = torch.rand(4, 32, generator=torch.Generator().manual_seed(2)) < 0.5


def network(dropout: float) -> DiT:
    torch.manual_seed(0)
    net = DiT(50, 32, 2, 2, dropout=dropout)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net.train()


def gradients(net: DiT, precision: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Features, gradients by parameter, and the numbers kept for the backward pass."""
    kept = 0

    def keep(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(3)
    with computing(CPU, precision), saved_tensors_hooks(keep, lambda tensor: tensor):
        h = net(X, None, WHERE)
    h.float().square().sum().backward()
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return h.detach(), found, kept


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recomputed_blocks_keep_less_and_give_the_same_bits(precision):
    """Dropout and the rows of the last block included, and a copy of the network too."""
    plain, recomputing = network(dropout=0.2), network(dropout=0.2)
    prepare_blocks(recomputing, Machine(recompute=True), CPU)
    twin = copy.deepcopy(recomputing)
    h, expected, kept = gradients(plain, precision)
    for net in (recomputing, twin):
        again, found, less = gradients(net, precision)
        assert torch.equal(again, h)
        assert found.keys() == expected.keys() and len(found) > 20
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert less < kept / 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_compiled_blocks_differ_by_rounding_alone():
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler: torch.compile has not been tried")
    plain, compiled = network(dropout=0.0), network(dropout=0.0)
    prepare_blocks(compiled, Machine(compile=True, recompute=True), CPU)
    h, expected, _ = gradients(plain, "float32")
    again, found, _ = gradients(compiled, "float32")
    torch.testing.assert_close(again, h, rtol=1e-5, atol=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < 1e-5, name
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_without_a_compiler_one_sentence_says_so(monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(inductor.cpp, "cxx", (None, str(tmp_path / "no-compiler")))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    torch._dynamo.reset()
    net = network(dropout=0.0)
    with pytest.raises(HalfstepError, match="^--compile: torch cannot compile for cpu.*compiler"):
        prepare_blocks(net, Machine(compile=True), CPU)

"""One context for all computing: autocast, TF32, and matrices that are cast once."""

import pytest
import torch
from torch import nn

from halfstep.kernels.precision import cast_matrices, computing
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT

CPU = torch.device("cpu")


def settings() -> tuple[bool, str]:
    return torch.is_autocast_enabled("cpu"), torch.get_float32_matmul_precision()


@pytest.mark.parametrize("around", ["highest", "high"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_autocast_is_for_bfloat16_alone_and_all_is_restored(around, precision):
    """What is set around the context does not reach inside, and is there again afterwards."""
    torch.set_float32_matmul_precision(around)
    try:
        for outer in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=outer):
                with pytest.raises(KeyError), computing(CPU, precision):
                    assert settings() == (precision == "bfloat16", "highest")
                    raise KeyError
                assert settings() == (outer, around)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "bfloat16", "high"),
        ("cuda", "float32", "highest"),
        ("cpu", "bfloat16", "highest"),
        ("cpu", "float32", "highest"),
    ],
)
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_tf32_is_for_bfloat16_on_cuda_alone(device, precision, expected):
    with computing(torch.device(device), precision):
        assert torch.get_float32_matmul_precision() == expected
    assert torch.get_float32_matmul_precision() == "highest"


def test_no_cast_of_a_weight_is_kept():
    """Weights may change inside, and a pass without gradients leaves nothing to one with them."""
    layer, x = nn.Linear(2, 2, bias=False), torch.eye(2)
    with computing(CPU, "bfloat16"):
        with torch.no_grad():
            layer(x)
        y = layer(x)
        assert y.dtype == torch.bfloat16 and y.requires_grad
        with torch.no_grad():
            layer.weight.fill_(3)
        assert layer(x).eq(3).all()


@pytest.mark.parametrize("make", [DiT, GPT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_cast_once_are_what_autocast_makes_of_them(make, dtype):
    torch.manual_seed(2)
    network = make(31, 32, 2, 4).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, sigma = torch.randint(0, 31, (3, 9)), [torch.tensor([0.1, 0.5, 2.0])] * (make is DiT)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = network(x, *sigma)
        cast_matrices(network, dtype)
        assert torch.equal(network(x, *sigma), expected)
    assert (
        network.output_layer.linear.weight.dtype
        == network.vocab_embed.embedding.dtype
        == network.blocks[0].norm1.weight.dtype
        == torch.float32
    )
    assert network.blocks[0].attn_qkv.weight.dtype == network.blocks[1].mlp[2].bias.dtype == dtype

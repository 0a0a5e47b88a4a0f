"""The written FLOP count against torch's counter of the operations that ran."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from halfstep.diffusion.schedules import LogLinear
from halfstep.models import flops
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("texts,length,rows,blocks", [(3, 10, 17, 2), (2, 16, 32, 3)])
def test_dit(texts, length, rows, blocks, conditioned):
    network = DiT(50, 32, blocks, 4)
    denoiser = SubsDenoiser(network, LogLinear(), conditioned)
    ids, t, where = (
        torch.randint(0, 51, (texts, length)),
        torch.rand(texts),
        (torch.arange(texts * length) < rows).view(texts, length),
    )

    def run():
        return denoiser.log_p(denoiser.features(ids, t, where)).sum()

    conditions = texts if conditioned else 1
    assert counted(run) == flops.forward_flops(network, texts, length, rows, conditions)
    leaf = (
        network.sigma_map.mlp[0].weight.numel()
    )  # no gradient flows on into the noise level: the one product that a backward pass spares
    assert (
        counted(lambda: run().backward())
        == flops.training_flops(network, texts, length, rows, conditions) - 2 * conditions * leaf
    )


def test_features_that_are_asked_for_and_not_read_out():
    network = DiT(50, 32, 2, 4)
    denoiser = SubsDenoiser(network, LogLinear())
    ids, where = torch.randint(0, 51, (3, 10)), (torch.arange(30) < 20).view(3, 10)
    assert counted(
        lambda: denoiser.log_p(denoiser.features(ids, torch.rand(3), where)[:5])
    ) == flops.forward_flops(network, 3, 10, 5, wanted=20)


def test_gpt():
    network = GPT(50, 32, 2, 4)
    ids = torch.randint(0, 50, (3, 10))
    assert counted(
        lambda: network.log_p(network(ids).flatten(0, 1)).sum().backward()
    ) == flops.training_flops(network, 3, 10, 30)

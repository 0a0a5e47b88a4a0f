"""The written FLOP count against torch's counter of the operations that ran."""

import pytest
import torch
from published import build_family
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from halfstep.diffusion.schedules import LogLinear
from halfstep.models import flops
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT
from halfstep.models.gpt2 import GPT2
from halfstep.models.hf import TransformersNetwork


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
    assert counted(run) == flops.forward_flops(
        flops.network_shape(network), texts, length, rows, conditions
    )
    leaf = (
        network.sigma_map.mlp[0].weight.numel()
    )  # no gradient flows on into the noise level: the one product that a backward pass spares
    assert (
        counted(lambda: run().backward())
        == flops.training_flops(flops.network_shape(network), texts, length, rows, conditions)
        - 2 * conditions * leaf
    )


def test_features_that_are_asked_for_and_not_read_out():
    network = DiT(50, 32, 2, 4)
    denoiser = SubsDenoiser(network, LogLinear())
    ids, where = torch.randint(0, 51, (3, 10)), (torch.arange(30) < 20).view(3, 10)
    assert counted(
        lambda: denoiser.log_p(denoiser.features(ids, torch.rand(3), where)[:5])
    ) == flops.forward_flops(flops.network_shape(network), 3, 10, 5, wanted=20)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_networks_of_transformers(kind):
    """They compute the last block at all positions; grouped keys and wide MLPs are counted."""
    own = {"llama": {"num_key_value_heads": 1, "intermediate_size": 96, "head_dim": 16}, "gpt2": {}}
    network = TransformersNetwork(build_family(kind, 50, 16, **own[kind]), 41)
    denoiser = SubsDenoiser(network, LogLinear())
    ids, where = torch.randint(2, 41, (3, 10)), (torch.arange(30) < 17).view(3, 10)
    found = counted(lambda: denoiser.log_p(denoiser.features(ids, torch.rand(3), where)))
    expected = flops.forward_flops(flops.network_shape(network), 3, 10, 17)
    # The angles of the rotary embedding are a small product.
    assert found == pytest.approx(expected, rel=0.002)


def test_gpt():
    network = GPT(50, 32, 2, 4)
    ids = torch.randint(0, 50, (3, 10))
    assert counted(
        lambda: network.log_p(network(ids).flatten(0, 1)).sum().backward()
    ) == flops.training_flops(flops.network_shape(network), 3, 10, 30)


def test_shapes_by_numbers_are_those_of_networks():
    """Prices are computed before a network exists; vectors are the parameters that do not count."""
    dit, gpt = DiT(50, 32, 2, 4, cond_width=24), GPT(50, 32, 2, 4)
    gpt2 = GPT2(50, 32, 2, 4)
    assert flops.network_shape(dit) == flops.denoiser_shape(2, 32, 50, cond_width=24)
    assert flops.network_shape(gpt) == flops.causal_shape(2, 32, 50)
    assert flops.network_shape(gpt2) == flops.denoiser_shape(2, 32, 50, cond_width=0)
    for network, masks in (dit, 2), (gpt, 0):  # rows of the mask token
        matrices = sum(p.numel() for p in network.parameters() if p.dim() == 2)
        assert flops.network_shape(network).parameters == matrices - masks * 32


@pytest.mark.parametrize("substeps, revealed", [(2, 0.1), (4, 0.01)])
def test_a_round_is_a_training_and_the_passes_of_its_teacher(substeps, revealed):
    """Texts of one token: a further substep reads the texts in which it was revealed."""
    shape = flops.denoiser_shape(2, 32, 50, 24)
    found = flops.distillation_flops(shape, shape, 8, 1, 0.5, revealed, substeps)
    passes, rows = 8 * (1 + (substeps - 1) * revealed), 4 + 8 * (substeps - 1) * revealed
    teacher = flops.forward_flops(shape, passes, 1, rows, wanted=passes / 2)
    assert found == pytest.approx(flops.training_flops(shape, 8, 1, 4) + teacher)

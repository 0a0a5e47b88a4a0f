"""The moving average of the weights."""

import math

import pytest
import torch
from torch import nn

from halfstep.training.ema import EMA


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_moving_average_in_closed_form(decay):
    """With weights n at update n: the sum over updates of (1 - d_i) i times all later d."""
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = EMA(network, decay)
    for n in range(1, 31):
        network.weight.data.fill_(float(n))
        ema.update()
    rates = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
    terms = [(1 - rates[i]) * (i + 1) * math.prod(rates[i + 1 :]) for i in range(30)]
    average, weight = pytest.approx(sum(terms), rel=1e-5), 30
    assert ema.shadow["weight"].item() == average and network.weight.item() == weight
    ema.swap()
    assert network.weight.item() == average and ema.shadow["weight"].item() == weight
    ema.swap()
    assert network.weight.item() == weight


def test_moving_average_begins_at_the_weights():
    network = nn.Linear(2, 1)
    shadow = EMA(network, 0.9).shadow["weight"]
    assert torch.equal(shadow, network.weight)
    assert shadow.data_ptr() != network.weight.data_ptr()


def test_moving_average_continues_a_given_one():
    """It copies the given average, ignores buffers, and goes on counting updates."""
    network = nn.Linear(2, 1)
    given = {"weight": torch.ones(1, 2), "bias": torch.zeros(1), "a buffer": torch.ones(1)}
    ema = EMA(network, 0.9, given, 100)
    assert torch.equal(ema.shadow["weight"], torch.ones(1, 2))
    assert ema.shadow.keys() == {"weight", "bias"}
    ema.update()
    expected = 0.9 * torch.ones(1, 2) + 0.1 * network.weight
    assert ema.updates == 101 and torch.allclose(ema.shadow["weight"], expected)
    assert torch.equal(given["weight"], torch.ones(1, 2))

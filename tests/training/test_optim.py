"""The learning rate, and the optimizer state by parameter name."""

import itertools
import math

import pytest
import torch
from torch import nn

from halfstep.config import Training
from halfstep.training.optim import (
    FLOOR,
    adamw,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)

OPTIONS = dict(num_steps=1000, warmup_steps=100, lr=2.0)


def small_network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))


@pytest.mark.parametrize("lr_decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm_up", [True, False])
def test_learning_rate(lr_decay, warm_up):
    training = Training(**OPTIONS, lr_decay=lr_decay)
    rates = [learning_rate(training, step, warm_up) for step in range(1000)]
    start = 100 if warm_up else 0
    assert rates[:start] == pytest.approx([2.0 * (i + 1) / 100 for i in range(start)])
    assert rates[start] == 2.0 and max(rates) == 2.0 and min(rates) > 0
    rest = rates[start:]
    if lr_decay == "constant":
        assert set(rest) == {2.0}
        return
    assert all(a > b for a, b in itertools.pairwise(rest))
    assert rest[-1] == pytest.approx(2.0 * FLOOR, rel=0.06)
    middle = rest[len(rest) // 2]  # both decays are symmetric about it
    assert middle == pytest.approx(2.0 * (1 + FLOOR) / 2, rel=1e-6)
    quarters = {
        "linear": 1 - 0.98 / 4,
        "cosine": FLOOR + 0.98 * (1 + math.cos(math.pi / 4)) / 2,
    }
    assert rest[len(rest) // 4] / 2.0 == pytest.approx(quarters[lr_decay], rel=1e-3)


def test_optimizer_state_goes_out_and_in():
    """Named by parameter, copied on loading; the next step has the same bits."""
    networks, training = [small_network(), small_network()], Training(**OPTIONS)
    first = adamw(networks[0], training)
    for _ in range(3):
        networks[0](torch.ones(2, 4)).sum().backward()
        first.step()
    networks[1].load_state_dict(networks[0].state_dict())
    state = optimizer_state(networks[0], first)
    assert set(state) == {
        f"{kind}:{name}"
        for kind in ("step", "exp_avg", "exp_avg_sq")
        for name, _ in networks[0].named_parameters()
    }
    saved = {key: value.clone() for key, value in state.items()}
    second = adamw(networks[1], training)
    load_optimizer_state(networks[1], second, state)
    for network, optimizer in zip(networks, (first, second), strict=True):
        network.zero_grad()
        network(torch.full((2, 4), 0.5)).square().sum().backward()
        optimizer.step()
    pairs = zip(networks[0].parameters(), networks[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    load_optimizer_state(networks[1], second, saved)
    second.step()
    assert saved["step:0.weight"] == 3


def test_optimizer_state_is_on_the_device_of_its_parameter():
    """`step` too, because the fused kernel reads it there. Meta stands for a second device."""
    network = small_network()
    optimizer = adamw(network, Training(**OPTIONS))
    network(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer_state(network, optimizer)
    away = small_network().to("meta")
    other = torch.optim.AdamW(away.parameters())
    load_optimizer_state(away, other, state)
    values = [value for p in away.parameters() for value in other.state[p].values()]
    assert len(values) == 3 * 4 and {value.device.type for value in values} == {"meta"}

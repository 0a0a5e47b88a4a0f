"""The learning rate, and the optimizer state by parameter name."""

import itertools
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from halfstep.config import Training
from halfstep.training.optim import (
    FLOOR,
    FusedAdamW,
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


def test_the_bits_are_those_of_torch():
    """Weights and moments after steps with other learning rates; one parameter has no gradient."""
    networks = [small_network(), small_network()]
    training = Training(**OPTIONS, beta2=0.95, weight_decay=0.1)
    ours = FusedAdamW(networks[0], training)
    torchs = torch.optim.AdamW(
        networks[1].parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
    )
    for step in range(4):
        ours.lr = torchs.param_groups[0]["lr"] = 0.3 / (step + 1)
        for network, optimizer in zip(networks, (ours, torchs), strict=True):
            network[0](torch.full((3, 4), step - 1.0)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None
        assert ours.state[p].keys() == torchs.state[q].keys()
        assert all(
            torch.equal(value, torchs.state[q][kind]) for kind, value in ours.state[p].items()
        )


def test_a_training_imports_no_compiler():
    """torch._dynamo, which torch.optim.AdamW imports, takes as long to import as torch itself."""
    code = """
import sys, torch
from halfstep.config import Training
from halfstep.training.optim import FusedAdamW
network = torch.nn.Linear(2, 1)
optimizer = FusedAdamW(network, Training())
network(torch.ones(1, 2)).sum().backward()
torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
optimizer.step()
optimizer.zero_grad()
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_optimizer_state_goes_out_and_in():
    """Named by parameter, copied on loading; the next step has the same bits."""
    networks, training = [small_network(), small_network()], Training(**OPTIONS)
    first = FusedAdamW(networks[0], training)
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
    second = FusedAdamW(networks[1], training)
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
    optimizer = FusedAdamW(network, Training(**OPTIONS))
    network(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer_state(network, optimizer)
    away = small_network().to("meta")
    other = FusedAdamW(away, Training(**OPTIONS))
    load_optimizer_state(away, other, state)
    values = [value for p in away.parameters() for value in other.state[p].values()]
    assert len(values) == 3 * 4 and {value.device.type for value in values} == {"meta"}

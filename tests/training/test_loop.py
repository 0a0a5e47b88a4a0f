"""The training loop: global gradients, resumption to the bit, moving average, rates, and the end of a training that diverged."""

import json
import math
import threading

import pytest
import torch
from safetensors import safe_open
from torch import nn

from halfstep.config import Machine, Training
from halfstep.errors import HalfstepError
from halfstep.records.journal import Journal, read_journal
from halfstep.training import loop
from halfstep.training.ema import EMA
from halfstep.training.optim import (
    FLOOR,
    adamw,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)

STEPS = 7


class Interrupted(Exception):
    pass


def training(**more) -> Training:
    how = dict(
        num_steps=STEPS,
        batch_size=12,
        lr=1e-2,
        warmup_steps=2,
        lr_decay="linear",
        dropout=0.0,
        precision="float32",
        validate_every=3,
    )
    return Training(**{**how, **more})


def network(dropout=0.0, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))


def run(
    folder,
    *,
    how=None,
    dropout=0.0,
    micro_batch=12,
    stop_at=None,
    seed=3,
    params=None,
    batch=None,
    loss=None,
    validate=None,
    **more,
):
    """A small regression through `fit`: y = sum x, noise from the step's own generator; optionally interrupted when asked for a batch."""
    how, net = how or training(), network(dropout)

    def data(step):
        if step == stop_at:
            raise Interrupted
        return torch.arange(48, dtype=torch.float64).view(12, 4).sin() + step

    def corrupt(x0, random):
        return {
            "x": x0 + torch.randn(x0.shape, generator=random, dtype=torch.float64),
            "y": x0.sum(1),
        }, x0.numel()

    def squares(part):
        return (net(part["x"].float())[:, 0] - part["y"].float()).square().sum()

    def measured():
        return {"val/loss": (net(torch.ones(1, 4)) - 4).square().item(), "val/other": 1.0}

    with Journal(
        folder,
        name="test",
        node="test",
        params=params or {"training": how.model_dump(), "dropout": dropout, "seed": seed},
    ) as journal:
        fitted = loop.fit(
            net, batch or data, corrupt, loss(net) if loss else squares, validate or measured, how, seed=seed, device=torch.device("cpu"),
            micro_batch=micro_batch, state=folder / "state", label="test", journal=journal, **more,
        )  # fmt: skip
    return net, fitted


def everything(net, fitted):
    """All that a training leaves, for a comparison of bits."""
    named = {f"raw/{k}": v for k, v in net.state_dict().items()}
    for group in ("moments", "best"):
        named |= {f"{group}/{k}": v for k, v in getattr(fitted, group).items()}
    named |= {f"ema/{k}": v for k, v in fitted.ema.shadow.items()}
    return named, (fitted.ema.updates, fitted.best_step, fitted.validation)


def assert_same_bits(one, other):
    (a, facts_a), (b, facts_b) = everything(*one), everything(*other)
    assert a.keys() == b.keys() and facts_a == facts_b
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("micro_batch", [1, 5, 6, 100])
def test_gradients_are_those_of_the_global_batch(tmp_path, micro_batch):
    whole, fitted = run(tmp_path / "whole")
    parts, parted = run(tmp_path / "parts", micro_batch=micro_batch)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and not torch.equal(a, torch.zeros_like(a))
    assert parted.validation["best"] == pytest.approx(fitted.validation["best"], rel=1e-4)


def test_one_step_by_hand(tmp_path):
    """The first update: mean loss over the global batch, clipped gradient, AdamW at the first warm-up rate."""
    how = training(
        num_steps=1, warmup_steps=0, lr_decay="constant", grad_clip=0.05, weight_decay=0.1
    )
    found, fitted = run(tmp_path, how=how)
    net = network()
    optimizer = torch.optim.AdamW(
        net.parameters(), how.lr, (0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    x0 = torch.arange(48, dtype=torch.float64).view(12, 4).sin()
    x = (x0 + torch.randn(12, 4, generator=loop.step_generator(3, 0), dtype=torch.float64)).float()
    ((net(x)[:, 0] - x0.sum(1).float()).square().sum() / 48).backward()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.05)
    optimizer.step()
    for a, b, p in zip(found.parameters(), net.parameters(), network().parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7) and not torch.allclose(a, p, atol=1e-4)
    (point,) = [point for point in read_journal(tmp_path)[1] if "train/loss" in point["metrics"]]
    assert (
        point["metrics"]["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05
    )


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_interrupted_and_resumed_is_bit_equal(tmp_path, monkeypatch, stop_at):
    """With dropout, a decaying rate and validation; interrupted before each step in turn, after the state of the last one was kept."""
    undisturbed = run(tmp_path / "a", dropout=0.3)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", dropout=0.3, stop_at=stop_at)
    with safe_open(tmp_path / "b" / "state" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == str(stop_at)
    asked = []
    resumed = run(
        tmp_path / "b",
        dropout=0.3,
        batch=lambda step: (
            asked.append(step) or torch.arange(48, dtype=torch.float64).view(12, 4).sin() + step
        ),
    )
    assert asked == list(range(stop_at, STEPS))
    assert_same_bits(undisturbed, resumed)
    points = {
        folder: [
            (
                p["step"],
                {k: v for k, v in p["metrics"].items() if "per_s" not in k and "system" not in k},
            )
            for p in read_journal(tmp_path / folder)[1]
        ]
        for folder in "ab"
    }
    assert points["a"] == points["b"]  # the journal too: no point twice, none missing


def test_interrupted_between_two_log_lines(tmp_path, monkeypatch):
    """What waits for the next line is in the state: the mean over the interval is the undisturbed run's."""
    how = training(num_steps=400, validate_every=400)  # a line every 2 steps
    undisturbed = run(tmp_path / "a", how=how)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", how=how, stop_at=7)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 1e9)
    assert_same_bits(undisturbed, run(tmp_path / "b", how=how))
    curves = [
        [(p["step"], p["metrics"].get("train/loss")) for p in read_journal(tmp_path / folder)[1]]
        for folder in "ab"
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 201


def test_twice_interrupted_and_the_journal_runs_ahead(tmp_path, monkeypatch):
    """The state of step 2 is kept, the journal goes to 5: the second start forgets 3 to 5 and comes to the same end."""
    undisturbed = run(tmp_path / "a")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=2)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 1e9)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=5)
    assert_same_bits(undisturbed, run(tmp_path / "b"))
    steps = [p["step"] for p in read_journal(tmp_path / "b")[1] if "train/loss" in p["metrics"]]
    assert steps == list(range(1, STEPS + 1))


def test_carried_moments_and_average_survive_an_interruption(tmp_path, monkeypatch):
    """A later round: moments and average handed over, the state of the interrupted call goes before them."""
    _, first = run(tmp_path / "first")

    def second(folder, **more):
        net = network()
        return run(
            folder,
            carried=first.moments,
            warm=False,
            ema=EMA(net, 0.9, first.ema.shadow, first.ema.updates),
            **more,
        )

    undisturbed = second(tmp_path / "a")
    assert (
        undisturbed[1].ema.updates == 2 * STEPS
        and undisturbed[1].moments["step:0.weight"] == 2 * STEPS
    )
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        second(tmp_path / "b", stop_at=4)
    resumed = second(tmp_path / "b")
    a, b = everything(undisturbed[0], undisturbed[1])[0], everything(resumed[0], resumed[1])[0]
    assert all(torch.equal(a[k], b[k]) for k in a) and resumed[1].ema.updates == 2 * STEPS


def test_the_state_of_another_run_is_not_continued(tmp_path, monkeypatch):
    """Another learning rate, teacher or corpus is another fingerprint: it starts anew, and ends where it would have without the old state."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=4)
    other = training(lr=3e-3)
    assert_same_bits(run(tmp_path / "a", how=other), run(tmp_path / "b", how=other))


def test_same_seed_same_bits_other_seed_others(tmp_path):
    one, two = run(tmp_path / "a", dropout=0.3), run(tmp_path / "b", dropout=0.3)
    assert_same_bits(one, two)
    other, _ = run(tmp_path / "c", dropout=0.3, seed=4)
    assert not torch.equal(one[0][0].weight, other[0].weight)


def test_generator_is_a_function_of_seed_and_step():
    draws = {
        (seed, step): torch.rand(4, generator=loop.step_generator(seed, step)).tolist()
        for seed in (0, 1, 11)
        for step in (0, 1, 10, 110)
    }
    assert len({tuple(v) for v in draws.values()}) == len(draws)
    assert torch.rand(4, generator=loop.step_generator(11, 10)).tolist() == draws[11, 10]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_a_sentence(tmp_path, bad):
    def loss(net):
        calls = iter(range(100))
        return lambda part: net(part["x"].float()).sum() * (bad if next(calls) == 3 else 1.0)

    with pytest.raises(HalfstepError, match=r"at step 4: training diverged; lower lr"):
        run(tmp_path, loss=loss)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_broken_state_is_never_kept(tmp_path, monkeypatch):
    """Between two checks of the loss, an infinite gradient under a finite loss: what is kept on disk must be the step before."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    how = training(num_steps=1000)  # the loss is looked at every 5 steps

    def loss(net):
        calls = iter(range(10_000))
        return lambda part: (
            net(part["x"].float()).sum()
            + (0.0 if next(calls) != 11 else (net[0].weight * 0).sum().sqrt())
        )  # finite, slope 0 * inf

    with pytest.raises(HalfstepError, match="gradient's norm nan at step 12"):
        run(tmp_path, how=how, loss=loss)
    with safe_open(tmp_path / "state" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "11" and all(
            file.get_tensor(k).isfinite().all() for k in file.keys()
        )


def test_a_loss_that_explodes_stops_and_leaves_the_state_from_before(tmp_path, monkeypatch):
    """Above 20 times the median of the logged losses; not at 15 times, and not before there are five to compare with."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)

    def loss(factors):
        calls = iter(range(1, 100))
        return lambda net: (
            lambda part: net(part["x"].float()).sum() * 0 + 48.0 * factors.get(next(calls), 1.0)
        )

    run(tmp_path / "a", how=training(num_steps=9), loss=loss({4: 1000.0, 8: 15.0}))
    with pytest.raises(
        HalfstepError,
        match=r"the loss is 25 at step 8, the median before it 1: training exploded; lower lr",
    ):
        run(tmp_path / "b", how=training(num_steps=9), loss=loss({8: 25.0}))
    with safe_open(tmp_path / "b" / "state" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
    run(tmp_path / "c", how=training(num_steps=9), loss=loss({8: 25.0}), from_zero=True)


def test_the_next_batch_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(5)]

    def make(step):
        if step == 4:
            raise Interrupted
        made[step].set()
        return 10 * step

    found = []
    with pytest.raises(Interrupted):
        for batch in loop.prefetched(make, 1, 6):
            assert len(found) == 2 or made[len(found) + 2].wait(10)
            found.append(batch)
    assert (
        found == [10, 20, 30] and list(loop.prefetched(make, 2, 2)) == []
    )  # the fault of step 4 comes when step 4 is asked for


def test_best_is_the_average_at_the_lowest_first_figure(tmp_path):
    """Validation sees the averaged weights in eval mode; afterwards training goes on from its own."""
    figures, seen = iter([3.0, 1.0, 2.0]), []
    net_of = {}

    def loss(net):
        net_of["net"] = net
        return lambda part: (net(part["x"].float())[:, 0] - part["y"].float()).square().sum()

    def validate():
        net = net_of["net"]
        seen.append((net.training, {k: v.clone() for k, v in net.named_parameters()}))
        return {"val/loss": next(figures), "val/other": -1.0}

    net, fitted = run(tmp_path, loss=loss, validate=validate)  # at steps 3, 6 and 7
    plain, plain_fitted = run(tmp_path / "plain")
    assert [mode for mode, _ in seen] == [False] * 3 and net.training
    assert fitted.best_step == 6 and fitted.validation == {
        "best": 1.0,
        "val/loss": 2.0,
        "val/other": -1.0,
    }
    assert all(torch.equal(fitted.best[k], seen[1][1][k]) for k in fitted.best)
    assert all(torch.equal(fitted.ema.shadow[k], seen[2][1][k]) for k in fitted.ema.shadow)
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True)
    )  # measuring moved nothing
    points = [
        (p["step"], p["metrics"]["val/loss"])
        for p in read_journal(tmp_path)[1]
        if "val/loss" in p["metrics"]
    ]
    assert points == [(3, 3.0), (6, 1.0), (7, 2.0)]


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_moving_average_in_closed_form(decay):
    """w_n = n: shadow = sum over updates of (1 - d_i) i times the product of later d, on top of the initial value."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA(net, decay)
    for n in range(1, 31):
        net.weight.data.fill_(float(n))
        ema.update()
    rates = [min(decay, (1 + n) / (10 + n)) for n in range(1, 31)]
    expected = sum((1 - rates[i]) * (i + 1) * math.prod(rates[i + 1 :]) for i in range(30))
    assert (
        ema.shadow["weight"].item() == pytest.approx(expected, rel=1e-5) and net.weight.item() == 30
    )
    ema.swap()
    assert (
        net.weight.item() == pytest.approx(expected, rel=1e-5) and ema.shadow["weight"].item() == 30
    )
    ema.swap()
    assert net.weight.item() == 30


def test_moving_average_begins_where_it_is_told():
    net = nn.Linear(2, 1)
    assert (
        torch.equal(EMA(net, 0.9).shadow["weight"], net.weight)
        and EMA(net, 0.9).shadow["weight"].data_ptr() != net.weight.data_ptr()
    )
    given = {"weight": torch.ones(1, 2), "bias": torch.zeros(1), "a buffer": torch.ones(1)}
    ema = EMA(net, 0.9, given, 100)
    assert torch.equal(ema.shadow["weight"], torch.ones(1, 2)) and ema.shadow.keys() == {
        "weight",
        "bias",
    }
    ema.update()
    assert ema.updates == 101 and torch.allclose(
        ema.shadow["weight"], 0.9 * torch.ones(1, 2) + 0.1 * net.weight
    )
    assert torch.equal(given["weight"], torch.ones(1, 2))


@pytest.mark.parametrize("lr_decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warm", [True, False])
def test_learning_rate(lr_decay, warm):
    how = training(num_steps=1000, warmup_steps=100, lr_decay=lr_decay, lr=2.0)
    rates = [learning_rate(how, step, warm) for step in range(1000)]
    start = 100 if warm else 0
    assert rates[:start] == pytest.approx([2.0 * (i + 1) / 100 for i in range(start)])
    assert rates[start] == 2.0 and max(rates) == 2.0 and min(rates) > 0
    rest = rates[start:]
    if lr_decay == "constant":
        assert set(rest) == {2.0}
        return
    assert all(a > b for a, b in zip(rest, rest[1:], strict=False)) and rest[-1] == pytest.approx(
        2.0 * FLOOR, rel=0.06
    )
    middle = rest[len(rest) // 2]
    assert middle == pytest.approx(
        2.0 * (1 + FLOOR) / 2, rel=1e-6
    )  # both are symmetric about the middle
    quarter = rest[len(rest) // 4] / 2.0
    assert quarter == pytest.approx(
        1 - 0.98 / 4 if lr_decay == "linear" else FLOOR + 0.98 * (1 + math.cos(math.pi / 4)) / 2,
        rel=1e-3,
    )


def test_moments_go_out_and_in(tmp_path):
    """Named by parameter, equal after a round trip, copies and not views; the next step is the same to the bit."""
    torch.manual_seed(1)
    nets, how = [network(seed=1), network(seed=1)], training()
    first = adamw(nets[0], how)
    for _ in range(3):
        nets[0](torch.ones(2, 4)).sum().backward()
        first.step()
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1][0].weight.grad = None
    state = optimizer_state(nets[0], first)
    assert set(state) == {
        f"{kind}:{name}"
        for kind in ("step", "exp_avg", "exp_avg_sq")
        for name, _ in nets[0].named_parameters()
    }
    kept = {k: v.clone() for k, v in state.items()}
    second = adamw(nets[1], how)
    load_optimizer_state(nets[1], second, state)
    for net, optimizer in zip(nets, (first, second), strict=True):
        net.zero_grad()
        net(torch.full((2, 4), 0.5)).square().sum().backward()
        optimizer.step()
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)
    load_optimizer_state(nets[1], second, kept)
    second.step()
    assert kept["step:0.weight"] == 3


def test_moments_land_on_the_device_of_their_parameter():
    """`step` too: the fused kernel reads it there. Meta tensors stand for a second device."""
    net = network()
    optimizer = adamw(net, training())
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    state = optimizer_state(net, optimizer)
    away = network().to("meta")
    other = torch.optim.AdamW(away.parameters())
    load_optimizer_state(away, other, state)
    assert {v.device.type for p in away.parameters() for v in other.state[p].values()} == {"meta"}


def test_device():
    threads = torch.get_num_threads()
    try:
        assert (
            loop.find_device(Machine(device="cpu", threads=2)) == torch.device("cpu")
            and torch.get_num_threads() == 2
        )
        assert (
            loop.find_device(Machine()).type == ("cuda" if torch.cuda.is_available() else "cpu")
            and torch.get_num_threads() == 2
        )
    finally:
        torch.set_num_threads(threads)

"""The loop: global gradients, resumption to the same bits, best weights, diverged trainings."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from halfstep.config import Training
from halfstep.distributed.group import Group, StopRequest
from halfstep.errors import HalfstepError
from halfstep.records.journal import Journal, read_journal
from halfstep.training import loop
from halfstep.training.ema import EMA
from halfstep.training.loop import Agreement, fit, progress_words
from halfstep.training.state import Run, Start
from halfstep.training.step import Batch, Examples, step_generator

STEPS = 7
CPU = torch.device("cpu")


class Interrupted(Exception):
    pass


def training(**changes) -> Training:
    options = dict(
        num_steps=STEPS,
        batch_size=12,
        lr=1e-2,
        warmup_steps=2,
        lr_decay="linear",
        dropout=0.0,
        precision="float32",
        validate_every=3,
    )
    return Training(**{**options, **changes})


def small_network(dropout=0.0, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))


def texts(step: int) -> torch.Tensor:
    return torch.arange(48, dtype=torch.float64).view(12, 4).sin() + step


@dataclass
class Regression:
    """y = sum x, with noise on x from the step's generator; a test may replace the loss."""

    network: nn.Module
    loss: Any = None
    validate: Any = None

    def __post_init__(self):
        self.loss = self.loss or self.squares
        self.validate = self.validate or self.measure

    def corrupt(self, x0, generator, step=None, asked=None):
        noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
        return Batch({"x": x0 + noise, "y": x0.sum(1)}, x0.numel())

    def squares(self, part):
        return (self.network(part["x"].float())[:, 0] - part["y"].float()).square().sum()

    def measure(self):
        value = (self.network(torch.ones(1, 4)) - 4).square().item()
        return {"val/loss": value, "val/other": 1.0}


def run(
    folder,
    *,
    options=None,
    dropout=0.0,
    micro_batch=12,
    stop_at=None,
    seed=3,
    batches=texts,
    loss=None,
    validate=None,
    continued=None,
    from_zero=False,
):
    """A small regression through `fit`; `stop_at` interrupts it when it asks for that batch.

    loss(network) and validate(network) return the functions that replace those of Regression.
    `continued` is a state that gives its average and its optimizer state.
    """
    options, network = options or training(), small_network(dropout)
    start = Start(seed, from_zero=from_zero)
    if continued:
        ema = EMA(network, 0.9, continued.ema.shadow, continued.ema.updates)
        start = Start(seed, ema, continued.optimizer_state, from_zero)

    def asked(step):
        if step == stop_at:
            raise Interrupted
        return Examples(batches(step))

    objective = Regression(network, loss and loss(network), validate and validate(network))
    params = {"training": options.model_dump(), "dropout": dropout, "seed": seed}
    with Journal(folder, name="test", node="test", params=params) as journal:
        where = Run(CPU, micro_batch, folder / "state", "test", journal)
        state = fit(network, objective, asked, options, start, where)
    return state


def everything(state):
    """All that a training leaves: tensors by name, and counts."""
    named = {f"raw/{k}": v for k, v in state.network.state_dict().items()}
    named |= {f"optimizer/{k}": v for k, v in state.optimizer_state.items()}
    named |= {f"best/{k}": v for k, v in state.best.items()}
    named |= {f"ema/{k}": v for k, v in state.ema.shadow.items()}
    return named, (state.ema.updates, state.step, state.best_step, state.validation)


def assert_same_bits(one, other):
    (a, facts_a), (b, facts_b) = everything(one), everything(other)
    assert a.keys() == b.keys() and facts_a == facts_b
    for key in a:
        assert torch.equal(a[key], b[key]), key


def saved_step(folder) -> str:
    with safe_open(folder / "state" / "state.safetensors", "pt") as file:
        return file.metadata()["step"]


def logged(folder, name):
    """(step, value) of one figure in the journal."""
    points = read_journal(folder)[1]
    return [(p["step"], p["metrics"][name]) for p in points if name in p["metrics"]]


def curves(folder):
    """Every figure of the journal that does not depend on time or memory."""
    return [
        (p["step"], k, v)
        for p in read_journal(folder)[1]
        for k, v in p["metrics"].items()
        if "per_s" not in k and "system" not in k
    ]


@pytest.mark.parametrize("micro_batch", [1, 5, 6, 100])
def test_gradients_are_those_of_the_global_batch(tmp_path, micro_batch):
    whole = run(tmp_path / "whole")
    parts = run(tmp_path / "parts", micro_batch=micro_batch)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5) and not torch.equal(a, torch.zeros_like(a))
    assert parts.validation["best"] == pytest.approx(whole.validation["best"], rel=1e-4)


def test_one_step_by_hand(tmp_path):
    """Mean loss over the global batch, clipped gradient, AdamW at the first warm-up rate."""
    options = training(
        num_steps=1, warmup_steps=0, lr_decay="constant", grad_clip=0.05, weight_decay=0.1
    )
    found = run(tmp_path, options=options).network
    expected, before = small_network(), small_network()
    optimizer = torch.optim.AdamW(
        expected.parameters(), options.lr, (0.9, 0.999), eps=1e-8, weight_decay=0.1
    )
    x0 = texts(0)
    x = (x0 + torch.randn(12, 4, generator=step_generator(3, 0), dtype=torch.float64)).float()
    ((expected(x)[:, 0] - x0.sum(1).float()).square().sum() / 48).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
    optimizer.step()
    networks = found, expected, before
    for a, b, p in zip(*(network.parameters() for network in networks), strict=True):
        assert torch.allclose(a, b, atol=1e-7) and not torch.allclose(a, p, atol=1e-4)
    ((_, grad_norm),) = logged(tmp_path, "train/grad_norm")
    assert grad_norm == pytest.approx(norm.item(), rel=1e-5) and norm > 0.05


@pytest.mark.parametrize("stop_at", range(1, STEPS))
def test_interrupted_and_resumed_is_bit_equal(tmp_path, monkeypatch, stop_at):
    """With dropout, a decaying rate and validation, interrupted before each step in turn."""
    undisturbed = run(tmp_path / "a", dropout=0.3)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", dropout=0.3, stop_at=stop_at)
    assert saved_step(tmp_path / "b") == str(stop_at)
    asked = []

    def batches(step):
        asked.append(step)
        return texts(step)

    resumed = run(tmp_path / "b", dropout=0.3, batches=batches)
    assert asked == list(range(stop_at, STEPS))
    assert_same_bits(undisturbed, resumed)
    assert curves(tmp_path / "a") == curves(tmp_path / "b")  # no point twice, none missing


def test_interrupted_between_two_log_lines(tmp_path, monkeypatch):
    """The state holds the losses since the last log, so their mean is the undisturbed run's."""
    options = training(num_steps=400, validate_every=400)  # logs every 2 steps
    undisturbed = run(tmp_path / "a", options=options)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", options=options, stop_at=7)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 1e9)
    assert_same_bits(undisturbed, run(tmp_path / "b", options=options))
    assert curves(tmp_path / "a") == curves(tmp_path / "b")
    assert len(logged(tmp_path / "b", "train/loss")) == 200


def test_twice_interrupted_with_a_journal_ahead_of_the_state(tmp_path, monkeypatch):
    """The state is of step 2, the journal ends at 5: the second start drops points 3 to 5."""
    undisturbed = run(tmp_path / "a")
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=2)
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 1e9)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=5)
    assert_same_bits(undisturbed, run(tmp_path / "b"))
    steps = [step for step, _ in logged(tmp_path / "b", "train/loss")]
    assert steps == list(range(1, STEPS + 1))


def test_optimizer_state_and_average_of_a_round_survive_an_interruption(tmp_path, monkeypatch):
    """A later round continues both; after an interruption the rolling checkpoint counts."""
    first = run(tmp_path / "first")

    def second(folder, **more):
        return run(folder, continued=first, **more)

    undisturbed = second(tmp_path / "a")
    assert undisturbed.ema.updates == 2 * STEPS
    assert undisturbed.optimizer_state["step:0.weight"] == 2 * STEPS
    rates = [rate for _, rate in logged(tmp_path / "a", "train/lr")]
    assert rates[0] == max(rates) == training().lr  # no warm-up
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        second(tmp_path / "b", stop_at=4)
    assert_same_bits(undisturbed, second(tmp_path / "b"))


def test_the_state_of_another_run_is_not_continued(tmp_path, monkeypatch):
    """Another learning rate is another fingerprint: the training starts again."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_at=4)
    other = training(lr=3e-3)
    assert_same_bits(run(tmp_path / "a", options=other), run(tmp_path / "b", options=other))


def test_the_seed_decides_the_bits(tmp_path):
    one, two = run(tmp_path / "a", dropout=0.3), run(tmp_path / "b", dropout=0.3)
    assert_same_bits(one, two)
    other = run(tmp_path / "c", dropout=0.3, seed=4)
    assert not torch.equal(one.network[0].weight, other.network[0].weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(tmp_path, bad):
    def loss(network):
        calls = iter(range(100))
        return lambda part: network(part["x"].float()).sum() * (bad if next(calls) == 3 else 1.0)

    with pytest.raises(HalfstepError, match=r"at step 4: training diverged; lower lr"):
        run(tmp_path, loss=loss)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"


def test_a_broken_state_is_never_saved(tmp_path, monkeypatch):
    """An infinite gradient under a finite loss, between two logs: step 11 stays on disk."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    options = training(num_steps=1000)  # logs every 5 steps

    def loss(network):
        calls = iter(range(10_000))

        def value(part):
            extra = 0.0
            if next(calls) == 11:
                extra = (network[0].weight * 0).sum().sqrt()  # value 0, slope 0 * inf
            return network(part["x"].float()).sum() + extra

        return value

    with pytest.raises(HalfstepError, match="gradient's norm nan at step 12"):
        run(tmp_path, options=options, loss=loss)
    assert saved_step(tmp_path) == "11"
    with safe_open(tmp_path / "state" / "state.safetensors", "pt") as file:
        keys = file.keys()
        assert all(file.get_tensor(key).isfinite().all() for key in keys)


def test_a_loss_that_explodes_stops_and_leaves_the_state_from_before(tmp_path, monkeypatch):
    """Above 20 times the median of the logged losses, once there are five; not at 15 times."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    options = training(num_steps=9)

    def loss(factors):
        calls = iter(range(1, 100))
        return lambda network: (
            lambda part: network(part["x"].float()).sum() * 0 + 48.0 * factors.get(next(calls), 1.0)
        )

    run(tmp_path / "a", options=options, loss=loss({4: 1000.0, 8: 15.0}))
    message = r"the loss is 25 at step 8, the median before it 1: training exploded; lower lr"
    with pytest.raises(HalfstepError, match=message):
        run(tmp_path / "b", options=options, loss=loss({8: 25.0}))
    assert saved_step(tmp_path / "b") == "7"
    run(tmp_path / "c", options=options, loss=loss({8: 25.0}), from_zero=True)


def test_best_is_the_average_at_the_lowest_first_figure(tmp_path):
    """Validation sees the averaged weights in eval mode; training then goes on from its own."""
    losses, seen = iter([3.0, 1.0, 2.0]), []

    def validate(network):
        def measure():
            weights = {name: p.clone() for name, p in network.named_parameters()}
            seen.append((network.training, weights))
            return {"val/loss": next(losses), "val/other": -1.0}

        return measure

    state = run(tmp_path, validate=validate)  # at steps 3, 6 and 7
    plain = run(tmp_path / "plain")
    assert [mode for mode, _ in seen] == [False] * 3 and state.network.training
    assert state.best_step == 6
    assert state.validation == {"best": 1.0, "val/loss": 2.0, "val/other": -1.0}
    assert all(torch.equal(state.best[name], seen[1][1][name]) for name in state.best)
    assert all(torch.equal(state.ema.shadow[name], seen[2][1][name]) for name in state.ema.shadow)
    pairs = zip(state.network.parameters(), plain.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)  # validation changed no weight
    assert logged(tmp_path, "val/loss") == [(3, 3.0), (6, 1.0), (7, 2.0)]


class Clock:
    """A clock that a test sets, and a group whose other rank answers `theirs`."""

    def __init__(self, monkeypatch, size, theirs=(0, 0, 0)):
        self.now, self.theirs = 0.0, theirs
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(
            Group,
            "all_max",
            lambda _, *values: [max(pair) for pair in zip(values, self.theirs, strict=True)],
        )
        self.stop = StopRequest()
        self.agreement = Agreement(Group(0, size), self.stop, 1, agreed=0.0, saved=0.0)

    def at(self, now):
        self.now = now
        return self.agreement.agree()


def test_ranks_agree_about_once_a_second(monkeypatch):
    """The pace at most doubles; a slow step brings it back; the slower clock's answer counts."""
    clock = Clock(monkeypatch, size=2)
    paces = []
    for _ in range(6):  # steps of 0.1 s
        assert clock.at(clock.now + 0.1 * clock.agreement.pace) == (False, 0)
        paces.append(clock.agreement.pace)
    assert paces == [2, 4, 8, 10, 10, 10] and clock.agreement.next_step == 1 + sum(paces)
    clock.at(clock.now + 20)  # 10 steps of 2 s
    assert clock.agreement.pace == 1
    clock.theirs = 0, 0, 3
    clock.at(clock.now + 20)
    assert clock.agreement.pace == 3


def test_what_one_rank_needs_all_ranks_do(monkeypatch):
    """A signal, or a save that is due, on another rank; a stop saves too."""
    clock = Clock(monkeypatch, size=2, theirs=(143, 0, 1))
    assert clock.at(1) == (True, 143)
    clock.theirs = 0, 1, 1
    assert clock.at(2) == (True, 0)
    clock.theirs = 0, 0, 1
    assert clock.at(loop.SAVE_EVERY_S) == (False, 0)
    assert clock.at(loop.SAVE_EVERY_S + 1) == (True, 0)
    clock.agreement.saved = clock.now
    assert clock.at(loop.SAVE_EVERY_S + 2) == (False, 0)
    clock.stop.signals.append(2)
    assert clock.at(loop.SAVE_EVERY_S + 3) == (True, 130)


def test_one_process_decides_at_every_step(monkeypatch):
    clock = Clock(monkeypatch, size=1)
    for step in range(1, 20):
        assert clock.agreement.next_step == step
        clock.at(0.01 * step)


def held_out_losses(values):
    """A validate function that returns these losses, one after another."""
    left = iter(values)
    return lambda network: lambda: {"val/loss": next(left)}


FALLING = [3.0, 2.0, 1.0]
RISING = [2.0, 2.5, 3.0]
LEVEL = [2.0, 2.01, 2.02]


@pytest.mark.parametrize(
    ("held_out", "factor", "warned"),
    [(FALLING, -1, 0), (RISING, -1, 1), (RISING, 1, 0), (LEVEL, -1, 0)],
)
def test_over_fitting_is_said_once(tmp_path, capsys, held_out, factor, warned):
    """The held-out loss rises by more than 2%, while the training loss falls."""
    steps = iter(range(1, 10))

    def loss(network):
        def changing(part):
            level = 10 + factor * next(steps)
            return 12 * 4 * level + 0 * network(part["x"].float()).sum()

        return changing

    options = training(num_steps=6, validate_every=2)
    run(tmp_path, options=options, loss=loss, validate=held_out_losses(held_out))
    said = [line for line in capsys.readouterr().err.splitlines() if "over-fitting" in line]
    assert len(said) == warned
    if warned:
        assert "since step 2 the held-out loss rose from 2 to 2.5" in said[0]
        assert "the training loss fell from 8.5 to 7" in said[0]


def test_a_line_of_progress_is_in_words():
    """Losses, epochs and speed have names, and no number has an exponent."""
    state = SimpleNamespace(
        step=300, validation={"best": 4.1, "val/entropy": 5, "val/nelbo": 4.3512}
    )
    training = SimpleNamespace(batch_size=64, num_steps=6000)
    figures = {"train/loss": 4.2134, "train/tokens_per_s": 12_490.0}
    shown = ["loss 4.213", "held-out loss 4.351", "epoch 1.92 of 38.4", "12.5k tokens/s"]
    run = SimpleNamespace(windows=10_000)
    assert progress_words(figures, state, training, run) == shown
    figures["train/mfu"] = 0.3421
    assert progress_words(figures, state, training, run) == [*shown, "34% of peak FLOPs"]
    state.validation = {}
    assert progress_words(figures, state, training, SimpleNamespace(windows=None)) == [
        "loss 4.213",
        "12.5k tokens/s",
        "34% of peak FLOPs",
    ]

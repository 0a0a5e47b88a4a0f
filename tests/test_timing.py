"""Timing on a clock that the test moves."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from halfstep import timing


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.calls = 100.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def task(self, name, seconds):
        """A function whose i-th call takes seconds[i]."""
        left = iter(seconds)

        def call():
            self.calls.append(name)
            self.now += next(left)

        return call


def test_median_and_quartiles_of_the_repeats_after_the_warm_up(monkeypatch):
    clock = Clock(monkeypatch)
    seconds = [1, 2, 3, 4, 5, 6, 7, 8, 100]
    timed = timing.measure(clock.task("a", [50, *seconds]), repeats=9)
    assert timed.all == tuple(seconds)
    assert (timed.median_s, timed.low_s, timed.high_s) == (5, 3, 7)
    assert timed.bounds == "quartiles of 9"


def test_few_repeats_have_no_quartiles_but_a_range(monkeypatch):
    clock = Clock(monkeypatch)
    for seconds in ([7, 8, 9], [2, 9, 4, 3, 5, 6, 1]):
        timed = timing.measure(clock.task("a", seconds), repeats=len(seconds), warmup=0)
        assert timed.median_s == sorted(seconds)[len(seconds) // 2]
        assert (timed.low_s, timed.high_s) == (min(seconds), max(seconds))
        assert timed.bounds == f"range of {len(seconds)}"


def test_cases_take_turns_in_alternating_order(monkeypatch):
    clock, ticks = Clock(monkeypatch), []
    cases = {
        name: clock.task(name, [seconds] * 4)
        for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    }
    found = timing.measure_in_turns(cases, repeats=3, tick=lambda: ticks.append(1))
    assert "".join(clock.calls) == "cba" + "abc" + "cba" + "abc" and len(ticks) == 12
    assert {name: t.median_s for name, t in found.items()} == {"a": 1, "b": 2, "c": 3}


def test_a_cuda_device_is_waited_for_before_every_reading(monkeypatch):
    clock, events = Clock(monkeypatch), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    timing.measure(lambda: events.append("run"), repeats=2, device="cuda")
    assert events == ["wait", "run", "wait"] * 3
    assert clock.now == 100.0


class Meter:
    """pynvml with one card, whose counter of millijoules the test sets.

    `broken` is the name of a call that this card does not support.
    """

    class NVMLError(Exception):
        pass

    def __init__(self, monkeypatch, broken=None):
        self.millijoules, self.broken = 5e9, broken
        monkeypatch.setitem(sys.modules, "pynvml", self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12ab")
        )

    def __getattr__(self, name):
        def call(*given):
            if name == self.broken:
                raise self.NVMLError(name)
            answers = {
                "nvmlInit": lambda: None,
                "nvmlDeviceGetHandleByUUID": lambda uuid: {"GPU-12ab": "card"}[uuid],
                "nvmlDeviceGetTotalEnergyConsumption": lambda card: {"card": self.millijoules}[
                    card
                ],
            }
            return answers[name](*given)

        return call


def test_energy_is_the_mean_of_a_call_and_each_case_has_its_own(monkeypatch):
    """The energy of warm-ups and of pauses between calls belongs to no call."""
    meter = Meter(monkeypatch)

    def task(*joules):
        left = iter(joules)

        def call():
            meter.millijoules += 1000 * next(left)

        return call

    def between():
        meter.millijoules += 7000

    found = timing.measure_in_turns(
        {"a": task(50, 1, 2, 6), "b": task(900, 10, 10, 40)}, 3, 1, "cuda", between
    )
    assert (found["a"].joules, found["b"].joules) == (3, 20)
    assert timing.measure(task(1, 1), 1).joules is None  # a CPU


@pytest.mark.parametrize(
    "call", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetTotalEnergyConsumption"]
)
def test_a_card_that_does_not_count_energy_has_none(monkeypatch, call):
    Meter(monkeypatch, broken=call)
    assert timing.measure(lambda: None, 2, device="cuda").joules is None


def test_without_nvml_there_is_no_energy(monkeypatch):
    Meter(monkeypatch)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert timing.measure(lambda: None, 2, device="cuda").joules is None


def test_an_error_in_the_timed_call_is_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        timing.measure(lambda: 1 / 0, repeats=3)


def test_the_machine_says_what_it_is():
    found = timing.machine()
    assert set(found) == {"device", "cores", "threads", "system", "python", "torch"}
    assert (
        1 <= found["cores"] <= os.cpu_count()
        and found["threads"] == torch.get_num_threads()
        and found["device"]
        and torch.__version__.startswith(found["torch"])
    )

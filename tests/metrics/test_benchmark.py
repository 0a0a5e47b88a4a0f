"""time-sampling: which cases are timed, in which order, and what the rows say."""

import pytest

from halfstep import timing
from halfstep.commands import benchmark as command
from halfstep.commands.benchmark import time_sampling
from halfstep.config import Benchmark, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json

MACHINE = Machine(device="cpu", threads=1)


def test_students_and_baseline_in_turns(world, tmp_path, monkeypatch):
    calls, sample, generate = [], command.sample, command.gpt.generate
    monkeypatch.setattr(command, "sample", lambda *args, **rest: calls.append(args[3]) or sample(*args, **rest))
    monkeypatch.setattr(command.gpt, "generate", lambda *args, **rest: calls.append("baseline") or generate(*args, **rest))
    sizes = Benchmark(lengths=[6, 130], batch_sizes=[1, 2], benchmark_steps=[2, 4], repeats=3)  # 130 is longer than trained on
    time_sampling(world.models / "teacher", world.models / "baseline", tmp_path / "rows.json", sizes, MACHINE)
    rows = read_json(tmp_path / "rows.json")
    assert calls[:5] == [2, 4, "baseline", 4, 2] and len(calls) == 4 * (2 + 3 * 4)
    assert [(r["length"], r["batch_size"], r["steps"]) for r in rows[:6]] == [
        (6, 1, 2),
        (6, 1, 4),
        (6, 1, None),
        (6, 2, 2),
        (6, 2, 4),
        (6, 2, None),
    ]
    for row in rows:
        assert 0 < row["low"] <= row["value"] <= row["high"]
        assert row["tokens_per_s"] == pytest.approx(row["length"] * row["batch_size"] / row["value"])
        assert row["dtype"] == "float32" and row["device"] == timing.device_name() and row["params"] > 500_000
        if row["steps"] is None:
            assert row["run"] == "baseline" and row["network_evaluations"] == row["length"] - 1 and row["sampler"] is None
        else:
            assert row["run"] == "teacher" and 1 <= row["network_evaluations"] <= row["steps"]


def test_the_student_must_be_a_denoiser_and_the_baseline_its_peer(world, tmp_path):
    with pytest.raises(HalfstepError, match="kind autoregressive, expected diffusion"):
        time_sampling(world.models / "baseline", world.models / "teacher", tmp_path / "rows.json", Benchmark(repeats=3), MACHINE)

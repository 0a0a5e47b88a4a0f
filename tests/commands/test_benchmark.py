"""latency: which cases are timed, in which order, and what the rows say."""

from importlib.util import find_spec
from itertools import count

import pytest

from halfstep import timing
from halfstep.commands import benchmark as command
from halfstep.commands.benchmark import latency
from halfstep.config import Benchmark, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json

MACHINE = Machine(device="cpu", threads=1)


def test_students_and_baseline_in_turns(world, tmp_path, monkeypatch):
    calls, sample, generate = [], command.sample, command.gpt.decode
    monkeypatch.setattr(
        command, "sample", lambda *args, **rest: calls.append(args[3]) or sample(*args, **rest)
    )
    monkeypatch.setattr(
        command.gpt,
        "decode",
        lambda *args, **rest: calls.append("baseline") or generate(*args, **rest),
    )
    sizes = Benchmark(
        lengths=[6, 130],
        batch_sizes=[1, 2],
        benchmark_steps=[2, 4],
        baselines=["halfstep"],
        repeats=3,
    )  # 130 is longer than trained on
    latency(
        world.models / "teacher", world.models / "baseline", tmp_path / "rows.json", sizes, MACHINE
    )
    rows = read_json(tmp_path / "rows.json")
    assert calls[:9] == [2, 4, "baseline", 2, 4, "baseline", "baseline", 4, 2] and len(
        calls
    ) == 4 * 3 * (1 + 3)
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
        assert row["tokens_per_s"] == pytest.approx(
            row["length"] * row["batch_size"] / row["value"]
        )
        assert (
            row["dtype"] == "float32"
            and row["device"] == timing.device_name()
            and row["params"] > 500_000
        )
        if row["steps"] is None:
            assert (
                row["run"] == "baseline"
                and row["network_evaluations"] == row["length"] - 1
                and row["sampler"] == "kv_cache"
            )
        else:
            assert row["run"] == "teacher" and 1 <= row["network_evaluations"] <= row["steps"]
            assert (
                row["tokens_per_forward"]
                == pytest.approx(row["length"] / row["network_evaluations"])
                and row["energy_j"] is None
            )


def test_energy_of_a_call_where_the_device_counts_it(world, tmp_path, monkeypatch):
    """A counter that rises by 5 J at each reading: 5 J lie between the two readings of a call, for a student and for its peer."""
    joules = count(100, 5)
    monkeypatch.setattr(timing, "energy_counter", lambda device: lambda: next(joules))
    sizes = Benchmark(
        lengths=[6], batch_sizes=[2], benchmark_steps=[2], baselines=["halfstep"], repeats=3
    )
    latency(
        world.models / "teacher", world.models / "baseline", tmp_path / "rows.json", sizes, MACHINE
    )
    assert [row["energy_j"] for row in read_json(tmp_path / "rows.json")] == [5, 5]


def test_other_baselines_and_untrained_sizes_in_bfloat16(world, tmp_path, monkeypatch):
    """transformers' generate from hf/ writes whole texts; a size without weights has rows that say so, and none of a checkpoint."""
    transformers = pytest.importorskip("transformers")
    made, theirs = [], transformers.GenerationMixin.generate
    monkeypatch.setattr(
        transformers.GenerationMixin,
        "generate",
        lambda *args, **rest: made.append(theirs(*args, **rest)) or made[-1],
    )
    sizes = Benchmark(
        lengths=[9],
        batch_sizes=[2],
        benchmark_steps=[2],
        baselines=["halfstep", "transformers"],
        sizes=["tiny"],
        timed_dtype="bfloat16",
        repeats=3,
    )
    latency(
        world.models / "teacher", world.models / "baseline", tmp_path / "rows.json", sizes, MACHINE
    )
    rows = read_json(tmp_path / "rows.json")
    assert [tuple(ids.shape) for ids in made] == [(2, 9)] * 8
    assert [(r["teacher"], r["run"], r["sampler"], r["weights"], r["dtype"]) for r in rows] == [
        (teacher, run, sampler, weights, "bfloat16")
        for teacher, weights in (("stories-tiny", "ema"), ("tiny-untrained", "untrained"))
        for run, sampler in (
            ("teacher", "ancestral"),
            ("baseline", "kv_cache"),
            ("baseline", "transformers"),
        )
    ]
    assert (
        rows[0]["checkpoint"]
        and rows[3]["checkpoint"] is None
        and rows[3]["params"] == rows[0]["params"]
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_is_asked_for_by_name(world, tmp_path):
    with pytest.raises(HalfstepError, match="vllm is not installed here"):
        latency(
            world.models / "teacher",
            world.models / "baseline",
            tmp_path / "rows.json",
            Benchmark(baselines=["vllm"], repeats=3),
            MACHINE,
        )


def test_the_student_must_be_a_denoiser_and_the_baseline_its_peer(world, tmp_path):
    with pytest.raises(HalfstepError, match="kind autoregressive, expected diffusion"):
        latency(
            world.models / "baseline",
            world.models / "teacher",
            tmp_path / "rows.json",
            Benchmark(repeats=3),
            MACHINE,
        )

"""latency: which cases are timed, in which order, and the contents of the rows."""

from importlib.util import find_spec
from itertools import count, product

import pytest

from halfstep import timing
from halfstep.commands import benchmark
from halfstep.config import Benchmark, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json

MACHINE = Machine(device="cpu", threads=1)


def latency_rows(world, output, student="teacher", baseline="baseline", **keys) -> list[dict]:
    keys = {"batch_sizes": [2], "benchmark_steps": [2], "repeats": 3} | keys
    folders = world.models / student, world.models / baseline
    benchmark.latency(*folders, output / "rows.json", Benchmark(**keys), MACHINE)
    return read_json(output / "rows.json")


def test_students_and_baseline_take_turns(world, tmp_path, monkeypatch):
    calls, sample, decode = [], benchmark.sample, benchmark.gpt.Decoder.write

    def record_sample(*args, **options):
        calls.append(args[3])  # steps
        return sample(*args, **options)

    def record_decode(*args, **options):
        calls.append("baseline")
        return decode(*args, **options)

    monkeypatch.setattr(benchmark, "sample", record_sample)
    monkeypatch.setattr(benchmark.gpt.Decoder, "write", record_decode)
    lengths, batch_sizes = [6, 130], [1, 2]  # 130 is longer than the training windows
    rows = latency_rows(
        world,
        tmp_path,
        lengths=lengths,
        batch_sizes=batch_sizes,
        benchmark_steps=[2, 4],
        baselines=["halfstep"],
    )
    assert calls[:9] == [2, 4, "baseline", 2, 4, "baseline", "baseline", 4, 2]
    assert len(calls) == 4 * 3 * (1 + 3)
    shapes = [(row["length"], row["batch_size"], row["steps"]) for row in rows]
    assert shapes == list(product(lengths, batch_sizes, [2, 4, None]))
    for row in rows:
        assert 0 < row["low"] <= row["value"] <= row["high"]
        tokens = row["length"] * row["batch_size"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["value"])
        assert row["dtype"] == "float32" and row["device"] == timing.device_name()
        assert row["params"] > 500_000 and row["energy_j"] is None
        evaluations = row["network_evaluations"]
        if row["steps"] is None:
            assert row["run"] == "baseline" and row["sampler"] == "kv_cache"
            assert evaluations == row["length"] - 1
        else:
            assert row["run"] == "teacher" and 1 <= evaluations <= row["steps"]
            assert row["tokens_per_forward"] == pytest.approx(row["length"] / evaluations)


def test_energy_of_a_call_if_the_device_counts_it(world, tmp_path, monkeypatch):
    """With a counter that rises by 5 J per reading, each call uses 5 J, by student and baseline."""
    joules = count(100, 5)
    monkeypatch.setattr(timing, "energy_counter", lambda device: lambda: next(joules))
    rows = latency_rows(world, tmp_path, lengths=[6], baselines=["halfstep"])
    assert [row["energy_j"] for row in rows] == [5, 5]


def test_other_baselines_and_untrained_sizes_in_bfloat16(world, tmp_path, monkeypatch):
    """transformers writes whole texts from hf/; rows of untrained sizes have no checkpoint."""
    transformers = pytest.importorskip("transformers")
    made, generate = [], transformers.GenerationMixin.generate

    def record(*args, **options):
        made.append(generate(*args, **options))
        return made[-1]

    monkeypatch.setattr(transformers.GenerationMixin, "generate", record)
    baselines = ["halfstep", "transformers"]
    rows = latency_rows(
        world, tmp_path, lengths=[9], baselines=baselines, sizes=["tiny"], timed_dtype="bfloat16"
    )
    assert [tuple(ids.shape) for ids in made] == [(2, 9)] * 8
    found = [(row["teacher"], row["weights"], row["run"], row["sampler"]) for row in rows]
    assert found == [
        ("stories-tiny", "ema", "teacher", "ancestral"),
        ("stories-tiny", "ema", "baseline", "kv_cache"),
        ("stories-tiny", "ema", "baseline", "transformers"),
        ("tiny-untrained", "untrained", "teacher", "ancestral"),
        ("tiny-untrained", "untrained", "baseline", "kv_cache"),
        ("tiny-untrained", "untrained", "baseline", "transformers"),
    ]
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert rows[0]["checkpoint"] and rows[3]["checkpoint"] is None
    assert rows[3]["params"] == rows[0]["params"]


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_without_its_package_is_an_error(world, tmp_path):
    with pytest.raises(HalfstepError, match="vllm is not installed here"):
        latency_rows(world, tmp_path, baselines=["vllm"])


def test_the_student_must_be_a_denoiser(world, tmp_path):
    with pytest.raises(HalfstepError, match="kind autoregressive, expected diffusion"):
        latency_rows(world, tmp_path, student="baseline", baseline="teacher")

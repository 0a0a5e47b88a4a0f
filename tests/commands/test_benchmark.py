"""latency: which cases are timed, in which order, what a stopped job keeps, and the rows."""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, product

import pytest
import torch
from safetensors.torch import load_file

from halfstep import checkpoint, timing
from halfstep.commands import benchmark, timed_sides, writers
from halfstep.commands.decoders import Side, TimedDraws
from halfstep.config import BenchmarkOptions, DrawOptions, Machine
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.models import gpt
from halfstep.models.readers import autoregressor

MACHINE = Machine(device="cpu", threads=1)


def latency_rows(
    world,
    output,
    student="teacher",
    baseline="baseline",
    size=None,
    variant=None,
    draws=None,
    **keys,
) -> list[dict]:
    keys = {"batch_sizes": [2], "benchmark_steps": [2], "repeats": 3} | keys
    benchmark.latency(
        [world.models / name for name in student.split()],
        output / "rows.json",
        BenchmarkOptions(**keys),
        draws or DrawOptions(),
        MACHINE,
        baseline=world.models / baseline if baseline else None,
        size=size,
        variant=variant,
    )
    return read_json(output / "rows.json")


@pytest.fixture
def calls(monkeypatch):
    """The calls of generate's own functions: a step count, or `baseline`."""
    made, sample, decode = [], writers.sample, gpt.Decoder.write

    def record_sample(*args, **options):
        made.append(args[3])  # steps
        return sample(*args, **options)

    def record_decode(*args, **options):
        made.append("baseline")
        return decode(*args, **options)

    monkeypatch.setattr(writers, "sample", record_sample)
    monkeypatch.setattr(gpt.Decoder, "write", record_decode)
    return made


def test_students_and_baseline_take_turns(world, tmp_path, calls):
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
        assert row["bounds"] == "range of 3"
        tokens = row["length"] * row["batch_size"]
        assert row["tokens_per_s"] == pytest.approx(tokens / row["value"])
        assert row["dtype"] == "float32" and row["device"] == timing.device_name()
        assert row["params"] > 500_000 and row["energy_j"] is None
        evaluations = row["network_evaluations"]
        if row["steps"] is None:
            assert row["run"] == "baseline" and row["sampler"] == "kv_cache"
            assert evaluations == row["length"] - 1 and row["cache"] == "static"
        else:
            assert row["run"] == "teacher" and 1 <= evaluations <= row["steps"]
            assert row["tokens_per_forward"] == pytest.approx(row["length"] / evaluations)


def test_a_student_without_a_baseline_is_timed_alone(world, tmp_path, calls):
    rows = latency_rows(world, tmp_path, baseline=None, lengths=[6])
    assert [(row["run"], row["steps"]) for row in rows] == [("teacher", 2)]
    assert set(calls) == {2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_sides_compute_in_the_timed_dtype(world, tmp_path, monkeypatch, dtype):
    """Blocks, the KV cache, and the matrix of our decoder's readout."""
    found = []
    sample, decode = writers.sample, gpt.Decoder.write

    def record_sample(*args, **options):
        found.append(args[0].network.blocks[0].attn_qkv.weight.dtype)
        assert torch.is_autocast_enabled("cpu") == (dtype == "bfloat16")
        return sample(*args, **options)

    def record_decode(self, *args):
        found.extend([self.logits.compute, self.caches[0].k.dtype])
        matrix = self.logits.weight
        rounded = torch.equal(matrix, matrix.bfloat16().float())
        assert rounded == (dtype == "bfloat16")
        return decode(self, *args)

    monkeypatch.setattr(writers, "sample", record_sample)
    monkeypatch.setattr(gpt.Decoder, "write", record_decode)
    monkeypatch.setattr(gpt, "pack_weight", lambda weight: weight)  # a packed one has no values
    latency_rows(world, tmp_path, lengths=[6], baselines=["halfstep"], timed_dtype=dtype)
    assert set(found) == {getattr(torch, dtype)}


def test_a_stopped_job_is_continued(world, tmp_path, calls, monkeypatch, capsys):
    """It stops after the first length; the next call measures the second one only."""
    keys = {"lengths": [6, 8], "baselines": ["halfstep"]}
    measure, left = timing.measure_in_turns, [1]

    def stop_after_one(*args):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure_in_turns", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            latency_rows(world, tmp_path, **keys)
    partial = tmp_path / "rows.partial"
    first = read_json(partial)["rows"]
    assert [row["length"] for row in first] == [6, 6] and not (tmp_path / "rows.json").exists()
    calls.clear()
    rows = latency_rows(world, tmp_path, **keys)
    assert rows[:2] == first and [row["length"] for row in rows] == [6, 6, 8, 8]
    assert len(calls) == 2 * (1 + 3)
    assert "2 rows are finished" in capsys.readouterr().err
    assert not partial.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"timed_dtype": "bfloat16"},
        {"repeats": 4},
        {"benchmark_steps": [3]},
        {"baseline": None},
        {"size": "tiny", "baseline": None},
    ],
    ids=str,
)
def test_rows_of_other_settings_are_measured_again(world, tmp_path, capsys, change):
    keys = {"lengths": [6], "baselines": ["halfstep"]}
    rows = latency_rows(world, tmp_path, **keys)
    device = torch.device("cpu")
    teacher, baseline = world.models / "teacher", world.models / "baseline"
    sides = timed_sides.trained_sides([teacher], baseline, BenchmarkOptions(), TimedDraws(), device)
    options = BenchmarkOptions(**{"batch_sizes": [2], "benchmark_steps": [2], "repeats": 3} | keys)
    settings = benchmark._settings(sides, options, device)
    partial = tmp_path / "rows.partial"
    write_json(partial, {"settings": settings, "rows": [row | {"value": 77.0} for row in rows]})
    assert {row["value"] for row in latency_rows(world, tmp_path, **keys)} == {77.0}
    write_json(partial, {"settings": settings, "rows": [row | {"value": 77.0} for row in rows]})
    again = latency_rows(world, tmp_path, **keys | change)
    assert 77.0 not in {row["value"] for row in again}
    assert "not of these settings" in capsys.readouterr().err


def test_energy_of_a_call_if_the_device_counts_it(world, tmp_path, monkeypatch):
    """With a counter that rises by 5 J per reading, each call uses 5 J, by student and baseline."""
    joules = count(100, 5)
    monkeypatch.setattr(timing, "energy_counter", lambda device: lambda: next(joules))
    rows = latency_rows(world, tmp_path, lengths=[6], baselines=["halfstep"])
    assert [row["energy_j"] for row in rows] == [5, 5]


@pytest.mark.parametrize("size", [None, "tiny"])
def test_transformers_and_untrained_sizes_in_bfloat16(world, tmp_path, monkeypatch, size):
    """transformers writes whole texts with both caches; rows of untrained sizes have no checkpoint.

    Of its two caches the faster one is in the rows.
    """
    transformers = pytest.importorskip("transformers")
    made, generate_ = [], transformers.GenerationMixin.generate

    def record(*args, **options):
        made.append((options["cache_implementation"], *generate_(*args, **options).shape))
        return made[-1]

    monkeypatch.setattr(transformers.GenerationMixin, "generate", record)
    measured, measure = [], timing.measure_in_turns

    def keep(*args):
        measured.append(measure(*args))
        return measured[-1]

    monkeypatch.setattr(timing, "measure_in_turns", keep)
    rows = latency_rows(
        world,
        tmp_path,
        baseline=None if size else "baseline",
        size=size,
        lengths=[9],
        timed_dtype="bfloat16",
    )
    assert sorted(made) == [("dynamic", 2, 9)] * 4 + [("static", 2, 9)] * 4
    teacher, weights = ("tiny-untrained", "untrained") if size else ("stories-tiny", "ema")
    found = [(row["teacher"], row["weights"], row["run"], row["sampler"]) for row in rows]
    assert found == [
        (teacher, weights, "teacher", "ancestral"),
        (teacher, weights, "baseline", "kv_cache"),
        (teacher, weights, "baseline", "transformers"),
    ]
    times = {case.cache: took for case, took in measured[0].items() if case[1] == "transformers"}
    fastest = min(times, key=lambda cache: times[cache].median_s)
    assert times.keys() == {"static", "dynamic"}
    assert (rows[2]["cache"], rows[2]["value"]) == (fastest, times[fastest].median_s)
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert (rows[0]["checkpoint"] is None) == (size is not None)
    record = read_json(tmp_path / "rows.provenance.json")["inputs"]
    assert len(record) == (1 if size else 6)


def test_lengths_beyond_the_positions_of_a_network_of_transformers(world, tmp_path, capsys):
    """A GPT-2 of 8 positions: transformers alone decodes it, and a line says what is left out."""
    transformers = pytest.importorskip("transformers")
    student = timed_sides.load_checkpoint(world.models / "teacher")
    config = transformers.GPT2Config(
        vocab_size=student.vocab_size, n_positions=8, n_embd=16, n_layer=1, n_head=2
    )
    network = transformers.GPT2LMHeadModel(config)
    network.save_pretrained(tmp_path / "hf")
    baseline = Side("t/baseline", replace(student, network=network), tmp_path / "hf")
    options = BenchmarkOptions(lengths=[8, 9], batch_sizes=[1], benchmark_steps=[2], repeats=3)
    kept = benchmark.KeptRows(tmp_path / "rows.partial", {})
    sides = timed_sides.Sides([Side("t/teacher", student)], baseline)
    benchmark._time_sides(sides, options, torch.device("cpu"), kept)
    found = [(row["length"], row["sampler"]) for row in kept.rows]
    assert found == [(8, "ancestral"), (8, "transformers"), (9, "ancestral")]
    note = "note: t/baseline, transformers: its network has 8 positions; left out at 9 tokens\n"
    assert capsys.readouterr().err.count(note) == 1


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_without_its_package_is_an_error(world, tmp_path):
    with pytest.raises(HalfstepError, match="vllm is not installed here"):
        latency_rows(world, tmp_path, baselines=["vllm"])


def test_the_student_must_be_a_denoiser(world, tmp_path):
    with pytest.raises(HalfstepError, match="kind autoregressive, expected diffusion"):
        latency_rows(world, tmp_path, student="baseline", baseline="teacher")


def test_an_untrained_size_has_no_trained_baseline(world, tmp_path):
    with pytest.raises(HalfstepError, match="networks of --size tiny are untrained"):
        latency_rows(world, tmp_path, size="tiny")


DRAFTS = {"sampler": "speculative", "draft_tokens": 3}


def other_student(world, name="round-1"):
    """A model of other weights than those of the teacher, next to it."""
    folder = world.models / name
    if not folder.exists():
        shutil.copytree(world.models / "teacher", folder)
        state = load_file(folder / "ema.safetensors")
        state["output_layer.linear.weight"] = -state["output_layer.linear.weight"]
        meta = read_json(folder / "meta.json")
        weights = {"model.safetensors": state, "ema.safetensors": state}
        checkpoint.save_checkpoint(folder, weights, meta, folder / "tokenizer.json")
    return name


@pytest.mark.parametrize("draws", [DRAFTS, {"sampler": "threshold", "threshold": 0.025}], ids=str)
def test_a_variant_is_timed_with_the_passes_of_its_own_texts(world, tmp_path, draws):
    """As the sampler itself writes the texts of the three repeats, 2 to 7, with trained weights."""
    students = ["teacher", other_student(world)]
    rows = latency_rows(
        world,
        tmp_path,
        student=" ".join(students),
        variant="mine",
        draws=DrawOptions(**draws),
        lengths=[12],
        benchmark_steps=[12],
        baselines=["halfstep"],
    )
    assert [row["variant"] for row in rows] == ["mine"] * 3
    assert rows[2]["sampler"] == "kv_cache" and rows[2]["network_evaluations"] == 11
    options = dict(draws)
    if draws["sampler"] == "speculative":
        scorer = checkpoint.load_checkpoint(world.models / "baseline")
        options["scorer"] = autoregressor(scorer.network)
    passes = []
    for name, row in zip(students, rows, strict=False):
        model = checkpoint.load_checkpoint(world.models / name)
        given = torch.full((12,), model.mask_id)
        if draws["sampler"] == "speculative":
            given[0] = model.eos_id
        texts = sample(model.denoiser, 6, 12, 12, draws=Draws(1, 2), given=given, **options)
        passes.append(texts.network_evaluations.double().mean().item())
        assert (row["weights"], row["steps"], row["seed"]) == ("ema", 12, 1)
        assert model.sha256.startswith(row["checkpoint"])
        assert row["network_evaluations"] == pytest.approx(passes[-1])
        if texts.autoregressive_passes is not None:
            asked = texts.autoregressive_passes.double().mean().item()
            assert row["autoregressive_passes"] == pytest.approx(asked)
            assert row["tokens_per_verification"] == pytest.approx(11 / asked)
            assert row["sampler"].startswith("speculative(draft_tokens=3,")
    assert len(set(passes)) == 2, "these weights would make no difference"


def test_a_stopped_variant_is_continued_only_with_the_same_draws(world, tmp_path, capsys):
    keys = {"lengths": [6], "baselines": ["halfstep"], "variant": "drafts", "repeats": 3}
    keys |= {"batch_sizes": [2], "benchmark_steps": [6]}
    options = BenchmarkOptions(**{k: keys[k] for k in BenchmarkOptions.model_fields if k in keys})
    draws, device = DrawOptions(**DRAFTS), torch.device("cpu")
    named = TimedDraws("drafts", draws)
    teacher, baseline = world.models / "teacher", world.models / "baseline"
    sides = timed_sides.trained_sides([teacher], baseline, options, named, device)
    assert sides.scorer is sides.baseline.model
    settings = benchmark._settings(sides, options, device)
    rows = latency_rows(world, tmp_path, draws=draws, **keys)
    kept = {"settings": settings, "rows": [row | {"value": 77.0} for row in rows]}
    write_json(tmp_path / "rows.partial", kept)
    again = latency_rows(world, tmp_path, draws=draws, **keys)
    assert {row["value"] for row in again} == {77.0}
    write_json(tmp_path / "rows.partial", kept)
    other = DrawOptions(**DRAFTS | {"draft_tokens": 2})
    assert 77.0 not in {row["value"] for row in latency_rows(world, tmp_path, draws=other, **keys)}
    assert "not of these settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"draws": DRAFTS, "variant": "a", "baseline": None}, "baseline: found none, but sampler"),
        ({"draws": DRAFTS}, "variant: found none, but students write by speculative"),
        ({"draws": {"precision": "bfloat16"}, "variant": "a"}, "latency computes in --timed-dtype"),
        ({"size": "tiny", "baseline": None, "variant": "a"}, "variant: found a, but networks of"),
        ({"size": "tiny", "baseline": None, "student": "teacher teacher"}, "checkpoint: found 2"),
        ({"student": "teacher teacher"}, "checkpoint: found two of the name"),
    ],
    ids=str,
)
def test_variants_that_cannot_be_timed(world, tmp_path, flags, message):
    flags = flags | {"draws": DrawOptions(**flags.get("draws", {}))}
    with pytest.raises(HalfstepError, match=message):
        latency_rows(world, tmp_path, **flags)

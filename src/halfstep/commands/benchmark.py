"""`halfstep latency`: time students at each step count against autoregressive baselines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from halfstep import timing
from halfstep.checkpoint import (
    KINDS,
    Model,
    build_denoiser,
    build_network,
    checkpoint_files,
    load_checkpoint,
    read_meta,
)
from halfstep.config import Benchmark, Machine, Network
from halfstep.diffusion.contracts import Draws, Samples
from halfstep.diffusion.samplers import sample
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import uniforms
from halfstep.kernels.precision import cast_matrices
from halfstep.metrics.rows import model_name, name_parts, row, write_rows
from halfstep.models import gpt
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt2 import GPT2
from halfstep.progress import Progress

SEED = 1
# If one call of each case takes more than PATIENCE_S together, FEW repeats are enough.
PATIENCE_S, FEW = 60, 3

Call = Callable[[], object]
Writer = Callable[[int, int], Call]
"""(batch, length) -> a call that writes `batch` texts of `length` tokens."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    name: str
    network: torch.nn.Module
    checkpoint: str | None = None
    """the first digits of the weights' sha256; None with untrained weights"""


@dataclass(frozen=True)
class Pair:
    """A student and an autoregressive baseline of the same size."""

    student: Side
    baseline: Side
    denoiser: SubsDenoiser
    eos_id: int
    weights: str
    hf: Path | None
    """the baseline's folder for transformers; None with untrained weights"""


class Case(NamedTuple):
    """What is timed: a student at a step count, or a baseline (steps is None)."""

    sampler: str
    steps: int | None
    call: Call
    network_evaluations: float


def latency(
    checkpoint: Path, baseline: Path, output: Path, benchmark: Benchmark, machine: Machine
) -> None:
    """Time whole calls and write rows of median seconds, with the quartiles as low and high.

    At each length and batch size all cases take turns in one process, on one device, in one dtype.
    Texts may be longer than those of training: positions are rotary, so the time is not affected.
    A case that does not fit into the memory of a CUDA device is reported and left out.

    Args:
        checkpoint: a diffusion checkpoint; its network runs at every step count
        baseline: an autoregressive checkpoint
        output: JSON file of the rows
    """
    if join_group(machine).size > 1:
        raise HalfstepError(
            "processes: latency times one process, and others would disturb it; "
            "leave --processes out"
        )
    device = find_device(machine)
    shapes = len(benchmark.lengths) * len(benchmark.batch_sizes)
    cases = len(benchmark.baselines) + len(benchmark.benchmark_steps)
    calls = shapes * cases * benchmark.repeats * (1 + len(benchmark.sizes))
    rows = []
    with Progress("latency", calls, "call") as progress:
        for pair in _pairs(checkpoint, baseline, benchmark, device):
            rows += _time_pair(pair, benchmark, device, progress)
            del pair  # before the next one is built
    inputs = [*checkpoint_files(checkpoint, "ema"), *checkpoint_files(baseline, "ema")]
    write_rows(output, rows, inputs)


def _pairs(
    folder: Path, baseline: Path, benchmark: Benchmark, device: torch.device
) -> Iterator[Pair]:
    """The trained pair, then an untrained one for each further size; one in memory at a time."""
    yield _trained_pair(folder, baseline, benchmark, device)
    meta = read_meta(folder)
    for size in benchmark.sizes:
        yield _untrained_pair(size, meta, benchmark, device)


def _trained_pair(folder: Path, baseline: Path, benchmark: Benchmark, device: torch.device) -> Pair:
    student = _load_kind(folder, "diffusion", device)
    autoregressive = _load_kind(baseline, "autoregressive", device)
    network = student.network
    if isinstance(network, GPT2) and max(benchmark.lengths) > network.length:
        raise HalfstepError(
            f"lengths: found {max(benchmark.lengths)}, but {folder} has the positions of "
            f"{network.length} tokens; lower benchmark.lengths"
        )
    dtype = getattr(torch, benchmark.timed_dtype)
    sides = [
        Side(model_name(path), cast_matrices(model.network, dtype), model.sha256[:16])
        for path, model in ((folder, student), (baseline, autoregressive))
    ]
    return Pair(*sides, student.denoiser, student.eos_id, student.weights, baseline / "hf")


def _untrained_pair(size: str, meta: dict, benchmark: Benchmark, device: torch.device) -> Pair:
    """Networks of another size, with the checkpoint's vocabulary and architecture."""
    architecture = meta["network"].get("architecture", "dit")
    meta = meta | {"network": Network(size=size, architecture=architecture).model_dump()}
    dtype = getattr(torch, benchmark.timed_dtype)
    sides = []
    for kind, name in zip(KINDS, ("teacher", "baseline"), strict=True):
        with torch.device(device):
            network = cast_matrices(build_network(meta | {"kind": kind}), dtype)
        sides.append(Side(f"{size}-untrained/{name}", network.eval().requires_grad_(False)))
    denoiser = build_denoiser(sides[0].network, meta)
    return Pair(*sides, denoiser, meta["eos_id"], "untrained", None)


def _load_kind(folder: Path, kind: str, device: torch.device) -> Model:
    model = load_checkpoint(folder, "ema", str(device))
    if model.kind != kind:
        raise HalfstepError(
            f"{folder}: holds a model of kind {model.kind}, expected {kind}; "
            "--checkpoint is the student, --baseline the autoregressive model"
        )
    return model


def _time_pair(
    pair: Pair, benchmark: Benchmark, device: torch.device, progress: Progress
) -> list[dict]:
    """The rows of one pair at every length and batch size."""
    baselines = [BASELINES[name] for name in benchmark.baselines]
    writers = {sampler: make_writer(pair, benchmark, device) for sampler, make_writer in baselines}
    rows = []
    for length, batch in product(benchmark.lengths, benchmark.batch_sizes):
        started = time.monotonic()
        cases = _cases(pair, writers, length, batch, benchmark, device)
        repeats = benchmark.repeats
        if time.monotonic() - started >= PATIENCE_S:
            repeats = min(FEW, repeats)
        calls = {case: case.call for case in cases}
        timed = timing.measure_in_turns(calls, repeats, 0, device, progress.update)
        rows += [
            _row(pair, case, took, length, batch, benchmark, device) for case, took in timed.items()
        ]
    return rows


def _row(
    pair: Pair,
    case: Case,
    took: timing.Timing,
    length: int,
    batch: int,
    benchmark: Benchmark,
    device: torch.device,
) -> dict:
    side = pair.student if case.steps else pair.baseline
    written = length if case.steps else length - 1  # a baseline is given BOS
    return row(
        "latency_s",
        "interleaved",
        took.median_s,
        (took.low_s, took.high_s),
        **name_parts(side.name),
        steps=case.steps,
        sampler=case.sampler,
        network_evaluations=case.network_evaluations,
        num_samples=batch,
        seed=SEED,
        weights=pair.weights,
        draw_dtype="float64" if case.sampler in ("ancestral", "kv_cache") else None,
        checkpoint=side.checkpoint,
        length=length,
        batch_size=batch,
        tokens_per_s=batch * length / took.median_s,
        tokens_per_forward=written / case.network_evaluations,
        energy_j=took.joules,
        device=timing.device_name(device),
        dtype=benchmark.timed_dtype,
        params=sum(p.numel() for p in side.network.parameters()),
    )


def _cases(
    pair: Pair,
    writers: dict[str, Writer],
    length: int,
    batch: int,
    benchmark: Benchmark,
    device: torch.device,
) -> list[Case]:
    """The cases that fit into memory; the call that finds out is also their warm-up."""
    wanted = [("ancestral", steps) for steps in dict.fromkeys(benchmark.benchmark_steps)]
    wanted += [(sampler, None) for sampler in writers]
    found = []
    for sampler, steps in wanted:
        try:
            if steps:
                call = partial(_write_by_student, pair, batch, length, steps, benchmark, device)
                evaluations = call().network_evaluations.double().mean().item()
            else:
                call = writers[sampler](batch, length)
                call()
                evaluations = max(length - 1.0, 1.0)
            found.append(Case(sampler, steps, call, evaluations))
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            side = pair.student if steps else pair.baseline
            print(
                f"note: {side.name}, {sampler}, {batch} texts of {length} tokens: not enough "
                f"memory on {timing.device_name(device)}; left out",
                file=sys.stderr,
            )
    return found


def _write_by_student(
    pair: Pair, batch: int, length: int, steps: int, benchmark: Benchmark, device: torch.device
) -> Samples:
    low = benchmark.timed_dtype != "float32"
    with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        denoiser = pair.denoiser.inference_copy
        return sample(denoiser, batch, length, steps, draws=Draws(SEED), device=device)


def _halfstep_writer(pair: Pair, benchmark: Benchmark, device: torch.device) -> Writer:
    network = pair.baseline.network
    dtype = getattr(torch, benchmark.timed_dtype)
    compute = None if dtype == torch.float32 else dtype

    def writer(batch: int, length: int) -> Call:
        decoder = gpt.Decoder(network, batch, length, compute=compute)
        start = torch.tensor([pair.eos_id])
        return lambda: decoder.write(start, uniforms(SEED, 0, batch, length))

    return writer


def _transformers_writer(pair: Pair, benchmark: Benchmark, device: torch.device) -> Writer:
    _check_hf_folder(pair, "transformers")
    try:
        from transformers import AutoModelForCausalLM, GPTNeoXConfig
    except ImportError:
        raise HalfstepError(
            "baselines: transformers is not installed; pip install transformers, "
            "or leave it out of --baselines"
        ) from None
    dtype, longest = getattr(torch, benchmark.timed_dtype), max(benchmark.lengths)
    if pair.hf is None:
        shape = gpt.gpt_neox_config(pair.baseline.network, longest, pair.eos_id)
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**shape), dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            pair.hf, max_position_embeddings=longest, dtype=dtype
        )
    model = model.to(device).eval()
    # All texts have the same length, so no token needs a check whether it is the last one.
    model.generation_config.eos_token_id = None
    how = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "cache_implementation": "static",
        "pad_token_id": pair.eos_id,
    }

    def writer(batch: int, length: int) -> Call:
        start = torch.full((batch, 1), pair.eos_id, device=device)
        attend = torch.ones_like(start)

        def call() -> Tensor:
            torch.manual_seed(SEED)
            return model.generate(start, attention_mask=attend, max_new_tokens=length - 1, **how)

        return call

    return writer


def _vllm_writer(pair: Pair, benchmark: Benchmark, device: torch.device) -> Writer:
    _check_hf_folder(pair, "vllm")
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise HalfstepError(
            "baselines: vllm is not installed here; pip install vllm (it needs a CUDA device), "
            "or leave it out of --baselines"
        ) from None
    if pair.hf is None:
        raise HalfstepError(
            "baselines: vllm loads folders, and untrained networks have none; "
            "use it without --sizes"
        )
    engine = LLM(
        str(pair.hf),
        skip_tokenizer_init=True,
        dtype=benchmark.timed_dtype,
        max_model_len=max(benchmark.lengths),
        seed=SEED,
    )

    def writer(batch: int, length: int) -> Call:
        how = SamplingParams(
            temperature=1.0, max_tokens=length - 1, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [pair.eos_id]} for _ in range(batch)]
        return lambda: engine.generate(prompts, how, use_tqdm=False)

    return writer


def _check_hf_folder(pair: Pair, name: str) -> None:
    if pair.hf is not None and not (pair.hf / "config.json").is_file():
        raise HalfstepError(
            f"{pair.hf}: no config.json, so {name} cannot load it; train the baseline again, "
            f"or leave {name} out of baselines"
        )


# baseline: column `sampler` of its rows, and how its writer is made
BASELINES: dict[str, tuple[str, Callable[[Pair, Benchmark, torch.device], Writer]]] = {
    "halfstep": ("kv_cache", _halfstep_writer),
    "transformers": ("transformers", _transformers_writer),
    "vllm": ("vllm", _vllm_writer),
}

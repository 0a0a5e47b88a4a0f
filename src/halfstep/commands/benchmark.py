"""`halfstep latency`: time a student at each step count against autoregressive baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from halfstep import timing
from halfstep.checkpoint import (
    Model,
    build_denoiser,
    build_network,
    checked_file,
    checkpoint_files,
    load_checkpoint,
    read_meta,
)
from halfstep.commands.decoders import BASELINES, SEED, Side, TimedDecoder, Write
from halfstep.config import BenchmarkOptions, Machine, Network, Size
from halfstep.data.tokenizer import read_tokenizer
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.kernels.precision import cast_matrices
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.metrics.rows import model_name, name_parts, row, write_rows
from halfstep.models.gpt2 import GPT2
from halfstep.progress import Progress
from halfstep.records.journal import commit

PROTOCOL = "interleaved"
SAMPLER = "ancestral"  # of the students


@dataclass(frozen=True)
class Pair:
    """A student, and the baseline that it is compared with, if there is one."""

    student: Side
    baseline: Side | None
    weights: str
    """column `weights` of the rows: ema or untrained"""


class Case(NamedTuple):
    """What is timed: a student at a step count, or a decoder of the baseline (steps is None)."""

    model: str
    sampler: str
    steps: int | None
    cache: str | None


class TextShape(NamedTuple):
    """What all cases write that take turns."""

    length: int
    batch: int


def latency(
    checkpoint: Path,
    output: Path,
    benchmark: BenchmarkOptions,
    machine: Machine,
    baseline: Path | None = None,
    size: Size | None = None,
) -> None:
    """Time whole calls and write rows of median seconds, with an interval as low and high.

    At each length and batch size all cases take turns in one process, on one device, in one dtype.
    Students and our decoder write as `halfstep generate` does. Of transformers' caches the faster
    one counts. Texts may be longer than those of training: positions are rotary, so the time is not
    affected. A case that does not fit into the memory of a CUDA device is reported and left out.

    Rows of a finished length and batch size are kept in {output without its ending}.partial until
    all are finished. So a call that was stopped is continued by the next one, unless the device,
    the weights, the code or another setting differ.

    Args:
        checkpoint: a diffusion checkpoint; its network runs at every step count
        output: JSON file of the rows
        baseline: an autoregressive checkpoint; without it the student is timed alone
        size: time an untrained student and an untrained baseline of this size, with the vocabulary
            and architecture of the checkpoint
    """
    if join_group(machine).size > 1:
        raise HalfstepError(
            "processes: latency times one process, and others would disturb it; "
            "leave --processes out"
        )
    if size and baseline:
        raise HalfstepError(
            f"baseline: found {baseline}, but networks of --size {size} are untrained, and so is "
            "their baseline; leave --baseline or --size out"
        )
    device = find_device(machine)
    if size:
        pair = _untrained_pair(checkpoint, size, benchmark, device)
        inputs = [checkpoint / "meta.json"]
    else:
        pair = _trained_pair(checkpoint, baseline, benchmark, device)
        folders = [checkpoint, baseline] if baseline else [checkpoint]
        inputs = [file for folder in folders for file in checkpoint_files(folder, "ema")]
    kept = KeptRows(output.with_suffix(".partial"), _settings(pair, benchmark, device))
    _time_pair(pair, benchmark, device, kept)
    write_rows(output, kept.of(_shapes(benchmark)), inputs)
    kept.file.unlink(missing_ok=True)


def _shapes(benchmark: BenchmarkOptions) -> list[TextShape]:
    shapes = product(benchmark.lengths, benchmark.batch_sizes)
    return [TextShape(*shape) for shape in dict.fromkeys(shapes)]


def _settings(pair: Pair, benchmark: BenchmarkOptions, device: torch.device) -> dict[str, Any]:
    """What rows must have in common with those of an earlier call."""
    sides = [pair.student, pair.baseline] if pair.baseline else [pair.student]
    return {
        "models": [[side.name, side.model.sha256] for side in sides],
        "options": benchmark.model_dump(exclude={"lengths", "batch_sizes"}),
        "machine": timing.machine(device),
        "version": PROTOCOLS["latency_s"][PROTOCOL],
        "commit": commit(),
    }


class KeptRows:
    """Rows of the shapes that are finished, in a file that a stopped job leaves behind.

    Rows that are there already count if they were measured with the same settings.
    """

    def __init__(self, file: Path, settings: dict[str, Any]):
        self.file, self.settings = file, settings
        self.rows: list[dict[str, Any]] = []
        if not file.exists():
            return
        found = read_json(file, "delete it, and measure again")
        if isinstance(found, dict) and found.get("settings") == settings:
            self.rows = found["rows"]
            print(f"note: {file}: {len(self.rows)} rows are finished", file=sys.stderr)
        else:
            print(f"note: {file}: not of these settings, so all is measured again", file=sys.stderr)

    def of(self, shapes: list[TextShape]) -> list[dict[str, Any]]:
        """The rows of these shapes, in their order."""
        return [
            row
            for shape in shapes
            for row in self.rows
            if (row["length"], row["batch_size"]) == shape
        ]

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one more shape."""
        self.rows += rows
        write_json(self.file, {"settings": self.settings, "rows": self.rows})


def _trained_pair(
    folder: Path, baseline: Path | None, benchmark: BenchmarkOptions, device: torch.device
) -> Pair:
    student = _load_side(folder, "diffusion", benchmark, device)
    network = student.model.network
    if isinstance(network, GPT2) and max(benchmark.lengths) > network.length:
        raise HalfstepError(
            f"lengths: found {max(benchmark.lengths)}, but {folder} has the positions of "
            f"{network.length} tokens; lower benchmark.lengths"
        )
    if baseline is None:
        return Pair(student, None, student.model.weights)
    other = _load_side(baseline, "autoregressive", benchmark, device)
    return Pair(student, other, student.model.weights)


def _load_side(folder: Path, kind: str, benchmark: BenchmarkOptions, device: torch.device) -> Side:
    model = load_checkpoint(folder, "ema", str(device), benchmark.timed_dtype)
    if model.kind != kind:
        raise HalfstepError(
            f"{folder}: holds a model of kind {model.kind}, expected {kind}; "
            "--checkpoint is the student, --baseline the autoregressive model"
        )
    return Side(model_name(folder), model, folder / "hf")


def _untrained_pair(
    folder: Path, size: str, benchmark: BenchmarkOptions, device: torch.device
) -> Pair:
    """Networks of another size, with the checkpoint's vocabulary and architecture."""
    meta = read_meta(folder)
    architecture = meta["network"].get("architecture", "dit")
    network = Network(size=size, architecture=architecture).model_dump()
    meta |= {"network": network, "length": max(benchmark.lengths)}
    tokenizer = read_tokenizer(checked_file(folder, "tokenizer.json", meta))

    def untrained(kind: str, name: str) -> Side:
        with torch.device(device):
            network = build_network(meta | {"kind": kind})
        cast_matrices(network, getattr(torch, benchmark.timed_dtype))
        network.eval().requires_grad_(False)
        denoiser = build_denoiser(network, meta) if kind == "diffusion" else None
        model = Model(
            kind, network, tokenizer, meta, "", "untrained", denoiser, benchmark.timed_dtype
        )
        return Side(f"{size}-untrained/{name}", model)

    return Pair(
        untrained("diffusion", "teacher"), untrained("autoregressive", "baseline"), "untrained"
    )


def _time_pair(
    pair: Pair, benchmark: BenchmarkOptions, device: torch.device, kept: KeptRows
) -> None:
    """Measure the shapes that are not finished, and keep the rows of each as soon as it is."""
    shapes = _shapes(benchmark)
    left = [shape for shape in shapes if not kept.of([shape])]
    decoders = _decoders(pair, benchmark, device) if left else []
    cases = len(set(benchmark.benchmark_steps)) + len(decoders)
    each = cases * benchmark.repeats
    finished = each * (len(shapes) - len(left))
    with Progress("latency", each * len(shapes), "call", done=finished) as progress:
        for shape in left:
            kept.add(_time_shape(pair, decoders, shape, benchmark, device, progress))


def _decoders(pair: Pair, benchmark: BenchmarkOptions, device: torch.device) -> list[TimedDecoder]:
    """The decoders of the baseline; a line tells which lengths are too long for one."""
    if pair.baseline is None:
        return []
    decoders: list[TimedDecoder] = []
    for name in dict.fromkeys(benchmark.baselines):
        found = BASELINES[name](pair.baseline, benchmark, device)
        longest = found[0].longest if found else None
        beyond = [str(n) for n in benchmark.lengths if longest and n > longest]
        if beyond:
            print(
                f"note: {pair.baseline.name}, {name}: its network has {longest} positions; left "
                f"out at {', '.join(beyond)} tokens",
                file=sys.stderr,
            )
        decoders += found
    return decoders


def _time_shape(
    pair: Pair,
    decoders: list[TimedDecoder],
    shape: TextShape,
    benchmark: BenchmarkOptions,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The rows of one length and batch size: all cases in turns."""
    length, batch = shape
    calls: dict[Case, Write] = {}
    evaluations: dict[Case, float] = {}
    for case, make in _cases(pair, decoders, shape, benchmark).items():
        try:
            call = make()
            written = call()  # the warm-up, which also finds out whether it fits into memory
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(
                f"note: {case.model}, {case.sampler}, {batch} texts of {length} tokens: not enough "
                f"memory on {timing.device_name(device)}; left out",
                file=sys.stderr,
            )
            continue
        calls[case] = call
        evaluations[case] = max(length - 1.0, 1.0)
        if case.steps:
            evaluations[case] = written.network_evaluations.double().mean().item()
    timed = timing.measure_in_turns(calls, benchmark.repeats, 0, device, progress.update)
    return [
        _row(pair, case, took, evaluations[case], shape, benchmark, device)
        for case, took in _faster_caches(timed).items()
    ]


def _cases(
    pair: Pair, decoders: list[TimedDecoder], shape: TextShape, benchmark: BenchmarkOptions
) -> dict[Case, Callable[[], Write]]:
    """Every case of a length and batch size, with a function that makes its call."""
    length, batch = shape
    student, baseline = pair.student, pair.baseline
    cases: dict[Case, Callable[[], Write]] = {}
    for steps in benchmark.benchmark_steps:
        case = Case(student.name, SAMPLER, steps, None)
        cases[case] = partial(student.writer, batch, length, steps)
    for decoder in decoders:
        if baseline and length <= (decoder.longest or length):
            case = Case(baseline.name, decoder.sampler, None, decoder.cache)
            cases[case] = partial(decoder.writer, batch, length)
    return cases


def _faster_caches(timed: dict[Case, timing.Timing]) -> dict[Case, timing.Timing]:
    """The cases without those that another cache of the same decoder makes faster."""
    fastest: dict[Case, Case] = {}
    for case, took in timed.items():
        known = fastest.setdefault(case._replace(cache=None), case)
        if took.median_s < timed[known].median_s:
            fastest[case._replace(cache=None)] = case
    return {case: timed[case] for case in fastest.values()}


def _row(
    pair: Pair,
    case: Case,
    took: timing.Timing,
    evaluations: float,
    shape: TextShape,
    benchmark: BenchmarkOptions,
    device: torch.device,
) -> dict[str, Any]:
    length, batch = shape
    side = pair.student if case.steps or pair.baseline is None else pair.baseline
    written = length if case.steps else length - 1  # a baseline is given BOS
    return row(
        "latency_s",
        PROTOCOL,
        took.median_s,
        (took.low_s, took.high_s),
        **name_parts(side.name),
        steps=case.steps,
        sampler=case.sampler,
        network_evaluations=evaluations,
        num_samples=batch,
        seed=SEED,
        weights=pair.weights,
        draw_dtype="float64" if case.sampler in (SAMPLER, "kv_cache") else None,
        checkpoint=side.checkpoint,
        length=length,
        batch_size=batch,
        bounds=took.bounds,
        cache=case.cache,
        tokens_per_s=batch * length / took.median_s,
        tokens_per_forward=written / evaluations,
        energy_j=took.joules,
        device=timing.device_name(device),
        dtype=benchmark.timed_dtype,
        params=side.num_params,
    )

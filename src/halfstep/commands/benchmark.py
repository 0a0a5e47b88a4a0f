"""`halfstep latency`: time students at each step count against autoregressive baselines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field

from halfstep import timing
from halfstep.checkpoint import checkpoint_files
from halfstep.commands.decoders import (
    BASELINES,
    SEED,
    Side,
    TimedDecoder,
    TimedDraws,
    TimedTexts,
    Write,
)
from halfstep.commands.timed_sides import (
    Sides,
    check_untrained,
    checked_draws,
    trained_sides,
    untrained_sides,
)
from halfstep.commands.writers import sampler_name
from halfstep.config import BenchmarkOptions, DrawOptions, Machine, Size
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.metrics.rows import KeptRows, name_parts, row, write_rows
from halfstep.progress import Progress
from halfstep.records.journal import commit

PROTOCOL = "interleaved"


class Case(NamedTuple):
    """What is timed: a student at a step count, or a decoder of the baseline (steps is None).

    sampler: as rows name it; of a student with its own options
    """

    model: str
    sampler: str
    steps: int | None
    cache: str | None


class TextShape(NamedTuple):
    """What all cases write that take turns."""

    length: int
    batch_size: int


def latency(  # noqa: PLR0913  the flags of the command
    checkpoint: Annotated[list[Path], Field(min_length=1)],
    output: Path,
    benchmark: BenchmarkOptions,
    sampling: DrawOptions,
    machine: Machine,
    baseline: Path | None = None,
    size: Size | None = None,
    variant: str | None = None,
) -> None:
    """Time whole calls and write rows of median seconds, with an interval as low and high.

    At each length and batch size all cases take turns in one process, on one device, in one dtype.
    Students and our decoder write as `halfstep generate` does. Of transformers' caches the faster
    one counts. Texts may be longer than those of training: positions are rotary, so the time is not
    affected. A case that does not fit into the memory of a CUDA device is reported and left out.

    Students write by the sampler `ancestral`, whose time does not depend on the weights. With
    --variant they write as the other options say, each call the next texts, with the weights of
    their own checkpoints. A sampler that asks an autoregressive model asks the baseline, unless
    --scorer names another one. The baseline always draws from all tokens at temperature 1.

    Rows of a finished length and batch size are kept in {output without its ending}.partial until
    all are finished. So a call that was stopped is continued by the next one, unless the device,
    the weights, the code or another setting differ.

    Args:
        checkpoint: diffusion checkpoints; their networks run at every step count
        output: JSON file of the rows
        baseline: an autoregressive checkpoint; without it the students are timed alone
        size: time an untrained student and an untrained baseline of this size, with the vocabulary
            and architecture of the checkpoint
        variant: name of this way to draw, in all rows; without it the options of the draws have to
            be the default
    """
    if join_group(machine).size > 1:
        raise HalfstepError(
            "processes: latency times one process, and others would disturb it; "
            "leave --processes out"
        )
    check_untrained(checkpoint, baseline, size, variant)
    draws = checked_draws(sampling, variant, baseline)
    device = find_device(machine)
    if size:
        sides = untrained_sides(checkpoint[0], size, benchmark, device)
        inputs = [checkpoint[0] / "meta.json"]
    else:
        sides = trained_sides(checkpoint, baseline, benchmark, draws, device)
        inputs = [file for one in checkpoint for file in checkpoint_files(one, sampling.weights)]
        scorer = Path(sampling.scorer) if sampling.scorer else None
        for folder in dict.fromkeys(filter(None, (baseline, scorer))):
            inputs += checkpoint_files(folder, "ema")
    kept = KeptRows(output.with_suffix(".partial"), _settings(sides, benchmark, device))
    _time_sides(sides, benchmark, device, kept)
    rows = [row for shape in _shapes(benchmark) for row in kept.of(**shape._asdict())]
    write_rows(output, rows, inputs)
    kept.file.unlink(missing_ok=True)


def _shapes(benchmark: BenchmarkOptions) -> list[TextShape]:
    shapes = product(benchmark.lengths, benchmark.batch_sizes)
    return [TextShape(*shape) for shape in dict.fromkeys(shapes)]


def _settings(sides: Sides, benchmark: BenchmarkOptions, device: torch.device) -> dict[str, Any]:
    """What rows must have in common with those of an earlier call."""
    timed = [*sides.students, *([sides.baseline] if sides.baseline else [])]
    return {
        "models": [[side.name, side.model.sha256] for side in timed],
        "options": benchmark.model_dump(exclude={"lengths", "batch_sizes"}),
        "variant": sides.draws.variant,
        "draws": sides.draws.options.model_dump(),
        "scorer": sides.scorer.sha256 if sides.scorer else None,
        "machine": timing.machine(device),
        "version": PROTOCOLS["latency_s"][PROTOCOL],
        "commit": commit(),
    }


def _time_sides(
    sides: Sides, benchmark: BenchmarkOptions, device: torch.device, kept: KeptRows
) -> None:
    """Measure the shapes that are not finished, and keep the rows of each as soon as it is."""
    shapes = _shapes(benchmark)
    left = [shape for shape in shapes if not kept.of(**shape._asdict())]
    decoders = _decoders(sides.baseline, benchmark, device) if left else []
    cases = len(sides.students) * len(set(benchmark.benchmark_steps)) + len(decoders)
    each = cases * benchmark.repeats
    finished = each * (len(shapes) - len(left))
    with Progress("latency", each * len(shapes), "call", done=finished) as progress:
        for shape in left:
            kept.add(_time_shape(sides, decoders, shape, benchmark, device, progress))


def _decoders(
    baseline: Side | None, benchmark: BenchmarkOptions, device: torch.device
) -> list[TimedDecoder]:
    """The decoders of the baseline; a line tells which lengths are too long for one."""
    if baseline is None:
        return []
    decoders: list[TimedDecoder] = []
    for name in dict.fromkeys(benchmark.baselines):
        found = BASELINES[name](baseline, benchmark, device)
        longest = found[0].longest if found else None
        beyond = [str(n) for n in benchmark.lengths if longest and n > longest]
        if beyond:
            print(
                f"note: {baseline.name}, {name}: its network has {longest} positions; left "
                f"out at {', '.join(beyond)} tokens",
                file=sys.stderr,
            )
        decoders += found
    return decoders


def _time_shape(
    sides: Sides,
    decoders: list[TimedDecoder],
    shape: TextShape,
    benchmark: BenchmarkOptions,
    device: torch.device,
    progress: Progress,
) -> list[dict[str, Any]]:
    """The rows of one length and batch size: all cases in turns."""
    length, batch = shape
    calls: dict[Case, Write] = {}
    for case, make in _cases(sides, decoders, shape, benchmark).items():
        try:
            call = make()
            call()  # the warm-up, which also finds out whether it fits into memory
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(
                f"note: {case.model}, {case.sampler}, {batch} texts of {length} tokens: not enough "
                f"memory on {timing.device_name(device)}; left out",
                file=sys.stderr,
            )
            continue
        calls[case] = call
    timed = timing.measure_in_turns(calls, benchmark.repeats, 0, device, progress.update)
    return [
        _row(sides, case, took, calls[case], shape, benchmark, device)
        for case, took in _faster_caches(timed).items()
    ]


def _cases(
    sides: Sides, decoders: list[TimedDecoder], shape: TextShape, benchmark: BenchmarkOptions
) -> dict[Case, Callable[[], Write]]:
    """Every case of a length and batch size, with a function that makes its call."""
    length, batch = shape
    sampler = sampler_name(sides.draws.options)
    cases: dict[Case, Callable[[], Write]] = {}
    for student, steps in product(sides.students, benchmark.benchmark_steps):
        case = Case(student.name, sampler, steps, None)
        cases[case] = partial(student.writer, batch, length, steps, sides.draws, sides.scorer)
    for decoder in decoders:
        if sides.baseline and length <= (decoder.longest or length):
            case = Case(sides.baseline.name, decoder.sampler, None, decoder.cache)
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
    sides: Sides,
    case: Case,
    took: timing.Timing,
    call: Write,
    shape: TextShape,
    benchmark: BenchmarkOptions,
    device: torch.device,
) -> dict[str, Any]:
    length, batch = shape
    side = _side_of(sides, case)
    columns = name_parts(side.name) | {
        "steps": case.steps,
        "sampler": case.sampler,
        "num_samples": batch,
        "weights": side.model.weights,
        "checkpoint": side.checkpoint,
        "length": length,
        "batch_size": batch,
        "bounds": took.bounds,
        "cache": case.cache,
        "tokens_per_s": batch * length / took.median_s,
        "energy_j": took.joules,
        "device": timing.device_name(device),
        "dtype": benchmark.timed_dtype,
        "params": side.num_params,
    }
    if case.steps and isinstance(call, TimedTexts):
        columns |= _columns_of_draws(sides.draws, call, length)
    else:
        evaluations = max(length - 1.0, 1.0)  # a baseline is given BOS
        columns |= {
            "seed": SEED,
            "draw_dtype": "float64" if case.sampler == "kv_cache" else None,
            "network_evaluations": evaluations,
            "tokens_per_forward": (length - 1) / evaluations,
        }
    if sides.draws.variant is not None:
        columns["variant"] = sides.draws.variant
    return row("latency_s", PROTOCOL, took.median_s, (took.low_s, took.high_s), **columns)


def _side_of(sides: Sides, case: Case) -> Side:
    """The model of a case."""
    if case.steps is None and sides.baseline:
        return sides.baseline
    return next(student for student in sides.students if student.name == case.model)


def _columns_of_draws(draws: TimedDraws, call: TimedTexts, length: int) -> dict[str, Any]:
    """Columns of a student's row that say how it draws, and what its timed texts took."""
    options, sampler = draws.options, SAMPLERS[draws.options.sampler]
    evaluations, asked = call.passes()
    written = length - sampler.needs_first
    columns = {
        "seed": options.sampling_seed,
        "draw_dtype": sampler.draw_dtype,
        "temperature": options.temperature,
        "top_p": options.top_p if "top_p" in sampler.options else None,
        "network_evaluations": evaluations,
        "tokens_per_forward": written / evaluations,
    }
    if asked is not None:
        columns["autoregressive_passes"] = asked
    if asked and options.sampler == "speculative":
        columns["tokens_per_verification"] = written / asked
    return columns

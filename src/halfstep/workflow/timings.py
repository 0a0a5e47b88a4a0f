"""The jobs of `halfstep latency`: what each of them times, and how long it may take."""

from __future__ import annotations

import math

from halfstep.config import BenchmarkOptions, Config, DrawOptions, shape_of_size
from halfstep.models.flops import denoiser_shape, forward_flops
from halfstep.resolve import flags
from halfstep.workflow.drawing import SAMPLER_PASSES, draft_reads
from halfstep.workflow.machine import demand_of
from halfstep.workflow.networks import GPT2_TOKENS

TRAINED = "trained"
"""Stands for a size in the name of a job: the trained network of its teacher."""

VARIANT = "variant-"
"""Begins the name of a job that times another way to draw: trained/variant-{name}."""

# A slow machine, because these numbers become time limits.
SLOW_FLOPS = {"bfloat16": 80e12, "float32": 10e12}  # per second, on a GPU
CPU_FLOPS = 20e9
DECODE_S = 2e-3  # to write one token: one block of an autoregressive network, on any device
COMPILE_S = 3.0  # to compile one block of transformers' network, for each length and batch size
FEWEST_MINUTES = 30
MARGIN = 1.5


def latency_jobs(config: Config, teacher: str) -> dict[str, BenchmarkOptions]:
    """What each job of a teacher's timings times, by its name: {size}/length-{lengths}.

    A job has one length. Only where a network is so small that it needs no GPU, lengths with the
    same steps share a job, because there a start of a process costs more than the timing.

    The trained network is always timed at the length of its samples, there also at more_steps, and
    at more_batch_sizes in jobs of their own, {size}/length-{length}-batch-{batch}. The first
    teacher's jobs time the further sizes as well.
    """
    benchmark, about = config.benchmark, config.teachers[teacher]
    common = _common_options(config)
    lengths, samples = dict.fromkeys(benchmark.lengths, common), config.corpora[about.corpus].length
    steps = sorted({*benchmark.benchmark_steps, *benchmark.more_steps})
    at_samples = common.model_copy(update={"benchmark_steps": steps})
    jobs = _jobs_of(TRAINED, about.network.size, lengths | {samples: at_samples})
    for batch in sorted(set(benchmark.more_batch_sizes) - set(benchmark.batch_sizes)):
        jobs[f"{TRAINED}/length-{samples}-batch-{batch}"] = common.model_copy(
            update={"lengths": [samples], "batch_sizes": [batch]}
        )
    if teacher == next(iter(config.teachers)):
        for size in benchmark.sizes:
            jobs |= _jobs_of(size, size, lengths)
    return jobs


def variant_job(config: Config, teacher: str, steps: list[int]) -> BenchmarkOptions:
    """What a job of a variant of the samples times, at these step counts."""
    benchmark, length = config.benchmark, config.corpora[config.teachers[teacher].corpus].length
    changed = {
        "lengths": [length],
        "batch_sizes": sorted({*benchmark.batch_sizes, *benchmark.more_batch_sizes}),
        "benchmark_steps": steps,
    }
    return _common_options(config).model_copy(update=changed)


def _common_options(config: Config) -> BenchmarkOptions:
    names = set(BenchmarkOptions.model_fields)
    return BenchmarkOptions(**config.benchmark.model_dump(include=names))


def _jobs_of(
    name: str, size: str, lengths: dict[int, BenchmarkOptions]
) -> dict[str, BenchmarkOptions]:
    """The jobs of one network, from what is timed at each length."""
    is_small = demand_of(size).sample[0] == 0
    groups: dict[object, list[int]] = {}
    for length, options in sorted(lengths.items()):
        groups.setdefault(flags(options) if is_small else length, []).append(length)
    return {
        f"{name}/length-{'-'.join(map(str, group))}": lengths[group[0]].model_copy(
            update={"lengths": group}
        )
        for group in groups.values()
    }


def latency_minutes(
    size: str, options: BenchmarkOptions, students: int = 1, draws: DrawOptions | None = None
) -> int:
    """Time limit of a job: what it takes on a slow machine, and half of that again.

    `draws` are those of a variant.
    """
    seconds = sum(
        _seconds(size, options, length, batch, students, draws or DrawOptions())
        for length in options.lengths
        for batch in options.batch_sizes
    )
    return max(FEWEST_MINUTES, math.ceil(MARGIN * seconds / 60))


def _seconds(
    size: str,
    options: BenchmarkOptions,
    length: int,
    batch: int,
    students: int,
    draws: DrawOptions,
) -> float:
    """Seconds to time all cases of one length and batch size on a slow machine."""
    blocks, width, _, cond_width = shape_of_size(size)
    on_gpu = demand_of(size).sample[0] > 0
    flops_per_s = SLOW_FLOPS[options.timed_dtype] if on_gpu else CPU_FLOPS
    network = denoiser_shape(blocks, width, GPT2_TOKENS, cond_width)
    decoders = len(options.baselines) + ("transformers" in options.baselines)  # its two caches
    texts, rows, short = map(
        sum,
        zip(*(_costs(draws, steps, length) for steps in options.benchmark_steps), strict=True),
    )
    texts, rows = students * texts + decoders, students * rows + decoders * length
    computing = forward_flops(network, texts * batch, length, rows * batch) / flops_per_s
    decoding = (decoders * length + students * short) * blocks * DECODE_S
    compiling = COMPILE_S * blocks if on_gpu and "transformers" in options.baselines else 0.0
    return compiling + (options.repeats + 1) * (computing + decoding)


def _costs(draws: DrawOptions, steps: int, length: int) -> tuple[float, float, float]:
    """What a student takes to write a text at most: a sampler may take less.

    Returns:
        texts of this length that networks read, positions that they read out, and passes over a
        few tokens, which take as long as those of a decoder
    """
    if draws.sampler == "speculative":
        reads = draft_reads(draws.draft_tokens or 4, steps, length, length)
        return (
            (reads.denoiser + reads.scorer) / length,
            reads.drafted + reads.scorer,
            2 * reads.drafts,
        )
    passes, rows = SAMPLER_PASSES[draws.sampler](steps, length, length)
    asked = passes * (draws.candidates or 8) if draws.sampler == "energy" else 0
    return passes + asked, rows + asked * length, 0

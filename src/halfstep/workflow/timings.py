"""The jobs of `halfstep latency`: what each of them times, and how long it may take."""

from __future__ import annotations

import math

from halfstep.config import BenchmarkOptions, Config, shape_of_size
from halfstep.resolve import flags, subsection
from halfstep.workflow.machine import demand_of

TRAINED = "trained"
"""Stands for a size in the name of a job: the trained network of its teacher."""

# A slow machine, because these numbers become time limits.
SLOW_FLOPS = {"bfloat16": 80e12, "float32": 10e12}  # per second, on a GPU
CPU_FLOPS = 20e9
DECODE_S = 2e-3  # to write one token: one block of an autoregressive network, on any device
COMPILE_S = 3.0  # to compile one block of transformers' network, for each length and batch size
FEWEST_MINUTES = 30
MARGIN = 1.5


def latency_jobs(config: Config, teacher: str) -> dict[str, BenchmarkOptions]:
    """What each job of a teacher's timings times, by its name: {size}/length-{lengths}.

    The trained network is always timed at the length of its samples, and only there also with
    more_batch_sizes and more_steps. The first teacher's jobs time the further sizes as well.

    A job has one length. Only where a network is so small that it needs no GPU, lengths with the
    same grid share a job, because there a start of a process costs more than the timing.
    """
    benchmark, about = config.benchmark, config.teachers[teacher]
    everywhere = BenchmarkOptions(**subsection(benchmark, BenchmarkOptions).model_dump())
    at_samples = everywhere.model_copy(
        update={
            "batch_sizes": list(
                dict.fromkeys([*benchmark.batch_sizes, *benchmark.more_batch_sizes])
            ),
            "benchmark_steps": sorted({*benchmark.benchmark_steps, *benchmark.more_steps}),
        }
    )
    grids = dict.fromkeys(benchmark.lengths, everywhere)
    trained = grids | {config.corpora[about.corpus].length: at_samples}
    jobs = _jobs_of(TRAINED, about.network.size, trained)
    if teacher == next(iter(config.teachers)):
        for size in benchmark.sizes:
            jobs |= _jobs_of(size, size, grids)
    return jobs


def _jobs_of(
    name: str, size: str, grids: dict[int, BenchmarkOptions]
) -> dict[str, BenchmarkOptions]:
    """The jobs of one network, from what is timed at each length."""
    is_small = demand_of(size).sample[0] == 0
    groups: dict[object, list[int]] = {}
    for length, grid in sorted(grids.items()):
        groups.setdefault(flags(grid) if is_small else length, []).append(length)
    return {
        f"{name}/length-{'-'.join(map(str, lengths))}": grids[lengths[0]].model_copy(
            update={"lengths": lengths}
        )
        for lengths in groups.values()
    }


def latency_minutes(size: str, options: BenchmarkOptions) -> int:
    """Time limit of a job: what it takes on a slow machine, and half of that again."""
    seconds = sum(
        _seconds(size, options, length, batch)
        for length in options.lengths
        for batch in options.batch_sizes
    )
    return max(FEWEST_MINUTES, math.ceil(MARGIN * seconds / 60))


def _seconds(size: str, options: BenchmarkOptions, length: int, batch: int) -> float:
    """Seconds to time all cases of one length and batch size on a slow machine."""
    blocks, width, *_ = shape_of_size(size)
    on_gpu = demand_of(size).sample[0] > 0
    flops_per_s = SLOW_FLOPS[options.timed_dtype] if on_gpu else CPU_FLOPS
    # Of a block and a token: 12 width^2 weights, and attention to all tokens; twice, to multiply
    # and to add.
    per_token = 2 * blocks * (12 * width**2 + 2 * length * width)
    decoders = len(options.baselines) + ("transformers" in options.baselines)  # its two caches
    passes = sum(options.benchmark_steps) + decoders
    computing = passes * batch * length * per_token / flops_per_s
    decoding = decoders * length * blocks * DECODE_S
    compiling = COMPILE_S * blocks if on_gpu and "transformers" in options.baselines else 0.0
    return compiling + (options.repeats + 1) * (computing + decoding)

"""The jobs of `halfstep latency`: what each of them times, and how long it may take."""

from __future__ import annotations

import math

from halfstep.config import BenchmarkOptions, Config, shape_of_size
from halfstep.models.flops import denoiser_shape, forward_flops
from halfstep.resolve import flags
from halfstep.workflow.machine import demand_of
from halfstep.workflow.networks import GPT2_TOKENS

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

    A job has one length. Only where a network is so small that it needs no GPU, lengths with the
    same steps share a job, because there a start of a process costs more than the timing.

    The trained network is always timed at the length of its samples, there also at more_steps, and
    at more_batch_sizes in jobs of their own, {size}/length-{length}-batch-{batch}. The first
    teacher's jobs time the further sizes as well.
    """
    benchmark, about = config.benchmark, config.teachers[teacher]
    common = BenchmarkOptions(**benchmark.model_dump(include=set(BenchmarkOptions.model_fields)))
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
    blocks, width, _, cond_width = shape_of_size(size)
    on_gpu = demand_of(size).sample[0] > 0
    flops_per_s = SLOW_FLOPS[options.timed_dtype] if on_gpu else CPU_FLOPS
    network = denoiser_shape(blocks, width, GPT2_TOKENS, cond_width)
    decoders = len(options.baselines) + ("transformers" in options.baselines)  # its two caches
    passes = sum(options.benchmark_steps) + decoders
    read_out = batch * length * (len(options.benchmark_steps) + decoders)
    computing = forward_flops(network, passes * batch, length, read_out) / flops_per_s
    decoding = decoders * length * blocks * DECODE_S
    compiling = COMPILE_S * blocks if on_gpu and "transformers" in options.baselines else 0.0
    return compiling + (options.repeats + 1) * (computing + decoding)

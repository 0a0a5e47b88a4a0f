"""`halfstep time-sampling`: seconds to write n tokens, students at each step count against the baseline with its KV cache."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch

from halfstep import checkpoint, provenance, timing
from halfstep.checkpoint import files as model_files
from halfstep.config import Benchmark, Machine
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.files import write_json
from halfstep.metrics.rows import model_name, name_parts, row
from halfstep.models import gpt
from halfstep.progress import Progress
from halfstep.training.loop import device_of

SEED = 1


def time_sampling(checkpoint: Path, baseline: Path, output: Path, benchmark: Benchmark, machine: Machine) -> None:
    """Write latency rows: median seconds of whole calls, quartiles as low and high.

    At each length and batch size all cases take turns in one process, on one device, in the weights' own dtype. Texts may be longer
    than those trained on (positions are rotary): for time that does not matter.

    Args:
        checkpoint: a diffusion checkpoint; every step count runs its network
        baseline: an autoregressive checkpoint
        output: JSON file of the rows
    """
    device = device_of(machine)
    student, peer = _load(checkpoint, "diffusion", device), _load(baseline, "autoregressive", device)
    rows, places = [], list(product(benchmark.lengths, benchmark.batch_sizes))
    calls = len(places) * (1 + len(benchmark.benchmark_steps)) * (1 + benchmark.repeats)
    with Progress("time-sampling", calls, "call") as progress:
        for length, batch in places:
            cases: dict[int | None, Callable] = {
                steps: partial(sample, student.denoiser, batch, length, steps, schedule=LogLinear(), seed=SEED, device=device)
                for steps in benchmark.benchmark_steps
            }
            evaluations = {steps: case().network_evaluations.double().mean().item() for steps, case in cases.items()}  # warms up, too
            cases[None] = partial(gpt.generate, peer.network, batch, length, peer.eos_id, seed=SEED)
            evaluations[None] = length - 1.0  # BOS is given
            for steps, timed in timing.measure_in_turns(cases, benchmark.repeats, device=device, tick=progress.update).items():
                folder, model = (baseline, peer) if steps is None else (checkpoint, student)
                weight = next(model.network.parameters())
                rows.append(row(
                    "latency_s", "interleaved", timed.median_s, (timed.low_s, timed.high_s), **name_parts(model_name(folder)), steps=steps,
                    sampler=None if steps is None else "ancestral", network_evaluations=evaluations[steps], num_samples=batch, seed=SEED, weights="ema",
                    draw_dtype="float64", checkpoint=model.sha256[:16], length=length, batch_size=batch, tokens_per_s=batch * length / timed.median_s,
                    device=timing.device_name(device), dtype=str(weight.dtype).removeprefix("torch."),
                    params=sum(p.numel() for p in model.network.parameters()),
                ))  # fmt: skip
    write_json(output, rows)
    provenance.record(output.with_suffix(f".{provenance.NAME}"), [output], [*model_files(checkpoint, "ema"), *model_files(baseline, "ema")])


def _load(folder: Path, kind: str, device: torch.device) -> checkpoint.Model:
    model = checkpoint.load(folder, "ema", str(device))
    if model.kind != kind:
        raise HalfstepError(
            f"{folder}: holds a model of kind {model.kind}, expected {kind}; --checkpoint is the student, --baseline its peer"
        )
    return model

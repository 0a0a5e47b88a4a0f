"""The models that `halfstep latency` compares: students, how they write, and their baseline."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from halfstep.checkpoint import (
    Model,
    build_denoiser,
    build_network,
    checked_file,
    load_checkpoint,
    read_meta,
)
from halfstep.commands.decoders import Side, TimedDraws
from halfstep.commands.writers import load_scorer
from halfstep.config import BenchmarkOptions, DrawOptions, Network
from halfstep.data.tokenizer import read_tokenizer
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import cast_matrices
from halfstep.metrics.rows import model_name
from halfstep.models.gpt2 import GPT2


@dataclass(frozen=True)
class Sides:
    """The students, how they write, and the baseline that they are compared with, if there is one.

    scorer: the autoregressive model that the sampler asks, if it asks one
    """

    students: list[Side]
    baseline: Side | None
    draws: TimedDraws = field(default_factory=TimedDraws)
    scorer: Model | None = None


def check_untrained(
    checkpoint: list[Path], baseline: Path | None, size: str | None, variant: str | None
) -> None:
    """Refuse flags that untrained networks of a size cannot have."""
    if size and baseline:
        raise HalfstepError(
            f"baseline: found {baseline}, but networks of --size {size} are untrained, and so is "
            "their baseline; leave --baseline or --size out"
        )
    if size and variant:
        raise HalfstepError(
            f"variant: found {variant}, but networks of --size {size} are untrained, and the time "
            "of a sampler may depend on the text; leave --variant or --size out"
        )
    if size and len(checkpoint) > 1:
        raise HalfstepError(
            f"checkpoint: found {len(checkpoint)}, but networks of --size {size} have the "
            "vocabulary of one; name one, or leave --size out"
        )


def checked_draws(sampling: DrawOptions, variant: str | None, baseline: Path | None) -> TimedDraws:
    """How the students write; HalfstepError for options that rows would not tell."""
    usual = DrawOptions()
    if sampling.precision != usual.precision:
        raise HalfstepError(
            f"precision: found {sampling.precision}, but latency computes in --timed-dtype; "
            "leave --precision out"
        )
    if sampling != usual and variant is None:
        raise HalfstepError(
            f"variant: found none, but students write by {sampling.sampler} with options of the "
            "draws that are not the default; name this way to draw, for the column of the rows"
        )
    if sampling.asks_scorer and sampling.scorer is None and baseline is None:
        raise HalfstepError(
            f"baseline: found none, but sampler {sampling.sampler} asks an autoregressive model; "
            "name its checkpoint folder as --baseline or --scorer"
        )
    return TimedDraws(variant, sampling)


def trained_sides(
    folders: list[Path],
    baseline: Path | None,
    benchmark: BenchmarkOptions,
    draws: TimedDraws,
    device: torch.device,
) -> Sides:
    """The models of checkpoints; only students have other weights than the moving average."""
    students = [
        _load_side(folder, "diffusion", draws.options.weights, benchmark, device)
        for folder in folders
    ]
    for folder, student in zip(folders, students, strict=True):
        network = student.model.network
        if isinstance(network, GPT2) and max(benchmark.lengths) > network.length:
            raise HalfstepError(
                f"lengths: found {max(benchmark.lengths)}, but {folder} has the positions of "
                f"{network.length} tokens; lower benchmark.lengths"
            )
    names = [student.name for student in students]
    if twice := [name for name in names if names.count(name) > 1]:
        raise HalfstepError(
            f"checkpoint: found two of the name {twice[0]}, but rows tell students by their names; "
            "leave one of them out"
        )
    other = None
    if baseline is not None:
        other = _load_side(baseline, "autoregressive", "ema", benchmark, device)
    scorer = None
    if draws.options.asks_scorer:
        given = other.model if other and draws.options.scorer is None else None
        scorer = load_scorer(students[0].model, draws.options, given)
    return Sides(students, other, draws, scorer)


def _load_side(
    folder: Path, kind: str, weights: str, benchmark: BenchmarkOptions, device: torch.device
) -> Side:
    model = load_checkpoint(folder, weights, str(device), benchmark.timed_dtype)
    if model.kind != kind:
        raise HalfstepError(
            f"{folder}: holds a model of kind {model.kind}, expected {kind}; "
            "--checkpoint is the student, --baseline the autoregressive model"
        )
    return Side(model_name(folder), model, folder / "hf")


def untrained_sides(
    folder: Path, size: str, benchmark: BenchmarkOptions, device: torch.device
) -> Sides:
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

    return Sides([untrained("diffusion", "teacher")], untrained("autoregressive", "baseline"))

"""`halfstep latency`: what it takes to write n tokens, students at each step count against autoregression at its best."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

from halfstep import checkpoint, timing
from halfstep.checkpoint import checkpoint_files as model_files
from halfstep.config import Benchmark, Machine, Network
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.samplers import sample
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.files import write_json
from halfstep.metrics.rows import model_name, name_parts, row
from halfstep.models import gpt
from halfstep.models.cuda_graphs import cast_matrices
from halfstep.models.denoiser import SubsDenoiser
from halfstep.progress import Progress
from halfstep.records import provenance

SEED = 1
PATIENCE_S, FEW = (
    60,
    3,
)  # where one call of each case takes longer than this together, so many repeats must do
BASELINE = {
    "halfstep": "kv_cache",
    "transformers": "transformers",
    "vllm": "vllm",
}  # what a row's `sampler` says


@dataclass(frozen=True)
class Pair:
    """A student's network and its autoregressive peer, of one size; `hf` is the peer as transformers loads it, None of untrained weights."""

    student: str
    baseline: str
    weights: str
    denoiser: SubsDenoiser
    peer: torch.nn.Module
    sums: tuple[str | None, str | None]
    hf: Path | None


def latency(
    checkpoint: Path, baseline: Path, output: Path, benchmark: Benchmark, machine: Machine
) -> None:
    """Write latency rows: median seconds of whole calls, quartiles as low and high.

    At each length and batch size all cases take turns in one process, on one device, in one dtype. Texts may be longer than those
    trained on (positions are rotary): for time that does not matter. What does not fit into a CUDA device's memory is named and left out.

    Args:
        checkpoint: a diffusion checkpoint; every step count runs its network
        baseline: an autoregressive checkpoint
        output: JSON file of the rows
    """
    if join_group(machine).size > 1:
        raise HalfstepError(
            "processes: latency times one process, which others would disturb; leave --processes out"
        )
    device, rows = find_device(machine), []
    places = list(product(benchmark.lengths, benchmark.batch_sizes))
    calls = (
        len(places)
        * (len(benchmark.baselines) + len(benchmark.benchmark_steps))
        * benchmark.repeats
        * (1 + len(benchmark.sizes))
    )
    with Progress("latency", calls, "call") as progress:
        for pair, meta in _pairs(checkpoint, baseline, benchmark, device):
            writers = {
                name: _writer(name, pair, meta, benchmark, device) for name in benchmark.baselines
            }
            for length, batch in places:
                started = time.monotonic()
                cases = _cases(pair, writers, length, batch, benchmark, device)
                repeats = (
                    benchmark.repeats
                    if time.monotonic() - started < PATIENCE_S
                    else min(FEW, benchmark.repeats)
                )
                evaluations = {key: passes for key, (_, passes) in cases.items()}
                timed = timing.measure_in_turns(
                    {key: call for key, (call, _) in cases.items()},
                    repeats,
                    0,
                    device,
                    progress.update,
                )
                for (who, steps), took in timed.items():
                    name, network = (
                        (pair.student, pair.denoiser.network)
                        if steps
                        else (pair.baseline, pair.peer)
                    )
                    passes = evaluations[who, steps]
                    rows.append(row(
                        "latency_s", "interleaved", took.median_s, (took.low_s, took.high_s), **name_parts(name), steps=steps, sampler=who,
                        network_evaluations=passes, num_samples=batch, seed=SEED, weights=pair.weights, draw_dtype="float64" if who in ("ancestral", "kv_cache") else None,
                        checkpoint=pair.sums[steps is None], length=length, batch_size=batch, tokens_per_s=batch * length / took.median_s,
                        tokens_per_forward=(length if steps else length - 1) / passes, energy_j=took.joules, device=timing.device_name(device),
                        dtype=benchmark.timed_dtype, params=sum(p.numel() for p in network.parameters()),
                    ))  # fmt: skip
    write_json(output, rows)
    provenance.write_record(
        output.with_suffix(f".{provenance.NAME}"),
        [output],
        [*model_files(checkpoint, "ema"), *model_files(baseline, "ema")],
    )


def _pairs(
    folder: Path, baseline: Path, benchmark: Benchmark, device: torch.device
) -> Iterator[tuple[Pair, dict]]:
    """The trained networks, then one pair of untrained ones for each further size, in memory one pair at a time."""
    student, peer = _load(folder, "diffusion", device), _load(baseline, "autoregressive", device)
    meta, dtype = student.meta, getattr(torch, benchmark.timed_dtype)
    sums = (student.sha256[:16], peer.sha256[:16])
    networks = [cast_matrices(model.network, dtype) for model in (student, peer)]
    yield (
        Pair(
            model_name(folder),
            model_name(baseline),
            "ema",
            student.denoiser,
            networks[1],
            sums,
            baseline / "hf",
        ),
        meta,
    )
    del student, peer, networks
    for size in benchmark.sizes:
        shape = meta | {"network": Network(size=size).model_dump()}
        with torch.device(device):
            networks = [
                cast_matrices(checkpoint.build_network(shape | {"kind": kind}), dtype)
                .eval()
                .requires_grad_(False)
                for kind in checkpoint.KINDS
            ]
        name = f"{size}-untrained"
        denoiser = checkpoint.build_denoiser(networks[0], shape)
        yield (
            Pair(
                f"{name}/teacher",
                f"{name}/baseline",
                "untrained",
                denoiser,
                networks[1],
                (None, None),
                None,
            ),
            shape,
        )


def _load(folder: Path, kind: str, device: torch.device) -> checkpoint.Model:
    model = checkpoint.load_checkpoint(folder, "ema", str(device))
    if model.kind != kind:
        raise HalfstepError(
            f"{folder}: holds a model of kind {model.kind}, expected {kind}; --checkpoint is the student, --baseline its peer"
        )
    return model


def _cases(
    pair: Pair, writers: dict, length: int, batch: int, benchmark: Benchmark, device: torch.device
) -> dict[tuple[str, int | None], tuple]:
    """{(sampler, steps): (call, network evaluations)} of what runs here; the call that tells is a warm-up, too."""
    low = benchmark.timed_dtype != "float32"

    def student(steps: int):
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            return sample(
                pair.denoiser.inference_copy,
                batch,
                length,
                steps,
                draws=Draws(SEED),
                device=device,
            )

    found = {}
    wanted = [("ancestral", steps) for steps in benchmark.benchmark_steps] + [
        (BASELINE[name], None) for name in writers
    ]
    for who, steps in wanted:
        try:
            if steps:
                call: Callable = partial(student, steps)
                found[who, steps] = call, call().network_evaluations.double().mean().item()
            else:
                call = next(writers[name] for name in writers if BASELINE[name] == who)(
                    batch, length
                )
                call()
                found[who, None] = call, max(length - 1.0, 1.0)  # BOS is given
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            model = pair.student if steps else pair.baseline
            print(
                f"note: {model}, {who}, {batch} texts of {length} tokens: not enough memory on {timing.device_name(device)}; left out",
                file=sys.stderr,
            )
    return found


def _writer(
    name: str, pair: Pair, meta: dict, benchmark: Benchmark, device: torch.device
) -> Callable[[int, int], Callable[[], object]]:
    """(batch, length) -> a call that writes so many texts with this baseline."""
    dtype, eos = getattr(torch, benchmark.timed_dtype), meta["eos_id"]
    longest = max(benchmark.lengths)
    if name == "halfstep":
        compute = None if dtype == torch.float32 else dtype

        def ours(batch: int, length: int):
            decoder = gpt.Decoder(pair.peer, batch, length, compute=compute)
            return partial(gpt.decode, pair.peer, batch, length, eos, seed=SEED, decoder=decoder)

        return ours
    if pair.hf is not None and not (pair.hf / "config.json").is_file():
        raise HalfstepError(
            f"{pair.hf}: no config.json there, so nothing that {name} can load; train the baseline again, or leave {name} out of baselines"
        )
    if name == "vllm":
        return _vllm(pair, benchmark, eos, longest)
    try:
        from transformers import AutoModelForCausalLM, GPTNeoXConfig
    except ImportError:
        raise HalfstepError(
            "baselines: transformers is not installed; pip install transformers, or leave it out of --baselines"
        ) from None
    if pair.hf is None:
        model = AutoModelForCausalLM.from_config(
            GPTNeoXConfig(**gpt.gpt_neox_config(pair.peer, longest, eos)), dtype=dtype
        )
    else:
        model = AutoModelForCausalLM.from_pretrained(
            pair.hf, max_position_embeddings=longest, dtype=dtype
        )
    model = model.to(device).eval()
    model.generation_config.eos_token_id = (
        None  # all texts are of one length, so nothing asks each token whether it is the last
    )

    def theirs(batch: int, length: int):
        start = torch.full((batch, 1), eos, device=device)
        how = {
            "max_new_tokens": length - 1,
            "do_sample": True,
            "top_k": 0,
            "top_p": 1.0,
            "cache_implementation": "static",
            "pad_token_id": eos,
        }
        return lambda: (
            torch.manual_seed(SEED),
            model.generate(start, attention_mask=torch.ones_like(start), **how),
        )[1]

    return theirs


def _vllm(
    pair: Pair, benchmark: Benchmark, eos: int, longest: int
) -> Callable[[int, int], Callable[[], object]]:
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise HalfstepError(
            "baselines: vllm is not installed here; pip install vllm (it needs a CUDA device), or leave it out of --baselines"
        ) from None
    if pair.hf is None:
        raise HalfstepError(
            "baselines: vllm loads folders, and untrained networks have none; give it without --sizes"
        )
    engine = LLM(
        str(pair.hf),
        skip_tokenizer_init=True,
        dtype=benchmark.timed_dtype,
        max_model_len=longest,
        seed=SEED,
    )

    def theirs(batch: int, length: int):
        how = SamplingParams(
            temperature=1.0, max_tokens=length - 1, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": [eos]} for _ in range(batch)]
        return lambda: engine.generate(prompts, how, use_tqdm=False)

    return theirs

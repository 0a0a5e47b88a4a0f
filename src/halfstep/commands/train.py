"""`halfstep pretrain` and `halfstep train-baseline`: the teacher of round 1, and its autoregressive peer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.config import Machine, Network, Training
from halfstep.data.batches import batch_indices
from halfstep.data.pack import Windows, corpus_files
from halfstep.diffusion.objective import nelbo, stratified_times
from halfstep.diffusion.readout import cross_entropy
from halfstep.diffusion.schedules import SCHEDULES, masked_share
from halfstep.distributed.group import ALONE, Group, join_group
from halfstep.models import flops
from halfstep.models.gpt import save_gpt_neox
from halfstep.records import provenance
from halfstep.records.journal import Journal
from halfstep.training.loop import Fitted, find_device, fit, step_generator

VALIDATION_WINDOWS = 512  # held-out windows behind each figure, or all there are


def pretrain(
    corpus: Path,
    output: Path,
    network: Network,
    training: Training,
    machine: Machine,
    seed: int = 1,
) -> None:
    """Train a masked diffusion language model by MDLM's continuous-time NELBO (arXiv 2406.07524, eq. 10).

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: folder of the checkpoint
        seed: of weights, batches, masks and times
    """
    if _train(
        "diffusion", "pretrain", corpus, output, network, training, machine, seed, diffusion_loss
    ):
        provenance.write_record(
            output / provenance.NAME, [output], corpus_files(corpus, "train", "validation")
        )


def train_baseline(
    corpus: Path,
    output: Path,
    network: Network,
    training: Training,
    machine: Machine,
    seed: int = 1,
) -> None:
    """Train the autoregressive peer by next-token cross-entropy; hf/ holds its average as transformers loads it.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: folder of the checkpoint
        seed: of weights and batches
    """
    if not _train(
        "autoregressive",
        "train-baseline",
        corpus,
        output,
        network,
        training,
        machine,
        seed,
        autoregressive_loss,
    ):
        return
    model = checkpoint.load_checkpoint(output)
    save_gpt_neox(
        model.network, output / "hf", model.length, model.eos_id, output / "tokenizer.json"
    )
    provenance.write_record(
        output / provenance.NAME,
        [output, output / "hf"],
        corpus_files(corpus, "train", "validation"),
    )


Objective = tuple[Callable, Callable]


def diffusion_loss(network: nn.Module, meta: dict) -> Objective:
    """MDLM: stratified times and masking uniforms of the global batch; the summed NELBO of a part; nats per token."""
    denoiser = checkpoint.build_denoiser(network, meta)
    min_t = meta["training"]["min_t"]

    def corrupt(x0: Tensor, random: torch.Generator) -> tuple[dict[str, Tensor], float]:
        B, L = x0.shape
        t = stratified_times(torch.rand(B, generator=random, dtype=torch.float64), min_t)
        return {
            "x0": x0,
            "t": t,
            "u": torch.rand(B, L, generator=random, dtype=torch.float64),
        }, B * L

    return corrupt, lambda part: nelbo(denoiser, part["x0"], part["t"].float(), part["u"])


def autoregressive_loss(network: nn.Module, meta: dict) -> Objective:
    """Next-token cross-entropy, summed over a part."""

    def loss(part: dict[str, Tensor]) -> Tensor:
        x0 = part["x0"]
        h, goal = network(x0[:, :-1]).flatten(0, 1), x0[:, 1:].flatten()
        linear = network.output_layer.linear
        return cross_entropy(
            h,
            (linear.weight, torch.zeros(linear.out_features, device=h.device)),
            goal,
            torch.ones_like(goal, dtype=torch.float32),
        )

    return lambda x0, random: ({"x0": x0}, x0.numel() - len(x0)), loss


def held_out(
    objective: Objective,
    name: str,
    windows: Windows,
    device: torch.device,
    micro_batch: int,
    group: Group = ALONE,
) -> Callable[[], dict[str, float]]:
    """A measurement of the held-out loss on fixed windows, times and masks: nats per token. Each process takes as many windows as the others, or,
    where they do not divide, all of them."""
    corrupt, loss = objective
    x0 = windows[torch.arange(min(VALIDATION_WINDOWS, len(windows)))]
    parts, divisor = corrupt(x0, step_generator(0, 0))
    if shared := len(x0) % group.size == 0:
        parts = {k: v[group.local_slice(len(x0))] for k, v in parts.items()}

    def measure() -> dict[str, float]:
        rows = len(next(iter(parts.values())))
        pieces = (
            {k: v[i : i + micro_batch].to(device) for k, v in parts.items()}
            for i in range(0, rows, micro_batch)
        )
        total = sum(loss(piece).double() for piece in pieces)
        return {name: (group.all_sum(total) if shared else total.item()) / divisor}

    return measure


def datasets(corpus: Path, windows: Windows) -> list[dict]:
    """What a run on this corpus was fed, for its journal."""
    return [
        {"name": f"{corpus.name}/train", "digest": windows.facts["sha256"], "source": str(corpus)}
    ]


def _train(
    kind: str,
    node: str,
    corpus: Path,
    output: Path,
    network: Network,
    training: Training,
    machine: Machine,
    seed: int,
    objective,
) -> bool:
    """True in the process that wrote the checkpoint."""
    group, device, windows = join_group(machine), find_device(machine), Windows(corpus, "train")
    meta = {
        "kind": kind, "network": network.model_dump(), "vocab_size": windows.vocab_size, "eos_id": windows.eos_id, "length": windows.length,
        "corpus": corpus.name, "corpus_sha256": windows.facts["sha256"], "training": training.model_dump(), "seed": seed, "round": 0,
    }  # fmt: skip
    torch.manual_seed(seed)
    net = checkpoint.build_network(meta, training.dropout).to(device)
    group.shard(net)
    texts, read = (
        training.batch_size,
        windows.length * masked_share(SCHEDULES[network.schedule]())
        if kind == "diffusion"
        else windows.length - 1,
    )  # times are uniform: half is masked
    per_token = flops.training_flops(
        net, texts, windows.length, texts * read, texts if network.time_conditioning else 1
    ) / (texts * windows.length)
    loss = objective(net, meta)
    validation = "val/nelbo" if kind == "diffusion" else "val/nll"
    teacher = output.parent.name
    params = {"seed": seed, **network.model_dump(), **training.model_dump()}
    name = "teacher" if kind == "diffusion" else "baseline"
    with Journal(
        output,
        name=name,
        node=f"{node}/{teacher}",
        params=params,
        tags={"teacher": teacher, "round": 0},
        datasets=datasets(corpus, windows),
        writes=group.is_main,
    ) as journal:
        fitted = fit(
            net, lambda step: windows[batch_indices(len(windows), training.batch_size, seed, step)], *loss,
            held_out(loss, validation, Windows(corpus, "validation"), device, machine.micro_batch, group), training,
            seed=seed, device=device, micro_batch=machine.micro_batch, state=output / "state", label=f"{node} {teacher}", journal=journal,
            group=group, time_limit=machine.time_limit, flops_per_token=per_token,
        )  # fmt: skip
        finish(output, net, fitted, meta, corpus, group)
        journal.close(checkpoint=output if group.is_main else None)
    return group.is_main


def finish(
    output: Path, network: nn.Module, fitted: Fitted, meta: dict, corpus: Path, group: Group = ALONE
) -> None:
    """Write the checkpoint and drop the rolling state: the first process does, of what all hold."""
    buffers = dict(network.named_buffers())
    tensors = {
        "model.safetensors": {**dict(network.named_parameters()), **buffers}, "ema.safetensors": {**fitted.ema.shadow, **buffers},
        "best.safetensors": {**fitted.best, **buffers}, "optimizer.safetensors": fitted.moments,
    }  # fmt: skip
    tensors = {name: group.gather_tensors(named) for name, named in tensors.items()}
    if group.is_main:
        meta = {
            **meta,
            "ema_updates": fitted.ema.updates,
            "best_step": fitted.best_step,
            "validation": dict(sorted(fitted.validation.items())),
        }  # a resumed run knows no order
        checkpoint.save_checkpoint(output, tensors, meta, corpus / "tokenizer.json")
        shutil.rmtree(output / "state", ignore_errors=True)
    group.all_max(0)  # all wait until it is there

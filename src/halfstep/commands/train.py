"""`halfstep pretrain` and `halfstep train-baseline`: the first teacher, and the baseline."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.commands.import_transformers import Logits
from halfstep.commands.origins import Origin, read_denoiser, read_origin
from halfstep.config import Machine, Network, Pretraining, Seed, Training
from halfstep.data.batches import batch_indices, describe_epochs
from halfstep.data.pack import Windows, corpus_files
from halfstep.diffusion.contracts import Denoiser, Draws
from halfstep.diffusion.masking import to_device
from halfstep.diffusion.objective import nelbo, stratified_times
from halfstep.diffusion.readout import cross_entropy
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import masked_share
from halfstep.distributed.device import find_device, memory_of
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.models import flops
from halfstep.models.adapt import annealed_pairs
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt import GPT, save_gpt_neox
from halfstep.records import provenance
from halfstep.records.journal import Journal
from halfstep.training.blocks import prepare_blocks
from halfstep.training.loop import fit
from halfstep.training.optim import trained_parameters
from halfstep.training.state import Run, Start, TrainingState
from halfstep.training.step import (
    Batch,
    Examples,
    Objective,
    Tensors,
    micro_batches,
    step_generator,
)

TrainedFiles = dict[str, dict[str, Tensor]]
"""By file of a checkpoint: the trained tensors by name"""
WATCHED, WATCHED_STEPS = 16, 32  # texts and sampling steps of a validation
NEVER = 1.0  # a uniform that masks its position at no time, because 1 - alpha(t) <= 1
VALIDATION_WINDOWS = 512  # held-out windows behind each figure, or all there are


def pretrain(  # noqa: PLR0913  the flags of the command
    corpus: Path,
    output: Path,
    network: Network,
    training: Pretraining,
    machine: Machine,
    seed: Seed = 1,
    adapt: str | None = None,
    source: Annotated[str | None, tyro.conf.arg(name="from")] = None,
    logits: Logits | None = None,
    from_weights: Literal["ema", "raw"] = "ema",
    trust_remote_code: bool = False,
) -> None:
    """Train a masked diffusion language model by MDLM's NELBO (arXiv 2406.07524, eq. 10).

    With --adapt it starts from the weights of an autoregressive model, with full attention and
    logits shifted by one (DiffuGPT, arXiv 2410.17891), and needs far fewer steps. These are a
    checkpoint of `halfstep train-baseline` or a GPT-2 model of transformers, with the size and the
    tokenizer of this training.

    With --from it fine-tunes a published denoiser on the corpus: whatever `halfstep import` reads,
    such as hf:answerdotai/ModernBERT-base. The network is that of the weights; --size must be its
    size, and the corpus must have its tokens.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: folder of the checkpoint
        seed: of weights, batches, masks and times
        adapt: folder of the weights to start from, or hub name (gpt2)
        source: file, folder or hub name of the denoiser to start from; hf: before a name or a
            folder of transformers
        logits: which output of an hf: model predicts a token: the one at its position (same) or at
            the position before (shifted); by default, what is known of the family
        from_weights: weights of --from; ema: the moving average if it has one; or raw
        trust_remote_code: run the Python files in the repository of an hf: model, which can do
            whatever you can do
    """
    _check_architecture(network)
    read, origin = corpus_files(corpus, "train", "validation"), None
    if adapt and source:
        raise HalfstepError(
            f"--from {source}: found it with --adapt {adapt}, but a training has one start; leave "
            "one of them out"
        )
    if training.anneal_attention and not adapt:
        raise HalfstepError(
            f"--anneal-attention: found {training.anneal_attention} without --adapt, but only "
            "adapted weights know causal attention; leave it out"
        )
    if adapt:
        origin = read_origin(adapt, corpus, network)
    elif source:
        origin = read_denoiser(source, corpus, network, logits, from_weights, trust_remote_code)
    elif logits or trust_remote_code:
        unused = f"--logits {logits}" if logits else "--trust-remote-code"
        raise HalfstepError(f"{unused}: found it without --from hf:...; leave it out")
    if origin:
        network, read = origin.network, read + origin.files
    job = TrainingJob.begin(f"pretrain/{output.parent.name}", corpus, output, machine)
    if _train(job, "diffusion", network, training, seed, origin):
        provenance.write_record(
            output / provenance.NAME, [output, *(output / name for name in checkpoint.KEPT)], read
        )


def train_baseline(
    corpus: Path,
    output: Path,
    network: Network,
    training: Training,
    machine: Machine,
    seed: Seed = 1,
) -> None:
    """Train the autoregressive baseline by next-token cross-entropy.

    The subfolder hf/ holds its averaged weights in the format of transformers.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: folder of the checkpoint
        seed: of weights and batches
    """
    _check_architecture(network)
    job = TrainingJob.begin(f"train-baseline/{output.parent.name}", corpus, output, machine)
    if not _train(job, "autoregressive", network, training, seed):
        return
    model, hf = checkpoint.load_checkpoint(output), output / "hf"
    save_gpt_neox(model.network, hf, model.length, model.eos_id, output / "tokenizer.json")
    read = corpus_files(corpus, "train", "validation")
    provenance.write_record(output / provenance.NAME, [output, hf], read)


def _check_architecture(network: Network) -> None:
    """Raise HalfstepError if the user, and not the weights, chose another architecture."""
    if network.architecture != "dit":
        raise HalfstepError(
            f"--architecture: found {network.architecture}, which follows from the weights of "
            "--adapt or import-baseline, and from nothing else; leave it out"
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True)
class TrainingJob:
    """What every training command does around `fit`.

    node: command and model, "distill-round/stories-tiny/kl_backward/round-3"
    """

    node: str
    corpus: Path
    output: Path
    machine: Machine
    windows: Windows
    group: Group
    device: torch.device

    @classmethod
    def begin(cls, node: str, corpus: Path, output: Path, machine: Machine) -> "TrainingJob":
        """Join the other ranks, find the device and open the corpus."""
        group, device = join_group(machine), find_device(machine)
        return cls(node, corpus, output, machine, Windows(corpus, "train"), group, device)

    def place(self, network: nn.Module, also: int = 0) -> None:
        """Move the network that is trained to its device, share it among the ranks, and prepare
        its blocks as `machine` asks.

        HalfstepError if this device cannot hold what is in memory all the time: `also` bytes, the
        weights, and of those that are trained the gradients, two moments and the average.
        """
        learning = trained_parameters(network).values()
        ranks = self.group.size if self.group.shards(network) else 1
        needed = also + (_bytes(network.parameters()) + 4 * _bytes(learning)) // ranks
        if needed > (found := memory_of(self.device)):
            raise HalfstepError(
                f"{self.node}: needs at least {needed / 1e9:.3g} GB for weights, gradients, "
                f"optimizer state and average, but this process has {found / 1e9:.3g} GB on "
                f"{self.device}; take more --processes, --lora-rank in rounds, or another machine"
            )
        network.to(self.device)
        self.group.shard(network)
        prepare_blocks(network, self.machine, self.device)

    def corpus_facts(self) -> dict:
        """Keys of meta.json that name the corpus."""
        return {"corpus": self.corpus.name, "corpus_sha256": self.windows.facts["sha256"]}

    def journal(
        self, name: str, params: dict, tags: dict, datasets: Sequence[dict] = ()
    ) -> Journal:
        """The journal of this training, with the corpus as its first data set."""
        read = {
            "name": f"{self.corpus.name}/train",
            "digest": self.windows.facts["sha256"],
            "source": str(self.corpus),
        }
        return Journal(
            self.output,
            name=name,
            node=self.node,
            params=params,
            tags=tags,
            datasets=[read, *datasets],
            writes=self.group.is_main,
        )

    def batches(self, training: Training, seed: int) -> Callable[[int], Examples]:
        """The global batch of a step, as a function of (seed, step); prints how many epochs."""
        windows, batch_size = self.windows, training.batch_size
        if self.group.is_main:
            epochs = describe_epochs(len(windows), batch_size, training.num_steps)
            print(f"{self.node.replace('/', ' ', 1)}: {epochs}", flush=True)

        def batch(step: int) -> Examples:
            indices = batch_indices(len(windows), batch_size, seed, step)
            return Examples(windows[indices], windows.asked(indices))

        return batch

    def run(self, journal: Journal, flops_per_token: float) -> Run:
        """Where `fit` runs, and where it reports."""
        return Run(
            device=self.device,
            micro_batch=self.machine.micro_batch,
            folder=self.output / "state",
            label=self.node.replace("/", " ", 1),
            journal=journal,
            group=self.group,
            time_limit=self.machine.time_limit,
            flops_per_token=flops_per_token,
            windows=len(self.windows),
        )

    def finish(
        self,
        state: TrainingState,
        meta: dict,
        journal: Journal,
        kept: Mapping[str, bytes],
        merge: Callable[[TrainedFiles], Mapping] | None = None,
    ) -> None:
        """Write the checkpoint on rank 0 and delete the rolling one; all ranks wait for that.

        `kept`: files of the model of transformers that it came from, for its export. With adapters,
        `merge` makes the tensors of each file of those that were trained.
        """
        stored = state.network.state_dict().keys()  # without what is computed from the shape
        buffers = {key: value for key, value in state.network.named_buffers() if key in stored}
        files = {
            "model.safetensors": {**trained_parameters(state.network), **buffers},
            "ema.safetensors": {**state.ema.shadow, **buffers},
            "best.safetensors": {**state.best, **buffers},
            "optimizer.safetensors": state.optimizer_state,
        }
        tensors = {file: self.group.gather_tensors(named) for file, named in files.items()}
        if self.group.is_main:
            meta = {
                **meta,
                "ema_updates": state.ema.updates,
                "best_step": state.best_step,
                # Sorted, because a resumed training has the figures in another order.
                "validation": dict(sorted(state.validation.items())),
            }
            files = merge(tensors) if merge else tensors
            checkpoint.write_kept(self.output, kept)
            tokenizer = self.corpus / "tokenizer.json"
            checkpoint.save_checkpoint(self.output, files, meta, tokenizer, list(kept))
            shutil.rmtree(self.output / "state", ignore_errors=True)
        self.group.barrier()
        journal.close(checkpoint=self.output)


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows x0[B, L], and how to measure a loss on them: device, micro-batch, ranks.

    asked bool [B, L]: the positions that have a loss; None: all
    """

    windows: Windows
    x0: Tensor
    asked: Tensor | None
    device: torch.device
    micro_batch: int
    group: Group

    @classmethod
    def read(cls, corpus: Path, device: torch.device, machine: Machine, group: Group) -> "HeldOut":
        """The first VALIDATION_WINDOWS held-out windows of a corpus."""
        windows = Windows(corpus, "validation")
        indices = torch.arange(min(VALIDATION_WINDOWS, len(windows)))
        asked = windows.asked(indices)
        return cls(windows, windows[indices], asked, device, machine.micro_batch, group)

    def responses(self, texts: Tensor) -> list[Tensor] | None:
        """The responses in texts[N, L] up to and with their first end-of-text; None without pairs.

        Text i has the prompt of window i mod B.
        """
        spans = self.windows.spans(np.arange(len(texts)) % len(self.x0), texts.numpy())
        if spans is None:
            return None
        return [text[begin:end] for text, (begin, end) in zip(texts, spans.tolist(), strict=True)]

    def mean_loss(self, objective: Objective) -> float:
        """The loss of the windows, always with the same random numbers, over the batch's divisor.

        The ranks share the windows if these divide evenly; otherwise every rank measures all.
        """
        batch = objective.corrupt(self.x0, step_generator(0, 0), asked=self.asked)
        windows = len(self.x0)
        shared = windows % self.group.size == 0
        rows = self.group.local_slice(windows) if shared else slice(windows)
        tensors = {name: value[rows] for name, value in batch.tensors.items()}
        parts = micro_batches(tensors, self.micro_batch)
        total = sum(objective.loss(part).double() for part, _ in parts)
        return (self.group.all_sum(total) if shared else total.item()) / batch.divisor


def watched_texts(denoiser: Denoiser, held_out: HeldOut, steps: int, seed: int) -> Tensor:
    """WATCHED texts of a denoiser in training, int64 [WATCHED, L] on the host.

    What is never masked in a corpus, such as a frame, is given as it is in held-out windows.
    """
    rows = torch.arange(WATCHED) % len(held_out.x0)
    given = None
    if held_out.asked is not None:
        given = held_out.x0[rows].masked_fill(held_out.asked[rows], denoiser.mask_id)
    length, device = held_out.x0.shape[1], held_out.device
    draws = Draws(seed)
    texts = sample(denoiser, WATCHED, length, steps, draws=draws, given=given, device=device)
    return texts.ids.cpu()


def watch_empty(texts: Tensor, held_out: HeldOut, most: float | None) -> dict[str, float]:
    """The share of texts[N, L] whose response is only end-of-text; nothing without pairs.

    A model that fills windows with end-of-text can learn to write nothing else. HalfstepError if
    the share is above `most`.
    """
    responses = held_out.responses(texts)
    if responses is None:
        return {}
    share = sum(int(one[0] == held_out.windows.eos_id) for one in responses) / len(responses)
    if most is not None and share > most:
        raise HalfstepError(
            f"{share:.0%} of {len(responses)} drawn responses are only end-of-text, "
            f"max_empty_texts is {most:g}: the model collapses; lower lr or length, or train on "
            "longer responses"
        )
    return {"val/only_end_of_text": share}


@dataclass(frozen=True)
class DiffusionObjective:
    """MDLM's NELBO at stratified times (arXiv 2406.07524, eq. 10), in nats per token.

    In the first `anneal_attention` steps attention reads only some pairs of positions, the same in
    all texts of a step. With `watched_seed` and a corpus of pairs a validation also draws responses
    and stops where more than the share `most_empty` of them are empty.
    """

    denoiser: SubsDenoiser
    min_t: float
    held_out: HeldOut
    anneal_attention: int = 0
    watched_seed: int | None = None
    most_empty: float | None = None

    def corrupt(
        self,
        x0: Tensor,
        generator: torch.Generator,
        step: int | None = None,
        asked: Tensor | None = None,
    ) -> Batch:
        """Draw a time for each text and a masking uniform for each token.

        Where nothing is asked the uniform is 1, which masks at no time, so there is no loss.
        While attention is annealed, also a seed of its pairs, next to the share of later positions
        that are read: 1 / anneal_attention in the first step, all in the last.
        """
        B, L = x0.shape
        u_time = torch.rand(B, generator=generator, dtype=torch.float64)
        u = torch.rand(B, L, generator=generator, dtype=torch.float64)
        if asked is not None:
            u = u.masked_fill(~asked, NEVER)
        tensors = {"x0": x0, "t": stratified_times(u_time, self.min_t), "u": u}
        if step is not None and step + 1 < self.anneal_attention:
            seed = torch.randint(2**62, (1,), generator=generator)
            share = torch.tensor((step + 1) / self.anneal_attention, dtype=torch.float64)
            tensors |= {"pair_seed": seed.repeat(B), "pair_share": share.repeat(B)}
        return Batch(tensors, B * L if asked is None else max(1, int(asked.sum())))

    def loss(self, part: Tensors) -> Tensor:
        """The NELBO, summed."""
        x0, denoiser = part["x0"], self.denoiser
        if "pair_seed" in part:
            share, seed = part["pair_share"][0].item(), int(part["pair_seed"][0])
            pairs = annealed_pairs(x0.shape[1], share, seed)
            denoiser = denoiser.reading(to_device(pairs, self.held_out.device))
        return nelbo(denoiser, x0, part["t"].float(), part["u"])

    def validate(self) -> dict[str, float]:
        """Held-out NELBO in nats per token, and the share of drawn responses that are empty."""
        figures, held_out = {"val/nelbo": self.held_out.mean_loss(self)}, self.held_out
        if self.watched_seed is None or not held_out.windows.is_pairs:
            return figures
        texts = watched_texts(self.denoiser, held_out, WATCHED_STEPS, self.watched_seed)
        return figures | watch_empty(texts, held_out, self.most_empty)


@dataclass(frozen=True)
class NextTokenObjective:
    """Cross-entropy of the next token, in nats per token."""

    network: GPT
    held_out: HeldOut

    def corrupt(
        self,
        x0: Tensor,
        generator: torch.Generator,
        step: int | None = None,
        asked: Tensor | None = None,
    ) -> Batch:
        """The texts as they are; every token but the first is predicted, or those asked for."""
        if asked is None:
            return Batch({"x0": x0}, x0.numel() - len(x0))
        asked = asked[:, 1:]
        return Batch({"x0": x0, "weight": asked.float()}, max(1, int(asked.sum())))

    def loss(self, part: Tensors) -> Tensor:
        """The cross-entropy, summed."""
        x0 = to_device(part["x0"], self.held_out.device)
        h, following = self.network(x0[:, :-1]).flatten(0, 1), x0[:, 1:].flatten()
        linear = self.network.output_layer.linear
        readout = linear.weight, torch.zeros(linear.out_features, device=h.device)
        weight = torch.ones_like(following, dtype=torch.float32)
        if "weight" in part:
            weight = to_device(part["weight"], self.held_out.device).flatten()
        return cross_entropy(h, readout, following, weight)

    def validate(self) -> dict[str, float]:
        """Held-out cross-entropy in nats per token."""
        return {"val/nll": self.held_out.mean_loss(self)}


NAMES = {"diffusion": "teacher", "autoregressive": "baseline"}  # in the journal, by kind


def _train(
    job: TrainingJob,
    kind: str,
    network: Network,
    training: Training,
    seed: int,
    origin: Origin | None = None,
) -> bool:
    """Train a network, from random weights or from those of an origin.

    True on the rank that wrote the checkpoint.
    """
    windows, teacher = job.windows, job.output.parent.name
    meta = {
        "kind": kind,
        "network": network.model_dump(),
        "vocab_size": windows.vocab_size,
        "eos_id": windows.eos_id,
        "length": windows.length,
        **windows.framed,
        **job.corpus_facts(),
        "training": training.model_dump(),
        "seed": seed,
        "round": 0,
        **(origin.about if origin else {}),
    }
    torch.manual_seed(seed)
    net = checkpoint.build_network(meta, training.dropout)
    datasets = []
    if origin:
        origin.fill(net)
        meta["adapted"] = {"from": origin.name, "sha256": origin.sha256}
        datasets = [{"name": "adapted from", "digest": origin.sha256, "source": origin.name}]
    job.place(net)
    held_out = HeldOut.read(job.corpus, job.device, job.machine, job.group)
    texts, length = training.batch_size, windows.length
    objective: Objective
    if kind == "diffusion":
        denoiser = checkpoint.build_denoiser(net, meta)
        objective = DiffusionObjective(denoiser, training.min_t, held_out, watched_seed=seed)
        if isinstance(training, Pretraining):
            objective = replace(
                objective,
                anneal_attention=training.anneal_attention,
                most_empty=training.max_empty_texts,
            )
        logits_per_text = length * masked_share(denoiser.schedule)
    else:
        objective = NextTokenObjective(net, held_out)
        logits_per_text = length - 1
    noise_levels = texts if network.time_conditioning else 1
    shape = flops.network_shape(net)
    step_flops = flops.training_flops(shape, texts, length, texts * logits_per_text, noise_levels)

    params = {"seed": seed, **network.model_dump(), **training.model_dump()}
    tags = {"teacher": teacher, "round": 0}
    with job.journal(NAMES[kind], params, tags, datasets) as journal:
        run = job.run(journal, step_flops / (texts * length))
        state = fit(net, objective, job.batches(training, seed), training, Start(seed), run)
        job.finish(state, meta, journal, origin.kept if origin else {})
    return job.group.is_main

"""`halfstep pretrain` and `halfstep train-baseline`: the first teacher, and the baseline."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

from halfstep import checkpoint
from halfstep.commands.import_transformers import Logits
from halfstep.commands.origins import Origin, read_denoiser, read_origin
from halfstep.commands.training_job import (
    WATCHED_STEPS,
    HeldOut,
    TrainingJob,
    watch_empty,
    watched_texts,
)
from halfstep.config import Machine, Network, Pretraining, Seed, Training
from halfstep.data.windows import corpus_files
from halfstep.diffusion.masking import to_device
from halfstep.diffusion.objective import nelbo, stratified_times
from halfstep.diffusion.readout import cross_entropy
from halfstep.diffusion.schedules import masked_share
from halfstep.errors import HalfstepError
from halfstep.models import flops
from halfstep.models.adapt import annealed_pairs
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt import GPT, save_gpt_neox
from halfstep.records import provenance
from halfstep.training.loop import fit
from halfstep.training.state import Start
from halfstep.training.step import (
    Batch,
    Objective,
    Tensors,
)

NEVER = 1.0  # a uniform that masks its position at no time, because 1 - alpha(t) <= 1


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
    eos, tokenizer = model.tokenizer.id_to_token(model.eos_id), output / "tokenizer.json"
    save_gpt_neox(model.network, hf, model.length, model.eos_id, tokenizer, eos)
    read = corpus_files(corpus, "train", "validation")
    provenance.write_record(output / provenance.NAME, [output, hf], read)


def _check_architecture(network: Network) -> None:
    """Raise HalfstepError if the user, and not the weights, chose another architecture."""
    if network.architecture != "dit":
        raise HalfstepError(
            f"--architecture: found {network.architecture}, which follows from the weights of "
            "--adapt or import-baseline, and from nothing else; leave it out"
        )


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

"""What all training commands share: the job around `fit`, and held-out windows for its figures."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.config import Machine, Training
from halfstep.data.batches import batch_indices, describe_epochs
from halfstep.data.windows import Windows
from halfstep.diffusion.contracts import Denoiser, Draws
from halfstep.diffusion.samplers import sample
from halfstep.distributed.device import find_device, memory_of
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.records.journal import Journal
from halfstep.training.blocks import prepare_blocks
from halfstep.training.optim import trained_parameters
from halfstep.training.state import Run, TrainingState
from halfstep.training.step import (
    Examples,
    Objective,
    micro_batches,
    step_generator,
)

TrainedFiles = dict[str, dict[str, Tensor]]
"""By file of a checkpoint: the trained tensors by name"""
WATCHED, WATCHED_STEPS = 16, 32  # texts and sampling steps of a validation
VALIDATION_WINDOWS = 512  # held-out windows behind each figure, or all there are


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

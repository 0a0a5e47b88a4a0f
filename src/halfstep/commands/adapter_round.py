"""A round that trains adapters (LoRA): teacher and student are one network with two adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfstep import checkpoint
from halfstep.adapters import (
    STUDENT,
    TEACHER,
    add_adapters,
    fill_adapter,
    teaching,
    weight_changes,
)
from halfstep.commands.training_job import TrainedFiles
from halfstep.config import Distillation
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import cast_matrices
from halfstep.models.denoiser import SubsDenoiser
from halfstep.training.ema import EMA

Tensors = dict[str, Tensor]


def lora_of(run: Distillation) -> dict[str, Any] | None:
    """The entry `lora` of a round's meta.json: the arguments of `add_adapters`; None without."""
    if run.lora_rank is None:
        return None
    return {"rank": run.lora_rank, "alpha": run.lora_alpha, "targets": run.lora_targets}


def check_adapters(teacher: Path, source: dict, run: Distillation) -> None:
    """HalfstepError if the last round trained something else, and its optimizer state is needed."""
    is_same = source.get("lora") == lora_of(run)
    if not (is_same or source["round"] == 0 or run.reset_optimizer):
        raise HalfstepError(
            f"--teacher {teacher}: trained {_described(source.get('lora'))}, but this round trains "
            f"{_described(lora_of(run))}, which has no optimizer state there; use the same "
            "options, or set reset_optimizer: true"
        )


def _described(lora: dict[str, Any] | None) -> str:
    if lora is None:
        return "the whole network"
    named = [f"lora_{key} {value}" for key, value in lora.items() if value]
    return f"adapters ({', '.join(named)})"


@dataclass(frozen=True)
class AdapterRound:
    """What a round with adapters starts from.

    The first one starts new adapters. Each later one goes on with the adapters of the last round:
    they are subtracted from the weights, which hold them, and the teacher and the student get them.

    teacher, source: a checkpoint folder and its meta.json
    begin_with: weights that the student begins with, raw or ema
    """

    teacher: Path
    source: dict
    begin_with: str
    run: Distillation

    @cached_property
    def last(self) -> dict[str, Tensors]:
        """Of the last round, by name: its adapter (raw), its average (ema), its optimizer state."""
        found: dict[str, Tensors] = {"raw": {}, "ema": {}, "optimizer": {}}
        if self.source.get("lora") != lora_of(self.run):
            return found
        stored = checkpoint.read_tensors(self.teacher, checkpoint.OPTIMIZER, self.source)
        for key, value in stored.items():
            kind, name = key.split(":", 1)
            if kind in found:
                found[kind][name] = value
            else:
                found["optimizer"][key] = value
        return found

    def network(self, seed: int) -> nn.Module:
        """The network with both adapters; new ones are drawn with the seed.

        With precision bfloat16 its frozen matrices are cast once, as autocast casts them in every
        pass: the same bits in half of the memory.
        """
        lora = lora_of(self.run)
        assert lora
        network = checkpoint.build_network(self.source, self.run.dropout)
        checkpoint.load_weights(network, self._read_weights(), self.teacher)
        torch.manual_seed(seed)
        add_adapters(network, **lora)
        if self.last["raw"]:
            fill_adapter(network, STUDENT, self.last["raw"])
            fill_adapter(network, TEACHER, self.last[self.run.next_teacher])
            changes = weight_changes(network, self.last["raw"])
            for name, change in changes.items():
                layer = network.get_submodule(name.removesuffix(".weight"))
                layer.weight.detach().sub_(change)
        if self.run.precision == "bfloat16":
            cast_matrices(network, torch.bfloat16)
        return network

    def ema(self, network: nn.Module) -> EMA:
        """The moving average of the student's adapter, continued unless `reset_ema`."""
        if self.run.reset_ema or not self.last["ema"]:
            return EMA(network, self.run.ema_decay)
        return EMA(network, self.run.ema_decay, self.last["ema"], self.source["ema_updates"])

    @property
    def optimizer_state(self) -> Tensors | None:
        """The optimizer state to continue; None for a new one."""
        return None if self.run.reset_optimizer else self.last["optimizer"] or None

    def files(
        self, network: nn.Module, trained: TrainedFiles
    ) -> Mapping[str, Tensors | Callable[[], Tensors]]:
        """Files of the checkpoint, from those with adapters alone: float32 weights that hold them.

        One file is in memory at a time; its frozen weights are read again, because the network may
        have them in bfloat16. The file of the optimizer state gets the adapters themselves.
        """
        adapters = {kind: trained[checkpoint.FILES[kind]] for kind in checkpoint.FILES}
        optimizer = dict(trained[checkpoint.OPTIMIZER])
        for kind in ("raw", "ema"):
            own = {name: value for name, value in adapters[kind].items() if ".lora_" in name}
            optimizer |= {f"{kind}:{name}": value for name, value in own.items()}
        whole = {
            checkpoint.FILES[kind]: partial(self._merged, network, adapter)
            for kind, adapter in adapters.items()
        }
        return {**whole, checkpoint.OPTIMIZER: optimizer}

    def _merged(self, network: nn.Module, adapter: Tensors) -> Tensors:
        tensors = self._read_weights()
        if self.last["raw"]:
            for name, change in weight_changes(network, self.last["raw"]).items():
                tensors[name] -= change
        for name, change in weight_changes(network, adapter).items():
            tensors[name] += change
        return tensors

    def _read_weights(self) -> Tensors:
        file = checkpoint.FILES[self.begin_with]
        return checkpoint.read_tensors(self.teacher, file, self.source)


def teacher_of_adapters(student: SubsDenoiser) -> SubsDenoiser:
    """The denoiser of the student's network under the teacher's adapter."""
    network = student.network

    def forward(*arguments: Any) -> Tensor:
        with teaching(network):
            return network(*arguments)

    return student.passing(forward)

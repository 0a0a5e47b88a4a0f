"""Checkpoints: a folder of safetensors and a meta.json that says everything needed to use it again.

model.safetensors  raw weights      ema.safetensors  their moving average      [best.safetensors  average at the lowest held-out loss]
optimizer.safetensors  moments      tokenizer.json   the corpus's tokenizer    meta.json  written last: without it there is no checkpoint
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_atomic, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from halfstep.models.denoiser import SubsDenoiser

FORMAT = 1
KEYS = {
    "kind": str,
    "network": dict,
    "vocab_size": int,
    "eos_id": int,
    "length": int,
    "sha256": dict,
}  # what every meta.json holds
KINDS = ("diffusion", "autoregressive")
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors", "best": "best.safetensors"}


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint: the network in eval mode, and what is needed to use it."""

    kind: str
    network: nn.Module
    tokenizer: Tokenizer
    meta: dict
    sha256: str
    denoiser: SubsDenoiser | None

    @property
    def length(self) -> int:
        return self.meta["length"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def eos_id(self) -> int:
        return self.meta["eos_id"]

    @property
    def mask_id(self) -> int:
        return self.meta["vocab_size"]


def build_network(meta: dict, dropout: float = 0.0) -> nn.Module:
    """A fresh network of the shape that meta's `kind`, `vocab_size` and `network` (a Network section) describe."""
    from halfstep.config import Network
    from halfstep.models.dit import DiT
    from halfstep.models.gpt import GPT

    network = Network.model_validate(meta["network"])
    make = {"diffusion": DiT, "autoregressive": GPT}[meta["kind"]]
    return make(meta["vocab_size"], network.width, network.blocks, network.heads, dropout)


def build_denoiser(network: nn.Module, meta: dict) -> SubsDenoiser:
    """The network of a diffusion checkpoint as a Denoiser, with the noise schedule that meta.json names."""
    from halfstep.config import Network
    from halfstep.diffusion.schedules import SCHEDULES
    from halfstep.models.denoiser import SubsDenoiser

    about = Network.model_validate(meta["network"])
    return SubsDenoiser(network, SCHEDULES[about.schedule](), about.time_conditioning)


def save_checkpoint(
    folder: Path, tensors: dict[str, dict[str, Tensor]], meta: dict, tokenizer: Path
) -> None:
    """Write a checkpoint: `tensors` maps file names (model.safetensors, ...) to named tensors. meta.json, with every file's checksum, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for name, state in tensors.items():
        write_tensors(folder / name, state, {"format": "pt"})
    write_atomic(folder / "tokenizer.json", Path(tokenizer).read_bytes())
    sums = {name: sha256(folder / name) for name in [*tensors, "tokenizer.json"]}
    write_json(folder / "meta.json", {"format": FORMAT, **meta, "sha256": sums})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """One whole safetensors file or none, and no leavings of a writer that was killed; OSError when the file system refuses, with its own number."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    for part in (*path.parent.glob(".*.part"), *path.parent.glob(".tmp*")):  # ours and safetensors'
        if part.is_file():
            part.unlink(missing_ok=True)
    try:
        write_atomic(path, lambda part: save_file(tensors, part, header))
    except SafetensorError as error:
        if not (number := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint folder."""
    import pydantic

    from halfstep.config import Network
    from halfstep.resolve import explain

    if not (Path(folder) / "meta.json").is_file():
        raise HalfstepError(
            f"{folder}: no meta.json there, so no finished checkpoint; name the folder that holds model.safetensors and meta.json"
        )
    meta = read_json(Path(folder) / "meta.json")
    found = meta.get("format") if isinstance(meta, dict) else meta
    if found != FORMAT:
        raise HalfstepError(
            f"{folder}/meta.json: format {found!r}, this halfstep reads format {FORMAT}"
        )
    for key, kind in KEYS.items():
        if not isinstance(meta.get(key), kind):
            what = f"{meta[key]!r}" if key in meta else "nothing"
            raise HalfstepError(
                f"{folder}/meta.json: {key}: found {what}, expected {kind.__name__}; copy the whole folder again, or train it again"
            )
    if meta["kind"] not in KINDS:
        raise HalfstepError(
            f"{folder}/meta.json: kind: found {meta['kind']!r}, allowed are {', '.join(KINDS)}"
        )
    try:
        Network.model_validate(meta["network"])
    except pydantic.ValidationError as error:
        raise HalfstepError(f"{folder}/meta.json: network.{explain(error, Network)[0]}") from None
    return meta


def read_tensors(folder: Path, name: str, meta: dict) -> dict[str, Tensor]:
    """Named tensors of one file of a checkpoint, its checksum compared with meta.json."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checked_file(folder, name, meta)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HalfstepError(
            f"{path}: not a whole safetensors file ({error}); copy or train it again"
        ) from None


def checked_file(folder: Path, name: str, meta: dict) -> Path:
    """The path of one file of a checkpoint, its checksum compared with meta.json."""
    path = Path(folder) / name
    if name not in meta["sha256"]:
        raise HalfstepError(f"{folder}: has no {name}; it holds {', '.join(meta['sha256'])}")
    if not path.is_file():
        raise HalfstepError(
            f"{path}: missing, though meta.json lists it; copy the whole folder, or train it again"
        )
    found = sha256(path)
    if found != meta["sha256"][name]:
        raise HalfstepError(
            f"{path}: sha256 {found[:12]}, meta.json says {meta['sha256'][name][:12]}: the file is damaged; copy or train it again"
        )
    return path


def checkpoint_files(folder: Path, *weights: str) -> list[Path]:
    """What a command reads of a checkpoint that it uses with these weights (ema, raw, best), for its record."""
    return [
        Path(folder) / name
        for name in ("meta.json", "tokenizer.json", *(FILES[which] for which in weights))
    ]


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state` into the network; every key and shape must agree. A file of an average holds parameters only: buffers stay as built."""
    check_weights(network, state, path)
    network.load_state_dict(state, strict=False)


def check_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """HalfstepError unless `state` fits the network (which may be on the meta device) in every key and shape, and is finite."""
    own = network.state_dict()
    need = set(dict(network.named_parameters()))
    for what, keys in (
        ("lacks", need - state.keys()),
        ("has the unknown", state.keys() - own.keys()),
    ):
        if keys:
            raise HalfstepError(
                f"{path}: {what} {len(keys)} tensors, {sorted(keys)[0]} first; it belongs to a network of another kind or size"
            )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise HalfstepError(
                f"{path}: {key} has shape {list(value.shape)}, the network expects {list(own[key].shape)}"
            )
        if not value.isfinite().all():
            raise HalfstepError(
                f"{path}: {key} holds NaN or infinity; the training that wrote it diverged: use an earlier checkpoint"
            )


def load_checkpoint(folder: str | Path, weights: str = "ema", device: str = "cpu") -> Model:
    """Load a checkpoint folder for use: network in eval mode on `device`. weights: ema, raw, or best (pretraining only)."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    meta = read_meta(folder)
    if weights not in FILES:
        raise HalfstepError(f"weights: found {weights!r}, allowed are {', '.join(FILES)}")
    tokenizer = Tokenizer.from_file(str(checked_file(folder, "tokenizer.json", meta)))
    if tokenizer.get_vocab_size() > meta["vocab_size"]:
        raise HalfstepError(f"{folder}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, meta.json says vocab_size {meta['vocab_size']}; "
                            "the tokenizer is another model's: copy the whole folder again")  # fmt: skip
    network = build_network(meta)
    load_weights(network, read_tensors(folder, FILES[weights], meta), folder / FILES[weights])
    network = network.to(device).eval().requires_grad_(False)
    denoiser = build_denoiser(network, meta) if meta["kind"] == "diffusion" else None
    return Model(meta["kind"], network, tokenizer, meta, meta["sha256"][FILES[weights]], denoiser)

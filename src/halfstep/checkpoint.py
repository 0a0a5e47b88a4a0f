"""Checkpoints: a folder of safetensors files, and a meta.json with all that is needed to use them.

model.safetensors      raw weights
ema.safetensors        their moving average
best.safetensors       the moving average at the lowest held-out loss (not always there)
optimizer.safetensors  optimizer state
tokenizer.json         the tokenizer of the corpus
meta.json              written last: a folder without it is no checkpoint
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_atomic, write_json

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from halfstep.models.denoiser import SubsDenoiser
    from halfstep.models.dit import DiT

FORMAT = 1
KEYS = {  # of every meta.json, with their types
    "kind": str,
    "network": dict,
    "vocab_size": int,
    "eos_id": int,
    "length": int,
    "sha256": dict,
}
KINDS = ("diffusion", "autoregressive")
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors", "best": "best.safetensors"}


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded checkpoint: its network in eval mode, its tokenizer, and its meta.json.

    `sha256` is the checksum of the loaded weights. `denoiser` is None for an autoregressive model.
    """

    kind: str
    network: nn.Module
    tokenizer: Tokenizer
    meta: dict
    sha256: str
    denoiser: SubsDenoiser | None

    @property
    def length(self) -> int:
        """Tokens per text, BOS and EOS included."""
        return self.meta["length"]

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, without the mask token."""
        return self.meta["vocab_size"]

    @property
    def eos_id(self) -> int:
        """Id of the token that begins and ends a document (BOS and EOS)."""
        return self.meta["eos_id"]

    @property
    def mask_id(self) -> int:
        """Id of the mask token: the first one after the vocabulary."""
        return self.meta["vocab_size"]

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.network.parameters()).device

    def __repr__(self) -> str:
        millions = sum(p.numel() for p in self.network.parameters()) / 1e6
        facts = [
            self.kind,
            f"size {self.meta['network']['size']} ({millions:.1f}M parameters)",
            f"vocabulary {self.vocab_size}",
            f"length {self.length}",
        ]
        if "round" in self.meta:
            facts.append(f"round {self.meta['round']}")
        if "student_steps" in self.meta:
            facts.append(f"{self.meta['student_steps']} steps")
        return f"Model({', '.join(facts)}, on {self.device})"


def build_network(meta: dict, dropout: float = 0.0) -> nn.Module:
    """A new network of the shape in meta.json (the keys `kind`, `vocab_size` and `network`)."""
    from halfstep.config import Network
    from halfstep.models.dit import DiT
    from halfstep.models.gpt import GPT

    network = Network.model_validate(meta["network"])
    shape = (meta["vocab_size"], network.width, network.blocks, network.heads, dropout)
    return DiT(*shape, network.cond_width) if meta["kind"] == "diffusion" else GPT(*shape)


def build_denoiser(network: nn.Module, meta: dict) -> SubsDenoiser:
    """The network of a diffusion checkpoint as a Denoiser, with the noise schedule of meta.json."""
    from halfstep.config import Network
    from halfstep.diffusion.schedules import SCHEDULES
    from halfstep.models.denoiser import SubsDenoiser

    about = Network.model_validate(meta["network"])
    schedule = SCHEDULES[about.schedule]()
    return SubsDenoiser(cast("DiT", network), schedule, about.time_conditioning)


def save_checkpoint(
    folder: Path, tensors: dict[str, dict[str, Tensor]], meta: dict, tokenizer: Path
) -> None:
    """Write a checkpoint; meta.json, with the checksum of every other file, comes last.

    `tensors` maps file names (model.safetensors, ...) to named tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for name, state in tensors.items():
        write_tensors(folder / name, state, {"format": "pt"})
    write_atomic(folder / "tokenizer.json", Path(tokenizer).read_bytes())
    sums = {name: sha256(folder / name) for name in [*tensors, "tokenizer.json"]}
    write_json(folder / "meta.json", {"format": FORMAT, **meta, "sha256": sums})


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file atomically, and remove what killed writers left in its folder.

    Raises OSError, with the number of the file system's error, if that refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    ours, theirs = path.parent.glob(".*.part"), path.parent.glob(".tmp*")  # files.py, safetensors
    for part in (*ours, *theirs):
        if part.is_file():
            part.unlink(missing_ok=True)
    try:
        write_atomic(path, lambda part: save_file(tensors, part, header))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint folder, checked."""
    import pydantic

    from halfstep.config import Network
    from halfstep.resolve import explain

    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise HalfstepError(
            f"{folder}: not a finished checkpoint, because meta.json is missing; "
            "name the folder that holds model.safetensors and meta.json"
        )
    meta: Any = read_json(path)
    found = meta.get("format") if isinstance(meta, dict) else meta
    if found != FORMAT:
        raise HalfstepError(f"{path}: format {found!r}, but this halfstep reads format {FORMAT}")
    for key, kind in KEYS.items():
        if not isinstance(meta.get(key), kind):
            value = repr(meta[key]) if key in meta else "nothing"
            raise HalfstepError(
                f"{path}: {key}: found {value}, expected {kind.__name__}; "
                "copy the whole folder again, or train again"
            )
    if meta["kind"] not in KINDS:
        raise HalfstepError(f"{path}: kind: found {meta['kind']!r}, allowed are {', '.join(KINDS)}")
    try:
        Network.model_validate(meta["network"])
    except pydantic.ValidationError as error:
        raise HalfstepError(f"{path}: network.{explain(error, Network)[0]}") from None
    return meta


def read_tensors(folder: Path, name: str, meta: dict) -> dict[str, Tensor]:
    """The named tensors of one file of a checkpoint, after a check of its checksum."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = checked_file(folder, name, meta)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HalfstepError(
            f"{path}: not a complete safetensors file ({error}); copy it again, or train again"
        ) from None


def checked_file(folder: Path, name: str, meta: dict) -> Path:
    """The path of one file of a checkpoint, after a check of its checksum against meta.json."""
    path = Path(folder) / name
    if name not in meta["sha256"]:
        raise HalfstepError(f"{folder}: has no {name}; it holds {', '.join(meta['sha256'])}")
    if not path.is_file():
        raise HalfstepError(
            f"{path}: missing, but listed in meta.json; copy the whole folder again, or train again"
        )
    found, expected = sha256(path), meta["sha256"][name]
    if found != expected:
        raise HalfstepError(
            f"{path}: sha256 {found[:12]}, but {expected[:12]} in meta.json: the file is damaged; "
            "copy it again, or train again"
        )
    return path


def checkpoint_files(folder: Path, *weights: str) -> list[Path]:
    """The files of a checkpoint that a command reads, for its record; `weights`: ema, raw, best."""
    names = ["meta.json", "tokenizer.json", *(FILES[which] for which in weights)]
    return [Path(folder) / name for name in names]


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state` into the network after `check_weights`.

    The file of a moving average has parameters only; buffers that it lacks stay as they were built.
    """
    check_weights(network, state, path)
    network.load_state_dict(state, strict=False)


def check_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Raise HalfstepError unless `state` is finite and fits the network in every key and shape.

    The network may be on the meta device.
    """
    own = network.state_dict()
    missing = sorted(dict(network.named_parameters()).keys() - state.keys())
    unknown = sorted(state.keys() - own.keys())
    for fault, keys in (("missing", missing), ("unknown", unknown)):
        if keys:
            raise HalfstepError(
                f"{path}: {len(keys)} {fault} tensors, the first is {keys[0]}; "
                "the file belongs to a network of another kind or size"
            )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise HalfstepError(
                f"{path}: {key} has shape {list(value.shape)}, "
                f"but the network expects {list(own[key].shape)}"
            )
        if not value.isfinite().all():
            raise HalfstepError(
                f"{path}: {key} holds NaN or infinity, because the training that wrote it "
                "diverged; use an earlier checkpoint"
            )


def load_checkpoint(folder: str | Path, weights: str = "ema", device: str = "cpu") -> Model:
    """Load a checkpoint folder, the network in eval mode, frozen, and on `device`.

    weights: ema, raw, or best (of a training that chose one). Raises HalfstepError if a file is
    missing, damaged, or does not fit.
    """
    from halfstep.data.tokenizer import read_tokenizer, vocabulary_size

    folder = Path(folder)
    meta = read_meta(folder)
    if weights not in FILES:
        raise HalfstepError(f"weights: found {weights!r}, allowed are {', '.join(FILES)}")
    tokenizer = read_tokenizer(checked_file(folder, "tokenizer.json", meta))
    tokens = vocabulary_size(tokenizer)
    if tokens > meta["vocab_size"]:
        raise HalfstepError(
            f"{folder}: tokenizer.json has {tokens} tokens, but vocab_size in meta.json is "
            f"{meta['vocab_size']}: the tokenizer is another model's; copy the whole folder again"
        )
    network = build_network(meta)
    file = FILES[weights]
    load_weights(network, read_tensors(folder, file, meta), folder / file)
    network = network.to(device).eval().requires_grad_(False)
    denoiser = build_denoiser(network, meta) if meta["kind"] == "diffusion" else None
    return Model(meta["kind"], network, tokenizer, meta, meta["sha256"][file], denoiser)

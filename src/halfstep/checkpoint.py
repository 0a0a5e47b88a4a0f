"""Checkpoints: a folder of safetensors files, and a meta.json with all that is needed to use them.

model.safetensors      raw weights
ema.safetensors        their moving average
best.safetensors       the moving average at the lowest held-out loss (not always there)
optimizer.safetensors  optimizer state; with LoRA that of the adapters, which it holds too
hf/                    of a baseline: config.json and model.safetensors for transformers; one that
                       is published has no other weights
tokenizer.json         the tokenizer of the corpus
source/                of a model of transformers: the files of its own tokenizer, for its export
code/                  of a model that brings code: its Python files (`remote_code`)
meta.json              written last: a folder without it is no checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from halfstep.config import Network, Precision
from halfstep.errors import HalfstepError, excerpt, reason
from halfstep.files import (
    LARGEST_TOKENIZER,
    read_json,
    sha256,
    write_atomic,
    write_json,
    write_tensors,
)
from halfstep.meta import Framing, Meta, Turn, check_framing, framing_of
from halfstep.remote_code import read_code
from halfstep.resolve import check_fields
from halfstep.tensors import DAMAGED, check_finite, check_optimizer_state, check_weights

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor, nn

    from halfstep.models.causal_lm import CausalLM
    from halfstep.models.denoiser import SubsDenoiser
    from halfstep.models.dit import DiT
    from halfstep.models.gpt2 import GPT2
    from halfstep.models.hf import TransformersNetwork

FORMAT = 1
KINDS = ("diffusion", "autoregressive")
PUBLISHED = {"raw": "published raw", "the one set it has": "published"}
"""Weights of an import with one set, which is in both files: what rows of metrics call them"""
FILES = {"raw": "model.safetensors", "ema": "ema.safetensors", "best": "best.safetensors"}
OPTIMIZER = "optimizer.safetensors"
LARGEST_PUBLISHED = 1 << 42  # bytes of a file of a published baseline
HF_FILES = ("hf/model.safetensors", "hf/config.json")
KEPT = ("source", "code")
"""Folders of a checkpoint with files of the model of transformers that it came from"""
PRECISIONS: tuple[str, ...] = get_args(Precision)
BYTES_PER_WEIGHT = 64  # no file of a checkpoint has more
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded checkpoint: its network in eval mode, its tokenizer, and its meta.json.

    `sha256` is the checksum of the loaded weights, `weights` what rows of metrics call them.
    `denoiser` is None for an autoregressive model. With `precision` bfloat16 the network runs only
    in `computing` of this precision.
    """

    kind: str
    network: nn.Module
    tokenizer: Tokenizer
    meta: dict
    sha256: str
    weights: str
    denoiser: SubsDenoiser | None
    precision: str = "float32"

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
    def framing(self) -> Framing:
        """The tokens before and after each text: EOS and EOS, or those of an imported model."""
        return framing_of(self.meta)

    @property
    def is_framed(self) -> bool:
        """True if the frame is always given; False if both EOS are part of the text (MDLM)."""
        return self.meta.get("framing") is not None

    @property
    def turn(self) -> Turn | None:
        """How a model that was trained on pairs reads a prompt; None for any other model."""
        found = self.meta.get("pairs")
        return None if found is None else Turn.model_validate(found)

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
    """A new network of the shape in meta.json.

    It reads the keys `kind`, `vocab_size` and `network`; for GPT-2's architecture also `length`,
    and for one of transformers `transformers`.
    """
    from halfstep.models.dit import DiT
    from halfstep.models.gpt import GPT
    from halfstep.models.gpt2 import GPT2
    from halfstep.models.hf import build_network_of

    network = Network.model_validate(meta["network"])
    if network.architecture == "transformers":
        return build_network_of(meta["transformers"], meta["vocab_size"], dropout)
    shape = (meta["vocab_size"], network.width, network.blocks, network.heads, dropout)
    if meta["kind"] != "diffusion":
        return GPT(*shape)
    if network.architecture == "gpt2":
        return GPT2(*shape, meta["length"])
    return DiT(*shape, network.cond_width)


def build_denoiser(network: nn.Module, meta: dict) -> SubsDenoiser:
    """The network of a diffusion checkpoint as a Denoiser, with the noise schedule of meta.json."""
    from halfstep.diffusion.schedules import SCHEDULES
    from halfstep.models.denoiser import SubsDenoiser

    about = Network.model_validate(meta["network"])
    schedule = SCHEDULES[about.schedule]()
    known = cast("DiT | GPT2 | TransformersNetwork", network)
    return SubsDenoiser(known, schedule, about.time_conditioning, about.shifted)


def save_checkpoint(
    folder: Path,
    tensors: Mapping[str, dict[str, Tensor] | Callable[[], dict[str, Tensor]]],
    meta: dict,
    tokenizer: Path,
    others: Sequence[str] = (),
) -> None:
    """Write a checkpoint; meta.json, with the checksum of every other file, comes last.

    `tensors` maps file names (model.safetensors, ...) to named tensors, or to functions that return
    them, so that not all are in memory at once; `others` are files that are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for name, state in tensors.items():
        write_tensors(folder / name, state() if callable(state) else state, {"format": "pt"})
    write_atomic(folder / "tokenizer.json", Path(tokenizer).read_bytes())
    sums = {name: sha256(folder / name) for name in [*tensors, *others, "tokenizer.json"]}
    write_json(folder / "meta.json", {"format": FORMAT, **meta, "sha256": sums})


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint folder, checked."""
    path = Path(folder) / "meta.json"
    if not path.exists():
        missing = "meta.json is missing" if path.parent.is_dir() else "there is no such folder"
        raise HalfstepError(
            f"{folder}: not a finished checkpoint, because {missing}; "
            "name the folder that holds model.safetensors and meta.json, or train it first"
        )
    meta: Any = read_json(path)
    found = meta.get("format") if isinstance(meta, dict) else meta
    if type(found) is not int or found != FORMAT:
        raise HalfstepError(
            f"{path}: format {excerpt(found)}, but this halfstep reads format {FORMAT}"
        )
    check_fields(meta, Meta, path, DAMAGED)
    if meta["kind"] not in KINDS:
        raise HalfstepError(
            f"{path}: kind: found {excerpt(meta['kind'])}, allowed are {', '.join(KINDS)}"
        )
    is_built_there = meta["network"].get("architecture") == "transformers"
    if meta["kind"] == "diffusion" and is_built_there != bool(meta.get("transformers")):
        raise HalfstepError(
            f"{path}: the architecture transformers and the entry `transformers` need each other, "
            f"found only one of them; {DAMAGED}"
        )
    _check_code(Path(folder), meta)
    if meta["eos_id"] >= meta["vocab_size"]:
        raise HalfstepError(
            f"{path}: eos_id: found {meta['eos_id']}, but vocab_size is {meta['vocab_size']}; "
            f"{DAMAGED}"
        )
    check_framing(meta, path, DAMAGED)
    return meta


def _check_code(folder: Path, meta: dict) -> None:
    """Read the code of a model that brings some, without running it.

    HalfstepError if it is not that of the import.
    """
    expected = (meta.get("transformers") or {}).get("code")
    if expected and (found := read_code(folder / "code")) != expected:
        raise HalfstepError(
            f"{folder / 'code'}: sha256 {found[:12]}, but {expected[:12]} in meta.json: the code "
            "has changed since the import; copy the whole folder again"
        )


def read_tensors(folder: Path, name: str, meta: dict) -> dict[str, Tensor]:
    """The named tensors of one file of a checkpoint, after checks against its meta.json.

    They have the names, shapes and kind of number that the network has, and the recorded checksum.
    Nothing of the size that meta.json claims is allocated before.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    network = Network.model_validate(meta["network"])
    weights = 12 * network.blocks * network.width**2 + meta["vocab_size"] * network.width
    path = checked_file(folder, name, meta, BYTES_PER_WEIGHT * weights)
    try:
        found = _tensors_of_header(path)
        if len(found) < network.blocks:  # to build them would take long
            raise HalfstepError(
                f"{path}: {len(found)} tensors, but {network.blocks} blocks in meta.json; {DAMAGED}"
            )
        with torch.device("meta"):
            expected = build_network(meta)
            if name == OPTIMIZER and meta.get("lora"):
                from halfstep.adapters import add_adapters

                add_adapters(expected, **meta["lora"])
        if name == OPTIMIZER:
            check_optimizer_state(expected, found, path)
        else:
            check_weights(expected, found, path)
        tensors = load_file(path)
    except SafetensorError as error:
        raise HalfstepError(
            f"{path}: not a complete safetensors file ({reason(error)}); "
            "copy it again, or train again"
        ) from None
    check_finite(tensors, path)
    return tensors


def _tensors_of_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file on the meta device: their names, shapes and dtypes.

    HalfstepError if they are not all of floating-point numbers.
    """
    import torch
    from safetensors import safe_open

    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no dict
            about = file.get_slice(name)
            kind = about.get_dtype()
            if kind not in FLOATS:
                raise HalfstepError(
                    f"{path}: {excerpt(name)} holds {kind}, expected floating-point numbers "
                    f"({', '.join(FLOATS)}); {DAMAGED}"
                )
            dtype = getattr(torch, FLOATS[kind])
            found[name] = torch.empty(about.get_shape(), dtype=dtype, device="meta")
    return found


def checked_file(folder: Path, name: str, meta: dict, most: int = LARGEST_TOKENIZER) -> Path:
    """The path of one file of a checkpoint, after a check of its size and of its checksum.

    It may have `most` bytes, so that nobody reads a file that is far too large.
    """
    path = Path(folder) / name
    if name not in meta["sha256"]:
        listed = excerpt(", ".join(meta["sha256"])).strip("'")
        raise HalfstepError(f"{folder}: has no {name}; it holds {listed}")
    if not path.exists():
        raise HalfstepError(f"{path}: missing, but listed in meta.json; {DAMAGED}")
    if path.stat().st_size > most:
        raise HalfstepError(
            f"{path}: {path.stat().st_size:,} bytes, but such a file has at most {most:,} with the "
            f"sizes in meta.json; {DAMAGED}"
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
    names = [FILES[which] for which in weights]
    if not (Path(folder) / FILES["raw"]).exists():  # a published baseline
        names = list(HF_FILES)
    return [Path(folder) / name for name in ("meta.json", "tokenizer.json", *names)]


def kept_files(meta: dict) -> list[str]:
    """The files of a checkpoint in the folders KEPT, by their names in it."""
    pattern = rf"({'|'.join(KEPT)})/\w[\w.-]*"
    return [name for name in meta["sha256"] if re.fullmatch(pattern, name)]


def read_kept(folder: Path) -> dict[str, bytes]:
    """The files of `kept_files` by their names; HalfstepError if one is damaged."""
    meta = read_meta(folder)
    return {name: checked_file(folder, name, meta).read_bytes() for name in kept_files(meta)}


def write_kept(output: Path, kept: Mapping[str, bytes]) -> None:
    """Write files of `kept_files` to a checkpoint whose meta.json is not there yet."""
    for name, content in kept.items():
        write_atomic(output / name, content)


def load_weights(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load `state` into the network after `check_weights`.

    The file of a moving average has parameters only; buffers that it lacks stay as they were built.
    """
    check_weights(network, state, path)
    network.load_state_dict(state, strict=False)


def load_checkpoint(
    folder: str | Path, weights: str = "ema", device: str = "cpu", precision: str = "float32"
) -> Model:
    """Load a checkpoint folder, the network in eval mode, frozen, and on `device`.

    weights: ema, raw, or best (of a training that chose one). precision: float32, or bfloat16, to
    which the matrices are cast. Raises HalfstepError if a file is missing, damaged, or does not
    fit.
    """
    import torch

    from halfstep.data.tokenizer import read_tokenizer, vocabulary_size
    from halfstep.kernels.precision import cast_matrices

    folder = Path(folder)
    meta = read_meta(folder)
    for what, found, known in (("weights", weights, FILES), ("precision", precision, PRECISIONS)):
        if found not in known:
            raise HalfstepError(f"{what}: found {found!r}, allowed are {', '.join(known)}")
    tokenizer = read_tokenizer(checked_file(folder, "tokenizer.json", meta))
    tokens = vocabulary_size(tokenizer)
    if tokens > meta["vocab_size"]:
        raise HalfstepError(
            f"{folder}: tokenizer.json has {tokens} tokens, but vocab_size in meta.json is "
            f"{meta['vocab_size']}: the tokenizer is another model's; copy the whole folder again"
        )
    network: nn.Module
    if meta["kind"] == "autoregressive" and meta["network"].get("architecture") == "transformers":
        network, file = _published_network(folder, weights, meta), HF_FILES[0]
    else:
        file = FILES[weights]
        state = read_tensors(folder, file, meta)
        network = build_network(meta)
        network.load_state_dict(state, strict=False)  # an average may lack the buffers
    if precision == "bfloat16":
        cast_matrices(network, torch.bfloat16)
    network = network.to(device).eval().requires_grad_(False)
    denoiser = build_denoiser(network, meta) if meta["kind"] == "diffusion" else None
    called = PUBLISHED.get(str(meta.get("imported", {}).get("weights")), weights)
    sha256 = meta["sha256"][file]
    return Model(meta["kind"], network, tokenizer, meta, sha256, called, denoiser, precision)


def _published_network(folder: Path, weights: str, meta: dict) -> CausalLM:
    """The network of a published baseline: its one set of weights is the raw one and the average.

    Raises HalfstepError for the best weights, which it does not have.
    """
    from halfstep.models.causal_lm import CausalLM
    from halfstep.pretrained import load_causal_lm

    for name in [FILES["best"]] if weights == "best" else HF_FILES:
        checked_file(folder, name, meta, LARGEST_PUBLISHED)
    return CausalLM(load_causal_lm(folder / "hf"), meta["vocab_size"])

"""What a teacher can be adapted from: our autoregressive baseline, or GPT-2 from transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from halfstep.checkpoint import FILES, Model, checkpoint_files, load_checkpoint, read_meta
from halfstep.commands.import_weights import fetch_from_hub
from halfstep.config import size_of_shape
from halfstep.data.pack import check_tokens, read_manifest
from halfstep.data.tokenizer import load_bpe
from halfstep.errors import HalfstepError
from halfstep.models.adapt import adapt_weights
from halfstep.models.dit import DiT
from halfstep.models.gpt2_weights import read_gpt2
from halfstep.workflow.sources import is_hub_name

DOWNLOADED = [
    *("model*.safetensors", "model.safetensors.index.json", "config.json"),
    *("tokenizer.json", "vocab.json", "merges.txt"),
]


@dataclass(frozen=True)
class Origin:
    """Autoregressive weights that a denoiser starts from.

    name: folder or hub name; files: what was read; sha256: of the weights; architecture: of the
    denoiser's network; fill: copies the weights into such a network
    """

    name: str
    files: list[Path]
    sha256: str
    architecture: str
    fill: Callable[[Any], None]


def read_origin(name: str, corpus: Path, size: str) -> Origin:
    """Read a checkpoint of `halfstep train-baseline`, or a GPT-2 model: a folder or a hub name.

    A baseline that is a published model is that model.

    HalfstepError if it is neither, or of another size, or has not the tokens of the corpus.
    """
    folder = find_published("--adapt", name)
    if (folder / "config.json").is_file() and not (folder / "meta.json").is_file():
        return _read_gpt2(name, folder, corpus, size)
    if (folder / "hf" / "config.json").is_file() and not (folder / FILES["raw"]).exists():
        published = read_meta(folder).get("imported", {}).get("source", name)
        return _read_gpt2(published, folder / "hf", corpus, size)
    return _read_baseline(folder, corpus)


def find_published(flag: str, name: str) -> Path:
    """The folder of a model of transformers: `name` itself, or downloaded if it is a hub name."""
    if not is_hub_name(name):
        return Path(name).expanduser()
    repository, _, revision = name.partition("@")
    return fetch_from_hub(flag, repository, revision, DOWNLOADED)


def _read_baseline(folder: Path, corpus: Path) -> Origin:
    model = load_checkpoint(folder)
    if model.denoiser is not None:
        raise HalfstepError(
            f"--adapt {folder}: is a denoiser; name a checkpoint of halfstep train-baseline"
        )
    check_tokens("--adapt", folder, model.tokenizer, corpus)
    files = checkpoint_files(folder, "ema")
    return Origin(str(folder), files, model.sha256, "dit", partial(_fill_dit, model, folder))


def _fill_dit(model: Model, folder: Path, network: DiT) -> None:
    try:
        adapt_weights(model.network, network)
    except ValueError as error:
        raise HalfstepError(
            f"--adapt {folder}: {error}; set network.size to that of the model"
        ) from None


def _read_gpt2(name: str, folder: Path, corpus: Path, size: str) -> Origin:
    published = read_gpt2(folder)
    found = size_of_shape(*published.shape)
    if found != size:
        raise HalfstepError(
            f"--adapt {name}: found size {found}, expected {size}; set network.size: {found}, or "
            "name another model"
        )
    check_tokens("--adapt", name, load_bpe(str(folder)), corpus)
    manifest = read_manifest(corpus)
    for key, limit in (("vocab_size", "vocab_size"), ("length", "n_positions")):
        most = published.config[limit]
        fits = manifest[key] == most if key == "vocab_size" else manifest[key] <= most
        if not fits:
            raise HalfstepError(
                f"--adapt {name}: its {limit} is {most}, but the {key} of corpus {corpus} is "
                f"{manifest[key]}; change the corpus, or name another model"
            )
    return Origin(name, published.files, published.sha256, "gpt2", published.fill)

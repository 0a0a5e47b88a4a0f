"""What the training of a teacher can start from: autoregressive weights, or published denoisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from halfstep.checkpoint import (
    FILES,
    Model,
    checkpoint_files,
    load_checkpoint,
    load_weights,
    read_meta,
)
from halfstep.commands.import_transformers import Logits
from halfstep.commands.import_weights import fetch_from_hub, read_imported
from halfstep.config import Network, PublishedStudent, size_of_shape
from halfstep.data.tokenizer import load_bpe
from halfstep.data.windows import check_tokens, read_manifest
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
    """Weights that the training of a denoiser starts from.

    name: folder or hub name; files: what was read; sha256: of the weights; network: the denoiser's;
    fill: copies the weights into such a network; about: entries of its meta.json; kept: files of
    the source for its export, by their names in a checkpoint
    """

    name: str
    files: list[Path]
    sha256: str
    network: Network
    fill: Callable[[Any], None]
    about: dict[str, Any] = field(default_factory=dict)
    kept: Mapping[str, bytes] = field(default_factory=dict)


def read_denoiser(
    source: str,
    corpus: Path,
    network: Network,
    logits: Logits | None,
    weights: Literal["ema", "raw"],
    runs_code: bool = False,
) -> Origin:
    """Read published weights of a denoiser, as `halfstep import` does.

    A model of transformers knows no noise schedule, and gets that of `network`.

    HalfstepError if they cannot be read, are of another size, or have not the corpus's tokens.
    """
    try:
        found = read_imported(
            source, PublishedStudent(), corpus, None, weights, network.size, logits, runs_code
        )
    except HalfstepError as error:
        raise HalfstepError(str(error).replace("--source", "--from")) from None
    own = Network.model_validate(found.meta["network"])
    if own.architecture == "transformers":
        if network.time_conditioning:
            raise HalfstepError(
                f"--time-conditioning: found it with --from {source}, but a model of transformers "
                "has no input for the time; leave it out"
            )
        own = own.model_copy(update={"schedule": network.schedule})
    about = {key: found.meta[key] for key in ("transformers", "framing") if key in found.meta}
    state, digest = found.states["ema"], found.meta["imported"]["sha256"]

    def fill(net: nn.Module) -> None:
        load_weights(net, state, found.files[0])

    files = [file for file in found.files if file.is_file()]
    return Origin(source, files, digest, own, fill, about, found.kept)


def read_origin(name: str, corpus: Path, network: Network) -> Origin:
    """Read a checkpoint of `halfstep train-baseline`, or a GPT-2 model: a folder or a hub name.

    A baseline that is a published model is that model.

    HalfstepError if it is neither, or of another size, or has not the tokens of the corpus.
    """
    folder = find_published("--adapt", name)
    if (folder / "config.json").is_file() and not (folder / "meta.json").is_file():
        return _read_gpt2(name, folder, corpus, network)
    if (folder / "hf" / "config.json").is_file() and not (folder / FILES["raw"]).exists():
        published = read_meta(folder).get("imported", {}).get("source", name)
        return _read_gpt2(published, folder / "hf", corpus, network)
    return _read_baseline(folder, corpus, network)


def find_published(flag: str, name: str) -> Path:
    """The folder of a model of transformers: `name` itself, or downloaded if it is a hub name."""
    if not is_hub_name(name):
        return Path(name).expanduser()
    repository, _, revision = name.partition("@")
    return fetch_from_hub(flag, repository, revision, DOWNLOADED)


def _read_baseline(folder: Path, corpus: Path, network: Network) -> Origin:
    model = load_checkpoint(folder)
    if model.denoiser is not None:
        raise HalfstepError(
            f"--adapt {folder}: is a denoiser; name a checkpoint of halfstep train-baseline"
        )
    check_tokens("--adapt", folder, model.tokenizer, corpus)
    files = checkpoint_files(folder, "ema")
    shifted = network.model_copy(update={"shifted": True})
    return Origin(str(folder), files, model.sha256, shifted, partial(_fill_dit, model, folder))


def _fill_dit(model: Model, folder: Path, network: DiT) -> None:
    try:
        adapt_weights(model.network, network)
    except ValueError as error:
        raise HalfstepError(
            f"--adapt {folder}: {error}; set network.size to that of the model"
        ) from None


def _read_gpt2(name: str, folder: Path, corpus: Path, network: Network) -> Origin:
    published = read_gpt2(folder)
    found = size_of_shape(*published.shape)
    if found != network.size:
        raise HalfstepError(
            f"--adapt {name}: found size {found}, expected {network.size}; set network.size: "
            f"{found}, or name another model"
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
    own = network.model_copy(update={"shifted": True, "architecture": "gpt2"})
    return Origin(name, published.files, published.sha256, own, published.fill)

"""`halfstep import-baseline`: an autoregressive baseline of a published causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
from torch import Tensor

from halfstep.checkpoint import HF_FILES, save_checkpoint
from halfstep.commands.origins import check_tokens, find_published
from halfstep.config import Network, size_of_shape
from halfstep.data.pack import read_manifest
from halfstep.data.tokenizer import load_bpe
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_json, write_tensors
from halfstep.models.causal_lm import CausalLM, check_causal
from halfstep.models.gpt import save_tokenizer
from halfstep.models.hub import WEIGHT_FILES
from halfstep.models.pickled import RefusedError
from halfstep.models.weight_files import DOWNLOAD_AGAIN, read_object, read_weights
from halfstep.pretrained import load_causal_lm
from halfstep.records import provenance
from halfstep.records.journal import Journal
from halfstep.tensors import check_finite

# Keys of config.json that load other code: the model's own, or kernels from the hub.
LOADS_CODE = ("auto_map", "attn_implementation", "experts_implementation")


def import_baseline(source: str, output: Path, corpus: Path) -> None:
    """Write an autoregressive checkpoint from a published model, such as the paper's GPT-2.

    It is any causal language model that transformers loads by its own code. The subfolder hf/ holds
    it in the format of transformers; the checkpoint has no other weights. Rows of its vocabulary
    that the tokenizer does not have are padding, and are never drawn.

    Args:
        source: folder of save_pretrained, or hub name (gpt2, gpt2@revision)
        output: folder of the checkpoint
        corpus: folder of `halfstep prepare-corpus`, which has the tokenizer of the model
    """
    folder = find_published("--source", source)
    config = read_object(folder / "config.json")
    check_tokens("--source", source, load_bpe(str(folder)), corpus)
    tensors, files = _read_tensors(folder)
    manifest, tokenizer, hf = read_manifest(corpus), corpus / "tokenizer.json", output / "hf"
    (output / "meta.json").unlink(missing_ok=True)
    write_tensors(output / HF_FILES[0], tensors, {"format": "pt"})
    write_json(output / HF_FILES[1], _without_code(config))
    save_tokenizer(hf, manifest["length"], tokenizer)
    network = CausalLM(load_causal_lm(hf), manifest["vocab_size"])
    _check_network(network, source, manifest)
    shape = Network(size=_size(network, source), architecture="transformers")
    _, _, revision = source.partition("@")
    digest = sha256(files[0])
    meta = {
        "kind": "autoregressive",
        "network": shape.model_dump(),
        **{key: manifest[key] for key in ("vocab_size", "eos_id", "length")},
        "corpus": corpus.name,
        "round": 0,
        "imported": {
            "source": source,
            "revision": revision or None,
            "file": files[0].name,
            "sha256": digest,
            "weights": "the one set it has",
        },
    }
    teacher = output.parent.name
    with Journal(
        output,
        name="baseline",
        node=f"import-baseline/{teacher}",
        params={"source": source, **meta["network"]},
        tags={"teacher": teacher, "round": 0, "imported": source},
        datasets=[{"name": "source", "digest": digest, "source": source}],
    ) as journal:
        save_checkpoint(output, {}, meta, tokenizer, HF_FILES)
        journal.close(checkpoint=output)
    read = [folder / "config.json", *files, corpus / "manifest.json", tokenizer]
    provenance.write_record(output / provenance.NAME, [output, hf], read)


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The weights in a folder and their files; HalfstepError if they may not be read."""
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise HalfstepError(
            f"--source {folder}: holds none of {', '.join(WEIGHT_FILES)}; name a hub name such as "
            "gpt2, or a folder that save_pretrained wrote"
        )
    try:
        content, files = read_weights(found[0])
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise RefusedError("holds more than named tensors")
    except RefusedError as error:
        raise HalfstepError(f"--source {found[0]}: {error}; {DOWNLOAD_AGAIN}") from None
    # Clones, because tied weights of an archive share their memory; masks are no weights.
    tensors = {
        str(name): value.clone() for name, value in content.items() if value.is_floating_point()
    }
    check_finite(tensors, found[0])
    return tensors, files


def _without_code(config: Any) -> Any:
    """A configuration without the keys of LOADS_CODE, at any depth."""
    if not isinstance(config, dict):
        return config
    kept = {key for key in config if not any(word in key for word in LOADS_CODE)}
    return {key: _without_code(value) for key, value in config.items() if key in kept}


def _check_network(network: CausalLM, source: str, manifest: dict[str, Any]) -> None:
    """HalfstepError unless the model predicts each token of the corpus's windows in turn."""
    limits = {
        "length": ("positions", network.most_tokens),
        "vocab_size": ("rows of its vocabulary", network.model.config.vocab_size),
    }
    for key, (what, most) in limits.items():
        if most is not None and manifest[key] > most:
            raise HalfstepError(
                f"--source {source}: found {most} {what}, but the {key} of the corpus is "
                f"{manifest[key]}; change the corpus, or name another model"
            )
    try:
        check_causal(network)
    except (ValueError, TypeError, AttributeError) as error:
        raise HalfstepError(
            f"--source {source}: is no causal language model with a KV cache ({error}); "
            "name another model"
        ) from None


def _size(network: CausalLM, source: str) -> str:
    """The size of the network, as blocks x width x heads."""
    config = network.model.config
    try:
        shape = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
        return Network(size=size_of_shape(*shape)).size
    except (AttributeError, pydantic.ValidationError) as error:
        raise HalfstepError(
            f"--source {source}: its blocks, width and heads have no size "
            f"({type(error).__name__}); name another model"
        ) from None

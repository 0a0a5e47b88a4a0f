"""`halfstep import-baseline`: an autoregressive baseline of a published causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from halfstep.checkpoint import HF_FILES, save_checkpoint
from halfstep.commands.origins import find_published
from halfstep.config import Network
from halfstep.data.tokenizer import load_bpe, mask_of
from halfstep.data.windows import check_tokens, corpus_tokenizer, read_manifest
from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_json, write_tensors
from halfstep.models import hub
from halfstep.models.causal_lm import CausalLM, check_causal
from halfstep.models.gpt import save_tokenizer
from halfstep.models.hf import swap_rows
from halfstep.models.weight_files import read_object
from halfstep.pretrained import load_causal_lm, size_of_model, without_code
from halfstep.records import provenance
from halfstep.records.journal import Journal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    tensors, files = hub.read_tensors_of(folder)
    manifest, tokenizer, hf = read_manifest(corpus), corpus / "tokenizer.json", output / "hf"
    (output / "meta.json").unlink(missing_ok=True)
    write_tensors(output / HF_FILES[0], tensors, {"format": "pt"})
    write_json(output / HF_FILES[1], without_code(config))
    eos = corpus_tokenizer(corpus).id_to_token(manifest["eos_id"])
    save_tokenizer(hf, manifest["length"], tokenizer, eos)
    model = load_causal_lm(hf)
    if _swap_mask(model, folder, manifest["vocab_size"]):
        write_tensors(output / HF_FILES[0], dict(model.named_parameters()), {"format": "pt"})
    network = CausalLM(model, manifest["vocab_size"])
    _check_network(network, source, manifest)
    shape = Network(size=size_of_model(network.model.config, source), architecture="transformers")
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


def _swap_mask(model: PreTrainedModel, folder: Path, vocabulary: int) -> bool:
    """Let a mask token that is not the last one change ids with the last, as in the corpus.

    False if there is nothing to change.
    """
    file = folder / "tokenizer.json"
    mask_id = mask_of(Tokenizer.from_file(str(file))) if file.is_file() else None
    rows = len(model.get_output_embeddings().weight)
    if mask_id is None or mask_id == vocabulary or rows <= vocabulary:
        return False
    swap_rows(model, mask_id, vocabulary)
    return True


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

"""`halfstep import`: a checkpoint from published weights."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from tokenizers import Tokenizer
from torch import Tensor

from halfstep.checkpoint import FILES, KEPT, build_network, save_checkpoint, write_kept
from halfstep.commands.import_transformers import (
    HF,
    Logits,
    TransformersSource,
    is_ours,
    read_source,
)
from halfstep.config import Distillation, Network, PublishedStudent, Training, size_of_shape
from halfstep.data.tokenizer import EOS, load_bpe, vocabulary_size
from halfstep.data.windows import corpus_tokenizer, read_manifest
from halfstep.distill.rounds import plan_round
from halfstep.errors import HalfstepError, reason
from halfstep.files import sha256, write_atomic
from halfstep.models import hub
from halfstep.records import provenance
from halfstep.records.journal import Journal
from halfstep.released import is_raw, read_student
from halfstep.resolve import explain
from halfstep.tensors import check_weights

DOWNLOADED = ["*.safetensors", "*.bin", "*.index.json", "config.json", "tokenizer.json"]
SOURCE_FILES = [*DOWNLOADED, "*token*", "vocab.*", "merges.txt", "*.model"]
SOURCE_FILES += ["chat_template*", "generation_config.json"]
MAX_LENGTH = 2**20  # tokens of a text, as a published configuration may give them


@dataclass(frozen=True)
class ImportedWeights:
    """Published weights of a denoiser, as a checkpoint holds them.

    meta: content of its meta.json; states: raw weights and their average, which may be the same
    files: what was read; kept: files of the source for its export, by their names in a checkpoint
    """

    meta: dict[str, Any]
    states: dict[str, dict[str, Tensor]]
    tokenizer: Tokenizer
    files: list[Path]
    kept: Mapping[str, bytes] = field(default_factory=dict)


def import_checkpoint(  # noqa: PLR0913  the flags of the command
    source: str,
    output: Path,
    student: PublishedStudent,
    corpus: Path | None = None,
    tokenizer: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    size: str | None = None,
    logits: Logits | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a checkpoint from published weights.

    It can be the teacher of a first round, or a student of the paper to measure. A source is a
    .ckpt of MDLM or SDTT, a folder as on the hub, or a hub name such as kuleshov-group/mdlm-owt or
    jdeschena/sdtt@baselines_kld_step_70000. With --weights ema the average is kept as well as the
    raw weights, if the source has one. With --weights raw the raw weights are used as both, as the
    released code does.

    A source that begins with hf: is a model of transformers that fills in masks, such as
    hf:answerdotai/ModernBERT-base: a masked language model, or a causal one that was trained to
    read both ways. Its tokenizer is that of the corpus. Its mask token and the last token change
    ids, so that the mask is the last one. Code of the source is run only with --trust-remote-code;
    the checkpoint keeps it, and this account may run it from then on.

    Args:
        source: file, folder or hub name; hf: before a name or a folder of transformers
        output: folder of the checkpoint
        student: what the weights were trained for, where their name does not say it
        corpus: folder of `halfstep prepare-corpus` to use it with; gives tokenizer and length
        tokenizer: hub name (gpt2) or folder, for an import without a corpus; without it, that of
            the source
        weights: ema or raw
        size: refuse weights of another size (small, medium, large ...)
        logits: which output of an hf: model predicts a token: the one at its position (same) or at
            the position before (shifted); by default, what is known of the family
        trust_remote_code: run the Python files in the repository of an hf: model, which can do
            whatever you can do
    """
    found = read_imported(
        source, student, corpus, tokenizer, weights, size, logits, trust_remote_code
    )
    _write_imported(output, found, weights)
    read = found.files
    if corpus:
        read = [*read, corpus / "manifest.json", corpus / "tokenizer.json"]
    provenance.write_record(
        output / provenance.NAME,
        [output, *(output / name for name in KEPT)],
        [file for file in read if file.is_file()],
    )


def read_imported(  # noqa: PLR0913  the flags of the command
    source: str,
    student: PublishedStudent,
    corpus: Path | None,
    tokenizer: str | None,
    weights: Literal["ema", "raw"],
    size: str | None,
    logits: Logits | None,
    trust_remote_code: bool = False,
) -> ImportedWeights:
    """The published weights of a denoiser; arguments and HalfstepErrors of `import_checkpoint`."""
    if source.startswith(HF):
        folder = find_folder(source, trust_remote_code)
        if not is_ours(folder):
            if tokenizer:
                raise HalfstepError(
                    f"--tokenizer {tokenizer}: found it with --source {source}, which has its own; "
                    "leave it out"
                )
            found = read_source(folder, source, corpus, logits, trust_remote_code)
            return _weights_of_transformers(found, source, student, corpus, size)
    unused = f"--logits {logits}" if logits else "--trust-remote-code"
    if logits or trust_remote_code:
        raise HalfstepError(
            f"{unused}: only sources that begin with hf: and are no denoiser of MDLM or "
            "halfstep need it; leave it out"
        )
    _, _, revision = source.partition("@")
    path = _find_source(source.removeprefix(HF))
    published = hub.read_published(path)
    vocabulary, *shape = hub.shape_of(
        published.raw, published.file, published.config.get("n_heads")
    )
    network = _network(published, shape)
    _check_size(network, size, published.file)
    tokens, length = _tokenizer_and_length(path, corpus, tokenizer, published.config)
    mask_id = published.config.get("mask_token_id", published.config.get("mask_index"))
    tokens = without_mask_token(tokens, mask_id if isinstance(mask_id, int) else vocabulary)
    raw = {key: value.float() for key, value in published.raw.items()}
    states = {"raw": raw, "ema": raw}
    if weights == "ema" and published.ema:
        states["ema"] = raw | {key: value.float() for key, value in published.ema.items()}
    if vocabulary_size(tokens) != vocabulary:
        vocabulary = _cut_vocabulary(states, published, vocabulary_size(tokens))
    meta = _meta_of_import(
        network,
        vocabulary,
        tokens.token_to_id(EOS),
        length,
        corpus,
        lineage(source, student),
        {
            "source": source,
            "revision": revision or None,
            "file": published.file.name,
            "sha256": sha256(published.file),
            "weights": _imported_weights(published, weights, source),
        },
    )
    _check_states(states, meta, published.file)
    read = [*published.files, published.file.parent / "config.json"]
    return ImportedWeights(meta, states, tokens, read)


def _meta_of_import(
    network: Network,
    vocabulary: int,
    eos_id: int,
    length: int,
    corpus: Path | None,
    made_from: dict[str, Any],
    imported: dict[str, Any],
) -> dict[str, Any]:
    """The content of the meta.json of a diffusion model that was trained elsewhere."""
    return {
        "kind": "diffusion",
        "network": network.model_dump(),
        "vocab_size": vocabulary,
        "eos_id": eos_id,
        "length": length,
        "corpus": corpus.name if corpus else None,
        "training": {"min_t": Training().min_t},
        **made_from,
        "ema_updates": 0,
        "imported": imported,
    }


def _check_size(network: Network, size: str | None, source: object) -> None:
    if size and network.size != size:
        raise HalfstepError(
            f"--source {source}: found size {network.size}, expected {size}; "
            f"set network.size: {network.size}, or name other weights"
        )


def find_folder(source: str, with_code: bool = False) -> Path:
    """The folder of a model of transformers, `source` after hf:, downloaded if it is a hub name."""
    patterns = [*SOURCE_FILES, "*.py"] if with_code else SOURCE_FILES
    path = _find_source(source.removeprefix(HF), patterns)
    if not (path / "config.json").is_file():
        raise HalfstepError(
            f"--source {source}: holds no config.json; name a hub name such as "
            "hf:answerdotai/ModernBERT-base, or a folder that save_pretrained wrote"
        )
    return path


def _weights_of_transformers(
    found: TransformersSource,
    source: str,
    student: PublishedStudent,
    corpus: Path | None,
    size: str | None,
) -> ImportedWeights:
    _check_size(found.network, size, source)
    _, _, revision = source.partition("@")
    about = {
        "source": source,
        "revision": revision or None,
        "file": found.files[0].name,
        "sha256": sha256(found.files[0]),
        "weights": "the one set it has",
    }
    made_from = lineage(source, student) | found.about
    vocabulary = vocabulary_size(found.tokenizer)
    meta = _meta_of_import(
        found.network, vocabulary, found.eos_id, found.length, corpus, made_from, about
    )
    states = {"raw": found.state, "ema": found.state}
    _check_states(states, meta, found.files[0])
    return ImportedWeights(meta, states, found.tokenizer, found.files, found.kept)


def _find_source(source: str, patterns: list[str] = DOWNLOADED) -> Path:
    """The file or folder that `source` names; a name on the hub is downloaded."""
    name, _, revision = source.partition("@")
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not name.endswith(".ckpt")
    if Path(source).exists() or not is_hub_name:
        return Path(source)
    return fetch_from_hub("--source", name, revision, patterns)


def fetch_from_hub(flag: str, name: str, revision: str, patterns: list[str]) -> Path:
    """The folder of a hub repository's revision, downloaded or from the hub's cache.

    Only files that fit a pattern are downloaded. `flag` begins the message of the HalfstepError.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # the client, requests and the file system raise different types
        full_name = f"{name}@{revision}" if revision else name
        raise HalfstepError(
            f"{flag} {full_name}: the download failed ({type(error).__name__}: {reason(error)}); "
            "check name, revision and network, or download it elsewhere and name the folder"
        ) from None
    return Path(folder)


def _network(published: hub.Published, shape: list[int]) -> Network:
    """The network that fits the weights and their configuration."""
    config = published.config
    noise = config.get("noise")
    kind = noise.get("type") if isinstance(noise, dict) else None
    if kind not in (None, "loglinear"):
        raise HalfstepError(
            f"--source {published.file}: its configuration has noise.type {str(kind)[:80]!r}, "
            "expected loglinear; name other weights"
        )
    is_gpt2 = hub.POSITIONS in published.raw
    if not is_gpt2:
        shape = [*shape, published.raw["sigma_map.mlp.0.weight"].shape[0]]
    try:
        return Network(
            size=size_of_shape(*shape),
            time_conditioning=config.get("time_conditioning") or False,
            schedule=config.get("schedule", "loglinear"),
            shifted=config.get("shifted", False),
            architecture="gpt2" if is_gpt2 else "dit",
        )
    except pydantic.ValidationError as error:
        raise HalfstepError(
            f"--source {published.file}: its configuration: {explain(error, Network)[0]}"
        ) from None


def _cut_vocabulary(
    states: dict[str, dict[str, Tensor]], published: hub.Published, tokens: int
) -> int:
    """Cut the rows of a padded vocabulary in each state; the number of tokens that remain.

    HalfstepError if the vocabulary is not a padded one of `tokens` tokens and the mask.
    """
    rows = len(published.raw[hub.EMBEDDING])
    mask = published.config.get("mask_token_id", published.config.get("mask_index", tokens))
    if mask != tokens or not hub.is_padded(published.raw, tokens):
        raise HalfstepError(
            f"--source {published.file}: its vocabulary is {rows - 1} tokens and the mask, "
            f"the tokenizer has {tokens}; "
            "name the corpus or the tokenizer that it was trained with"
        )
    for name, state in states.items():
        states[name] = hub.without_padding(state, tokens)
    print(
        f"halfstep import: --source {published.file}: its vocabulary is padded; of {rows} rows, "
        f"those of the {tokens} tokens and the mask are kept",
        file=sys.stderr,
    )
    return tokens


def _tokenizer_and_length(
    path: Path, corpus: Path | None, name: str | None, config: dict
) -> tuple[Tokenizer, int]:
    """Tokenizer, and tokens per text, from the corpus or else from the source and --tokenizer."""
    if corpus:
        return corpus_tokenizer(corpus), read_manifest(corpus)["length"]
    model = config.get("model")
    length = config.get("model_length")
    if not length and isinstance(model, dict):
        length = model.get("length")
    if type(length) is not int or not 8 <= length <= MAX_LENGTH:
        raise HalfstepError(
            f"--source {path}: does not say how many tokens a text has (8 to {MAX_LENGTH:,}); "
            "give --corpus, the folder of halfstep prepare-corpus"
        )
    if name:
        return load_bpe(name), length
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return load_bpe(str(path)), length
    raise HalfstepError(
        f"--source {path}: comes without a tokenizer; "
        "give --corpus, or --tokenizer gpt2 for the published models"
    )


def without_mask_token(tokenizer: Tokenizer, mask_id: int) -> Tokenizer:
    """The tokenizer of an export as halfstep uses it; any other tokenizer as it is."""
    about = json.loads(tokenizer.to_str())
    added = {token["id"]: token["content"] for token in about["added_tokens"]}
    content = added.get(mask_id, "")
    if "mask" not in content.lower():
        return tokenizer
    about["added_tokens"] = [token for token in about["added_tokens"] if token["id"] != mask_id]
    if isinstance(about["model"]["vocab"], dict):
        about["model"]["vocab"].pop(content, None)
    return Tokenizer.from_str(json.dumps(about))


def lineage(source: str, student: PublishedStudent) -> dict:
    """Entries of meta.json on the round: those of `student`, or else what the source's name says.

    Where neither says anything it is a teacher (round 0).
    """
    known = student if student.round is not None else read_student(source)
    if known is None or not known.round:
        return {"round": 0}
    facts = {
        "divergence": known.divergence,
        "teacher_steps": known.teacher_steps,
        "substeps": known.substeps,
    }
    plan = plan_round(Distillation(**facts, rounds=known.round), known.round)
    about = {"round": plan.index, "run": facts, "dt": plan.dt}
    return about | {"student_steps": plan.student_steps}


def _imported_weights(published: hub.Published, weights: str, source: str) -> str:
    if published.ema and weights == "ema":
        return "raw and ema"
    is_known = published.ema or weights == "raw" or is_raw(source)
    return "raw" if is_known else "the one set it has"


def _check_states(states: dict[str, dict[str, Tensor]], meta: dict, file: Path) -> None:
    """HalfstepError unless every set of weights fits the network that meta describes."""
    with torch.device("meta"):
        network = build_network(meta)
    for state in states.values():
        check_weights(network, state, file)


def _write_imported(output: Path, found: ImportedWeights, weights: str) -> None:
    """Write the checkpoint, with the files it keeps, and a journal without points."""
    meta = found.meta
    imported, round = meta["imported"], meta["round"]
    params = {"source": imported["source"], "weights": weights, **meta["network"]}
    teacher, name = output.parent.name, "teacher"
    tags = {"round": round, "imported": imported["source"]}
    if round:
        teacher, name = output.parent.parent.name, f"{output.parent.name}/round-{round}"
        tags["run"] = output.parent.name
        params |= {"round": round, "student_steps": meta["student_steps"], **meta["run"]}
    with Journal(
        output,
        name=name,
        node=f"import/{teacher}/{name}" if round else f"import/{teacher}",
        params=params,
        tags={"teacher": teacher, **tags},
        datasets=[{"name": "source", "digest": imported["sha256"], "source": imported["source"]}],
    ) as journal:
        write_atomic(output / "tokenizer.json", found.tokenizer.to_str(pretty=False))
        tensors = {FILES[name]: state for name, state in found.states.items()}
        write_kept(output, found.kept)
        save_checkpoint(output, tensors, meta, output / "tokenizer.json", list(found.kept))
        journal.close(checkpoint=output)

"""Language models of transformers that fill in masks, as `halfstep import` reads them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from halfstep.config import Network
from halfstep.data.model_tokenizer import read_model_tokenizer
from halfstep.data.tokenizer import encode_texts, vocabulary_size
from halfstep.data.windows import Windows, check_tokens, read_manifest
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError, reason
from halfstep.files import write_json, write_tensors
from halfstep.meta import LONGEST_TEXT, Framing, framing_of
from halfstep.models import hub
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.hf import TransformersNetwork, read_both_ways, swap_rows
from halfstep.models.weight_files import read_object
from halfstep.pretrained import (
    ANY,
    CAUSAL,
    CONFIG,
    MASKED,
    Code,
    code_of,
    load_pretrained,
    size_of_model,
    without_code,
)
from halfstep.remote_code import allow_code, files_of_code, read_code, split_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HF = "hf:"  # before the name of a source that is read here
OURS = ("halfstep", "mdlm")  # values of model_type that `hub.read_published` reads
Logits = Literal["same", "shifted"]
EXPORTED = "halfstep"  # key of config.json in which an export says what the model is
KNOWN_LOGITS: dict[str, Logits] = {"gpt2": "shifted", "llada": "same", "Dream": "shifted"}
"""Families of causal models whose denoisers all have their logits in one way (gpt2: DiffuGPT)"""
TOLERANCE = 1e-4  # between logits that should be equal, as a share of the largest
OTHER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "generation_config.json"),
)
"""Files of a source that its export has too, next to the vocabulary files of its tokenizer"""
LEAST_TOKENS = 0.9  # of the rows of a padded table
MOST_TOKENS = 1024  # of a text, where neither a corpus nor the model says fewer
# Share of masked tokens, texts, and tokens of each, of the test of the logits.
HIDDEN, WINDOWS, TESTED = 0.3, 16, 128
SURE = 4  # standard errors between two means that differ
PARAGRAPH = (
    "The river was high after three days of rain, and nobody had seen the ferry since Sunday. "
    "My grandmother put bread and cheese into a basket, gave me her old coat, and told me to walk "
    "along the road until I found the bridge. It was not far, she said, but I should be careful "
    "where the path turns into the forest, because the ground there is soft and the light is bad. "
    "When I came to the village in the evening, all the windows were open and people were talking "
    "about the water. A man who sold newspapers asked me where I came from. I told him, and he "
    "laughed and said that I was the first visitor of the week."
)


@dataclass(frozen=True)
class TransformersSource:
    """A model of transformers with its mask token as the last one, and what a checkpoint needs.

    network: for meta.json; about: more entries of it; files: what was read, the weights first
    kept: files of its tokenizer, by their names in the checkpoint
    """

    network: Network
    tokenizer: Tokenizer
    eos_id: int
    length: int
    state: dict[str, Tensor]
    about: dict[str, Any]
    files: list[Path]
    kept: dict[str, bytes]


def is_ours(folder: Path) -> bool:
    """Does config.json say that our own networks read these weights? No code is run for it."""
    return read_object(folder / "config.json").get("model_type") in OURS


def read_source(
    folder: Path,
    source: str,
    corpus: Path | None,
    logits: Logits | None,
    runs_code: bool = False,
) -> TransformersSource:
    """Read and check the model in a folder of transformers.

    With `runs_code`, code in the folder is allowed to run in this account, now and later.
    HalfstepError if it cannot be read, has no mask token, another tokenizer than the corpus, logits
    that are no linear function of its features, or other logits than `logits`.
    """
    config = read_object(folder / "config.json")
    code = _allowed_code(folder, config, source) if runs_code else None
    auto = _auto_class(config, source, code)
    chosen = _logits_of(config, auto, source, logits or _exported_logits(config))
    tensors, files = hub.read_tensors_of(folder)
    model = _load(config, tensors, auto, source, code)
    _check_head(model, source)
    own = read_model_tokenizer(folder, f"--source {source}")
    tokenizer, mask_id, swapped = own.tokenizer, own.mask_id, own.swapped
    V = vocabulary_size(tokenizer)
    _check_rows(model, V, source)
    swap_rows(model, mask_id, V)
    if corpus:
        check_tokens("--source", source, tokenizer, corpus)
        _check_framing(own.framing, corpus, source)
    network = _checked_network(model, V, auto, source)
    length = read_manifest(corpus)["length"] if corpus else network.most_tokens or MOST_TOKENS
    length = length if corpus else min(length, MOST_TOKENS)
    _check_length(network, length, source)
    check_logits(network, chosen, _real_text(tokenizer, corpus, length), source)
    return TransformersSource(
        network=Network(
            size=size_of_model(model.config, source),
            shifted=chosen == "shifted",
            architecture="transformers",
        ),
        tokenizer=tokenizer,
        eos_id=read_manifest(corpus)["eos_id"] if corpus else own.eos_id,
        length=length,
        state={name: p.detach().clone() for name, p in network.named_parameters()},
        about={
            "transformers": {
                "auto": auto,
                "config": with_ids(without_code(config), swapped)
                | ({"auto_map": code.auto_map} if code else {}),
                "mask_id": mask_id,
                "source": source.removeprefix(HF),
                "code": code and code.sha256,
            },
            "framing": own.framing.model_dump(),
            **_turn_of(corpus),
        },
        files=[*files, folder / "config.json"],
        kept=_kept_files(folder, own.theirs) | _files_in_code(code),
    )


def _allowed_code(folder: Path, config: dict[str, Any], source: str) -> Code:
    """The code of the source, which the user allows to run; a warning names it.

    HalfstepError if there is none, or if config.json names classes outside it.
    """
    try:
        code = code_of(config, read_code(folder) if "auto_map" in config else "")
    except ValueError as error:
        raise HalfstepError(
            f"--trust-remote-code: --source {source} brings no code of a language model "
            f"({error}); leave it out"
        ) from None
    for key in (MASKED, CAUSAL, ANY, CONFIG):
        if key in code.auto_map:
            split_reference(code.sha256, code.auto_map[key])
    print(
        f"halfstep import: warning: runs the code of {source.removeprefix(HF)} "
        f"({', '.join(files_of_code(code.sha256))}), sha256 {code.sha256}; this account allows it "
        "from now on",
        file=sys.stderr,
    )
    allow_code(code.sha256, source.removeprefix(HF))
    return code


def _files_in_code(code: Code | None) -> dict[str, bytes]:
    files = files_of_code(code.sha256) if code else {}
    return {f"code/{name}": content for name, content in files.items()}


def _auto_class(config: dict[str, Any], source: str, code: Code | None) -> str:
    """The class of transformers that loads this configuration; HalfstepError if there is none."""
    import transformers

    if code:
        return next(auto for auto in (MASKED, CAUSAL, ANY) if auto in code.auto_map)
    kind = str(config.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        found, advice = "no code in transformers", ""
        if "auto_map" in config:
            found = "its code in the repository, which is not run"
            advice = "read that code, and set trust_remote_code: true (--trust-remote-code), or "
        raise HalfstepError(
            f"--source {source}: its model_type {kind[:80]!r} has {found}; {advice}name a model "
            f"that transformers {transformers.__version__} knows, or an export of halfstep"
        )
    known = transformers.CONFIG_MAPPING[kind]
    says_causal = all("MaskedLM" not in str(name) for name in config.get("architectures") or [""])
    is_masked = known in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if known in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and (says_causal or not is_masked):
        return CAUSAL
    if is_masked:
        return MASKED
    raise HalfstepError(
        f"--source {source}: its model_type {kind!r} is no language model with a readout of "
        "tokens; name a masked or a causal language model"
    )


def _exported_logits(config: dict[str, Any]) -> Logits | None:
    """Which output predicts a token, where config.json is of an export; its entry is taken out."""
    said = config.pop(EXPORTED, None)
    found = said.get("logits") if isinstance(said, dict) else None
    return found if found in get_args(Logits) else None


def _logits_of(config: dict[str, Any], auto: str, source: str, given: Logits | None) -> Logits:
    """Which output predicts a token, from the user or the family of the model."""
    known = "same" if auto == MASKED else KNOWN_LOGITS.get(str(config.get("model_type")))
    if given or known:
        return given or known  # type: ignore[return-value]
    raise HalfstepError(
        f"--source {source}: is a causal language model ({config.get('model_type')}), which is "
        "read as a denoiser only if it was trained as one; set logits: same, or logits: shifted "
        "if each output predicts the next token"
    )


def _load(
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    auto: str,
    source: str,
    code: Code | None,
) -> PreTrainedModel:
    """The model of these tensors; neither a pickle nor other code is near transformers."""
    with TemporaryDirectory() as name:
        write_json(Path(name) / "config.json", without_code(config))
        write_tensors(Path(name) / "model.safetensors", tensors, {"format": "pt"})
        return load_pretrained(Path(name), auto, f"--source {source}", code)


def _check_head(model: PreTrainedModel, source: str) -> None:
    """HalfstepError unless the model names an embedding table, and a linear layer as its head."""
    try:
        layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    except Exception:  # code of others raises anything
        layers = [None, None]
    if not (isinstance(layers[0], nn.Embedding) and isinstance(layers[1], nn.Linear)):
        raise HalfstepError(
            f"--source {source}: {type(model).__name__} names no embedding table and no linear "
            "layer of logits (get_input_embeddings, get_output_embeddings); name another model"
        )


def _kept_files(folder: Path, theirs: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files of a tokenizer, as they are."""
    names = {*OTHER_FILES, *theirs.vocab_files_names.values()}
    files = [folder / name for name in sorted(names)]
    return {f"source/{file.name}": file.read_bytes() for file in files if file.is_file()}


def _check_rows(model: PreTrainedModel, vocabulary: int, source: str) -> None:
    """HalfstepError unless table and readout have a row for each token, and few others."""
    rows = [
        len(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    if not all(vocabulary < n and vocabulary + 1 >= LEAST_TOKENS * n for n in rows):
        raise HalfstepError(
            f"--source {source}: its tokenizer has {vocabulary:,} tokens and the mask, but its "
            f"table has {rows[0]:,} rows and its readout {rows[1]:,}: the tokenizer is another "
            "model's; name a folder with the model's own tokenizer"
        )


def _check_framing(framing: Framing, corpus: Path, source: str) -> None:
    """HalfstepError if the corpus has another model's frame; one without any has none to check."""
    manifest = read_manifest(corpus)
    if "framing" in manifest and framing_of(manifest) != framing:
        raise HalfstepError(
            f"--source {source}: its tokenizer puts {framing.begin} before and {framing.end} after "
            f"a text, corpus {corpus} has {manifest['framing']['begin']} and "
            f"{manifest['framing']['end']}; prepare the corpus with tokenizer: {source}"
        )


def _turn_of(corpus: Path | None) -> dict[str, Any]:
    """The entry `pairs` of a corpus of pairs, which its models have too."""
    turn = read_manifest(corpus).get("pairs") if corpus else None
    return {} if turn is None else {"pairs": turn}


def _check_length(network: TransformersNetwork, length: int, source: str) -> None:
    most = network.most_tokens or LONGEST_TEXT
    if length > most:
        raise HalfstepError(
            f"--source {source}: found {most} positions, but the length of the corpus is {length}; "
            "change the corpus, or name another model"
        )


@torch.no_grad()
def _checked_network(
    model: PreTrainedModel, vocabulary: int, auto: str, source: str
) -> TransformersNetwork:
    """The network; HalfstepError unless it gives the model's logits, and reads both ways."""
    model.config.use_cache = False
    if auto != MASKED:
        read_both_ways(model)
    x = (torch.arange(8)[None] * 7919 + 1) % vocabulary
    other = x.clone()
    other[:, -1] = vocabulary
    try:
        expected = model(input_ids=x).logits
        network = TransformersNetwork(model, vocabulary).eval()
        h, changed = network(x), network(other)
        weight, bias = network.readout
        found = h @ weight[:vocabulary].t() + bias
        error = (found - expected[..., :vocabulary]).abs().max() / expected.abs().max()
        fault = None
        if not error <= TOLERANCE:
            fault = "its logits are no linear function of its features"
        elif torch.equal(h[:, 0], changed[:, 0]):
            fault = "its predictions do not depend on later tokens"
    except Exception as error:  # transformers, and code of others, raise many types
        fault = f"{type(error).__name__}: {reason(error)}"
    if fault:
        raise HalfstepError(
            f"--source {source}: {type(model).__name__} cannot be read as a denoiser ({fault}); "
            "name another model"
        )
    return network


def swap_of(mask_id: int, last: int) -> Callable[[int], int]:
    """The function that lets two ids change places; it undoes itself."""
    return lambda token: {mask_id: last, last: mask_id}.get(token, token)


def with_ids(config: dict[str, Any], swapped: Callable[[int], int]) -> dict[str, Any]:
    """A configuration whose special tokens have changed their ids."""
    changed = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id"):
            is_list = isinstance(value, list)
            changed[key] = [swapped(token) for token in value] if is_list else swapped(value)
    return changed


def _real_text(tokenizer: Tokenizer, corpus: Path | None, length: int) -> Tensor:
    """The beginnings of held-out windows [n, L]; a paragraph of English without a corpus."""
    if corpus:
        return Windows(corpus, "validation")[:WINDOWS][:, :TESTED]
    return torch.tensor(encode_texts(tokenizer, [PARAGRAPH]))[:, : min(length, TESTED)]


def check_logits(network: TransformersNetwork, chosen: Logits, texts: Tensor, source: str) -> None:
    """HalfstepError if the other output predicts masked tokens of real text better, and well.

    A model that predicts no better than chance in both ways is not refused.
    """
    losses = {
        name: masked_losses(network, texts, name == "shifted") for name in ("same", "shifted")
    }
    other = "same" if chosen == "shifted" else "shifted"
    gain = losses[chosen] - losses[other]
    is_clear = gain.mean() > SURE * gain.std() / math.sqrt(len(gain))
    if is_clear and losses[other].mean() < LEAST_TOKENS * math.log(network.vocabulary):
        raise HalfstepError(
            f"--source {source}: logits: {chosen} predicts masked tokens of real text with "
            f"{losses[chosen].mean():.2f} nats each, {other} with {losses[other].mean():.2f}; "
            f"set logits: {other}"
        )


@torch.no_grad()
def masked_losses(network: TransformersNetwork, texts: Tensor, shifted: bool) -> Tensor:
    """-log p of the same masked tokens of texts[n, L], in nats, [masked tokens]."""
    denoiser = SubsDenoiser(network, LogLinear(), shifted=shifted)
    hidden = torch.rand(texts.shape, generator=torch.Generator().manual_seed(1)) < HIDDEN
    hidden[:, 1] = True  # at least one in a short text
    xt = texts.masked_fill(hidden, denoiser.mask_id)
    h = denoiser.features(xt, torch.full((len(xt),), HIDDEN), hidden)
    return -denoiser.log_p(h).gather(-1, texts[hidden][:, None])[:, 0]

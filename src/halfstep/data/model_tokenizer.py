"""Tokenizers of models of transformers: tokens without the mask, and the frame of each text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfstep.data.tokenizer import end_of_document, mask_of, vocabulary_size, without_mask
from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json
from halfstep.meta import Framing

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

OF_MODEL = "hf:"  # before the name of a model of which all is taken as it is
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class ModelTokenizer:
    """A tokenizer as halfstep uses it: the mask is the first id after the vocabulary.

    theirs: as transformers reads it; tokenizer: the same without its mask token, whose id the last
    token has; mask_id: the mask at the source; framing, eos_id: with our ids
    """

    theirs: PreTrainedTokenizerBase
    tokenizer: Tokenizer
    mask_id: int
    framing: Framing
    eos_id: int

    def swapped(self, token: int) -> int:
        """Our id of a token of the source."""
        last = vocabulary_size(self.tokenizer)
        return {self.mask_id: last, last: self.mask_id}.get(token, token)


def read_model_tokenizer(folder: Path, where: str) -> ModelTokenizer:
    """Read the tokenizer in a folder of transformers, without running code of the folder.

    `where` begins each message. HalfstepError if it cannot be read, has no mask token, or names no
    token that ends a text.
    """
    theirs = _load_tokenizer(folder, where)
    backend, mask_id = theirs.backend_tokenizer, theirs.mask_token_id
    if mask_id is None:
        about = folder / "config.json"
        config = read_json(about) if about.is_file() else {}
        known = config if isinstance(config, dict) else {}
        mask_id = known.get("mask_token_id", mask_of(backend))
    if type(mask_id) is not int or backend.id_to_token(mask_id) is None:
        raise HalfstepError(
            f"{where}: has no mask token; name a model that was trained to fill in "
            "masks, or adapt this one by training (adapt: gpt2)"
        )
    last = vocabulary_size(backend) - 1
    ours = {mask_id: last, last: mask_id}
    frame = {
        side: [ours.get(token, token) for token in ids] for side, ids in _framing(theirs).items()
    }
    tokenizer = without_mask(backend, mask_id)
    tokenizer.encode_special_tokens = True
    eos_id = _end_of_text(theirs, frame["end"], ours, tokenizer, where)
    return ModelTokenizer(theirs, tokenizer, mask_id, Framing(**frame), eos_id)


def find_model_tokenizer(name: str) -> tuple[ModelTokenizer, Path]:
    """The tokenizer that a corpus names as hf:FOLDER or hf:NAME of the hub, and its folder."""
    where, source = f"tokenizer: {name}", name.removeprefix(OF_MODEL)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        folder = _from_hub(source, where)
    return read_model_tokenizer(folder, where), folder


def _from_hub(source: str, where: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
            raise ValueError("no such folder")
        options = {"revision": revision or None, "allow_patterns": TOKENIZER_FILES}
        return Path(snapshot_download(name, **options))  # type: ignore[arg-type]
    except Exception as error:  # the client, the network and the disk raise different types
        raise HalfstepError(
            f"{where}: is no folder, and the download failed ({type(error).__name__}: "
            f"{reason(error)}); run `halfstep fetch --repositories model:{source}` where there is "
            "a network, or name a folder"
        ) from None


def _load_tokenizer(folder: Path, where: str) -> Any:
    """The tokenizer of a folder; that of a model with its own code is its tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    about = folder / "config.json"
    try:
        has_code = about.is_file() and "auto_map" in read_json(about)
        reader = AutoTokenizer
        if has_code and (folder / "tokenizer.json").is_file():
            reader = PreTrainedTokenizerFast
        found = reader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        found.backend_tokenizer.to_str()
    except Exception as error:  # transformers raises many types
        raise HalfstepError(
            f"{where}: its tokenizer cannot be read ({type(error).__name__}: "
            f"{reason(error)}); name a model with a tokenizer.json"
        ) from None
    return found


def _framing(theirs: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The tokens that the tokenizer puts before and after a text, as the source numbers them."""
    backend = theirs.backend_tokenizer
    plain, framed = (
        backend.encode("a", add_special_tokens=special).ids for special in (False, True)
    )
    for start in range(len(framed) - len(plain) + 1):
        end = start + len(plain)
        if framed[start:end] == plain:
            return {"begin": framed[:start], "end": framed[end:]}
    return {"begin": [], "end": []}


def _end_of_text(
    theirs: PreTrainedTokenizerBase,
    end: list[int],
    ours: dict[int, int],
    tokenizer: Tokenizer,
    where: str,
) -> int:
    """Our id of the token that ends a text: the last of its frame; else one of ENDS; else its EOS.

    ENDS come before EOS, because a chat model's EOS ends a turn and not a text.
    """
    if end:
        return end[-1]
    if (token := end_of_document(tokenizer)) is not None:
        return tokenizer.token_to_id(token)
    for named in (theirs.eos_token_id, theirs.sep_token_id, theirs.pad_token_id):
        if named is not None:
            return ours.get(named, named)
    raise HalfstepError(
        f"{where}: its tokenizer names no token that ends a text (eos_token or "
        "sep_token); add one to its tokenizer_config.json"
    )

"""Tokenizers: a byte-level BPE trained on the corpus, or GPT-2's; EOS ends a document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from halfstep.errors import HalfstepError, reason

EOS = "<|endoftext|>"
# File names on the hub, and in OpenAI's release.
BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens.

    EOS (id 0) and all 256 bytes are among them, so it can encode any text.
    """
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_bpe(name: str) -> Tokenizer:
    """Load a BPE from a folder, or by its name on the hub.

    The folder holds vocab.json and merges.txt, or encoder.json and vocab.bpe, or tokenizer.json.
    """
    folder = Path(name)
    if folder.is_dir():
        tokenizer = _read_folder(folder)
    elif folder.exists() or name.startswith((".", "/", "~")):
        raise HalfstepError(
            f"tokenizer: {name} is not a folder; "
            "name a folder with vocab.json and merges.txt, a hub name, or bpe"
        )
    else:
        tokenizer = _download(name)
    if tokenizer.token_to_id(EOS) is None:
        raise HalfstepError(
            f"tokenizer: {name} has no token {EOS}, which ends documents; "
            "use a GPT-2-like tokenizer"
        )
    tokenizer.add_special_tokens([EOS])  # it exists already: this only marks it as special
    return tokenizer


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """Checksum of the map from tokens to ids, whatever the layout of the tokenizer's file.

    Ids of one vocabulary mean nothing in another.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _read_folder(folder: Path) -> Tokenizer:
    for vocab, merges in BPE_FILES:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            return _byte_level(_read(models.BPE.from_file, folder / vocab, folder / merges))
    if not (folder / "tokenizer.json").is_file():
        raise HalfstepError(
            f"tokenizer: {folder} holds none of vocab.json + merges.txt, "
            "encoder.json + vocab.bpe, tokenizer.json; name another folder"
        )
    return _read(Tokenizer.from_file, folder / "tokenizer.json")


def _read(reader: Callable, *paths: Path) -> Any:
    try:
        return reader(*map(str, paths))
    except Exception as error:  # the bindings raise bare Exception
        names = " and ".join(map(str, paths))
        raise HalfstepError(
            f"tokenizer: {names} cannot be read ({error}); expected the files of a byte-level BPE"
        ) from None


def _download(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the bindings raise bare Exception, offline or unknown alike
        raise HalfstepError(
            f"tokenizer: {name!r} is not a local folder, and the hub did not give it "
            f"({reason(error)}); check name and network, or name a folder with vocab.json and "
            "merges.txt"
        ) from None

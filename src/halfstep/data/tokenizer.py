"""Tokenizers: a byte-level BPE trained on the corpus, or GPT-2's from the hub or a local folder; both end documents with EOS."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from halfstep.errors import HalfstepError, reason

EOS = "<|endoftext|>"
FILES = (
    ("vocab.json", "merges.txt"),
    ("encoder.json", "vocab.bpe"),
)  # names in the hub, and in OpenAI's release


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens, EOS (id 0) and all 256 bytes included: it can write any text."""
    tokenizer = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return tokenizer


def load_bpe(name: str) -> Tokenizer:
    """A folder with vocab.json and merges.txt (or encoder.json and vocab.bpe, or tokenizer.json), else a name on the hub."""
    folder = Path(name)
    if folder.is_dir():
        for vocab, merges in FILES:
            if (folder / vocab).is_file() and (folder / merges).is_file():
                tokenizer = _byte_level(
                    _read(models.BPE.from_file, folder / vocab, folder / merges)
                )
                break
        else:
            if not (folder / "tokenizer.json").is_file():
                raise HalfstepError(
                    f"tokenizer: {folder} holds none of vocab.json + merges.txt, encoder.json + vocab.bpe, tokenizer.json; name another folder"
                )
            tokenizer = _read(Tokenizer.from_file, folder / "tokenizer.json")
    elif folder.exists() or name.startswith((".", "/", "~")):
        raise HalfstepError(
            f"tokenizer: {name} is not a folder; name a folder with vocab.json and merges.txt, a hub name, or bpe"
        )
    else:
        tokenizer = _download(name)
    if tokenizer.token_to_id(EOS) is None:
        raise HalfstepError(
            f"tokenizer: {name} has no token {EOS}, which ends documents; use a GPT-2-like tokenizer"
        )
    tokenizer.add_special_tokens([EOS])  # known already: this only marks it as special
    return tokenizer


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """A checksum of which id means which token, however the file is laid out: ids are worth nothing under another."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _read(reader, *paths: Path):
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
            f"tokenizer: {name!r} is no local folder and the hub did not give it ({reason(error)}); check name and network, or name a folder "
            "with vocab.json and merges.txt"
        ) from None

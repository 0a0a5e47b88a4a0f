"""Tokenizers: a byte-level BPE trained on the corpus, or GPT-2's; EOS ends a document."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from halfstep.errors import HalfstepError, reason
from halfstep.progress import waiting

EOS = "<|endoftext|>"
ENDS = (EOS, "<|end_of_text|>", "</s>", "[SEP]", "<eos>")
"""Tokens that end a document, of our tokenizers and of published ones; the first that exists"""
# File names on the hub, and in OpenAI's release.
BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
LARGEST_FILE = 256 << 20  # bytes; the largest tokenizers have about 30 MB
LONGEST_PROBE = 100_000  # characters of a document that are encoded as a test
LONGEST_RUN = 1024  # characters
# A word of a byte-level BPE is a part of one of these runs.
_RUN = re.compile(r"[^\W_]{N}|(?:[^\w\s]|_){N}|\s{N}".replace("N", str(LONGEST_RUN)))
_BLANKS = re.compile(r"\s{N}".replace("N", str(LONGEST_RUN)))


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
    with waiting("train the BPE"):
        pieces = (piece for text in texts for piece in cut_runs(text))
        tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def cut_runs(text: str) -> Iterator[str]:
    """The text, cut inside of runs of more than LONGEST_RUN letters, digits, signs or blanks.

    A merge of a BPE moves the rest of its word: the time for one word grows with the square of its
    length, and one run is one word.
    """
    longest = max(map(len, text.split()), default=0)
    start = 0
    if longest > LONGEST_RUN or _BLANKS.search(text):
        for run in _RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
    yield text[start:]


def load_bpe(name: str) -> Tokenizer:
    """Load a BPE from a folder, or by its name on the hub, without the settings of UNUSED.

    The folder holds tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe. A
    mask token is taken out (`without_mask`). Settings that are left out, and ids without a token,
    are named on standard error.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        tokenizer, unused = _read_folder(folder)
    elif folder.exists() or name.startswith((".", "/", "~")):
        raise HalfstepError(
            f"tokenizer: {name} is not a folder; "
            "name a folder with vocab.json and merges.txt, a hub name, or bpe"
        )
    else:
        tokenizer, unused = _plain(_download(name).to_str(), name)
    end = end_of_document(tokenizer)
    if end is None:
        raise HalfstepError(
            f"tokenizer: {name} has no token {EOS}, which ends documents, and none of "
            f"{', '.join(ENDS[1:])}; use a GPT-2-like tokenizer"
        )
    if (mask_id := mask_of(tokenizer)) is not None:
        is_last = mask_id == vocabulary_size(tokenizer) - 1
        tokenizer = without_mask(tokenizer, mask_id)
        if not is_last:
            _note(name, f"the mask is no token of texts; its id {mask_id} is now the last token's")
    if unused:
        left_out = ", ".join(unused)
        _note(name, f"its {left_out} is not used: texts are encoded whole, and as they are")
    tokens, size = len(tokenizer.get_vocab()), vocabulary_size(tokenizer)
    if size > 2 * tokens:
        raise HalfstepError(
            f"tokenizer: {name} has {tokens} tokens, but ids up to {size - 1}: most rows of the "
            "model would have no token; number the tokens without holes"
        )
    if size > tokens:
        _note(name, f"the vocabulary is the largest id + 1, {size}, for {tokens} tokens")
    tokenizer.add_special_tokens([end])  # it exists already: this only marks it as special
    return tokenizer


def _note(name: str, text: str) -> None:
    print(f"note: tokenizer {name}: {text}", file=sys.stderr)


def end_of_document(tokenizer: Tokenizer) -> str | None:
    """The token that ends a document: the first of ENDS that the tokenizer has."""
    return next((token for token in ENDS if tokenizer.token_to_id(token) is not None), None)


def end_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a document; ValueError if there is none."""
    end = end_of_document(tokenizer)
    if end is None:
        raise ValueError(f"the tokenizer has none of {', '.join(ENDS)}")
    return tokenizer.token_to_id(end)


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer.json of a corpus or checkpoint, without the settings of UNUSED.

    Special tokens that are written in a text are text for it.
    """
    tokenizer, _ = _plain(_read_json(path), str(path))
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id + 1: ids may have holes, and a model has a row for each id."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def mask_of(tokenizer: Tokenizer) -> int | None:
    """The id of the mask token: the one special token that is called so; None if there is none."""
    added = json.loads(tokenizer.to_str())["added_tokens"]
    ids = [
        token["id"] for token in added if token["special"] and "mask" in token["content"].lower()
    ]
    return ids[0] if len(ids) == 1 else None


def without_mask(tokenizer: Tokenizer, mask_id: int) -> Tokenizer:
    """The tokenizer without its mask token, whose id the last token takes.

    So the mask can be the first id after the vocabulary, as in our own models. Settings of UNUSED
    are left out. HalfstepError if the format of the tokenizer cannot be changed so.
    """
    last = vocabulary_size(tokenizer) - 1
    wanted = {
        token: mask_id if number == last else number
        for token, number in tokenizer.get_vocab().items()
        if number != mask_id
    }
    about = json.loads(tokenizer.to_str())
    about["added_tokens"] = sorted(
        (
            {**token, "id": wanted[token["content"]]}
            for token in about["added_tokens"]
            if token["id"] != mask_id
        ),
        key=lambda token: token["id"],
    )
    vocabulary = about["model"]["vocab"]
    if isinstance(vocabulary, dict):
        # With the added tokens, because one that is added alone takes the first hole of the ids.
        about["model"]["vocab"] = wanted
    else:  # of Unigram: pairs of token and score in the order of the ids
        scores = dict(vocabulary)
        pairs = sorted(wanted.items(), key=lambda pair: pair[1])
        about["model"]["vocab"] = [[token, scores.get(token, 0.0)] for token, _ in pairs]
    found, _ = _plain(json.dumps(about), "the tokenizer without its mask")
    if found.get_vocab() != wanted:
        raise HalfstepError(
            "tokenizer: its mask token cannot be taken out, because the tokens would change their "
            "ids; use the tokenizer.json of another model"
        )
    return found


def describe_loss(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """What the tokenizer changes in these texts, in one sentence; None if they come back exactly.

    HalfstepError if it cannot encode them, or loses more than half of them.
    """
    given = [text[:LONGEST_PROBE] for text in texts]
    encoded = encode_texts(tokenizer, given)
    with _quiet("cannot decode its own tokens"):
        found = tokenizer.decode_batch(encoded, skip_special_tokens=False)
    changed = [(text, back) for text, back in zip(given, found, strict=True) if text != back]
    if not changed:
        return None
    example = _first_difference(*changed[0])
    kept = sum(map(len, found)) / max(sum(map(len, given)), 1)
    number = unknown_id(tokenizer)
    unknown = sum(ids.count(number) for ids in encoded) / max(sum(map(len, encoded)), 1)
    if kept < 0.5 or unknown > 0.5:
        raise HalfstepError(
            f"tokenizer: it loses most of the text ({kept:.0%} of the characters come back, "
            f"{unknown:.0%} of the tokens are unknown); {example}; use a byte-level BPE"
        )
    return f"{len(changed)} of the first {len(given)} documents do not come back exactly; {example}"


def _first_difference(text: str, back: str) -> str:
    pairs = enumerate(zip(text, back, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    here = slice(max(0, at - 10), at + 20)
    return f"{text[here]!r} becomes {back[here]!r}"


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text as it is written: special tokens in it are text, and none are added."""
    former = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    try:
        with _quiet("cannot encode a text"):
            encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    finally:
        tokenizer.encode_special_tokens = former
    return [text.ids for text in encoded]


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for what a tokenizer does not know, if it has one."""
    model = json.loads(tokenizer.to_str())["model"]
    if "unk_id" in model:
        return model["unk_id"]
    return tokenizer.token_to_id(model.get("unk_token") or "")


def vocabulary_sha256(tokenizer: Tokenizer) -> str:
    """Checksum of the map from tokens to ids, whatever the layout of the tokenizer's file.

    Ids of one vocabulary mean nothing in another.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def _read_folder(folder: Path) -> tuple[Tokenizer, list[str]]:
    if (folder / "tokenizer.json").is_file():
        return _plain(_read_json(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    for vocab, merges in BPE_FILES:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            names = f"{folder / vocab} and {folder / merges}"
            for name in (vocab, merges):
                _check_size(folder / name)
            with _quiet(f"{names} cannot be read"):
                bpe = models.BPE.from_file(str(folder / vocab), str(folder / merges))
                tokenizer = _byte_level(bpe)
            return _checked(tokenizer, names), []
    raise HalfstepError(
        f"tokenizer: {folder} holds none of vocab.json + merges.txt, "
        "encoder.json + vocab.bpe, tokenizer.json; name another folder"
    )


def _read_json(path: Path) -> str:
    _check_size(path)
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise HalfstepError(
            f"tokenizer: {path} cannot be read ({reason(error)}); expected JSON in UTF-8"
        ) from None


def _check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise HalfstepError(
            f"tokenizer: {path} has {size:,} bytes, expected at most {LARGEST_FILE:,}; "
            "name the files of a tokenizer"
        )


def _plain(text: str, where: str) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a tokenizer.json without the settings of UNUSED, and what it had of them."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HalfstepError(
            f"tokenizer: {where} cannot be read ({reason(error)}); expected JSON"
        ) from None
    model = about.get("model") if isinstance(about, dict) else None
    if not isinstance(model, dict):
        raise HalfstepError(
            f"tokenizer: {where} cannot be read (it has no model); expected a tokenizer.json"
        )
    unused = [name for name, remove in UNUSED.items() if remove(about)]
    with _quiet(f"{where} cannot be read"):
        tokenizer = Tokenizer.from_str(json.dumps(about))
    return _checked(tokenizer, where), unused


def _checked(tokenizer: Tokenizer, where: str) -> Tokenizer:
    """The tokenizer; HalfstepError if two tokens have one id, so that one of them is lost."""
    owners: dict[int, str] = {}
    for token, number in tokenizer.get_vocab().items():
        other = owners.setdefault(number, token)
        if other != token:
            first, second = sorted([other, token])
            raise HalfstepError(
                f"tokenizer: {where} gives the id {number} to two tokens, {first[:40]!r} and "
                f"{second[:40]!r}; give each token its own id"
            )
    return tokenizer


def _reset(section: dict, key: str) -> bool:
    """Set a key to null; True if it had a value."""
    if not section.get(key):
        return False
    section[key] = None
    return True


def _reset_template(about: dict) -> bool:
    """Remove a post-processor that adds tokens; that of a byte-level BPE moves offsets only."""
    found = about.get("post_processor")
    if isinstance(found, dict) and found.get("type") == "ByteLevel":
        return False
    return _reset(about, "post_processor")


def _reset_strip(about: dict) -> bool:
    """Let no added token take the blanks around it away."""
    tokens = about.get("added_tokens")
    found = False
    for token in tokens if isinstance(tokens, list) else []:
        if isinstance(token, dict) and (token.get("lstrip") or token.get("rstrip")):
            token.update(lstrip=False, rstrip=False)
            found |= "mask" not in str(token.get("content")).lower()  # no text has a mask token
    return found


# Settings of a tokenizer.json that change what a text is: each removes itself, and says if it was.
UNUSED: dict[str, Callable[[dict], bool]] = {
    "truncation": lambda about: _reset(about, "truncation"),
    "padding": lambda about: _reset(about, "padding"),
    "post-processor": _reset_template,
    "dropout": lambda about: _reset(about["model"], "dropout"),
    "strip of added tokens": _reset_strip,
}


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Turn a fault of the bindings into `tokenizer: what (reason)`.

    They raise bare Exception. A panic of theirs is a BaseException, and prints its own stack to the
    file descriptor of standard error, which is closed for it meanwhile.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise HalfstepError(
            f"tokenizer: {what} ({reason(error)}); expected the files of a byte-level BPE"
        ) from None
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _download(name: str) -> Tokenizer:
    try:
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the bindings raise bare Exception, offline or unknown alike
        raise HalfstepError(
            f"tokenizer: {name!r} is not a local folder, and the hub did not give it "
            f"({reason(error)}); check name and network, or name a folder with vocab.json and "
            "merges.txt"
        ) from None

"""Pairs of a prompt and a response: one window each, and a frame of chat around the two.

A window is prompt + response + end-of-text up to the window's end. Noise masks the response and
what follows it, and only they have a loss; so a model learns where a response ends. The file of a
split holds the windows and then, for each of them, where the response starts (uint32).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.data.pack import Spool, read_chunk, token_dtype
from halfstep.data.tokenizer import encode_texts, unknown_id
from halfstep.data.windows import Layout
from halfstep.errors import HalfstepError, reason
from halfstep.files import remember_sha256, write_atomic
from halfstep.meta import Turn

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

PROMPT, RESPONSE = "halfstep's prompt", "halfstep's response"  # stand-ins in a chat template


def join_pair(prompt: str, response: str) -> str:
    """A pair as one document of a spool."""
    return json.dumps([prompt, response], ensure_ascii=False)


def split_pair(document: str) -> tuple[str, str]:
    """The prompt and the response of a document of `join_pair`."""
    prompt, response = json.loads(document)
    return prompt, response


def read_turn(theirs: PreTrainedTokenizerBase, where: str) -> Turn:
    """What the chat template of a tokenizer has around a prompt and its response.

    Without a template it is a line break between the two. HalfstepError if the template has no
    place for them, or cannot be read; `where` begins the message.
    """
    if not theirs.chat_template:
        return Turn()
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": RESPONSE}]
    try:
        text = str(theirs.apply_chat_template(turns, tokenize=False))
        fault = "it has no place for a prompt and its response"
    except Exception as error:  # of jinja2 and of transformers
        text, fault = "", f"{type(error).__name__}: {reason(error)}"
    before, _, rest = text.partition(PROMPT)
    after, found, end = rest.partition(RESPONSE)
    if not found:
        raise HalfstepError(
            f"{where}: its chat template cannot be used ({fault}); name another model, or remove "
            "chat_template from its tokenizer"
        )
    return Turn(before=before, after=after, end=end)


def encode_between(
    tokenizer: Tokenizer, before: str, texts: Sequence[str], after: str
) -> list[list[int]]:
    """The ids of each text between `before` and `after`, in which special tokens are tokens.

    Those that a text mentions are text, as everywhere. Such a text is encoded alone.
    """
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    plain = [not any(one in text for one in special) for text in texts]
    whole = [before + text + after for text, is_plain in zip(texts, plain, strict=True) if is_plain]
    encoded = iter(_with_tokens(tokenizer, whole))
    ends = _with_tokens(tokenizer, [before, after])
    return [
        next(encoded) if is_plain else [*ends[0], *encode_texts(tokenizer, [text])[0], *ends[1]]
        for text, is_plain in zip(texts, plain, strict=True)
    ]


def _with_tokens(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    former = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = False
    try:
        return [one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)]
    finally:
        tokenizer.encode_special_tokens = former


def encode_prompts(
    tokenizer: Tokenizer, turn: Turn, begin: list[int], prompts: Sequence[str]
) -> list[list[int]]:
    """The tokens before each response: the begin of the frame, and the prompt in its turn.

    A chat template may write the begin of the frame itself; it is there once.
    """
    encoded = encode_between(tokenizer, turn.before, prompts, turn.after)
    return [ids if begin and ids[: len(begin)] == begin else [*begin, *ids] for ids in encoded]


def pack_pairs(
    spool: Spool,
    tokenizer: Tokenizer,
    layout: Layout,
    turn: Turn,
    output: Path,
    splits: dict[str, range],
) -> dict[str, dict]:
    """Write {split}.bin for each range of pairs, and return facts of each split.

    `too_long` counts the pairs that do not fit into a window with one end-of-text after them; they
    are left out. HalfstepError if none fits.
    """
    facts = {}
    for split, pairs in splits.items():
        packed = _PackedPairs(tokenizer, layout, turn)
        path = output / f"{split}.bin"

        def write(part: Path, packed: _PackedPairs = packed, pairs: range = pairs) -> None:
            with open(part, "wb") as out:
                for block in packed.blocks(spool, pairs):
                    out.write(block)

        write_atomic(path, write)
        remember_sha256(path, packed.digest.hexdigest())
        facts[split] = {"documents": len(pairs), **packed.facts()}
        if not packed.starts:
            raise HalfstepError(
                f"{split}: none of {len(pairs)} pairs fits into a window of {layout.length} "
                "tokens; raise length, or shorten the pairs"
            )
    return facts


class _PackedPairs:
    """The windows of a split as bytes, and what is counted meanwhile."""

    def __init__(self, tokenizer: Tokenizer, layout: Layout, turn: Turn):
        self.tokenizer, self.layout, self.turn = tokenizer, layout, turn
        self.digest, self.starts = hashlib.sha256(), list[int]()
        self.tokens = self.unknown_tokens = self.too_long = 0

    def blocks(self, spool: Spool, pairs: range) -> Iterator[bytes]:
        """The windows of each chunk of pairs, and at last their starts."""
        for chunk in spool.chunks(pairs.start, pairs.stop):
            found = self._windows(map(split_pair, read_chunk(spool.path, chunk)))
            self.digest.update(found)
            yield found
        found = np.array(self.starts, "<u4").tobytes()
        self.digest.update(found)
        yield found

    def _windows(self, pairs: Iterable[tuple[str, str]]) -> bytes:
        prompts, responses = zip(*pairs, strict=True)
        begin, stop = self.layout.framing.begin, self.layout.framing.inside(self.layout.length).stop
        before = encode_prompts(self.tokenizer, self.turn, begin, prompts)
        after = encode_between(self.tokenizer, "", responses, self.turn.end)
        unknown, rows = unknown_id(self.tokenizer), []
        for prompt, response in zip(before, after, strict=True):
            ids = [*prompt, *response]
            if len(ids) >= stop:
                self.too_long += 1
                continue
            rows.append(ids)
            self.starts.append(len(prompt))
            self.tokens += len(ids) + 1
            self.unknown_tokens += ids.count(unknown)
        windows = self.layout.frames(len(rows), token_dtype(self.tokenizer))
        for window, ids in zip(windows, rows, strict=True):
            window[: len(ids)] = ids
        return windows.tobytes()

    def facts(self) -> dict[str, Any]:
        """Facts of the split for the manifest."""
        return {
            "windows": len(self.starts),
            "cut_windows": 0,
            "tokens": self.tokens,
            "unknown_tokens": self.unknown_tokens,
            "too_long": self.too_long,
            "sha256": self.digest.hexdigest(),
        }

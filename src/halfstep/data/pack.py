"""Packing: documents become windows of tokens in a file, on all cores and in constant memory.

A document becomes its tokens and EOS. The joined stream is cut every length - 2 tokens, and a
window is EOS + cut + EOS (MDLM: BOS and EOS are one id). The remainder at the end of a split is
dropped. Files hold uint16, or uint32 for large vocabularies; `Windows` memory-maps them.

A corpus with the tokenizer of a model has that model's frame in place of the two EOS: Bert's is
[CLS] + cut + [SEP], and a model without one has the cut alone. Noise never masks a frame.

Documents are first spooled to disk. So their number is known before the first one is tokenized: the
last ones can be held out, progress can be shown, and workers read their own share. The bytes
written do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from halfstep.data.tokenizer import (
    encode_texts,
    unknown_id,
    vocabulary_size,
)
from halfstep.data.windows import Layout
from halfstep.errors import HalfstepError
from halfstep.files import remember_sha256, write_atomic
from halfstep.progress import Progress

CHUNK = 1 << 20  # bytes of text that a worker tokenizes at once
HEAD = struct.Struct("<I")  # before each document in the spool: its length in bytes
END = struct.Struct("<q")  # in the index: where each document ends


class Chunk(NamedTuple):
    """Consecutive whole documents in the spool: their position in bytes."""

    start: int
    size: int


class Spool:
    """Documents in a temporary file, each after its length; it exists inside the `with` block."""

    def __init__(self, path: Path, documents: Iterable[str]):
        self.path, self._index = path, path.with_name(path.name + ".ends")
        self.bytes = 0
        self._documents = documents

    def __enter__(self) -> Spool:
        try:
            with open(self.path, "wb", 1 << 20) as out, open(self._index, "wb", 1 << 20) as index:
                for text in self._documents:
                    # Broken JSON escapes make lone surrogates; each becomes "?".
                    raw = text.encode("utf-8", "replace")
                    out.write(HEAD.pack(len(raw)) + raw)
                    self.bytes += HEAD.size + len(raw)
                    index.write(END.pack(self.bytes))
        except BaseException:
            self.__exit__()
            raise
        if self.bytes:
            self._ends = np.memmap(self._index, END.format, "r")
        else:
            self._ends = np.zeros(0, END.format)
        return self

    def __exit__(self, *exc: object) -> None:
        self.path.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._ends)

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        """Documents first, ..., last - 1 in chunks: at most CHUNK bytes, or one longer document."""
        while first < last:
            start = int(self._ends[first - 1]) if first else 0
            stop = int(np.searchsorted(self._ends, np.int64(start + CHUNK), "right"))
            stop = min(max(stop, first + 1), last)
            yield Chunk(start, int(self._ends[stop - 1]) - start)
            first = stop

    def texts(self, first: int, last: int) -> Iterator[str]:
        """Documents first, ..., last - 1."""
        for chunk in self.chunks(first, last):
            yield from read_chunk(self.path, chunk)

    def spread(self, last: int, most_bytes: int) -> Iterator[str]:
        """Every k-th document before `last`: about `most_bytes` of text from the whole spool."""
        every = max(1, -(-self.bytes // most_bytes))
        return islice(self.texts(0, last), 0, None, every)


def read_chunk(path: Path, chunk: Chunk) -> list[str]:
    """The documents of one chunk of the spool at `path`."""
    with open(path, "rb") as file:
        file.seek(chunk.start)
        raw = memoryview(file.read(chunk.size))
    texts, at = [], 0
    while at < len(raw):
        (size,) = HEAD.unpack_from(raw, at)
        at += HEAD.size
        texts.append(str(raw[at : at + size], "utf-8"))
        at += size
    return texts


class _Encoder:
    """Chunk -> its stream of tokens, EOS after each document."""

    def __init__(self, spool: Path, tokenizer: str, dtype: str, eos: int):
        self.spool, self.dtype, self.eos = spool, dtype, eos
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.unknown = unknown_id(self.tokenizer)

    def __call__(self, chunk: Chunk) -> np.ndarray:
        # A text that mentions <|endoftext|> does not end there.
        encoded = encode_texts(self.tokenizer, read_chunk(self.spool, chunk))
        return np.concatenate([np.array([*ids, self.eos], self.dtype) for ids in encoded])


_encoder: _Encoder


def _start_worker(spool: Path, tokenizer: str, dtype: str, eos: int) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process uses one core
    _encoder = _Encoder(spool, tokenizer, dtype, eos)


def _encode(chunk: Chunk) -> np.ndarray:
    return _encoder(chunk)


def _streams(
    chunks: Iterable[Chunk], pool: ProcessPoolExecutor | None, encoder: _Encoder, ahead: int
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Token streams in the order of the chunks; at most `ahead` are pending, to bound memory."""
    if pool is None:
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    pending: deque = deque()
    for chunk in chunks:
        pending.append((chunk, pool.submit(_encode, chunk)))
        if len(pending) >= ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def token_dtype(tokenizer: Tokenizer) -> str:
    """The dtype of the tokens in a corpus's files."""
    return "uint16" if vocabulary_size(tokenizer) <= 1 << 16 else "uint32"


def pack_windows(
    spool: Spool,
    tokenizer: Tokenizer,
    layout: Layout,
    output: Path,
    splits: dict[str, range],
    workers: int,
) -> dict[str, dict]:
    """Write {split}.bin for each range of documents.

    Returns facts of each split: numbers of documents, windows, tokens and so on, and its sha256.
    """
    args = (spool.path, tokenizer.to_str(), token_dtype(tokenizer), layout.eos_id)
    encoder = _Encoder(*args)
    pool = None
    if workers > 1 and spool.bytes > 8 * CHUNK:  # for less, starting processes takes longer
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _start_worker, args)
    facts = {}
    try:
        with Progress("tokenize", -(-spool.bytes // CHUNK), "MB") as progress:
            for split, documents in splits.items():
                chunks = spool.chunks(documents.start, documents.stop)
                streams = _streams(chunks, pool, encoder, 4 * workers)
                path = output / f"{split}.bin"
                found = _write_windows(path, streams, layout, encoder, progress)
                if encoder.unknown == encoder.eos:
                    found["unknown_tokens"] -= len(documents)  # these end documents
                facts[split] = {"documents": len(documents), **found}
                if not found["windows"]:
                    raise HalfstepError(
                        f"{split} text is shorter than one window: {found['tokens']} tokens in "
                        f"{len(documents)} documents, expected at least {layout.room}; add text, "
                        f"lower length ({layout.length}), or change validation_documents"
                    )
    except BrokenProcessPool:
        raise HalfstepError(
            "tokenize: a worker process was killed, most likely for memory; "
            "try fewer with --workers"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return facts


def _write_windows(
    path: Path,
    streams: Iterable[tuple[Chunk, np.ndarray]],
    layout: Layout,
    encoder: _Encoder,
    progress: Progress,
) -> dict:
    """Write the joined streams as windows to a file; return facts of the file."""
    facts: dict = {}

    def write(part: Path) -> None:
        with open(part, "wb") as out:
            facts.update(_cut(streams, layout, encoder, out, progress))

    write_atomic(path, write)
    remember_sha256(path, facts["sha256"])
    return facts


def _cut(
    streams: Iterable[tuple[Chunk, np.ndarray]],
    layout: Layout,
    encoder: _Encoder,
    out: BinaryIO,
    progress: Progress,
) -> dict:
    """Write the joined streams as windows: (length - 2) tokens between EOS, or within a frame.

    `cut_windows` counts those whose last document goes on in the next window.
    """
    digest, eos, rest = hashlib.sha256(), encoder.eos, None
    room, inside = layout.room, layout.framing.inside(layout.length)
    windows = cut_windows = tokens = unknown_tokens = seen = 0
    for chunk, stream in streams:
        tokens += len(stream)
        if encoder.unknown is not None:
            unknown_tokens += np.count_nonzero(stream == encoder.unknown)
        if rest is not None:
            stream = np.concatenate([rest, stream])
        count = len(stream) // room
        cut, rest = np.split(stream, [count * room])
        block = layout.frames(count, stream.dtype)
        block[:, inside] = cut.reshape(count, room)
        digest.update(block)
        out.write(block)
        windows += count
        cut_windows += np.count_nonzero(block[:, inside.stop - 1] != eos)
        seen += chunk.size
        if seen >= CHUNK:  # progress counts whole MB
            progress.update(seen // CHUNK)
            seen %= CHUNK
    return {
        "windows": windows,
        "cut_windows": int(cut_windows),
        "tokens": tokens,
        "unknown_tokens": int(unknown_tokens),
        "sha256": digest.hexdigest(),
    }

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
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from halfstep.data.tokenizer import (
    encode_texts,
    read_tokenizer,
    unknown_id,
    vocabulary_size,
)
from halfstep.errors import HalfstepError, excerpt
from halfstep.files import read_json, remember_sha256, sha256, write_atomic
from halfstep.meta import Framing, Turn, check_framing, framing_of
from halfstep.progress import Progress
from halfstep.resolve import check_fields

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes of text that a worker tokenizes at once
HEAD = struct.Struct("<I")  # before each document in the spool: its length in bytes
START = np.dtype("<u4")  # of a pair: where its response starts
END = struct.Struct("<q")  # in the index: where each document ends
OF_MODELS = ("framing", "pairs")  # entries of a manifest that models of the corpus have too
PREPARE_AGAIN = "run halfstep prepare-corpus again"


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


@dataclass(frozen=True)
class Layout:
    """How windows are laid out: tokens of each, the token that ends a document, and the frame."""

    length: int
    eos_id: int
    framing: Framing

    def frames(self, count: int, dtype: str | np.dtype) -> np.ndarray:
        """Windows [count, length] with their frame, and EOS where text is to be written."""
        windows = np.full((count, self.length), self.eos_id, dtype)
        inside = self.framing.inside(self.length)
        windows[:, : inside.start], windows[:, inside.stop :] = self.framing.begin, self.framing.end
        return windows

    @property
    def room(self) -> int:
        """Tokens of text in a window."""
        return self.length - len(self.framing.begin) - len(self.framing.end)


def layout_of(manifest: dict) -> Layout:
    """The layout of the windows of a corpus."""
    return Layout(manifest["length"], manifest["eos_id"], framing_of(manifest))


def without_frame(ids: np.ndarray, manifest: dict) -> np.ndarray:
    """Texts ids[N, L] with EOS in place of the frame of a model of transformers.

    To a judge and to the grammar such a frame means nothing. The end of a frame may be missing.
    """
    if manifest.get("framing") is None:
        return ids
    framing, ids = framing_of(manifest), ids.copy()
    begin, end = len(framing.begin), len(framing.end)
    ids[:, :begin] = manifest["eos_id"]
    if end:
        is_whole = (ids[:, -end:] == framing.end).all(1)
        ids[is_whole, -end:] = manifest["eos_id"]
    return ids


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


def corpus_files(corpus: Path, *splits: str) -> list[Path]:
    """The files of a corpus that a command with these `splits` reads, for its provenance record."""
    names = ("manifest.json", "tokenizer.json", *(f"{split}.bin" for split in splits))
    return [Path(corpus) / name for name in names]


class Split(BaseModel):
    """One split of a corpus in its manifest."""

    windows: Annotated[int, Field(ge=1)]
    sha256: str


class Manifest(BaseModel):
    """What a manifest.json must hold."""

    model_config = ConfigDict(strict=True)

    length: Annotated[int, Field(ge=3, le=1 << 20)]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Annotated[int, Field(ge=1, lt=1 << 31)]
    eos_id: Annotated[int, Field(ge=0)]
    splits: dict[str, Split]
    tokenizer_sha256: str
    corpus: dict[str, Any] = {}
    framing: Framing | None = None
    pairs: Turn | None = None


def read_manifest(corpus: Path) -> dict:
    """manifest.json of a corpus folder; HalfstepError if it is not a manifest."""
    path = Path(corpus) / "manifest.json"
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != 1:
        raise HalfstepError(f"{path}: format is {excerpt(found)}, expected 1; {PREPARE_AGAIN}")
    check_fields(manifest, Manifest, path, PREPARE_AGAIN)
    if manifest["eos_id"] >= manifest["vocab_size"]:
        raise HalfstepError(
            f"{path}: eos_id: found {manifest['eos_id']}, but vocab_size is "
            f"{manifest['vocab_size']}; {PREPARE_AGAIN}"
        )
    check_framing(manifest, path, PREPARE_AGAIN)
    return manifest


def corpus_name(corpus: Path) -> str:
    """The corpus in a row: its folder's name, and the checksum of its held-out tokens."""
    return f"{corpus.name}@{read_manifest(corpus)['splits']['validation']['sha256'][:12]}"


def verified_file(path: Path, expected: str) -> Path:
    """The path of a corpus file; HalfstepError unless its sha256 is the one in the manifest."""
    if not path.is_file():
        raise HalfstepError(
            f"{path}: missing, though the manifest lists it; run halfstep prepare-corpus again"
        )
    found = sha256(path)
    if found != expected:
        raise HalfstepError(
            f"{path}: sha256 is {found[:16]}..., the manifest has {expected[:16]}...: the file was "
            "changed or is damaged; run halfstep prepare-corpus again"
        )
    return path


def corpus_tokenizer(corpus: Path) -> Tokenizer:
    """The tokenizer of a corpus folder, after its checksum is verified."""
    digest = read_manifest(corpus)["tokenizer_sha256"]
    return read_tokenizer(verified_file(Path(corpus) / "tokenizer.json", digest))


def check_tokens(flag: str, source: object, tokenizer: Tokenizer, corpus: Path) -> None:
    """Raise HalfstepError unless the model reads the tokens of the corpus, with the same ids."""
    if tokenizer.get_vocab() != corpus_tokenizer(corpus).get_vocab():
        raise HalfstepError(
            f"{flag} {source}: its tokenizer has other tokens than that of corpus "
            f"{corpus}; name a model that was trained on this corpus, or prepare the corpus with "
            "the tokenizer of the model"
        )


class Windows:
    """The memory-mapped windows of one split: `windows[indices]` is an int64 tensor [n, length].

    The checksums of tokens and tokenizer are verified first.
    """

    def __init__(self, folder: Path, split: str):
        self.manifest = read_manifest(folder)
        splits = self.manifest["splits"]
        if split not in splits:
            raise HalfstepError(
                f"{folder}/manifest.json: no split {split!r}; there are {excerpt(list(splits))}"
            )
        self.path, self.facts = Path(folder) / f"{split}.bin", splits[split]
        self.length, dtype = self.manifest["length"], self.manifest["dtype"]
        self.vocab_size, self.eos_id = self.manifest["vocab_size"], self.manifest["eos_id"]
        self.layout = layout_of(self.manifest)
        shape = (self.facts["windows"], self.length)
        self.is_pairs = "pairs" in self.manifest
        starts = shape[0] * shape[1] * np.dtype(dtype).itemsize
        expected = starts + shape[0] * START.itemsize if self.is_pairs else starts
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found != expected:
            raise HalfstepError(
                f"{self.path}: found {found} bytes, expected {expected}; "
                "run halfstep prepare-corpus again"
            )
        self.verify()
        self._tokens = np.memmap(self.path, dtype, "r", shape=shape)
        self._starts = None
        if self.is_pairs:
            self._starts = np.memmap(self.path, START, "r", offset=starts, shape=shape[:1])

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(
        self, indices: int | slice | Sequence[int] | np.ndarray | torch.Tensor
    ) -> torch.Tensor:
        import torch

        found = self._tokens[indices].astype(np.int64)
        if found.size and found.max() >= self.vocab_size:
            raise HalfstepError(
                f"{self.path}: holds token {found.max()}, but vocab_size in manifest.json is "
                f"{self.vocab_size}; {PREPARE_AGAIN}"
            )
        return torch.from_numpy(found)

    @property
    def framed(self) -> dict[str, Any]:
        """The entries of the manifest that a model of this corpus has in its meta.json too."""
        return {key: self.manifest[key] for key in OF_MODELS if key in self.manifest}

    def asked(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor | None:
        """The positions of these windows that noise may mask, bool [n, length]; None: all of them.

        They are those of the text, without its frame; of a pair, the response and all after it. The
        two EOS of our own corpora are text.
        """
        import torch

        if not self.framed:
            return None
        found = torch.ones(len(indices), self.length, dtype=torch.bool)
        if "framing" in self.manifest:
            inside = self.layout.framing.inside(self.length)
            found[:, : inside.start] = found[:, inside.stop :] = False
        starts = self.starts(indices)
        if starts is not None:
            found &= torch.arange(self.length) >= torch.from_numpy(starts)[:, None]
            if not found.any(1).all():
                raise HalfstepError(
                    f"{self.path}: holds a pair without a response; {PREPARE_AGAIN}"
                )
        return found

    def starts(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray | None:
        """Where the responses of these windows start, int64 [n]; None without pairs."""
        return None if self._starts is None else self._starts[np.asarray(indices)].astype(np.int64)

    def spans(self, indices: Sequence[int] | np.ndarray, texts: np.ndarray) -> np.ndarray | None:
        """Where responses begin and end in texts[n, length] that have the prompts of these windows.

        int64 [n, 2]. A response ends with its first end-of-text, or with its window. None without
        pairs.
        """
        starts = self.starts(indices)
        if starts is None:
            return None
        ends = (texts == self.eos_id) & (np.arange(self.length) >= starts[:, None])
        ends[:, self.layout.framing.inside(self.length).stop - 1] = True
        return np.stack([starts, ends.argmax(1) + 1], 1)

    def words(self, indices: Sequence[int] | np.ndarray, texts: np.ndarray) -> np.ndarray | None:
        """The positions of responses in such texts, without their end-of-text: bool [n, length]."""
        spans, place = self.spans(indices, texts), np.arange(self.length)
        if spans is None:
            return None
        return (place >= spans[:, :1]) & (place < spans[:, 1:]) & (texts != self.eos_id)

    def verify(self) -> None:
        """Compare the checksums of tokens and tokenizer with those in the manifest."""
        verified_file(self.path, self.facts["sha256"])
        verified_file(self.path.with_name("tokenizer.json"), self.manifest["tokenizer_sha256"])

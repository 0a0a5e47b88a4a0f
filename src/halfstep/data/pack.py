"""Documents to windows of tokens in a memory-mapped file, on all cores and in constant memory; and `Windows`, which reads them.

A document becomes its tokens and EOS; the joined stream is cut every length - 2 tokens, and a window is EOS + cut + EOS
(MDLM: BOS and EOS are one id). The remainder at the end of a split is dropped. Files hold uint16, or uint32 for large vocabularies.

Documents are first spooled to disk: their number is then known before the first is tokenised, so the last ones can be held out,
progress can be shown, and workers read their own share. The bytes written do not depend on the number of workers.
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
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from halfstep.data.tokenizer import EOS
from halfstep.errors import HalfstepError
from halfstep.files import read_json, remember_sha256, sha256, write_atomic
from halfstep.progress import Progress

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes of text that a worker tokenises at once
HEAD = struct.Struct("<I")  # before each document in the spool: its length in bytes
END = struct.Struct("<q")  # in the index: where each document ends


class Chunk(NamedTuple):
    """A run of whole documents in the spool: its place in bytes."""

    start: int
    size: int


class Spool:
    """Documents on disk, each with its length before it, in a file that lives as long as the `with` block around it."""

    def __init__(self, path: Path, documents: Iterable[str]):
        self.path, self._index, self.bytes = path, path.with_name(path.name + ".ends"), 0
        self._documents = documents

    def __enter__(self) -> Spool:
        try:
            with open(self.path, "wb", 1 << 20) as out, open(self._index, "wb", 1 << 20) as index:
                for text in self._documents:
                    raw = text.encode(
                        "utf-8", "replace"
                    )  # a lone surrogate, as broken JSON escapes make, becomes "?"
                    out.write(HEAD.pack(len(raw)) + raw)
                    self.bytes += HEAD.size + len(raw)
                    index.write(END.pack(self.bytes))
        except BaseException:
            self.__exit__()
            raise
        self._ends = (
            np.memmap(self._index, END.format, "r") if self.bytes else np.zeros(0, END.format)
        )
        return self

    def __exit__(self, *exc) -> None:
        self.path.unlink(missing_ok=True)
        self._index.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._ends)

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        """Documents first..last (exclusive) in chunks of at most CHUNK bytes, or of one longer document; the same whoever reads them."""
        while first < last:
            start = int(self._ends[first - 1]) if first else 0
            upto = int(np.searchsorted(self._ends, np.int64(start + CHUNK), "right"))
            upto = min(max(upto, first + 1), last)
            yield Chunk(start, int(self._ends[upto - 1]) - start)
            first = upto

    def texts(self, first: int, last: int) -> Iterator[str]:
        for chunk in self.chunks(first, last):
            yield from read_chunk(self.path, chunk)

    def spread(self, last: int, most_bytes: int) -> Iterator[str]:
        """Every k-th of the documents before `last`, about `most_bytes` of text from all over."""
        every = max(1, -(-self.bytes // most_bytes))
        return (text for i, text in enumerate(self.texts(0, last)) if i % every == 0)


def read_chunk(path: Path, chunk: Chunk) -> list[str]:
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

    def __init__(self, spool: Path, tokenizer: str, dtype: str):
        self.spool, self.dtype = spool, dtype
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.encode_special_tokens = (
            True  # a text that speaks of <|endoftext|> does not end there
        )
        self.eos = self.tokenizer.token_to_id(EOS)

    def __call__(self, chunk: Chunk) -> np.ndarray:
        rows = [
            np.array([*e.ids, self.eos], self.dtype)
            for e in self.tokenizer.encode_batch_fast(read_chunk(self.spool, chunk))
        ]
        return np.concatenate(rows)


_encoder: _Encoder


def _start_worker(*args) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    _encoder = _Encoder(*args)


def _encode(chunk: Chunk) -> np.ndarray:
    return _encoder(chunk)


def _streams(
    chunks: Iterable[Chunk], pool: ProcessPoolExecutor | None, encoder: _Encoder, ahead: int
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """Token streams in the order of the chunks; at most `ahead` are in flight, so a fast worker never fills the memory."""
    if pool is None:
        yield from ((chunk, encoder(chunk)) for chunk in chunks)
        return
    flight: deque = deque()
    for chunk in chunks:
        flight.append((chunk, pool.submit(_encode, chunk)))
        if len(flight) >= ahead:
            first, future = flight.popleft()
            yield first, future.result()
    for first, future in flight:
        yield first, future.result()


def dtype_of(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"


def pack_windows(
    spool: Spool,
    tokenizer: Tokenizer,
    length: int,
    output: Path,
    splits: dict[str, range],
    workers: int,
) -> dict[str, dict]:
    """Write {split}.bin for each range of documents; gives each split's windows, documents, tokens and sha256."""
    args = (spool.path, tokenizer.to_str(), dtype_of(tokenizer))
    encoder = _Encoder(*args)
    pool = None
    if (
        workers > 1 and spool.bytes > 8 * CHUNK
    ):  # below that, starting processes costs more than it gives
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _start_worker, args
        )
    facts = {}
    try:
        with Progress("tokenise", -(-spool.bytes // CHUNK), "MB") as progress:
            for split, documents in splits.items():

                def write(path: Path, split=split, documents=documents) -> None:
                    with open(path, "wb") as out:
                        streams = _streams(
                            spool.chunks(documents.start, documents.stop),
                            pool,
                            encoder,
                            4 * workers,
                        )
                        facts[split] = {
                            "documents": len(documents),
                            **_cut(streams, length, encoder.eos, out, progress),
                        }

                write_atomic(output / f"{split}.bin", write)
                remember_sha256(output / f"{split}.bin", facts[split]["sha256"])
                if not facts[split]["windows"]:
                    raise HalfstepError(
                        f"{split} text is shorter than one window: {facts[split]['tokens']} tokens in {len(documents)} documents, expected at "
                        f"least {length - 2}; add text, lower length ({length}), or change validation_documents"
                    )
    except BrokenProcessPool:
        raise HalfstepError(
            "tokenise: a worker process was killed, most likely for memory; try fewer with --workers"
        ) from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return facts


def _cut(
    streams: Iterable[tuple[Chunk, np.ndarray]],
    length: int,
    eos: int,
    out: BinaryIO,
    progress: Progress,
) -> dict:
    """Write the joined streams as windows EOS + (length - 2) tokens + EOS."""
    digest, windows, tokens, seen = hashlib.sha256(), 0, 0, 0
    rest = None
    for chunk, stream in streams:
        tokens += len(stream)
        if rest is not None:
            stream = np.concatenate([rest, stream])
        count = len(stream) // (length - 2)
        block = np.full((count, length), eos, stream.dtype)
        block[:, 1:-1] = stream[: count * (length - 2)].reshape(count, length - 2)
        rest = stream[count * (length - 2) :]
        digest.update(block)
        out.write(block)
        windows += count
        seen += chunk.size
        if seen >= CHUNK:  # whole MB only
            progress.update(seen // CHUNK)
            seen %= CHUNK
    return {"windows": windows, "tokens": tokens, "sha256": digest.hexdigest()}


def corpus_files(corpus: Path, *splits: str) -> list[Path]:
    """What a command reads of a corpus whose `splits` it uses, for its record."""
    return [
        Path(corpus) / name
        for name in ("manifest.json", "tokenizer.json", *(f"{split}.bin" for split in splits))
    ]


def read_manifest(corpus: Path) -> dict:
    """manifest.json of a corpus folder; HalfstepError when it is none."""
    manifest = read_json(Path(corpus) / "manifest.json")
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != 1:
        raise HalfstepError(
            f"{corpus}/manifest.json: format is {found!r}, expected 1; run halfstep prepare-corpus again"
        )
    if lacks := sorted(
        {"length", "dtype", "vocab_size", "eos_id", "splits", "tokenizer_sha256"} - manifest.keys()
    ):
        raise HalfstepError(
            f"{corpus}/manifest.json: has no {', '.join(lacks)}; run halfstep prepare-corpus again"
        )
    return manifest


def check(path: Path, expected: str) -> Path:
    """The path of a corpus's file, its checksum compared with what the manifest says."""
    if not path.is_file():
        raise HalfstepError(
            f"{path}: missing, though the manifest names it; run halfstep prepare-corpus again"
        )
    if (found := sha256(path)) != expected:
        raise HalfstepError(
            f"{path}: sha256 is {found[:16]}..., the manifest says {expected[:16]}...: the file was changed or is damaged; "
            "run halfstep prepare-corpus again"
        )
    return path


def tokenizer_of(corpus: Path) -> Tokenizer:
    """The tokenizer of a corpus folder, its checksum compared."""
    return Tokenizer.from_file(
        str(check(Path(corpus) / "tokenizer.json", read_manifest(corpus)["tokenizer_sha256"]))
    )


class Windows:
    """The windows of a prepared corpus, memory-mapped: `windows[indices]` is an int64 tensor [n, length]. Its checksums are compared first."""

    def __init__(self, folder: Path, split: str):
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise HalfstepError(
                f"{folder}/manifest.json: no split {split!r}; there are {', '.join(manifest['splits'])}"
            )
        self.path, self.facts, self.manifest = (
            Path(folder) / f"{split}.bin",
            manifest["splits"][split],
            manifest,
        )
        self.length, self.vocab_size, self.eos_id = (
            manifest["length"],
            manifest["vocab_size"],
            manifest["eos_id"],
        )
        shape = (self.facts["windows"], self.length)
        expected = shape[0] * shape[1] * np.dtype(manifest["dtype"]).itemsize
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found != expected:
            raise HalfstepError(
                f"{self.path}: found {found} bytes, expected {expected}; run halfstep prepare-corpus again"
            )
        self.verify()
        self._tokens = np.memmap(self.path, manifest["dtype"], "r", shape=shape)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, indices) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._tokens[indices].astype(np.int64))

    def verify(self) -> None:
        """Compare tokens and tokenizer with the checksums in the manifest."""
        check(self.path, self.facts["sha256"])
        check(self.path.with_name("tokenizer.json"), self.manifest["tokenizer_sha256"])

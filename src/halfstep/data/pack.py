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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from halfstep.data.tokenizer import EOS
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_atomic
from halfstep.progress import Progress

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes of text that a worker tokenises at once
HEAD = struct.Struct("<I")  # before each document in the spool: its length in bytes


class Chunk(NamedTuple):
    """A run of whole documents in the spool."""

    start: int
    size: int
    documents: int


class Spool:
    """Documents on disk, each with its length before it, and an index of chunks that never cross `boundary` documents from the end."""

    def __init__(self, path: Path, documents: Iterable[str], total: int | None = None, label: str = "read documents"):
        self.path, self.documents, self._ends = path, 0, path.with_suffix(".ends")
        position = 0
        with open(path, "wb", 1 << 20) as out, open(self._ends, "wb", 1 << 20) as ends, Progress(label, total or 0, "document") as progress:
            for text in documents:
                raw = text.encode("utf-8", "replace")  # lone surrogates of broken JSON escapes
                out.write(HEAD.pack(len(raw)))
                out.write(raw)
                position += HEAD.size + len(raw)
                ends.write(struct.pack("<Q", position))
                self.documents += 1
                if total:
                    progress.update()
        self.bytes = position

    def chunks(self, first: int, last: int) -> Iterator[Chunk]:
        """Documents first..last (exclusive) in chunks of about CHUNK bytes; the same whoever reads them."""
        ends = np.memmap(self._ends, np.uint64, "r") if self.documents else np.zeros(0, np.uint64)
        while first < last:
            start = int(ends[first - 1]) if first else 0
            upto = min(max(int(np.searchsorted(ends, start + CHUNK, "right")), first + 1), last)
            yield Chunk(start, int(ends[upto - 1]) - start, upto - first)
            first = upto

    def texts(self, first: int, last: int) -> Iterator[str]:
        for chunk in self.chunks(first, last):
            yield from read_chunk(self.path, chunk)

    def spread(self, most_bytes: int) -> Iterator[str]:
        """About `most_bytes` of text from all over the spool: every k-th document."""
        every = max(1, -(-self.bytes // most_bytes))
        return (text for i, text in enumerate(self.texts(0, self.documents)) if i % every == 0)

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
        self._ends.unlink(missing_ok=True)


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
        self.tokenizer.encode_special_tokens = True  # a text that speaks of <|endoftext|> does not end there
        self.eos = self.tokenizer.token_to_id(EOS)

    def __call__(self, chunk: Chunk) -> np.ndarray:
        rows = [np.array([*e.ids, self.eos], self.dtype) for e in self.tokenizer.encode_batch_fast(read_chunk(self.spool, chunk))]
        return np.concatenate(rows)


_encoder: _Encoder


def _start_worker(*args) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process is one core
    _encoder = _Encoder(*args)


def _encode(chunk: Chunk) -> np.ndarray:
    return _encoder(chunk)


def _streams(chunks: Iterable[Chunk], pool: ProcessPoolExecutor | None, encoder: _Encoder, ahead: int) -> Iterator[tuple[Chunk, np.ndarray]]:
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


def pack(spool: Spool, tokenizer: Tokenizer, length: int, output: Path, splits: dict[str, range], workers: int) -> dict[str, dict]:
    """Write {split}.bin for each range of documents; gives each split's windows, documents, tokens and sha256."""
    dtype = "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"
    args = (spool.path, tokenizer.to_str(), dtype)
    encoder = _Encoder(*args)
    pool = None
    if workers > 1 and spool.bytes > 8 * CHUNK:  # below that, starting processes costs more than it gives
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, args)
    facts = {}
    try:
        with Progress("tokenise", max(1, spool.bytes >> 20), "MB") as progress:
            seen = 0
            for split, documents in splits.items():
                digest, figures = hashlib.sha256(), {"windows": 0, "documents": len(documents), "tokens": 0}

                def write(path: Path, documents=documents, digest=digest, figures=figures):
                    nonlocal seen
                    rest = np.zeros(0, dtype)
                    with open(path, "wb") as out:
                        chunks = spool.chunks(documents.start, documents.stop)
                        for chunk, stream in _streams(chunks, pool, encoder, 4 * workers):
                            figures["tokens"] += len(stream)
                            stream = np.concatenate([rest, stream])
                            count = len(stream) // (length - 2)
                            windows = np.full((count, length), encoder.eos, dtype)
                            windows[:, 1:-1] = stream[: count * (length - 2)].reshape(count, length - 2)
                            rest = stream[count * (length - 2) :]
                            digest.update(windows.data)
                            out.write(windows.data)
                            figures["windows"] += count
                            seen += chunk.size
                            progress.update((seen >> 20) - progress.done)

                write_atomic(output / f"{split}.bin", write)
                if not figures["windows"]:
                    raise HalfstepError(
                        f"{split} text is shorter than one window: {figures['tokens']} tokens in {len(documents)} documents, expected at "
                        f"least {length - 2}; add text, raise validation_documents for a longer held-out part, or lower length ({length})"
                    )
                facts[split] = {**figures, "sha256": digest.hexdigest()}
    except BrokenProcessPool:
        raise HalfstepError("tokenise: a worker process was killed, most likely for memory; try fewer with --workers") from None
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return facts


class Windows:
    """The windows of a prepared corpus, memory-mapped: `windows[indices]` is an int64 tensor [n, length]."""

    def __init__(self, folder: Path, split: str):
        manifest = read_json(Path(folder) / "manifest.json")
        if split not in manifest["splits"]:
            raise HalfstepError(f"{folder}/manifest.json: no split {split!r}; there are {', '.join(manifest['splits'])}")
        self.path, self.facts, self.manifest = Path(folder) / f"{split}.bin", manifest["splits"][split], manifest
        self.length, self.vocab_size, self.eos_id = manifest["length"], manifest["vocab_size"], manifest["eos_id"]
        shape = (self.facts["windows"], self.length)
        expected = shape[0] * shape[1] * np.dtype(manifest["dtype"]).itemsize
        found = self.path.stat().st_size if self.path.is_file() else 0
        if found != expected:
            raise HalfstepError(f"{self.path}: found {found} bytes, expected {expected}; run halfstep prepare-corpus again")
        self._tokens = np.memmap(self.path, manifest["dtype"], "r", shape=shape)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, indices) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._tokens[indices].astype(np.int64))

    def verify(self) -> None:
        """Compare the file with the checksum in the manifest."""
        found = sha256(self.path)
        if found != self.facts["sha256"]:
            raise HalfstepError(
                f"{self.path}: sha256 is {found[:16]}..., the manifest says {self.facts['sha256'][:16]}...; the file has changed or is "
                "damaged: run halfstep prepare-corpus again"
            )

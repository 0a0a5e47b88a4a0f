"""The windows of a finished corpus: layout, manifest, checksums, and the tokens themselves.

manifest.json says how the windows were made, and holds the checksum of each file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from halfstep.data.tokenizer import read_tokenizer
from halfstep.errors import HalfstepError, excerpt
from halfstep.files import read_json, sha256
from halfstep.meta import Framing, Turn, check_framing, framing_of
from halfstep.resolve import check_fields

if TYPE_CHECKING:
    import torch

START = np.dtype("<u4")  # of a pair: where its response starts
OF_MODELS = ("framing", "pairs")  # entries of a manifest that models of the corpus have too
PREPARE_AGAIN = "run halfstep prepare-corpus again"


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

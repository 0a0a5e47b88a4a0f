"""Folders of samples: samples.npy, samples.txt and, written last, samples.json."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from tokenizers import Tokenizer

from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.errors import HalfstepError, reason
from halfstep.files import open_file, read_json, sha256, write_atomic, write_json
from halfstep.records.journal import commit
from halfstep.records.shapes import MODEL_NAME
from halfstep.resolve import check_fields

BEGINNING = 100_000
GENERATE_AGAIN = "run halfstep generate again"


class SamplesFacts(BaseModel):
    """What a samples.json must and may hold."""

    model_config = ConfigDict(strict=True)

    model: Annotated[str, Field(pattern=MODEL_NAME)]
    checkpoint: str
    steps: PositiveInt | None
    sha256: str
    sampler: str
    network_evaluations: Annotated[float, Field(ge=0)]
    autoregressive_passes: Annotated[float, Field(ge=0)] | None = None
    num_samples: Annotated[int, Field(ge=0)]
    seed: int
    weights: str
    draw_dtype: str
    precision: str = "float32"
    kind: str = "diffusion"
    temperature: float = 1.0
    top_p: float = 1.0
    vocabulary: str = ""


def write_texts(
    output: Path,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    about: dict[str, Any],
    meta: dict[str, Any] | None = None,
) -> None:
    """Write samples.npy (ids), samples.txt (text) and, last, samples.json (how they were made).

    samples.json holds `about`, checksums, and the meta.json of the model, if there is one.
    """
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int32))
    write_atomic(output / "samples.npy", buffer.getvalue())
    write_atomic(output / "samples.txt", decode_texts(ids, tokenizer))
    written = {
        **about,
        "vocabulary": vocabulary_sha256(tokenizer),
        "sha256": sha256(output / "samples.npy"),
        "commit": commit(),
        "meta": meta or {},
    }
    write_json(output / "samples.json", written)


def decode_texts(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The content of samples.txt: every text under its number."""
    decoded = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    return "".join(f"=== {i}\n{text}\n" for i, text in enumerate(decoded))


def first_texts(file: Path, count: int) -> str:
    """The beginning of a samples.txt with this number of texts, at most BEGINNING bytes of it."""
    with open_file(file) as opened:
        beginning = opened.read(BEGINNING).decode(errors="replace")
    return beginning.partition(f"=== {count}\n")[0]


def sample_files(samples: list[Path]) -> list[Path]:
    """The files that a command reads from folders of samples, for its provenance record."""
    return [folder / name for folder in samples for name in ("samples.json", "samples.npy")]


def read_samples(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """ids[N, L] and samples.json of one folder, after the checksum is verified."""
    about, path = folder / "samples.json", folder / "samples.npy"
    facts = read_json(about)
    check_fields(facts, SamplesFacts, about, GENERATE_AGAIN)
    if not path.exists():
        raise HalfstepError(f"{path}: no such file, though samples.json exists; {GENERATE_AGAIN}")
    found = sha256(path)
    if found != facts["sha256"]:
        raise HalfstepError(
            f"{path}: sha256 is {found[:12]}, samples.json has {facts['sha256'][:12]}: "
            f"the file has changed; {GENERATE_AGAIN}"
        )
    try:
        ids = np.load(path, mmap_mode="r")  # mapped, so that a false size in it is found
    except Exception as error:  # a damaged header raises what Python's parser raises
        raise HalfstepError(f"{path}: no array ({reason(error)}); {GENERATE_AGAIN}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32:
        kind = getattr(ids, "dtype", "several arrays")
        raise HalfstepError(f"{path}: found {kind}, expected one array of int32; {GENERATE_AGAIN}")
    return np.array(ids), facts


def is_written(folder: Path, about: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Does the folder hold finished samples, unchanged, whose samples.json has all of `about`?"""
    try:
        ids, facts = read_samples(folder)
        with open_file(folder / "samples.txt") as file:
            text = file.read()
    except (HalfstepError, OSError):
        return False
    expected = about | {"vocabulary": vocabulary_sha256(tokenizer)}
    as_asked = all(facts.get(key) == value for key, value in expected.items())
    return as_asked and text == decode_texts(ids, tokenizer).encode()

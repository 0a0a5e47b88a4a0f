"""`files`: the user's own .txt, .jsonl (both also .gz) and .parquet, read as streams; errors name file and line.

.jsonl: one document per line, in the field `text_field`. .parquet: one per row, likewise. .txt: a line `<|endoftext|>` ends a document;
in a file without such lines every block between blank lines is one.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from halfstep.data.tokenizer import EOS
from halfstep.errors import HalfstepError

LONGEST_LINE = 64 << 20  # bytes; what has longer ones is no text, and would fill the memory
LONGEST_DOCUMENT = 4 << 20  # characters; a longer .txt document is cut at a line's end


def find(patterns: list[str]) -> list[Path]:
    """Every file that the paths and globs name, in their order, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        paths = (
            [Path(pattern)]
            if os.path.exists(pattern)
            else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
        )
        if not paths:
            raise HalfstepError(
                f"files: {pattern!r} matches nothing; check the path (relative ones start at {Path.cwd()})"
            )
        for path in paths:
            if path.is_dir():
                raise HalfstepError(
                    f"files: {path} is a folder; name its files, for instance {path}/*.jsonl"
                )
            if not path.name.endswith(tuple(READERS)):
                raise HalfstepError(
                    f"files: {path} has an unknown suffix; expected one of {', '.join(READERS)}"
                )
            found[path] = None
    return list(found)


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The documents of one file, those of white space alone left out, each with the byte that the reader has reached."""
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    count = 0
    try:
        with open(path, "rb") as file:
            for text in READERS[suffix](path, file, text_field):
                if text and not text.isspace():
                    count += 1
                    yield text, file.tell()
    except (OSError, EOFError, zlib.error) as error:  # missing, no permission, cut or damaged .gz
        raise HalfstepError(
            f"{path}: cannot be read ({error}); check that the file is whole"
        ) from None
    if not count:
        raise HalfstepError(
            f"{path}: holds no text ({path.stat().st_size} bytes); leave it out of `files` or fill it"
        )


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Number and text of each line, without its end."""
    file.seek(0)
    number = 0
    stream = gzip.open(file) if path.name.endswith(".gz") else file
    while raw := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise HalfstepError(
                f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MB; cut it into documents of their own"
            )
        try:
            yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise HalfstepError(
                f"{path}, line {number}: byte 0x{raw[error.start]:02x} at place {error.start + 1} is not UTF-8; convert the file, for "
                f"instance iconv -f latin1 -t utf-8 {path}"
            ) from None


def _jsonl(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise HalfstepError(
                f"{path}, line {number}: not valid JSON ({error}); expected one object per line"
            ) from None
        if not isinstance(row, dict) or text_field not in row:
            found = (
                f"an object with {', '.join(row) or 'no fields'}"
                if isinstance(row, dict)
                else f"a JSON {type(row).__name__}"
            )
            raise HalfstepError(
                f"{path}, line {number}: found {found}, expected a field {text_field!r}; set text_field to the one with the text"
            )
        if not isinstance(row[text_field], str):
            raise HalfstepError(
                f"{path}, line {number}: field {text_field!r} holds a {type(row[text_field]).__name__}, expected text"
            )
        yield row[text_field]


def _txt(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    marked = any(line.strip() == EOS for _, line in _lines(path, file))
    block: list[str] = []
    size = 0
    for _, line in _lines(path, file):
        if line.strip() == EOS if marked else not line.strip():
            yield "\n".join(block).strip("\n")
            block, size = [], 0
            continue
        block.append(line)
        size += len(line)
        if size > LONGEST_DOCUMENT:
            yield "\n".join(block).strip("\n")
            block, size = [], 0
    yield "\n".join(block).strip("\n")


def _parquet(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise HalfstepError(
            f"{path}: reading .parquet needs pyarrow; run pip install 'halfstep[eval]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if text_field not in names:
                raise HalfstepError(
                    f"{path}: found the columns {', '.join(names)}, expected {text_field!r}; set text_field to the one with the text"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise HalfstepError(
                            f"{path}, row {number}: column {text_field!r} holds a {type(text).__name__}, expected text"
                        )
                    yield text
    except pyarrow.ArrowException as error:
        raise HalfstepError(
            f"{path}: not a readable parquet file ({error}); check that the file is whole"
        ) from None


READERS = {
    ".txt": _txt,
    ".txt.gz": _txt,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
}

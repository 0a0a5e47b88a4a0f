"""Corpus kind `files`: the user's own .txt, .jsonl (both also .gz) and .parquet, read as streams.

.jsonl: one document per line, in the field `text_field`; .parquet: one per row, likewise. .txt: a
line `<|endoftext|>` ends a document; in a file without such lines, each block between blank lines
is one. Errors name the file and the line.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from halfstep.data.tokenizer import EOS
from halfstep.errors import HalfstepError

LONGEST_LINE = 64 << 20  # bytes; a file with longer lines is not text and would fill the memory
LONGEST_DOCUMENT = 4 << 20  # characters; a longer .txt document is cut at the end of a line


def find_files(patterns: list[str]) -> list[Path]:
    """Every file that the paths and globs name, in their order, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        names = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not names:
            raise HalfstepError(
                f"files: {pattern!r} matches nothing; "
                f"check the path (relative ones start at {Path.cwd()})"
            )
        for path in map(Path, sorted(names)):
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
    """The documents of one file, except blank ones, each with the reader's position in bytes."""
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
            f"{path}: holds no text ({path.stat().st_size} bytes); "
            "leave it out of `files` or fill it"
        )


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Number and text of each line, without its end."""
    file.seek(0)
    number = 0
    stream = gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file
    while raw := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(raw) > LONGEST_LINE:
            raise HalfstepError(
                f"{path}, line {number}: longer than {LONGEST_LINE >> 20} MB; "
                "cut it into separate documents"
            )
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise HalfstepError(
                f"{path}, line {number}: byte 0x{raw[error.start]:02x} at position "
                f"{error.start + 1} is not UTF-8; convert the file, for instance "
                f"iconv -f latin1 -t utf-8 {path}"
            ) from None
        yield number, text.rstrip("\r\n")


def _read_jsonl(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    for number, line in _lines(path, file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise HalfstepError(
                f"{path}, line {number}: not valid JSON ({error}); expected one object per line"
            ) from None
        yield _text_of(row, text_field, f"{path}, line {number}")


def _text_of(row: Any, text_field: str, where: str) -> str:
    """The text of one parsed line of a .jsonl file; `where` names the line in errors."""
    if not isinstance(row, dict) or text_field not in row:
        found = f"a JSON {type(row).__name__}"
        if isinstance(row, dict):
            found = f"an object with {', '.join(row) or 'no fields'}"
        raise HalfstepError(
            f"{where}: found {found}, expected a field {text_field!r}; "
            "set text_field to the one with the text"
        )
    if not isinstance(row[text_field], str):
        kind = type(row[text_field]).__name__
        raise HalfstepError(f"{where}: field {text_field!r} holds a {kind}, expected text")
    return row[text_field]


def _read_txt(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
    marked = any(line.strip() == EOS for _, line in _lines(path, file))
    separator = EOS if marked else ""
    block: list[str] = []
    size = 0
    for _, line in _lines(path, file):
        ends = line.strip() == separator
        if not ends:
            block.append(line)
            size += len(line)
        if ends or size > LONGEST_DOCUMENT:
            yield "\n".join(block).strip("\n")
            block, size = [], 0
    yield "\n".join(block).strip("\n")


def _read_parquet(path: Path, file: BinaryIO, text_field: str) -> Iterator[str]:
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
                    f"{path}: found the columns {', '.join(names)}, expected {text_field!r}; "
                    "set text_field to the one with the text"
                )
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise HalfstepError(
                            f"{path}, row {number}: column {text_field!r} holds a {kind}, "
                            "expected text"
                        )
                    yield text
    except pyarrow.ArrowException as error:
        raise HalfstepError(
            f"{path}: not a readable parquet file ({error}); check that the file is whole"
        ) from None


READERS = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}

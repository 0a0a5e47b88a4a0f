"""Corpus kind `files`: the user's own .txt, .jsonl (both also .gz) and .parquet, read as streams.

.jsonl: one document per line, in the field `text_field`; .parquet: one per row, likewise. .txt: a
line `<|endoftext|>` ends a document; in a file without such lines, each block between blank lines
is one. Errors name the file and the line.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from halfstep.errors import HalfstepError, reason
from halfstep.texts import (
    BOMB,
    LONGEST_LINE,
    MOST_UNPACKED,
    check_regular,
    read_lines,
    reading,
    row_text,
)

if TYPE_CHECKING:
    import pyarrow.parquet

LONGEST_DOCUMENT = 4 << 20  # characters; a longer .txt document is cut at the end of a line
ROWS = 64  # rows of a .parquet that are in memory at a time


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Every file that the paths and patterns name, in their order, each once.

    The workflow and the reader of a corpus both ask this function. A path that exists is taken as
    it is written. Otherwise *, ?, [...] and ** are those of Python's glob, and ~ is the home
    folder.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        for path in _matches(pattern):
            check_regular(path, "files")
            if not path.name.endswith(tuple(READERS)):
                raise HalfstepError(
                    f"files: {path} has an unknown suffix; expected one of {', '.join(READERS)}"
                )
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _matches(pattern: str) -> list[Path]:
    """The paths that one pattern names, sorted; at least one."""
    path = os.path.expanduser(pattern)
    names = [path] if os.path.lexists(path) else glob.glob(path, recursive=True)
    if names:
        return [Path(name) for name in sorted(names)]
    raise HalfstepError(
        f"files: {pattern[:200]!r} matches nothing; check the path (relative ones start at "
        f"{Path.cwd()})"
    )


def read_documents(path: Path, text_field: str) -> Iterator[tuple[str, int]]:
    """The documents of one file, except blank ones, each with the reader's position in bytes."""
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    count = 0
    with reading(path) as file:
        for text in READERS[suffix](path, file, text_field):
            if text and not text.isspace():
                count += 1
                yield text, file.tell()
    if not count:
        raise HalfstepError(
            f"{path}: holds no text ({path.stat().st_size} bytes); "
            "leave it out of `files` or fill it"
        )


def read_pairs(
    path: Path, prompt_field: str, response_field: str
) -> Iterator[tuple[str, str, int]]:
    """The prompts and responses of one file, each pair with the reader's position in bytes."""
    suffix = next(suffix for suffix in READERS if path.name.endswith(suffix))
    if suffix.startswith(".txt"):
        raise HalfstepError(
            f"{path}: found text, expected pairs in a .jsonl, .jsonl.gz or .parquet; convert it"
        )
    count, read = 0, READERS[suffix]
    with reading(path) as file, reading(path) as again:
        prompts = read(path, file, prompt_field, "prompt_field")
        responses = read(path, again, response_field, "response_field")
        for prompt, response in zip(prompts, responses, strict=True):
            count += 1
            for field, text in ((prompt_field, prompt), (response_field, response)):
                if not text or text.isspace():
                    raise HalfstepError(
                        f"{path}, pair {count}: field {field!r} is empty, expected text; fill it, "
                        "or leave the pair out"
                    )
            yield prompt, response, file.tell()
    if not count:
        raise HalfstepError(
            f"{path}: holds no pairs ({path.stat().st_size} bytes); "
            "leave it out of `files` or fill it"
        )


def _read_jsonl(
    path: Path, file: BinaryIO, text_field: str, key: str = "text_field"
) -> Iterator[str]:
    for number, line in read_lines(path, file, LONGEST_LINE):
        if line.strip():
            yield row_text(line, text_field, f"{path}, line {number}", key)


def _read_txt(
    path: Path, file: BinaryIO, text_field: str, key: str = "text_field"
) -> Iterator[str]:
    from halfstep.data.tokenizer import EOS  # not at the top: the workflow needs find_files alone

    lines = read_lines(path, file, LONGEST_LINE)
    separator = EOS if any(line.strip() == EOS for _, line in lines) else ""
    block: list[str] = []
    size = 0
    for _, line in read_lines(path, file, LONGEST_LINE):
        ends = line.strip() == separator
        if not ends:
            block.append(line)
            size += len(line) + 1
        if ends or size > LONGEST_DOCUMENT:
            yield "\n".join(block).strip("\n")
            block, size = [], 0
    yield "\n".join(block).strip("\n")


def _read_parquet(
    path: Path, file: BinaryIO, text_field: str, key: str = "text_field"
) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise HalfstepError(
            f"{path}: reading .parquet needs pyarrow; run pip install 'halfstep[eval]'"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            _check_columns(path, table, text_field, key)
            number = 0
            for batch in table.iter_batches(batch_size=ROWS, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        kind = type(text).__name__
                        raise HalfstepError(
                            f"{path}, row {number}: column {text_field!r} holds a {kind}, "
                            "expected text"
                        )
                    yield text
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise HalfstepError(
            f"{path}: not a readable parquet file ({reason(error)}); check that the file is whole"
        ) from None


def _check_columns(
    path: Path, table: pyarrow.parquet.ParquetFile, text_field: str, key: str
) -> None:
    """HalfstepError unless there is one column `text_field`, which unpacks to a text's size."""
    names = table.schema_arrow.names
    if names.count(text_field) != 1:
        found = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise HalfstepError(
            f"{path}: found the columns {found or 'none'}, expected {text_field!r}, once; "
            f"set {key} to the one with the text"
        )
    about = table.metadata
    groups = [about.row_group(i) for i in range(about.num_row_groups)]
    columns = [group.column(i) for group in groups for i in range(group.num_columns)]
    for column in columns:
        if column.path_in_schema.split(".")[0] != text_field:
            continue
        unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
        if unpacked > max(MOST_UNPACKED * packed, BOMB):
            raise HalfstepError(
                f"{path}: a column unpacks to {unpacked:,} bytes, more than {MOST_UNPACKED} times "
                "its size in the file, so it is hardly text; look at it, or unpack it yourself"
            )


READERS = {
    ".txt": _read_txt,
    ".txt.gz": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}

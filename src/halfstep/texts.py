"""Text files as lines: what is no UTF-8 text is named, and time and memory stay bounded."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from halfstep.errors import HalfstepError, reason

LONGEST_LINE = 64 << 20  # bytes; a file with longer lines is not text and would fill the memory
MOST_UNPACKED = 200  # times its packed size; no text is packed so densely
BOMB = 2 << 20  # bytes of unpacked text after which MOST_UNPACKED is asked for
ITEM_SUFFIXES = (".jsonl", ".jsonl.gz")
TASK_SUFFIXES = (".yaml", ".yml")

BYTE_ORDER_MARKS = [  # UTF-32 first, because its mark begins with that of UTF-16
    (b"\xff\xfe\0\0", "utf-32"),
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
]
OTHER_FORMATS = [  # first bytes, what has them, what to do
    (b"\x1f\x8b", "gzip data", "unpack it, or add .gz to its name"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"BZh", "bzip2 data", "unpack it"),
    (b"\xfd7zXZ", "xz data", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "unpack it"),
    (b"PAR1", "a parquet file", "give it the suffix .parquet"),
    (b"%PDF-", "a PDF", "convert it to text"),
    (b"\x89PNG", "a PNG image", "leave it out"),
]


def check_regular(path: Path, key: str) -> None:
    """HalfstepError, which begins with `key`, unless `path` is a regular file that can be read."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:  # a loop of links, a link to nothing, no permission
        raise HalfstepError(
            f"{key}: {path} cannot be read ({error.strerror}); check the path"
        ) from None
    if stat.S_ISDIR(mode):
        raise HalfstepError(
            f"{key}: {path} is a folder; name its files, for instance {path}/*.jsonl"
        )
    if not stat.S_ISREG(mode):
        raise HalfstepError(f"{key}: {path} is a pipe, device or socket; name a file")
    if not os.access(path, os.R_OK):
        raise HalfstepError(f"{key}: {path} may not be read; change its permissions")


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The open file; a fault of the file system or of a .gz is one sentence."""
    try:
        with open(path, "rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # missing, no permission, cut or damaged .gz
        raise HalfstepError(
            f"{path}: cannot be read ({error}); check that the file is whole"
        ) from None


def read_lines(
    path: Path, file: BinaryIO, longest: int = LONGEST_LINE
) -> Iterator[tuple[int, str]]:
    """Number and text of each line, without its end."""
    file.seek(0)
    number, size = 0, 0
    packed = path.name.endswith(".gz")
    stream = gzip.GzipFile(fileobj=file) if packed else file
    while raw := stream.readline(longest + 1):
        number += 1
        size += len(raw)
        if number == 1:
            _check_first(path, raw)
        if len(raw) > longest:
            raise HalfstepError(
                f"{path}, line {number}: longer than {longest >> 20} MB; "
                "cut it into separate documents"
            )
        if packed and size > BOMB and size > MOST_UNPACKED * file.tell():
            raise HalfstepError(
                f"{path}, line {number}: unpacks to more than {MOST_UNPACKED} times its size, "
                "so it is hardly text; look at it, or unpack it yourself"
            )
        yield number, _decode(path, number, raw).rstrip("\r\n")


def _check_first(path: Path, raw: bytes) -> None:
    """HalfstepError if the first line shows another encoding or format than UTF-8 text."""
    for mark, encoding in BYTE_ORDER_MARKS:
        if raw.startswith(mark):
            raise HalfstepError(f"{path}: is {encoding.upper()}; {_conversion(path, encoding)}")
    for first, name, advice in OTHER_FORMATS:
        if raw.startswith(first):
            raise HalfstepError(f"{path}: holds {name}, expected UTF-8 text; {advice}")
    if b"\0" in raw[:4] and raw[:4].strip(b"\0"):
        zeros = [byte == 0 for byte in raw[:4]]
        encoding = "utf-32" if sum(zeros) > 2 else "utf-16"
        encoding += "be" if zeros[0] else "le"
        raise HalfstepError(
            f"{path}: looks like {encoding.upper()} without a byte order mark; "
            f"{_conversion(path, encoding)}"
        )
    if b"\r" in raw.rstrip(b"\r\n"):
        raise HalfstepError(
            f"{path}: its lines end in CR alone, expected LF or CR LF; convert it, for instance "
            f"tr '\\r' '\\n' < {path}"
        )


def _conversion(path: Path, encoding: str) -> str:
    return f"convert the file, for instance iconv -f {encoding} -t utf-8 {path}"


def _decode(path: Path, number: int, raw: bytes) -> str:
    if b"\0" in raw:
        raise HalfstepError(
            f"{path}, line {number}: holds NUL bytes, so the file is binary or damaged; "
            "leave it out, or remove them, for instance tr -d '\\000'"
        )
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode()  # a mark begins each joined file
    except UnicodeDecodeError as error:
        raise HalfstepError(
            f"{path}, line {number}: byte 0x{raw[error.start]:02x} at position "
            f"{error.start + 1} is not UTF-8; {_conversion(path, 'latin1')}"
        ) from None


def row_text(line: str, text_field: str, where: str, key: str = "text_field") -> str:
    """The text in the field `text_field` of a line of .jsonl; `where` names the line in errors.

    `key` is the key of the configuration that names the field.

    Broken JSON escapes make lone surrogates; each becomes "?".
    """
    row = _parse(line, text_field, where)
    if not isinstance(row, dict) or text_field not in row:
        found = f"a JSON {type(row).__name__}"
        if isinstance(row, dict):
            found = f"an object with {_names(row)}"
        raise HalfstepError(
            f"{where}: found {found}, expected a field {text_field!r}; "
            f"set {key} to the one with the text"
        )
    text = row[text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise HalfstepError(f"{where}: field {text_field!r} holds a {kind}, expected text")
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _parse(line: str, text_field: str, where: str) -> Any:
    """The value of one line of JSON, in which no object gives `text_field` twice."""

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(key == text_field for key, _ in pairs) > 1:
            raise HalfstepError(
                f"{where}: gives the field {text_field!r} twice; leave one of them out"
            )
        return dict(pairs)

    twice = line.count(json.dumps(text_field, ensure_ascii=False)) > 1
    try:
        return json.loads(line, object_pairs_hook=checked if twice else None)
    except HalfstepError:
        raise
    except (ValueError, RecursionError) as error:  # also a number with too many digits
        raise HalfstepError(
            f"{where}: not valid JSON ({reason(error)}); expected one object per line"
        ) from None


def _names(row: dict[str, Any]) -> str:
    """The first fields of a row; long or unprintable names are cut or escaped."""
    names = [name[:40] if name.isprintable() else ascii(name[:40]) for name in list(row)[:5]]
    more = ", ..." if len(row) > len(names) else ""
    return ", ".join(names) + more if names else "no fields"


def items_file(data: str | None) -> Path | None:
    """The local file of LAMBADA items that `data` names; None for a hub data set, or for none."""
    if data is None:
        return None
    path = Path(data).expanduser()
    if data.endswith(ITEM_SUFFIXES):
        return path
    if data.startswith((".", "/", "~")) or path.is_file():
        raise HalfstepError(
            f"lambada: {data} has an unknown suffix; expected {' or '.join(ITEM_SUFFIXES)} "
            "with one item per line, or the name of a hub data set"
        )
    return None


def is_task_file(name: str) -> bool:
    """Is this the path of an lm-eval task's YAML file, and not the name of a task?"""
    return name.endswith(TASK_SUFFIXES)

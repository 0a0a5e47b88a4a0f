"""Atomic writes, JSON files and checksums: a file is complete or absent."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.sanitize import mask_secrets


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a temporary file next to `path`, flush it to disk and rename it.

    A reader never sees a partial file. A callable `content` writes to the path that it is given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()  # fails with the system's own error, whichever library writes the file
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        # safetensors creates files with mode 0600, which nobody else on a cluster could read.
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically and without secrets; NaN and infinity are errors."""
    write_atomic(path, json.dumps(mask_secrets(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict | list:
    """Parsed JSON. Raises HalfstepError if the file is missing or broken."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise HalfstepError(
            f"{path}: no such file; run the step that makes it, or check the path"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HalfstepError(
            f"{path}: not valid JSON ({error}); delete it and run the step that makes it again"
        ) from None


def sha256(path: Path) -> str:
    """Checksum of the file's present bytes."""
    with open(path, "rb") as file:
        stamp = _stamp(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _hashed[os.path.abspath(path)] = stamp, digest
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """Note the checksum of a file that this process has just written."""
    _hashed[os.path.abspath(path)] = _stamp(os.stat(path)), digest


def sha256_once(path: Path) -> str:
    """The checksum that this process has noted, if the file is unchanged since; otherwise `sha256`.

    This is for records. A check of a file must read its bytes.
    """
    stamp, digest = _hashed.get(os.path.abspath(path), (None, ""))
    return digest if stamp == _stamp(os.stat(path)) else sha256(path)


_hashed: dict[str, tuple[tuple[int, ...], str]] = {}


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

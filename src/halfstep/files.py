"""Files that are whole or absent: atomic writes and checksums."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from halfstep.errors import HalfstepError


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write beside the target, flush to disk, rename: a reader never sees half a file. A callable writes the given path itself."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()  # where nothing may be written the system's own error says so, whichever library writes
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
        part.chmod(
            0o666 & ~_umask()
        )  # safetensors writes 0600, which colleagues on a cluster could not read
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict | list:
    """Parsed JSON; HalfstepError when the file is missing or broken."""
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
    """Checksum of the bytes that lie there now."""
    with open(path, "rb") as file:
        stamp = _stamp(os.fstat(file.fileno()))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _hashed[os.path.abspath(path)] = stamp, digest
    return digest


def remember_sha256(path: Path, digest: str) -> None:
    """This process has just written the file, and took the checksum of its bytes on the way."""
    _hashed[os.path.abspath(path)] = _stamp(os.stat(path)), digest


def sha256_once(path: Path) -> str:
    """The checksum that this process knows of the file, if nobody has touched it since. For records; a check reads the bytes."""
    stamp, digest = _hashed.get(os.path.abspath(path), (None, ""))
    return digest if stamp == _stamp(os.stat(path)) else sha256(path)


_hashed: dict[str, tuple[tuple[int, ...], str]] = {}


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns

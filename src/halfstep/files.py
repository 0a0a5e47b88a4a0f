"""Atomic writes, JSON files and checksums: a file is complete or absent.

Every write of the package goes through `write_atomic`. JSON files may come from anywhere, so
`read_json` refuses everything that is not plain, finite and of bounded size and depth.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from halfstep.errors import HalfstepError, excerpt, reason

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON = 32 << 20  # bytes
LARGEST_TOKENIZER = 128 << 20  # bytes of a tokenizer.json
DEEPEST_JSON = 64  # nested lists and objects
LARGEST_INTEGER = 1 << 64
PART = re.compile(r"\..+\.(?P<pid>\d+)(@(?P<machine>.+))?\.part")  # see scratch_folder
ABANDONED_S = 24 * 3600  # after so long without a write, a part of another machine is abandoned
MAKE_AGAIN = "delete it and run the step that makes it again"


def write_atomic(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a temporary file, flush it to disk, rename it to `path`, and flush the folder.

    A reader never sees a partial file, not even after a power failure. A callable `content` writes
    to the path that it is given.
    """
    path = Path(path)
    with _errors_name(path), scratch_folder(path) as folder:
        part = folder / path.name
        if callable(content):
            content(part)
        else:
            part.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        # safetensors creates files with mode 0600, which nobody else on a cluster could read.
        part.chmod(0o666 & ~_umask())
        os.replace(part, path)
        _flush_folder(path.parent)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder next to `path`, which exists inside the `with` block.

    Its name, `.{name}.{process}@{machine}.part`, says who writes in it. What killed processes left
    next to `path` is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}@{_machine()}.part")
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process with the same number
    folder.mkdir()
    try:
        _sweep(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """An OSError inside that names no file, or a temporary one, names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or re.search(r"\.part(/|$)", str(error.filename)):
            error.filename = str(path)
        raise


def _sweep(own: Path) -> None:
    """Remove the parts next to `own` that nobody writes any more."""
    with contextlib.suppress(OSError):
        for path in own.parent.iterdir():
            found = PART.fullmatch(path.name)
            if found and path != own and _is_abandoned(path, found, own.stat().st_mtime):
                with contextlib.suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_abandoned(part: Path, found: re.Match[str], now: float) -> bool:
    """Does the writer of a part no longer run?

    The processes of another machine are not visible here. Their part counts as abandoned a day
    after its last write, by the clock of the file system.
    """
    if found["machine"] in (None, _machine()):
        return not _runs(int(found["pid"]))
    written = max(path.stat().st_mtime for path in (part, *part.rglob("*")))
    return now - written > ABANDONED_S


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


@functools.cache
def _machine() -> str:
    """Where the number of a process has a meaning: the host, and the container if it is in one."""
    spaces = Path("/proc/self/ns/pid")
    container = f"-{spaces.stat().st_ino}" if spaces.exists() else ""
    return platform.node().replace("/", "-") + container


def _flush_folder(folder: Path) -> None:
    """Make a rename in the folder durable. Some network file systems cannot do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, atomically; NaN and infinity are errors."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises OSError, with the number of the file system's error, if that refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    try:
        write_atomic(path, lambda part: save_file(tensors, part, header))
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from None


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes.

    HalfstepError for a folder, and for a pipe or a device, which could block for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        found = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise HalfstepError(f"{path}: found {found}, expected a file; check the path")
    return open(descriptor, "rb")


def read_json(path: Path, advice: str = MAKE_AGAIN) -> Any:
    """Parsed JSON. Raises HalfstepError, which ends with `advice`, if the file is broken."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, LARGEST_JSON))
    except FileNotFoundError:
        raise HalfstepError(
            f"{path}: no such file; run the step that makes it, or check the path"
        ) from None
    if size > LARGEST_JSON:
        raise HalfstepError(
            f"{path}: found {size:,} bytes, expected a JSON file of at most {LARGEST_JSON:,}; "
            f"{advice}"
        )
    return parse_json(content, str(path), advice)


def parse_json(content: bytes, where: str, advice: str) -> Any:
    """Parsed JSON, of plain finite values. Raises HalfstepError, which begins with `where`."""
    try:
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
        _check_plain(value, DEEPEST_JSON)
    except RecursionError:
        fault = "too deeply nested"
    except ValueError as error:  # among them UnicodeError and json.JSONDecodeError
        fault = reason(error)
    else:
        return value
    raise HalfstepError(f"{where}: not valid JSON ({fault}); {advice}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {excerpt(twice)} is given twice")
    return found


def _check_plain(value: object, depth: int) -> None:
    """Raise ValueError for what JSON should not hold, and RecursionError below `depth` levels."""
    if isinstance(value, dict | list):
        if not depth:
            raise RecursionError
        for name in value if isinstance(value, dict) else ():
            name.encode()
        for part in value.values() if isinstance(value, dict) else value:
            _check_plain(part, depth - 1)
    elif isinstance(value, str):
        value.encode()  # a lone surrogate is no text
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError("a whole number above 2^64")


def sha256(path: Path) -> str:
    """Checksum of the file's present bytes."""
    with open_file(path) as file:
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

"""Files of weights from outside, read without running anything that they hold.

Known are PyTorch's archives (.ckpt, .pt, .bin), safetensors, and the index of a model in several
files. An archive is a zip of stored members, with a pickle among them. Its members and its pickle
are checked before torch sees the file; torch then reads it with `weights_only`, memory-mapped.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json
from halfstep.models.pickled import RefusedError, check_pickle, stand_in

INDEX = ".index.json"
MAX_MEMBERS = 20_000  # files in an archive, or tensors in a file
MAX_DIRECTORY = 2**22  # bytes of the list of an archive's members
MAX_PICKLE = 2**26  # bytes of an archive's pickle: all but the tensors
MAX_HEADER = 2**24  # bytes of the header of a safetensors file
DOWNLOAD_AGAIN = "download it again, or name other weights"
STARTS = {  # first bytes of files that are often taken for weights: what they are
    b"\x80": "PyTorch's format from before 2020, or a plain pickle",
    b"\x1f\x8b": "a gzip archive",
    b"version https://git-lfs": "a pointer of Git LFS, which stands for the file on the server",
    b"<": "a web page",
}


def read_weights(file: Path) -> tuple[dict[Any, Any], list[Path]]:
    """What a file of weights holds, and the files that were read: itself, and those of an index.

    RefusedError if the file is damaged, or holds anything that may not be read.
    """
    try:
        if file.name.endswith(INDEX):
            return _read_index(file)
        return _read_file(file), [file]
    except (RefusedError, HalfstepError):
        raise
    except Exception as error:  # safetensors, zipfile, pickle and torch raise different types
        raise RefusedError(f"cannot be read ({type(error).__name__}: {reason(error)})") from None


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; HalfstepError if it holds none."""
    value = read_json(file, DOWNLOAD_AGAIN)
    if not isinstance(value, dict):
        raise HalfstepError(
            f"{file}: holds a {type(value).__name__}, expected an object; {DOWNLOAD_AGAIN}"
        )
    return value


def _read_index(index: Path) -> tuple[dict[Any, Any], list[Path]]:
    """The tensors of several files in the folder of their index, {"weight_map": {name: file}}."""
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise RefusedError("has no weight_map, the files of the tensors")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or name.endswith(INDEX):
            raise RefusedError(f"names {str(name)[:80]!r}, expected a file in its own folder")
    tensors: dict[Any, Any] = {}
    names = sorted(set(places.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise RefusedError(f"names {name!r}, but there is no such file next to it")
        part = _read_file(index.parent / name)
        if part.keys() != {key for key, place in places.items() if place == name}:
            raise RefusedError(f"and {name} disagree about the tensors in it")
        tensors |= part
    return tensors, [index, *(index.parent / name for name in names)]


def _read_file(file: Path) -> dict[Any, Any]:
    with open(file, "rb") as opened:
        start = opened.read(512)
    if not start:
        raise RefusedError("is empty")
    if start[:4] == b"PK\x03\x04":
        content = _read_archive(file)
    elif start[257:262] == b"ustar":
        raise RefusedError("is a tar archive")
    else:
        known = [text for bytes_, text in STARTS.items() if start.startswith(bytes_)]
        is_header = start[8:9] == b"{"
        if known and not is_header:
            raise RefusedError(f"is {known[0]}")
        content = _read_safetensors(file, int.from_bytes(start[:8], "little"))
    if not isinstance(content, dict):
        raise RefusedError(f"holds a {type(content).__name__}, expected named tensors")
    return content


def _read_safetensors(file: Path, header: int) -> dict[str, torch.Tensor]:
    if header > min(MAX_HEADER, file.stat().st_size):
        raise RefusedError("is neither an archive of PyTorch nor a safetensors file")
    with safe_open(file, "pt") as opened:
        if len(opened.keys()) > MAX_MEMBERS:
            raise RefusedError(f"holds more than {MAX_MEMBERS:,} tensors")
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dict


def _read_archive(file: Path) -> Any:
    """What torch.save wrote: torch reads the numbers from the disk when they are used."""
    _check_end(file)
    with zipfile.ZipFile(file) as archive:
        records = _check_members(archive.infolist(), file.stat().st_size)
        folder = archive.infolist()[0].filename.partition("/")[0]
        names = check_pickle(archive.read(f"{folder}/data.pkl"), records)
    allowed = [(stand_in(name), name) for name in sorted(names)]
    with torch.serialization.safe_globals(allowed):  # type: ignore[arg-type]
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _check_end(file: Path) -> None:
    """RefusedError unless any reader of zip files finds the same, short list of members.

    The file ends with the record of that list (22 bytes); in long archives a locator (20 bytes) and
    the record in 64 bits (56 bytes) are before it.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        opened.seek(max(0, size - 98))
        tail = opened.read()
    record, end, width, at = b"PK\x05\x06", size - 22, 4, len(tail) - 10
    found = tail[-22:-18] == record
    if tail[-42:-38] == b"PK\x06\x07":
        record, end, width, at = b"PK\x06\x06", size - 98, 8, 40
        found = found and tail[:4] == record
        found = found and int.from_bytes(tail[-34:-26], "little") == end
    length = int.from_bytes(tail[at : at + width], "little")
    start = int.from_bytes(tail[at + width : at + 2 * width], "little")
    if not found or length > MAX_DIRECTORY or start + length != end:
        raise RefusedError("cannot be read (it does not end with a list of its members)")


def _check_members(members: list[zipfile.ZipInfo], size: int) -> dict[str, int]:
    """The bytes of each storage, by its name in the pickle.

    RefusedError if the archive is not one that torch.save writes.
    """
    names = [member.filename for member in members]
    folder = names[0].partition("/")[0] if names else ""
    if len(names) > MAX_MEMBERS or len({name.lower() for name in names}) < len(names):
        raise RefusedError(f"has more than {MAX_MEMBERS:,} members, or two of one name")
    if any(name.lower().endswith("/constants.pkl") or "/code/" in name.lower() for name in names):
        raise RefusedError("is a TorchScript archive, which holds a program")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise RefusedError("has compressed members, which torch.save does not write")
    if sum(member.file_size for member in members) > size:
        raise RefusedError("has members that overlap")
    sizes = {
        name.removeprefix(f"{folder}/"): m.file_size for name, m in zip(names, members, strict=True)
    }
    if sizes.get("data.pkl", MAX_PICKLE + 1) > MAX_PICKLE:
        raise RefusedError(f"has no pickle data.pkl of at most {MAX_PICKLE:,} bytes")
    return {key.removeprefix("data/"): n for key, n in sizes.items() if key.startswith("data/")}

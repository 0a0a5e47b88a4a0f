"""Code that a model brings along: it runs only after the user of this account has allowed it.

A model such as LLaDA has Python files in its repository. A checkpoint of it keeps them in code/,
with their sha256 in meta.json; but it may come from a stranger, who can change both. So the code
runs only if the same sha256 is in a folder of the user's account:

    $XDG_CONFIG_HOME/halfstep/trusted-code/SHA256.json     (default: ~/.config/halfstep/...)

`halfstep import --trust-remote-code` and `halfstep trust` write this file. The jobs of a cluster
share the home folder, so they find it too; elsewhere the user allows the code again.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib
import os
import re
import shlex
import shutil
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

from halfstep.errors import HalfstepError, reason
from halfstep.files import write_json

MOST_FILES, MOST_BYTES = 64, 4 << 20
NAME = re.compile(r"[A-Za-z_]\w*\.py", re.ASCII)
CLASS = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
_found: dict[str, tuple[Path, dict[str, bytes]]] = {}  # sha256 -> folder and files, not yet run


def read_code(folder: Path) -> str:
    """Read the Python files of a folder without running them: their sha256, for `load_class`.

    It is that of the lines `sha256sum *.py` prints, in the order of the names. HalfstepError if
    there are none, or if they are not a few plain files.
    """
    files = {}
    paths = sorted(folder.glob("*.py"))
    sizes = [path.stat().st_size if path.is_file() else MOST_BYTES + 1 for path in paths]
    if not paths or len(paths) > MOST_FILES or sum(sizes) > MOST_BYTES:
        raise HalfstepError(
            f"{folder}: found {len(paths)} Python files of {sum(sizes):,} bytes, expected 1 to "
            f"{MOST_FILES} files of at most {MOST_BYTES:,} bytes; copy the whole folder again"
        )
    for path in paths:
        if not NAME.fullmatch(path.name):
            raise HalfstepError(
                f"{folder}: {path.name!r} is no name of a Python module; copy the whole folder "
                "again, or name another model"
            )
        files[path.name] = path.read_bytes()
    lines = [f"{hashlib.sha256(text).hexdigest()}  {name}\n" for name, text in files.items()]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    _found[digest] = folder, files
    return digest


def files_of_code(digest: str) -> dict[str, bytes]:
    """The files that `read_code` has read, by their names."""
    return _found[digest][1]


def consent_file(digest: str) -> Path:
    """The file that says that the user has allowed this code."""
    given = Path(os.environ.get("XDG_CONFIG_HOME") or "")
    base = given if given.is_absolute() else Path.home() / ".config"
    return base / "halfstep" / "trusted-code" / f"{digest}.json"


def allow_code(digest: str, source: str) -> Path:
    """Write the user's consent to run this code, which `source` brought; the file of it."""
    file = consent_file(digest)
    write_json(file, {"source": source, "files": sorted(files_of_code(digest))})
    return file


def split_reference(digest: str, reference: str) -> tuple[str, str]:
    """Module and class of a name such as "modeling_x.X" in an auto_map.

    HalfstepError if it is not in a file of this code.
    """
    folder, files = _found[digest]
    named = CLASS.fullmatch(reference)
    if named is None or f"{named[1]}.py" not in files:
        raise HalfstepError(
            f"{folder}: auto_map names {reference[:80]!r}, expected module.Class of a file in this "
            "folder; name another model"
        )
    return named[1], named[2]


def load_class(digest: str, reference: str, base: type) -> Any:
    """Run the code, once in a process, and return its class `reference`, such as "modeling_x.X".

    The files are those that `read_code` has read, whatever their folder holds now. HalfstepError if
    the user has not allowed the code, or if there is no such subclass of `base`.
    """
    folder, files = _found[digest]
    if not consent_file(digest).is_file():
        checkpoint = folder.parent
        raise HalfstepError(
            f"{checkpoint}: its model needs the code in {folder} (sha256 {digest[:16]}), which "
            "this account has not allowed to run; read it, and allow it with "
            f"halfstep trust {shlex.quote(str(checkpoint))}"
        )
    module, name = split_reference(digest, reference)
    try:
        found = getattr(importlib.import_module(f"{_package(digest, files)}.{module}"), name)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise TypeError(f"{name} is no {base.__name__}")
    except Exception as error:  # code of others raises anything
        raise HalfstepError(
            f"{folder}: its code does not give {reference} ({type(error).__name__}: "
            f"{reason(error)}); install the packages that it needs, or name another model"
        ) from None
    return found


def _package(digest: str, files: dict[str, bytes]) -> str:
    """The name of a package of these files, which are written to a private folder."""
    name = f"halfstep_code_{digest}"
    if name not in sys.modules:
        folder = Path(tempfile.mkdtemp(prefix="halfstep-code-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        sys.modules[name] = module_from_spec(spec)
    return name

"""Write envs/requirements.txt and the conda files of the rules from the installed packages.

None of these files is edited by hand. To move to newer packages:

1. In a fresh virtual environment run `pip install torch`, then `pip install -e .[all]`.
2. Make the tests pass there.
3. Run `pip install uv`, then `python envs/lock.py`, with the Python of that environment.
   (`make lock` does both with .venv.)

The lock holds the dependencies of the extra `all` of pyproject.toml, direct and indirect. A conda
file holds those of the extras that its jobs need (KINDS). Other installed packages do not enter.
The CUDA packages of torch stay out, because the chosen wheel of torch brings its own.

requirements.txt has the sha256 of every file that PyPI has of each version, for all platforms, so
pip refuses any other file. The conda files have none: a list for pip with hashes must have those
of the CUDA packages too, and of the CPU build of torch, which is not on PyPI.
"""

import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
HEADER = "# Written by envs/lock.py from pyproject.toml's {extras}; do not edit."
BROUGHT_BY_TORCH = re.compile(r"nvidia-|cuda-|triton")
CONDA = """{header}
# {about}
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
"""
CPU = "--extra-index-url https://download.pytorch.org/whl/cpu", "+cpu"
KINDS = {  # file: its purpose, extras of pyproject.toml, option of pip, suffix of torch's version
    "cpu.yaml": (
        "For corpora. Those of kind `docs` are the docstrings of all these packages.",
        ["all"],
        *CPU,
    ),
    "gpu.yaml": (
        "For trainings, samples, scores and timings, on a machine with an NVIDIA GPU or without.",
        ["eval", "lora"],
        *("", ""),
    ),
    "report.yaml": ("For tables, figures, pages and MLflow.", ["report", "track"], *CPU),
}
CONDA_PYTHON = {  # the Python and the platform of the conda files
    "python_version": "3.11",
    "python_full_version": "3.11.14",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "sys_platform": "linux",
}


def closure(
    name: str, extras: frozenset[str], platform: dict[str, str] | None = None
) -> dict[str, str]:
    """Installed version of every package that `name[extras]` needs here, or on another platform."""
    pins: dict[str, str] = {}
    seen = set()
    todo = [(canonicalize_name(name), extras)]
    while todo:
        key, extras = todo.pop()
        if (key, extras) in seen or BROUGHT_BY_TORCH.match(key):
            continue
        seen.add((key, extras))
        found = distribution(key)
        pins[key] = found.version.split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are one source
        for requirement in map(Requirement, found.requires or []):
            marker = requirement.marker
            wanted = [{**(platform or {}), "extra": extra} for extra in extras or {""}]
            if marker is None or any(map(marker.evaluate, wanted)):
                todo.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    del pins[canonicalize_name(name)]
    return dict(sorted(pins.items()))


def pinned(pins: dict[str, str]) -> list[str]:
    """The pins as pip reads them."""
    return [f"{name}=={version}" for name, version in pins.items()]


def published_hashes(pins: dict[str, str]) -> dict[str, list[str]]:
    """The sha256 of all files that PyPI has of each pinned version, for every platform."""
    options = "--no-config --no-deps --universal --generate-hashes --no-header --no-annotate"
    call = ["uv", "pip", "compile", "--quiet", *options.split(), "-"]
    lines = "\n".join(pinned(pins))
    done = subprocess.run(call, input=lines, capture_output=True, text=True, check=True)
    return read_hashes(done.stdout)


def requirements(pins: dict[str, str], hashes: dict[str, list[str]]) -> str:
    """The text of requirements.txt."""
    lines = [HEADER.format(extras="extra `all`")]
    for name, pin in zip(pins, pinned(pins), strict=True):
        lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{h}" for h in hashes[name])]))
    return "\n".join(lines) + "\n"


def conda(kind: str, pins: dict[str, str]) -> str:
    """The text of a conda file, a key of KINDS, with the versions of the lock."""
    about, extras, option, suffix = KINDS[kind]
    needed = closure("halfstep", frozenset(extras), CONDA_PYTHON)
    pins = {name: version for name, version in pins.items() if name in needed}
    pins["torch"] += suffix
    named = f"extra{'s' * (len(extras) > 1)} " + " and ".join(f"`{extra}`" for extra in extras)
    lines = [option] * bool(option) + pinned(pins)
    head = CONDA.format(header=HEADER.format(extras=named), about=about)
    return head + "".join(f"      - {line}\n" for line in lines)


def read(lock: Path = HERE / "requirements.txt") -> dict[str, str]:
    """Version of each package in the lock."""
    return dict(line.split("==") for line in lock.read_text().split() if "==" in line)


def read_hashes(text: str) -> dict[str, list[str]]:
    """The sha256 of each package's files in the text of a lock."""
    entries = [entry.split() for entry in text.replace("\\\n", " ").splitlines() if "==" in entry]
    return {
        words[0].split("==")[0]: [word.removeprefix("--hash=sha256:") for word in words[1:]]
        for words in entries
    }


if __name__ == "__main__":
    pins = closure("halfstep", frozenset({"all"}))
    (HERE / "requirements.txt").write_text(requirements(pins, published_hashes(pins)))
    for kind in KINDS:
        (HERE / kind).write_text(conda(kind, pins))
    print(f"{len(pins)} packages, torch {pins['torch']}")

"""Writes envs/requirements.txt, envs/cpu.yaml and envs/gpu.yaml from what is installed; none of the three is edited by hand.

To move to newer packages: in a fresh virtual environment `pip install torch` and then `pip install -e .[all]`, make the tests pass
there, and run `python envs/lock.py` with its Python. The lock is the closure of pyproject's extra `all`, so that nothing
slips in that happens to be installed too; torch's own CUDA packages stay out: the wheel of torch that is chosen brings them.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
HEADER = "# Written by envs/lock.py from pyproject.toml's extra `all`; not by hand."
BROUGHT_BY_TORCH = re.compile(r"nvidia-|cuda-|triton")
CONDA = """{header}
# {about}
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
"""
KINDS = {  # file: what it says of itself, pip options, what is appended to torch's version
    "cpu.yaml": (
        "For machines without a GPU, and for tables and figures.",
        ["--extra-index-url https://download.pytorch.org/whl/cpu"],
        "+cpu",
    ),
    "gpu.yaml": ("For machines with an NVIDIA GPU.", [], ""),
}


def closure(
    name: str, extras: frozenset = frozenset(), pins: dict | None = None, seen: set | None = None
) -> dict[str, str]:
    """Name -> installed version, of everything that `name[extras]` needs on this Python and platform."""
    pins, seen = {} if pins is None else pins, set() if seen is None else seen
    key = canonicalize_name(name)
    if (key, extras) in seen or BROUGHT_BY_TORCH.match(key):
        return pins
    seen.add((key, extras))
    found = distribution(name)
    if key != "halfstep":
        pins[key] = found.version.split("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are the same source
    for requirement in map(Requirement, found.requires or []):
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}
        ):
            closure(requirement.name, frozenset(requirement.extras), pins, seen)
    return dict(sorted(pins.items()))


def requirements(pins: dict[str, str]) -> str:
    return "\n".join([HEADER, *(f"{name}=={version}" for name, version in pins.items())]) + "\n"


def conda(kind: str, pins: dict[str, str]) -> str:
    about, options, local = KINDS[kind]
    lines = [
        *options,
        *(f"{name}=={version}{local if name == 'torch' else ''}" for name, version in pins.items()),
    ]
    return CONDA.format(header=HEADER, about=about) + "".join(f"      - {line}\n" for line in lines)


def read(lock: Path = HERE / "requirements.txt") -> dict[str, str]:
    return dict(line.split("==") for line in lock.read_text().split() if "==" in line)


if __name__ == "__main__":
    pins = closure("halfstep", frozenset({"all"}))
    (HERE / "requirements.txt").write_text(requirements(pins))
    for kind in KINDS:
        (HERE / kind).write_text(conda(kind, pins))
    print(f"{len(pins)} packages, torch {pins['torch']}")

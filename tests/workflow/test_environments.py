"""envs/: the lock pins every requirement of pyproject.toml to a version that it admits.

The conda files have the same versions. Every pin has the hashes of its files.
"""

import re
import runpy
import shutil
import subprocess
import tomllib
from importlib.metadata import distribution

import pytest
from dryrun import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = runpy.run_path(str(REPOSITORY / "envs/lock.py"))
REMEDY = "run `make lock`"


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        lines += extra
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def test_every_requirement_is_pinned():
    pins = LOCK["read"]()
    for requirement in direct_requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is missing in envs/requirements.txt: {REMEDY}"
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{requirement} does not admit the locked {pins[name]}: {REMEDY}"
        )


def test_the_lock_holds_only_pins_and_their_hashes():
    text = (REPOSITORY / "envs/requirements.txt").read_text()
    assert text == LOCK["requirements"](LOCK["read"](), LOCK["read_hashes"](text))
    assert not any(word in text for word in ("://", "@", "+", "\n-"))


def test_every_pin_has_hashes():
    """One hash at least: that of a wheel for all platforms, or of the source."""
    hashes = LOCK["read_hashes"]((REPOSITORY / "envs/requirements.txt").read_text())
    assert hashes.keys() == LOCK["read"]().keys()
    for name, found in hashes.items():
        assert found and len(set(found)) == len(found), name
        assert all(re.fullmatch("[0-9a-f]{64}", one) for one in found), name
    for name in ("torch", "numpy", "tokenizers"):  # wheels of several Pythons and platforms
        assert len(hashes[name]) > 10, name


MACHINES = [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Darwin", "x86_64")]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
@pytest.mark.parametrize(("system", "machine"), MACHINES)
def test_the_lock_is_complete_elsewhere(python, system, machine):
    """pip installs the lock without looking for further packages, so it must hold all of them."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "platform_machine": machine,
        "sys_platform": system.lower(),
    }
    pins, seen = LOCK["read"](), set()
    todo = [("halfstep", frozenset({"all"}))]
    while todo:
        name, extras = todo.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for requirement in map(Requirement, distribution(name).requires or []):
            marker, needed = requirement.marker, canonicalize_name(requirement.name)
            wanted = [{**environment, "extra": extra} for extra in extras or {""}]
            if marker is not None and not any(map(marker.evaluate, wanted)):
                continue
            if LOCK["BROUGHT_BY_TORCH"].match(needed):
                continue
            assert needed in pins or needed == "halfstep", f"{name} needs {requirement}: {REMEDY}"
            todo.append((needed, frozenset(requirement.extras)))
    assert len({name for name, _ in seen}) > 150


def test_make_installs_the_chosen_torch_and_then_only_what_the_lock_names():
    command = ["make", "-n", "-W", "pyproject.toml", ".venv/ready", "PYTHON=python3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "pip install --no-deps --require-hashes -r envs/requirements.txt" in done.stdout
    (words,) = re.findall(r'"\$\((sed .*)\)"', done.stdout)
    found = subprocess.run(words, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert found.stdout == f"torch=={LOCK['read']()['torch']}\n"


def test_the_conda_files_equal_the_lock():
    for kind in LOCK["KINDS"]:
        text = (REPOSITORY / "envs" / kind).read_text()
        assert text == LOCK["conda"](kind, LOCK["read"]()), f"envs/{kind} differs: {REMEDY}"


def test_make_without_a_python_names_the_version_it_needs(tmp_path):
    for part in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / part, tmp_path)
    shutil.copytree(REPOSITORY / "envs", tmp_path / "envs")
    command = ["make", "demo", "PYTHON="]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()

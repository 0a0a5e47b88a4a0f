"""envs/: the lock pins every requirement of pyproject.toml to a version that it admits.

The conda files have the same versions.
"""

import runpy
import shutil
import subprocess
import tomllib

from dryrun import REPOSITORY
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = runpy.run_path(str(REPOSITORY / "envs/lock.py"))


def direct() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    words = project["dependencies"] + [
        word for extra in project["optional-dependencies"].values() for word in extra
    ]
    return [
        requirement
        for requirement in map(Requirement, words)
        if requirement.name != project["name"]
    ]


def test_every_requirement_is_pinned():
    pins = LOCK["read"]()
    for requirement in direct():
        name = canonicalize_name(requirement.name)
        assert name in pins, (
            f"{name} is missing in envs/requirements.txt: run `python envs/lock.py`"
        )
        assert requirement.specifier.contains(pins[name], prereleases=True), (
            f"{requirement} does not admit the locked {pins[name]}"
        )


def test_lock_holds_pins_alone():
    text = (REPOSITORY / "envs/requirements.txt").read_text()
    assert text == LOCK["requirements"](LOCK["read"]())
    assert not any(word in text for word in ("://", "@", "+", "\n-"))


def test_conda_files_are_the_lock():
    for kind in LOCK["KINDS"]:
        assert (REPOSITORY / "envs" / kind).read_text() == LOCK["conda"](kind, LOCK["read"]()), (
            "run `python envs/lock.py`"
        )


def test_make_says_what_it_needs(tmp_path):
    for part in ("Makefile", "pyproject.toml"):
        shutil.copy(REPOSITORY / part, tmp_path)
    shutil.copytree(REPOSITORY / "envs", tmp_path / "envs")
    done = subprocess.run(["make", "demo", "PYTHON="], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()

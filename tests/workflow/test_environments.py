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
REMEDY = "run `python envs/lock.py`"


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


def test_the_lock_holds_only_pins():
    text = (REPOSITORY / "envs/requirements.txt").read_text()
    assert text == LOCK["requirements"](LOCK["read"]())
    assert not any(word in text for word in ("://", "@", "+", "\n-"))


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

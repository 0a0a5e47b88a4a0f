"""The Dockerfile, as far as it can be checked without a daemon of Docker.

Its COPY lines are done for real, in a folder in place of the image, and so are its RUN lines, with
a pip that notes its arguments. The last one's wheel is built from the copied files.
"""

import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from dryrun import REPOSITORY
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from wheels import run_pip

TEXT = (REPOSITORY / "Dockerfile").read_text()
LINES = [
    tuple(line.split(None, 1))
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines()
    if line and not line.startswith("#")
]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
LOCK = runpy.run_path(str(REPOSITORY / "envs/lock.py"))


def of(kind: str) -> list[str]:
    return [rest for word, rest in LINES if word == kind]


def test_its_instructions_are_known_and_it_begins_with_an_image():
    kinds = [word for word, _ in LINES]
    assert set(kinds) == {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}
    assert kinds[:2] == ["ARG", "FROM"] and kinds.count("FROM") == 1
    for rest in of("ENTRYPOINT") + of("CMD"):
        assert yaml.safe_load(rest) == re.findall('"(.+?)"', rest)  # the form without a shell


def test_its_python_is_one_that_the_package_and_the_conda_files_have():
    (python,) = re.findall(r"^PYTHON=(\S+)$", "\n".join(of("ARG")), re.MULTILINE)
    assert of("FROM") == ["docker.io/library/python:${PYTHON}-slim"]
    assert SpecifierSet(PROJECT["requires-python"]).contains(Version(python))
    assert python == LOCK["CONDA_PYTHON"]["python_version"]


def test_every_variable_is_set_before_it_is_used():
    known = set()
    for kind, rest in LINES:
        shell = re.sub(r"'[^']*'", "", rest)
        used = set(re.findall(r"\$\{?(\w+)", shell))
        assert used <= known, f"{kind} {rest}"
        if kind in ("ARG", "ENV"):
            known |= set(re.findall(r"(?:^|\s)(\w+)=", rest))


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    """A folder with what the COPY lines copy from files that git has, links as links."""
    folder = tmp_path_factory.mktemp("image") / "src"
    folder.mkdir()
    for rest in of("COPY"):
        *sources, to = rest.split()
        for name in sources:
            source = REPOSITORY / name
            assert source.exists(), f"COPY {rest}: there is no {name}"
            if (REPOSITORY / ".git").exists():
                call = ["git", "-C", str(REPOSITORY), "ls-files", name]
                listed = subprocess.run(call, capture_output=True, text=True, check=True).stdout
                assert listed, f"COPY {rest}: git has no {name}"
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
                how = {"symlinks": True, "ignore": ignored, "dirs_exist_ok": True}
                shutil.copytree(source, folder / to, **how)
            else:
                (folder / to).mkdir(exist_ok=True)
                shutil.copy(source, folder / to)
    return folder


def test_what_is_copied_gives_the_whole_wheel(image, tmp_path, wheel_file):
    run_pip("wheel", "--no-build-isolation", "--wheel-dir", str(tmp_path / "built"), str(image))
    (built,) = (tmp_path / "built").glob("*.whl")
    with zipfile.ZipFile(built) as found, zipfile.ZipFile(wheel_file) as own:
        assert sorted(found.namelist()) == sorted(own.namelist())


def test_pip_installs_torch_the_lock_and_halfstep(image, tmp_path):
    """The chosen build of torch first, then only what the lock has, as `make` does."""
    (tmp_path / "pip").write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> {tmp_path}/calls\n')
    (tmp_path / "pip").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": "https://index/of torch"}
    for line in of("RUN"):
        subprocess.run(["sh", "-ec", line], cwd=image, env=path, check=True)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"install --index-url https://index/of torch torch=={LOCK['read']()['torch']}",
        "install --no-deps --require-hashes -r envs/requirements.txt",
        "install --no-deps .",
    ]


def test_the_commands_in_its_comments_are_the_programs_own():
    shown = [shlex.split(line) for line in re.findall(r"^# +(docker .*)$", TEXT, re.MULTILINE)]
    images = {words[words.index("-t") + 1]: words for words in shown if words[1] == "build"}
    given = " ".join(" ".join(words) for words in images.values())
    named = {argument.split("=")[0] for argument in of("ARG")}
    assert set(re.findall(r"--build-arg (\w+)=", given)) <= named
    presets = {file.stem for file in (REPOSITORY / "workflow/presets").glob("*.yaml")}
    for words in shown:
        if words[1] == "run":
            at = next(i for i, word in enumerate(words) if word in images)
            assert words[at + 1 : at + 3] == ["run", "--preset"] and words[at + 3] in presets


@pytest.mark.skipif(
    not shutil.which("docker")
    or subprocess.run(["docker", "info"], capture_output=True).returncode != 0,
    reason="no daemon of Docker",
)
def test_docker_finds_nothing_to_complain_about():
    call = ["docker", "build", "--check", "."]
    done = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

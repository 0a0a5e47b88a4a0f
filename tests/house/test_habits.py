"""The project's habits: one version, a complete wheel, and checks that fail when they should."""

import os
import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import halfstep

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def load(file: str) -> dict:
    return yaml.safe_load((REPOSITORY / file).read_text())


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, without the folder of the tools."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (REPOSITORY / "Makefile").read_text(), re.M)
    return re.findall(r"^\t\$\(BIN\)/(.*)$", found[1], re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(wheel_file) -> zipfile.ZipFile:
    with zipfile.ZipFile(wheel_file) as found:
        yield found


def test_the_version_is_written_once(wheel):
    """The wheel, the citation and the changelog agree with halfstep.__version__."""
    assert "version" not in PYPROJECT["project"]
    name = f"halfstep-{halfstep.__version__}.dist-info/METADATA"
    assert f"\nVersion: {halfstep.__version__}\n" in wheel.read(name).decode()
    assert load("CITATION.cff")["version"] == halfstep.__version__
    assert f"\n## {halfstep.__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_the_wheel_holds_every_file_of_the_package(wheel):
    """Snakemake's logger, data files, py.typed and the workflow too, which could be forgotten."""
    source = REPOSITORY / "src"
    files = {
        str(Path(folder).relative_to(source) / name)
        for folder, _, names in os.walk(source, followlinks=True)
        for name in names
        if "__pycache__" not in folder and ".egg-info" not in folder
    }
    needless = {f"halfstep/packaged/envs/{name}" for name in ("lock.py", "requirements.txt")}
    assert "halfstep/py.typed" in files and "halfstep/packaged/Snakefile" in files
    assert files - needless == {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_commit_hooks_are_the_quick_checks():
    """Every hook uses a tool of .venv, so that no hook needs the network."""
    hooks = [hook for repo in load(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    entries = " ".join(hook["entry"] for hook in hooks)
    quick = [command.removesuffix(" .") for command in recipe("quick")]
    assert len(hooks) == len(quick)
    for command in quick:
        assert command in entries, f"`{command}` of `make quick` is no hook"


@pytest.mark.parametrize(("check", "tests"), [(0, 0), (2, 0), (0, 2), (2, 2)])
def test_ci_fails_if_the_checks_or_the_tests_fail(tmp_path, check, tests):
    """Both always run, and the output ends with pytest's closing line."""
    make = f"case $1 in check) exit {check};; test) echo 3 passed; exit {tests};; esac"
    for name, body in {"make": make, "id": "echo 1000"}.items():  # not root: no apt-get
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), *os.get_exec_path()])
    command = [REPOSITORY / ".ci/run"]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "3 passed"
    assert (done.returncode != 0) == bool(check or tests)
    assert ("make check failed" in done.stderr) == bool(check)


def test_the_hosted_ci_runs_ours_and_only_reads():
    flow = load(".github/workflows/ci.yml")
    assert flow["permissions"] == {"contents": "read"}
    commands = {
        name: [step["run"] for step in job["steps"] if "run" in step]
        for name, job in flow["jobs"].items()
    }
    assert commands["linux"] == [".ci/run"]
    assert commands["macos"][0] == "make check"
    actions = [
        step["uses"] for job in flow["jobs"].values() for step in job["steps"] if "uses" in step
    ]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in actions)
    oldest = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert flow["jobs"]["linux"]["strategy"]["matrix"]["python"][0] == oldest


def test_every_tolerated_warning_is_named():
    """After `error`, an exception names its message or its module, not a category alone."""
    first, *exceptions = PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    assert first == "error"
    for line in exceptions:
        action, message, *rest = line.split(":")
        assert action == "ignore"
        assert message or len(rest) > 1, f"{line} tolerates warnings of any origin"


def test_lines_that_ruff_does_not_read_are_as_short():
    """Rules, configuration, Makefile and shell scripts."""
    named = ("Makefile", "Snakefile", "Dockerfile", ".ci/run", "config.yaml")
    files = [REPOSITORY / name for name in named]
    patterns = ("rules/*.smk", "workflow/**/*.smk", "workflow/**/*.yaml", "envs/*", "tests/**/*.sh")
    for pattern in patterns:
        files += [path for path in REPOSITORY.glob(pattern) if path.is_file()]
    limit = PYPROJECT["tool"]["ruff"]["line-length"]
    long = [
        f"{path.relative_to(REPOSITORY)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > limit
    ]
    assert len(files) > 20
    assert long == []

"""The recipes of docs/extending.md work, on a copy of the source.

Each recipe passes the tests that it names, and without its second file it fails them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
REGISTRIES = {"A divergence", "A noise schedule", "A sampler", "A figure", "A corpus kind",
              "A family of models"}  # fmt: skip


def diffs(recipe: str) -> list[tuple[str, str]]:
    """(path, hunk) of each diff of a recipe, in order."""
    return re.findall(r"^```diff (\S+)\n(.*?)^```", recipe, re.MULTILINE | re.DOTALL)


def apply(folder: Path, path: str, hunk: str) -> None:
    """Replace the hunk's old lines, which must stand in the file exactly once, by its new lines."""
    lines = hunk.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    file = folder / path
    text = file.read_text()
    assert text.count(old) == 1, f"{path} does not hold these lines once:\n{old}"
    file.write_text(text.replace(old, new))


def run_tests(folder: Path, recipe: str, *more: str) -> subprocess.CompletedProcess:
    """The recipe's own test command, with `more` words, against the source in `folder`."""
    (line,) = re.findall(r"^```sh test\npython -m (.*?)^```", recipe, re.MULTILINE | re.DOTALL)
    words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)]
    return subprocess.run(
        [sys.executable, "-m", *words, "-q", "-p", "no:cacheprovider", *more],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def copy(tmp_path) -> Path:
    """A copy of what a newcomer edits and tests."""
    for name in ("src", "tests", "rules", "workflow", "benchmarks", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in ("Snakefile", "config.yaml", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_there_is_a_recipe_for_each_registry():
    assert RECIPES.keys() == REGISTRIES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_touches_two_files(name):
    assert len({path for path, _ in diffs(RECIPES[name])}) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_its_tests_and_half_of_it_does_not(copy, name):
    hunks = diffs(RECIPES[name])
    first = [hunk for hunk in hunks if hunk[0] == hunks[0][0]]
    for path, hunk in first:
        apply(copy, path, hunk)
    half = run_tests(copy, RECIPES[name], "-x")
    assert half.returncode == 1, f"nothing fails without the second file:\n{half.stdout}"
    for path, hunk in hunks:
        if (path, hunk) not in first:
            apply(copy, path, hunk)
    whole = run_tests(copy, RECIPES[name])
    assert whole.returncode == 0, whole.stdout + whole.stderr

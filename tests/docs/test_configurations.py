"""The configurations that README and docs show resolve without a warning."""

import re
from pathlib import Path

import pytest

from halfstep.resolve import read_yaml, resolve

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "workflow" / "presets"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    (page, block)
    for page in PAGES
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]
TASKS = [ROOT / "docs/results/endings.yaml"]  # of lm-eval
FILES = [file for file in sorted((ROOT / "docs").rglob("*.yaml")) if file not in TASKS]


@pytest.mark.parametrize("page, block", BLOCKS)
def test_a_block_resolves(tmp_path, monkeypatch, page, block):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("Dear reader, this is a letter.\n")
    (tmp_path / "config.yaml").write_text(block)
    monkeypatch.chdir(tmp_path)
    config = resolve(read_yaml(tmp_path / "config.yaml"), PRESETS)
    assert config.teachers and not config.warnings()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_resolves(file):
    config = resolve(read_yaml(file), PRESETS)
    assert config.teachers and not config.warnings()


def test_readme_and_results_are_among_them():
    assert {page.name for page, _ in BLOCKS} >= {"README.md"}
    assert (ROOT / "docs" / "results" / "three-seeds.yaml").exists()

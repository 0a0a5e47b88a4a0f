"""docs/paper.md names every figure and table of the paper, with presets that make its targets."""

import re
from functools import cache
from pathlib import Path

import pytest

from halfstep.report.paper import ITEMS
from halfstep.resolve import resolve
from halfstep.workflow.paper_targets import PaperTargets
from halfstep.workflow.targets import Targets

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "workflow" / "presets"
PAGE = (ROOT / "docs" / "paper.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith(("| Figure", "| Table", "| MDLM"))
]


@cache
def items_of(preset):
    """The paper's figures and tables that a preset makes."""
    return PaperTargets(Targets(resolve({"preset": preset}, PRESETS, quiet=True))).items.keys()


def targets_of(cell):
    """The targets in a cell; `a` to `f` are all between."""
    found = re.findall(r"`([\w-]+)`", cell)
    if " to " in cell:
        stem = found[0][:-1]
        found = [f"{stem}{panel}" for panel in "abcdef"]
    return found


def test_every_figure_and_table_of_the_paper_has_a_row():
    names = [number for row in ROWS for number in re.findall(r"\d+", row[0])]
    assert names == [*map(str, [1, 2, 3, *range(3, 5), *range(4, 23)]), "1", "2", "3"]


def test_every_target_has_a_row():
    listed = [target for row in ROWS for target in targets_of(row[1])]
    assert sorted(listed) == sorted([*ITEMS, "table-2"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_presets_of_a_row_make_its_targets(row):
    presets, targets = re.findall(r"`([\w.-]+)`", row[3]), {*targets_of(row[1])} - {"table-2"}
    assert bool(presets) == bool(targets)
    for preset in presets:
        assert targets <= items_of(preset), preset


def test_every_preset_of_the_paper_is_in_the_first_table():
    listed = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    of_paper = {file.stem for file in PRESETS.glob("*.yaml") if file.stem[:5] in ("sdtt-", "owt-s")}
    assert set(listed) == of_paper

"""docs/paper.md names every figure and table of the paper, with presets and files that exist."""

import re
from pathlib import Path

import pytest

from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.resolve import resolve
from halfstep.workflow.targets import Targets

ROOT = Path(__file__).parents[2]
PRESETS = ROOT / "workflow" / "presets"
PAGE = (ROOT / "docs" / "paper.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith(("| Figure", "| Table"))
]


def test_every_figure_and_table_of_the_paper_has_a_row():
    names = [re.match(r"(Figure|Table) \d+", row[0].strip())[0] for row in ROWS]
    assert list(dict.fromkeys(names)) == [
        *(f"Figure {number}" for number in range(1, 23)),
        *("Table 1", "Table 2"),
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_presets_of_a_row_make_its_file(row):
    presets, files = (re.findall(r"`([\w.-]+)`", cell) for cell in row[2:4])
    assert bool(presets) == bool(files)
    for preset in presets:
        found = Targets(resolve({"preset": preset}, PRESETS, quiet=True))
        made = {f"{name}.pdf" for name in found.figure_inputs()}
        made |= {f"{name}.md" for name in found.table_inputs()}
        assert (
            set(files)
            <= made
            <= {f"{name}.pdf" for name in FIGURES} | {f"{name}.md" for name in TABLES}
        )


def test_every_preset_of_the_paper_is_in_the_first_table():
    listed = re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)
    of_paper = {file.stem for file in PRESETS.glob("*.yaml") if file.stem[:5] in ("sdtt-", "owt-s")}
    assert set(listed) == of_paper

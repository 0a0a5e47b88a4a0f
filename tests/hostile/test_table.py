"""The table of hostile inputs in docs/reliability.md counts what the tests of this folder try."""

import importlib
import re
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent
DOCUMENT = FOLDER.parents[1] / "docs" / "reliability.md"


def test_the_table_counts_the_inputs_that_are_tried():
    cases = []
    for file in sorted(FOLDER.glob("test_*.py")):
        cases += getattr(importlib.import_module(file.stem), "CASES", [])
    tried = Counter(case.kind for case in cases)
    tried["all"] = len(cases)
    written = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    rows = "\n".join(f"| {kind} | {n} | {n} |" for kind, n in sorted(tried.items()))
    assert {kind: (int(n), int(held)) for kind, n, held in written} == {
        kind: (n, n) for kind, n in tried.items()
    }, f"the table should be:\n{rows}"


def test_no_two_inputs_have_one_name():
    names = Counter()
    for file in sorted(FOLDER.glob("test_*.py")):
        cases = getattr(importlib.import_module(file.stem), "CASES", [])
        names.update((case.kind, case.name) for case in cases)
    assert [name for name, times in names.items() if times > 1] == []

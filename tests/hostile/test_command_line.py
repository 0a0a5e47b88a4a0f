"""Hostile arguments of the command line."""

import pytest
from hostile import Hostile, answer

CASES = [
    Hostile(
        "command line",
        "an unknown command",
        lambda folder: None,
        ["frobnicate"],
        "unknown command 'frobnicate'",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

"""The notebook runs from its first cell to its last on a small finished results folder."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/denoising.ipynb"
COUNT = "\nprint('figures:', len(plt.get_fignums()))\n"


@pytest.fixture(scope="module")
def printed(tmp_path_factory, pipeline):
    """What the code cells print, one after the other in one process, next to a results folder.

    They are plain Python, so no kernel is needed.
    """
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(pipeline.results, folder / "results", symlinks=True)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run(
        [sys.executable, "-c", code + COUNT],
        cwd=folder,
        env=os.environ | {"MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_step_reveals_and_none_hides(printed):
    left = [int(line.split()[3]) for line in printed.splitlines() if line.startswith("after step")]
    assert left[0] == 24  # the length of its texts
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)


def test_teacher_and_student_have_a_row_for_each_step_count(printed):
    rows = printed.split("steps   perplexity")[1].splitlines()[1:-1]
    assert [int(row.split()[0]) for row in rows] == [2, 4, 8, 16, 32]
    for row in rows:
        *perplexities, entropy, other = map(float, row.replace(",", "").split()[1:])
        assert min(perplexities) > 1
        assert 0 < entropy < 3.18 and 0 < other < 3.18  # at most log 24


def test_it_draws_two_figures(printed):
    assert printed.splitlines()[-1] == "figures: 2"

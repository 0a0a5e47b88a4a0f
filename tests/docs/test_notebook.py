"""The notebook runs from its first cell to its last on a small finished results folder."""

import asyncio
import shutil
import warnings
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs/notebooks/denoising.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory, pipeline):
    """The notebook after its execution next to a results folder."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copytree(pipeline.results, folder / "results", symlinks=True)
    book = nbformat.read(NOTEBOOK, 4)
    for cell in book.cells:
        cell.pop("outputs", None) if cell.cell_type == "markdown" else cell.update(outputs=[])
    client = NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jupyter's own sockets and event loop
        asyncio.run(client.async_execute())
    return book


def printed(book, code: str) -> str:
    """What the one cell with this code printed."""
    (cell,) = (cell for cell in book.cells if cell.cell_type == "code" and code in cell.source)
    return "".join(out.text for out in cell.outputs if out.get("name") == "stdout")


def test_every_step_reveals_and_none_hides(executed):
    lines = printed(executed, "for step in tqdm(range(STEPS)").splitlines()
    left = [int(line.split()[3]) for line in lines if line.startswith("after step")]
    assert left[0] == 24  # the length of its texts
    assert left[-1] == 0
    assert left == sorted(left, reverse=True)


def test_teacher_and_student_have_a_row_for_each_step_count(executed):
    _, *rows = printed(executed, "judge = load_judge").strip().splitlines()
    assert [int(row.split()[0]) for row in rows] == [2, 4, 8, 16, 32]
    for row in rows:
        *perplexities, entropy, other = map(float, row.replace(",", "").split()[1:])
        assert min(perplexities) > 1
        assert 0 < entropy < 3.18 and 0 < other < 3.18  # at most log 24


def test_it_draws_two_figures(executed):
    pictures = [out for cell in executed.cells for out in cell.get("outputs", []) if "data" in out]
    assert sum("image/png" in out.data for out in pictures) == 2

"""The gallery: a picture of every figure, which the code still draws from the tables next to it."""

import re
from pathlib import Path

import pytest

from halfstep.commands.report import plot
from halfstep.report.catalogue import FIGURES, JOURNALS
from halfstep.report.paper import ITEMS

RESULTS = Path(__file__).parents[2] / "docs/results"
NEVER_RUN = {item.shows for item in ITEMS.values() if len(item.sizes) > 2}
FOLDERS = {  # of a figure's own tables, where another run made them
    "decoders": "tables/decoders",
    "accuracy_vs_parallelism": "tables/decoders",
}
DRAWN = [name for name in FIGURES if name not in NEVER_RUN]


def texts(picture: Path) -> list[str]:
    """All that is written in a figure, in the order in which it is drawn."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def test_every_figure_has_a_picture():
    """But those that compare several sizes of networks: no machine of ours can train them."""
    assert NEVER_RUN == {"ppl_by_size", "lambada_by_size"}
    assert {file.stem for file in (RESULTS / "gallery").glob("*.svg")} == set(DRAWN)


def test_the_page_shows_every_figure():
    """In the order of the catalogue, under its title, also where no site is built."""
    sections = re.split(r"(?m)^## ", (RESULTS / "gallery.md").read_text())[1:]
    assert [section.split()[0] for section in sections] == list(FIGURES)
    for name, section in zip(FIGURES, sections, strict=True):
        assert (f"![{FIGURES[name].title}](gallery/{name}.svg)" in section) == (name in DRAWN)
        assert ("was never run" in section) == (name in NEVER_RUN)


@pytest.mark.parametrize("name", [name for name in DRAWN if JOURNALS not in FIGURES[name].needs])
def test_a_picture_is_what_the_code_draws(name, tmp_path):
    """As the command under it does. A change of what is written in a figure fails here."""
    row = FIGURES[name]
    runs = next((item.runs for item in ITEMS.values() if item.shows == name), ())
    where = [f"run={','.join(runs)}"] if row.only_in_paper else []
    folder = RESULTS / FOLDERS.get(name, "tables")
    tables = [folder / f"{need}.csv" for need in row.needs]
    plot(name, tables, tmp_path / name, where=where)
    again = tmp_path / f"{name}.svg"
    assert len(texts(again)) > 10
    assert texts(RESULTS / f"gallery/{name}.svg") == texts(again)

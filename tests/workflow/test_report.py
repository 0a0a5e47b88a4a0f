"""The Snakemake report: every table and figure of the catalogue is in it, with its caption."""

import html
import re

import pytest
import yaml
from dryrun import copy

from halfstep.report.catalogue import FIGURES, TABLES

CONFIG = {
    "preset": "ci",
    "teachers": {"stories-ci": {"distillation": {"rounds": 1}}},
    "sampling": {"steps": [8]},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A finished tree whose files are empty: commands are replaced by `touch`."""
    tree = copy(tmp_path_factory.mktemp("report"))
    (tree.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rules = {file: file.read_text() for file in (tree.folder / "rules").glob("*.smk")}
    for file, text in rules.items():
        file.write_text(re.sub(r"\bhalfstep (?=[a-z-]+ \\\n)", "touch {output}; : ", text))
    done = tree.run("--cores", "64", "--quiet")
    assert done.returncode == 0, done.stderr
    for file, text in rules.items():
        file.write_text(text)
    return tree


def words(text):
    """Without markup and line breaks."""
    return " ".join(html.unescape(text).replace("``", "").split())


def test_every_table_and_figure_has_its_title_and_caption_in_the_report(tree):
    done = tree.run("--report", "report.html")
    assert done.returncode == 0, done.stderr
    shown = (tree.folder / "report.html").read_text()
    (tree.folder / "x.html").write_text(shown)
    for name, row in {**TABLES, **FIGURES}.items():
        assert words(row.title) in words(shown), name
        assert words(row.caption) in words(shown), name


def test_a_new_caption_makes_no_table_or_figure_again(tree):
    tree.edit("rules/report.smk", lambda text: text.replace("].caption,", "].caption + 'more',"))
    assert tree.jobs() == set()

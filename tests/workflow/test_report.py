"""The Snakemake report: every table, figure and text is in it, with its caption."""

import html
import json
import re

import pytest
import yaml
from dryrun import REPOSITORY, TOUCH, copy

from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.resolve import resolve
from halfstep.workflow.targets import Targets

SURE = {"sampler": "threshold", "rounds": [0]}
CONFIG = {
    "preset": "ci",
    "teachers": {"stories-ci": {"distillation": {"rounds": 1}}},
    "sampling": {"steps": [8], "variants": {"cold": {"temperature": 0.8}, "sure": SURE}},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A finished tree whose files are empty: commands are replaced by `touch`."""
    tree = copy(tmp_path_factory.mktemp("report"))
    (tree.folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    rules = {file: file.read_text() for file in (tree.folder / "rules").glob("*.smk")}
    for file, text in rules.items():
        file.write_text(re.sub(r"\bhalfstep (?=[a-z-]+ \\\n)", TOUCH, text))
    done = tree.run("--cores", "64", "--quiet")
    assert done.returncode == 0, done.stderr
    for file, text in rules.items():
        file.write_text(text)
    return tree


def read_report(file):
    """{path: result} of all results in a report of Snakemake, which holds them as JSON."""
    text = file.read_text()
    results, _ = json.JSONDecoder().raw_decode(text, text.index('{"results/'))
    return results


def test_every_table_and_figure_has_its_title_and_caption_in_the_report(tree):
    done = tree.run("--report", "report.html")
    assert done.returncode == 0, done.stderr
    results = read_report(tree.folder / "report.html")
    targets = Targets(resolve(CONFIG, REPOSITORY / "workflow/presets", quiet=True))
    made = targets.figure_inputs()
    assert made.keys() == {
        name for name, row in FIGURES.items() if not (row.only_in_paper or row.section)
    }
    tables = {f"results/tables/{name}.html": TABLES[name] for name in targets.table_inputs()}
    figures = {f"results/figures/{name}.svg": FIGURES[name] for name in made}
    assert results.keys() == {*tables, *figures, "results/texts.html"}
    shown = {path: result["mime_type"] for path, result in results.items()}
    assert set(shown.values()) == {"text/html", "image/svg+xml"}  # what the report shows itself
    for path, row in {**tables, **figures}.items():
        caption = re.sub("<[^>]+>", "", html.unescape(results[path]["caption"]))
        assert row.caption.replace("``", "") in caption
        assert results[path]["labels"]["shows"] == row.title


def test_a_new_caption_makes_no_table_or_figure_again(tree):
    tree.edit("rules/report.smk", lambda text: text.replace("].caption,", "].caption + 'more',"))
    assert tree.jobs() == set()

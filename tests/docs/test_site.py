"""The documentation site: it builds without a warning, is complete, and loads nothing from afar."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
from dryrun import copy, counts

from halfstep.commands import COMMANDS
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.resolve import schema

ROOT = Path(__file__).parents[2]
ALL_TABLES = """
preset: laptop-losses
sampling: {variants: {released-noise: {sampler: ancestral_float32}}}
evaluation: {tasks: [arc_easy], perplexity: [ptb]}
"""


def build(settings: Path, site: Path) -> subprocess.CompletedProcess:
    """`mkdocs build --strict`, as in `make docs`."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", settings, "-d", site],
        cwd=settings.parent,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_relative_link_leads_to_a_file_of_a_clone(page):
    """The site has more pages, which are made when it is built; hooks.py turns links to them."""
    links = re.findall(r"\]\(([^)\s#]+)", page.read_text())
    places = [link for link in links if not re.match(r"\w+:", link)]
    assert [place for place in places if not (page.parent / place).exists()] == []


class Loaded(HTMLParser):
    """The addresses that a browser loads by itself when it shows a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag in ("script", "img", "iframe", "source", "video"):
            self.addresses.append(values.get("src", ""))
        if tag == "link":
            self.addresses.append(values.get("href", ""))


def test_a_page_loads_nothing_from_the_internet(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.addresses
        for address in loaded.addresses:
            assert not re.match(r"(https?:)?//", address), f"{page.name} loads {address}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\W*(https?:)?//", style.read_text()), style


def test_the_search_index_has_every_page(site):
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"].split("#")[0] for entry in index["docs"]}
    assert found == {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"}


def test_generated_pages_are_complete(site):
    reference = {page.stem: page.read_text() for page in (site / "reference").glob("*.html")}
    for name in COMMANDS:
        assert f'<h2 id="{name}">' in reference["commands"]
    sections = [schema(), *schema()["$defs"].values()]
    keys = {
        key: "deprecated" in about
        for section in sections
        for key, about in section["properties"].items()
    }
    for key in (key for key, is_old in keys.items() if not is_old):
        assert f"<code>{key}</code>" in reference["configuration"]
    for metric in PROTOCOLS:
        assert f"<code>{metric}</code>" in reference["metrics"]
    for name in (*FIGURES, *TABLES):
        assert f'<h3 id="{name}">' in reference["figures"]
    presets = {file.stem for file in (ROOT / "workflow/presets").glob("*.yaml")}
    assert set(re.findall(r'<h2 id="([\w-]+)">', reference["presets"])) == presets


def commands_on(page: Path) -> list[str]:
    """What follows `snakemake` in the commands of a page."""
    return re.findall(r"^snakemake (.+)$", re.sub("<[^>]+>", "", page.read_text()), re.MULTILINE)


def test_every_table_is_made_by_the_command_under_it(site, tmp_path):
    """In a configuration that asks for all of them."""
    shown = commands_on(site / "reference/figures.html")
    targets = [f"results/tables/{name}.md" for name in TABLES]
    assert [target for target in shown if "/tables/" in target] == targets
    tree = copy(tmp_path)
    (tmp_path / "config.yaml").write_text(ALL_TABLES)
    assert counts(tree.plan(*targets))["tabulate"] == len(targets)


def test_every_figure_is_made_by_the_command_under_it(site, tmp_path):
    """From a clone, which has the preset of `make demo`."""
    shown = [line for line in commands_on(site / "results/gallery.html") if ".svg" in line]
    assert len(shown) == len(FIGURES) and set(shown) < {
        *commands_on(site / "reference/figures.html")
    }
    tree = copy(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    targets = defaultdict(list)
    for line in shown:
        *options, target = shlex.split(line)
        targets[tuple(options)].append(target)
    for options, names in targets.items():
        jobs = counts(tree.plan(*options, *names))
        assert jobs.get("plot", 0) + jobs.get("paper_figure", 0) == len(names)


def test_no_generated_page_is_in_the_repository(site):
    """What a hook makes from the source must not be kept next to it, where it would grow old."""
    for name in ("configuration", "commands", "metrics", "figures", "presets"):
        assert (site / f"reference/{name}.html").exists()
        assert not (ROOT / f"docs/reference/{name}.md").exists()


@pytest.mark.parametrize(
    "text, fault",
    [
        ("[a page](missing.md)", "missing.md"),
        ("[a heading](index.md#missing)", "missing"),
        ("[a file](../src/file.py)", "../src/file.py"),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path, text, fault):
    """With the settings of mkdocs.yml, and one page in place of ours."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Title\n\n{text}\n")
    settings = {"INHERIT": str(ROOT / "mkdocs.yml"), "nav": ["index.md"], "hooks": []}
    settings |= {"plugins": [], "extra_css": [], "docs_dir": "docs", "theme": {"name": "mkdocs"}}
    (tmp_path / "mkdocs.yml").write_text(json.dumps(settings))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    assert fault in done.stderr

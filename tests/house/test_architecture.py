"""docs/architecture.md lists all files of the source and the rules with their first sentences."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
TREE = re.search(r"^## Files\n.*?^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1]
# Folders of tests that mirror no package of the source.
TESTS_ALONE = {"hostile", "support", "house", "parity", "cluster", "docs", "benchmarks"}


def first_sentence(path: Path) -> str:
    """The first line of a file's docstring, without its full stop."""
    text = path.read_text()
    if path.suffix == ".smk":
        text = re.match(r'""".*?"""', text, re.DOTALL)[0]
    return ast.get_docstring(ast.parse(text)).split("\n")[0].rstrip(".")


def expected() -> str:
    """The tree as it should stand in the page."""
    source = ROOT / "src" / "halfstep"
    logger = source.with_name("snakemake_logger_plugin_halfstep")
    folders = [ROOT / "rules", source, *sorted(p for p in source.iterdir() if p.is_dir()), logger]
    lines = []
    for folder in folders:
        files = [p for p in sorted(folder.iterdir()) if p.suffix in (".py", ".smk")]
        if not files:
            continue
        lines.append(f"{folder.relative_to(ROOT)}/")
        for file in files:
            if file.name != "__init__.py" or folder in (source, logger):
                lines.append(f"  {file.name:22} {first_sentence(file)}")
    return "\n".join(lines) + "\n"


def test_the_page_lists_every_file_with_its_first_sentence():
    assert expected() == TREE


def test_presets_are_listed():
    named = re.search(r"^`workflow/presets/`.*?: (.*)\.$", PAGE, re.MULTILINE)[1]
    files = sorted(file.stem for file in (ROOT / "workflow" / "presets").glob("*.yaml"))
    assert sorted(re.findall(r"`([\w-]+)`", named)) == files


def test_tests_mirror_the_source():
    """A folder of tests for each package; loose test files only for modules at the package root."""
    tests, source = ROOT / "tests", ROOT / "src" / "halfstep"
    folders = {p.name for p in tests.iterdir() if p.is_dir() and p.name != "__pycache__"}
    packages = {p.name for p in source.iterdir() if (p / "__init__.py").is_file()}
    assert folders - TESTS_ALONE <= packages
    modules = {p.stem for p in source.glob("*.py")} | {"api"}  # test_api: __init__.py
    modules.add("atomic_files")  # of files.py: the name test_files belongs to data/
    loose = {p.stem for p in tests.glob("*.py")} - {"conftest", "oracle"}
    assert {name.removeprefix("test_") for name in loose} <= modules

"""The README's tree names every file of the source and of the rules, and nothing else."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_tree_names_every_file():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree\n```\n")[1].split("```")[0]
    folder, named = ROOT, set()
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        folder = folder if indent else ROOT / name
        named.add(folder / name if indent else folder)
    assert [path for path in named if not path.exists()] == []
    source = {
        file for file in (ROOT / "src/halfstep").rglob("*.py") if file.name != "__init__.py"
    } | {*(ROOT / "rules").glob("*.smk")}
    assert source == {
        path
        for path in named
        if path.is_file() and path.relative_to(ROOT).parts[0] in ("src", "rules")
    } - {ROOT / "src/halfstep/__init__.py"}
    presets = re.search(r"workflow/presets/ .*: (.*)", tree)[1].split(", ")
    assert sorted(presets) == sorted(
        file.stem for file in (ROOT / "workflow/presets").glob("*.yaml")
    )

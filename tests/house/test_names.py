"""One public name has one meaning, and one thing has one name (CONTRIBUTING.md, Language)."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src" / "halfstep"
ALONE = (
    SOURCE / "exported" / "modeling_halfstep.py"
)  # runs without halfstep, so it repeats its classes
SHARED = {  # name: why several files may define it
    "generate": "the command and the function of the public API do the same thing",
}


@cache
def public_names() -> dict[str, list[str]]:
    """Public top-level functions and classes, and the files that define them."""
    found = defaultdict(list)
    for path in sorted(set(SOURCE.rglob("*.py")) - {ALONE}):
        for node in ast.parse(path.read_text()).body:
            is_named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_named and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(SOURCE)))
    return found


def test_a_public_name_has_one_meaning():
    assert len(public_names()) > 200
    several = {name: files for name, files in public_names().items() if len(files) > 1}
    assert several.keys() == SHARED.keys(), {n: f for n, f in several.items() if n not in SHARED}


@cache
def words() -> list[tuple[str, str, set[str]]]:
    """(word, meaning, words not to use) of each row of the table in CONTRIBUTING.md."""
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (.+?) \|(.*?)\|$", page, re.MULTILINE)
    return [(word, text, set(re.findall("`(.+?)`", other))) for word, text, other in rows[1:]]


def test_the_list_of_words():
    names = [name for word, _, _ in words() for name in word.split(", ")]
    others = [name for _, _, others in words() for name in others]
    assert len(words()) > 20 and len(others) >= 5
    assert len({*names, *others}) == len(names) + len(others), "a word is listed twice"


def identifiers(path: Path) -> set[str]:
    """Every name that a file gives: to functions, classes, parameters, variables and attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def parts(name: str) -> str:
    """`TeacherTargets` and `teacher_targets` alike as _teacher_targets_."""
    return f"_{re.sub('(?<=[a-z0-9])(?=[A-Z])', '_', name).lower().strip('_')}_"


def test_a_thing_has_one_name():
    assert parts("_PeerModel") == "_peer_model_" and "_words_of_" in parts("words_of_peer")
    banned = {other for _, _, others in words() for other in others}
    wrong = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in SOURCE.rglob("*.py")
        for name in identifiers(path)
        for word in banned
        if f"_{word}_" in parts(name)
    }
    assert not wrong

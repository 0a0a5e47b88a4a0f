"""Corpus kind `docs`: sources are parsed but never run, and each paragraph appears once."""

import ast
from pathlib import Path

from halfstep.data import docstrings

SOURCE = '''"""The module's first paragraph, which is
broken over two lines.

    >>> example()
    1.

The second paragraph is here.
"""
raise SystemExit("imported")

if True:
    class Thing:
        """A class under a condition has a documentation string."""

        async def method(self):
            r"""Invalid escapes as \\d do not matter."""
            def inner():
                "An inner function speaks too."

def last(a, b="no documentation string"):
    """Parameters
    ----------
    a : int.
    """

def table():
    """x = 1; y = 2; {z}: 3, (4), [5], 6 * 7 = 42."""
'''


def test_paragraphs_come_in_the_order_of_the_file():
    assert docstrings.prose_paragraphs(SOURCE) == [
        "The module's first paragraph, which is broken over two lines.",
        "The second paragraph is here.",
        "A class under a condition has a documentation string.",
        "Invalid escapes as \\d do not matter.",
        "An inner function speaks too.",
    ]


def test_every_documented_node_of_real_sources_is_visited():
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for module in ("typing.py", "subprocess.py", "asyncio/tasks.py"):
        tree = ast.parse((Path(ast.__file__).parent / module).read_text())
        expected = {node for node in ast.walk(tree) if isinstance(node, kinds)}
        assert set(docstrings._documented(tree)) == expected


def test_a_file_that_is_not_python_gives_nothing(tmp_path):
    for raw in (b"def {{ name }}:", b"\xff\xfe", b"x\x00y", b"(" * 5000):
        (tmp_path / "a.py").write_bytes(raw)
        assert docstrings.read_paragraphs(tmp_path / "a.py") == []
    assert docstrings.read_paragraphs(tmp_path / "absent.py") == []


def test_repeated_paragraphs_are_dropped_whatever_their_marks_and_case():
    a = "This first text is quite long enough. " * 6
    b = "Another text, long enough too, stands here. " * 6
    c = "The third is long as well. " * 8
    files = [[a, b, a], [b.upper().replace(",", ";"), c], [a, b], ["short"]]
    found = docstrings.join_documents(files)
    assert sorted(found) == sorted([a + "\n\n" + b, c])
    assert found == docstrings.join_documents(files)


def test_sources_are_those_of_the_library_and_of_all_requirements():
    names = {dist.metadata["Name"].lower() for dist in docstrings.required_distributions()}
    assert {"torch", "numpy", "pydantic", "sympy"} <= names  # torch requires sympy
    assert not {"pip", "halfstep"} & names
    files = docstrings.source_files()
    assert len(files) == len(set(files)) > 2000
    assert any(path.name == "argparse.py" for path in files)
    assert not [path for path in files if "tests" in path.parts[-3:]]
    own = [path for path in files if "site-packages" not in path.parts]
    assert not [path for path in own if "test" in path.parts[-2:]]


def test_documents_do_not_depend_on_the_number_of_workers(monkeypatch):
    library = Path(ast.__file__).parent
    files = sorted(library.glob("*.py"))[:40]
    monkeypatch.setattr(docstrings, "PARALLEL_FILES", 10)
    monkeypatch.setattr(docstrings, "source_files", lambda: files)
    one, two = docstrings.read_docs(1), docstrings.read_docs(2)
    assert one == two and 10 < len(one) <= 40
    assert all(len(text) >= docstrings.SHORTEST and "\n\n\n" not in text for text in one)

"""Corpus kind `docs`: docstrings of the standard library and of halfstep's dependencies.

Sources are parsed, never imported. A document is the prose of one source file: the paragraphs of
its docstrings that are sentences. Examples, tables, parameter lists and markup are left out, and so
is a paragraph that an earlier file had. The same Python with the same pinned versions gives the
same documents in the same order. Only the closure of halfstep's own requirements is read, whatever
else is installed. Documents are ordered by digest, so the held-out ones come from all packages
alike.
"""

from __future__ import annotations

import ast
import hashlib
import multiprocessing
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.progress import Progress

SHORTEST = 200  # characters of prose in a document
PARALLEL_FILES = 500  # from this many files on, starting worker processes pays off
SKIPPED = set(
    "test tests testing _test idle_test __pycache__ site-packages dist-packages lib2to3".split()
)


def required_distributions(root: str = "halfstep") -> list[Distribution]:
    """The installed distributions that `root` and its extras need, directly or not, by name."""
    found: dict[str, Distribution] = {}
    queue = [root]
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            if name == root:
                raise HalfstepError(
                    f"docs: {root} is not installed, so its dependencies are unknown; "
                    "run pip install -e ."
                ) from None
            continue
        for line in found[name].requires or []:
            # The extras of other packages are left out.
            if name == root or not re.search(r"\bextra\s*==", line):
                queue.append(re.match(r"[\w.-]+", line)[0])
    return [found[name] for name in sorted(found) if name != root]


def source_files() -> list[Path]:
    """Python sources without tests, the standard library first."""
    library = Path(sysconfig.get_path("stdlib"))
    own = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    files = [library / path for path in own if not SKIPPED & set(path.parts)]
    for dist in required_distributions():
        for path in sorted(dist.files or [], key=str):
            if path.suffix == ".py" and ".." not in path.parts and not SKIPPED & set(path.parts):
                files.append(Path(path.locate()))
    return list(dict.fromkeys(files))  # two distributions may list the same file


def is_prose(paragraph: str) -> bool:
    """True for sentences: no examples, tables or markup.

    At least 7 of 8 characters are letters or spaces, the last one ends a sentence, and there is no
    mark of an example or a table.
    """
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        paragraph[-1] in ".!?"
        and letters >= 7 / 8 * len(paragraph)
        and not re.search(r">>>|---|===|\.\. ", paragraph)
    )


def prose_paragraphs(source: str) -> list[str]:
    """The prose in the docstrings of a module, its classes and functions, a line per paragraph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    found = []
    for node in _documented(tree):
        for part in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(part.split())
            if text and is_prose(text):
                found.append(text)
    return found


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    """Module, classes and functions in the order of the file, without visiting expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from _documented(child)


def read_paragraphs(path: Path) -> list[str]:
    """The prose of one file; empty if it is not valid Python (templates, other versions)."""
    try:
        return prose_paragraphs(path.read_text("utf-8"))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []


def letters_digest(text: str) -> bytes:
    """Digest of a text's letters: the same if only case, digits, spaces or marks differ."""
    letters = " ".join(re.findall(r"[^\W\d_]+", text.lower()))
    return hashlib.blake2b(letters.encode(), digest_size=16).digest()


def join_documents(files: Iterable[list[str]]) -> list[str]:
    """One document per file, without paragraphs of earlier files, in the order of their digests."""
    seen: set[bytes] = set()
    kept: dict[bytes, str] = {}
    for paragraphs in files:
        new: list[str] = []
        for paragraph in paragraphs:
            key = letters_digest(paragraph)
            if key not in seen:
                seen.add(key)
                new.append(paragraph)
        text = "\n\n".join(new)
        if len(text) >= SHORTEST:
            kept[letters_digest(text)] = text
    return [kept[key] for key in sorted(kept)]


def read_docs(workers: int = 1) -> list[str]:
    """All documents, read by `workers` processes."""
    files = source_files()
    spawn = multiprocessing.get_context("spawn")
    parallel = workers > 1 and len(files) >= PARALLEL_FILES
    with (
        ProcessPoolExecutor(workers, spawn) if parallel else nullcontext() as pool,
        Progress("read docs", len(files), "file") as progress,
    ):
        if pool:
            results = pool.map(read_paragraphs, files, chunksize=64)
        else:
            results = map(read_paragraphs, files)
        return join_documents(_with_progress(results, progress))


def _with_progress(results: Iterable[list[str]], progress: Progress) -> Iterator[list[str]]:
    for result in results:
        yield result
        progress.update()

"""`docs`: the documentation strings of the standard library and of halfstep's installed dependencies, read without importing.

A document is the prose of one source file: the paragraphs of its documentation strings that are sentences, without those that are
examples, tables, lists of parameters or markup, and without any paragraph seen in an earlier file. The same Python and the same
pinned versions give the same documents in the same order: what is read is the closure of halfstep's own requirements, never
whatever else lies in the environment, and documents are ordered by digest, so that held-out ones come from all packages alike.
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
MANY = 500  # files from which on processes are worth their start
SKIPPED = {
    "test",
    "tests",
    "testing",
    "_test",
    "idle_test",
    "__pycache__",
    "site-packages",
    "dist-packages",
    "lib2to3",
}


def distributions(root: str = "halfstep") -> list[Distribution]:
    """The installed distributions that `root` needs, extras of `root` included, by name."""
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
                    f"docs: {root} is not installed, so its dependencies are unknown; run pip install -e ."
                ) from None
            continue
        queue += [
            re.match(r"[\w.-]+", line)[0]
            for line in found[name].requires or []
            if name == root
            or not re.search(
                r"\bextra\s*==", line
            )  # what other packages need only in part is left out
        ]
    return [found[name] for name in sorted(found) if name != root]


def source_files() -> list[Path]:
    """Python sources, standard library first; tests left out."""
    library = Path(sysconfig.get_path("stdlib"))
    own = sorted(path.relative_to(library) for path in library.rglob("*.py"))
    files = [library / path for path in own if not SKIPPED & set(path.parts)]
    for dist in distributions():
        for path in sorted(dist.files or [], key=str):
            if path.suffix == ".py" and ".." not in path.parts and not SKIPPED & set(path.parts):
                files.append(Path(path.locate()))
    return list(dict.fromkeys(files))  # mlflow and mlflow-skinny list the same ones


def is_prose(paragraph: str) -> bool:
    """Sentences: seven characters in eight are letters or spaces, the last ends a sentence, and nothing looks like an example or a table."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        paragraph[-1] in ".!?"
        and letters >= 7 / 8 * len(paragraph)
        and not re.search(r">>>|---|===|\.\. ", paragraph)
    )


def paragraphs(source: str) -> list[str]:
    """The prose of a module's, its classes' and its functions' documentation strings, each paragraph on one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    found = []
    for node in _documented(tree):
        parts = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
        found += [
            text for text in (" ".join(part.split()) for part in parts) if text and is_prose(text)
        ]
    return found


def _documented(node: ast.AST) -> Iterator[ast.AST]:
    """Module, classes and functions in the order of the file; expressions, most of a tree, are never visited."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()):
            yield from _documented(child)


def read_file(path: Path) -> list[str]:
    """A file's paragraphs; none when it is not valid Python (templates, other versions)."""
    try:
        return paragraphs(path.read_text("utf-8"))
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []


def normalised(text: str) -> bytes:
    """What makes two paragraphs the same: their letters, whatever case, digits, spaces and marks stand between."""
    return hashlib.blake2b(
        " ".join(re.findall(r"[^\W\d_]+", text.lower())).encode(), digest_size=16
    ).digest()


def docstring_documents(files: Iterable[list[str]]) -> list[str]:
    """Paragraphs of each file, the repeated ones dropped, as one document per file, in the order of their digests."""
    seen: set[bytes] = set()
    kept: dict[bytes, str] = {}
    for paragraphs in files:
        new: list[str] = []
        for paragraph in paragraphs:
            key = normalised(paragraph)
            if key not in seen:
                seen.add(key)
                new.append(paragraph)
        text = "\n\n".join(new)
        if len(text) >= SHORTEST:
            kept[normalised(text)] = text
    return [kept[key] for key in sorted(kept)]


def read_docs(workers: int = 1) -> list[str]:
    """All documents, on `workers` processes."""
    files = source_files()
    spawn = multiprocessing.get_context("spawn")
    many = workers > 1 and len(files) >= MANY
    with (
        ProcessPoolExecutor(workers, spawn) if many else nullcontext() as pool,
        Progress("read docs", len(files), "file") as progress,
    ):

        def shown(results):
            for result in results:
                yield result
                progress.update()

        return docstring_documents(
            shown(pool.map(read_file, files, chunksize=64) if pool else map(read_file, files))
        )

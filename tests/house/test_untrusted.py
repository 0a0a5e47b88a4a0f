"""Nothing in the package unpickles freely: weights come from strangers."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "halfstep"
UNPICKLERS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def calls(tree: ast.AST) -> list[tuple[str, dict[str, str]]]:
    """The dotted name and the keywords of each call."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords})
        for node in nodes
    ]


def faults(source: str) -> list[str]:
    """Calls and imports in a file's text that could run what a file of data holds."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        found += [name for name in names if name.partition(".")[0] in UNPICKLERS]
    for name, words in calls(tree):
        if name == "torch.load" and words.get("weights_only") != "True":
            found.append("torch.load without weights_only")
        if name.startswith("torch.jit.load") or words.get("allow_pickle", "False") != "False":
            found.append(name)
        if words.get("trust_remote_code", "False") != "False":
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_no_file_unpickles_freely(path):
    assert faults(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch; torch.load(file, weights_only=False)",
        "torch.load(file)",
        "torch.load(file, weights_only=flag)",
        "torch.jit.load(file)",
        "import pickle",
        "from pickle import loads",
        "numpy.load(file, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_faults_are_found(source):
    assert faults(source)

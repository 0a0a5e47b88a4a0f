"""Nothing in the package unpickles freely or runs code of others: weights come from strangers."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "halfstep"
CONSENT = {"remote_code.py": ["module_from_spec"]}
"""The one place that runs code of a model, after it has looked for the user's consent"""
RUNNERS = {"exec", "eval", "compile", "runpy.run_path", "runpy.run_module", "module_from_spec"}
RUNNERS |= {"importlib.util.module_from_spec", "sys.path.append", "sys.path.insert"}
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
        if words.get("trust_remote_code", "False") != "False" or name in RUNNERS:
            found.append(name)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_no_file_unpickles_freely_or_runs_code_of_others(path):
    assert faults(path.read_text()) == CONSENT.get(path.name, [])


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
        "AutoModel.from_pretrained(name, trust_remote_code=runs_code)",
        "exec(file.read_text())",
        "sys.path.insert(0, folder)",
    ],
)
def test_the_faults_are_found(source):
    assert faults(source)

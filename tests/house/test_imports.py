"""The import law: leaves are independent, mathematics uses torch alone, heavy imports are late."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "halfstep"
LEAVES = {"data", "diffusion", "distill", "models", "training", "metrics", "report"}
BELOW = {
    "adapters",
    "kernels",
    "distributed",
    "records",
    "files",
    "gpus",
    "errors",
    "sanitize",
    "config",
    "renamed",
    "resolve",
    "checkpoint",
    "meta",
    "timing",
    "progress",
    "pretrained",
    "released",
    "remote_code",
    "seeds",
    "tensors",
    "texts",
}  # what a leaf may import
CONTRACTS = "halfstep.diffusion.contracts."  # types, which every leaf may import
EDGES = {("distill", "diffusion")}  # and which leaf may know which
HEAVY = {
    "lm_eval",
    "transformers",
    "datasets",
    "mlflow",
    "matplotlib",
    "pandas",
    "huggingface_hub",
    "mauve",
    "faiss",
    "nltk",
    "peft",
}
FILES = sorted(SOURCE.rglob("*.py"))
LATE = [
    SOURCE / "metrics" / "lambada.py",
    SOURCE / "metrics" / "tasks.py",
    *(file for file in SOURCE.glob("report/*.py") if file.name != "catalogue.py"),
    *SOURCE.glob("exported/*.py"),
]  # lm-eval's model; pandas; goes to users


@cache
def imports(path: Path, late: bool = True) -> set[str]:
    """Dotted names that a file imports; with late=False only those at the module's own level.

    Imports under TYPE_CHECKING do not count.
    """
    found = set()

    def visit(node, inside):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import) and (late or not inside):
            found.update(name.name for name in node.names)
        if isinstance(node, ast.ImportFrom) and (late or not inside):
            assert node.level == 0, f"{path}: a relative import"
            found.update(f"{node.module}.{name.name}" for name in node.names)
        for child in ast.iter_child_nodes(node):
            visit(
                child,
                inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda),
            )

    visit(ast.parse(path.read_text()), False)
    return found


def own(path: Path) -> set[str]:
    """First names below halfstep that a file imports."""
    return {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("halfstep.") and not name.startswith(CONTRACTS)
    }


def others(path: Path, late=True) -> set[str]:
    return (
        {name.split(".")[0] for name in imports(path, late)}
        - {"halfstep"}
        - sys.stdlib_module_names
    )


def place(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_the_law_can_be_read_from_the_files():
    assert LEAVES <= {p.name for p in SOURCE.iterdir()} and len(FILES) > 30
    assert "diffusion" in own(SOURCE / "distill" / "targets.py") and {"torch"} == others(
        SOURCE / "distill" / "targets.py"
    )
    assert own(SOURCE / "commands" / "distill.py") > {
        "data",
        "diffusion",
        "distill",
        "training",
        "checkpoint",
    }


@pytest.mark.parametrize(
    "path", [p for p in FILES if place(p) in LEAVES], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_leaves_do_not_import_one_another(path):
    leaf = place(path)
    allowed = BELOW | {leaf} | {b for a, b in EDGES if a == leaf}
    assert own(path) <= allowed, f"{leaf} imports {own(path) - allowed}: only commands/ composes"


@pytest.mark.parametrize(
    "path", [p for p in FILES if place(p) in BELOW], ids=lambda p: str(p.relative_to(SOURCE))
)
def test_what_leaves_stand_on_knows_no_leaf_when_imported(path):
    """checkpoint and config import leaves only inside of functions.

    Only cli and the public functions import commands.
    """
    early = {
        name.split(".")[1] for name in imports(path, late=False) if name.startswith("halfstep.")
    }
    assert early <= BELOW and "commands" not in own(path)
    assert place(path) in {"checkpoint", "config"} or not own(path) & LEAVES


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if place(p) in {"diffusion", "distill", "models"}],
    ids=lambda p: str(p.relative_to(SOURCE)),
)
def test_mathematics_knows_torch_alone(path):
    assert others(path) <= {"torch"} | ({"safetensors"} if place(path) == "models" else set())
    assert (
        not own(path) & {"config", "records", "progress", "checkpoint"} or path.name == "rounds.py"
    )  # rounds.py reads the run it plans


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_that_computes_knows_mlflow_or_snakemake(path):
    sends = {"mlflow.py", "database.py", "track.py"}
    plans = SOURCE / "workflow" / "graph.py"
    assert path.name in sends or "mlflow" not in others(path)
    assert path == plans or "snakemake" not in others(path)
    assert "snakemake" not in others(path, late=False)
    assert path in LATE or not others(path, late=False) & HEAVY


def test_files_that_need_something_heavy_are_imported_late():
    """Only from inside of a function, or from each other."""
    for path in LATE:
        module = ".".join(
            ("halfstep", *path.relative_to(SOURCE).with_suffix("").parts)
        ).removesuffix(".__init__")
        early = [
            p.name
            for p in FILES
            if p not in LATE
            and any(f"{name}.".startswith(f"{module}.") for name in imports(p, late=False))
        ]
        assert early == [] or not others(path, late=False) & HEAVY, (
            f"{early} import {module} at their top"
        )


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("halfstep", {"torch", "numpy", "tokenizers", "pydantic"}),
        ("halfstep.cli", {"torch", "transformers"}),
        (
            "halfstep.commands.distill, halfstep.commands.generate",
            {"transformers", "mlflow", "snakemake", "lm_eval", "matplotlib", "pandas"},
        ),
        ("halfstep.report.catalogue", {"torch", "numpy", "pandas", "matplotlib", "pydantic"}),
        ("halfstep.commands.report", {"torch", "pandas", "matplotlib"}),
    ],
)
def test_an_import_loads_no_more_than_it_says(module, absent):
    code = f"import sys, {module}; print(*({absent!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

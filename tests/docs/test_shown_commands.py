"""The commands that the pages of docs/ show: run, planned, or named as not run.

The word after the language of a box says what happens here to its commands:

    sh test     they are run, on a small finished results folder
    sh plan     each is a dry run of Snakemake, also by `halfstep run`
    python      run, on the same folder
    sh title="no test runs this: <why>"

A block of YAML is the config.yaml of the commands below it on its page. The commands of
extending.md are run by test_extending.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dryrun import clean_environment, copy

from halfstep.commands.verify import merge_provenance

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "extending.md"]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = {page: FENCE.findall(page.read_text()) for page in PAGES}
PROGRAMS = ("halfstep", "snakemake", "make", "mlflow", "lm_eval", "pip", "python")
RUN = ("sh test", "sh plan", "python")
UNTESTED = re.compile(r'(sh|python) title="no test runs this: [^"]+"')


def name(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_says_whether_a_test_runs_it(page):
    for info, body in BLOCKS[page]:
        # a placeholder such as <teacher> makes a line a pattern, and no command
        lines = [line for line in body.splitlines() if "<" not in line]
        is_command = any(line.split(" ")[0] in PROGRAMS for line in lines)
        if is_command or info.split(" ")[0] in ("sh", "python"):
            assert info in RUN or UNTESTED.fullmatch(info), f"```{info}\n{body}"


@pytest.fixture
def workspace(tmp_path, pipeline):
    """The workflow with a small finished results folder, whose one student stands for the last."""
    tree = copy(tmp_path)
    shutil.copytree(pipeline.results, tmp_path / "results", symlinks=True)
    student = tmp_path / "results/models/stories-tiny/kl_backward"
    shutil.copytree(student / "round-1", student / "round-7")
    merge_provenance(tmp_path / "results")
    for folder in ("docs", "benchmarks"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("Dear reader, this is a letter.\n\n" * 40)
    return tree


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(info in RUN for info, _ in BLOCKS[page])], ids=name
)
def test_the_commands_of_a_page(workspace, page):
    folder = workspace.folder
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = clean_environment() | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}
    for info, body in BLOCKS[page]:
        if info == "yaml":
            (folder / "config.yaml").write_text(body)
        elif info == "sh plan":
            for line in body.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line.replace("halfstep run", "snakemake"), True)
                assert program == "snakemake", line
                assert workspace.graph(*words).jobs, line
        elif info in RUN:
            program = ["bash", "-ec"] if info == "sh test" else [sys.executable, "-c"]
            done = subprocess.run(
                [*program, body],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{body}\n{done.stdout}{done.stderr}"

"""The whole graph as a Snakemake module: another workflow's rules, in a folder without ours."""

import json
import re

import pytest
from dryrun import REPOSITORY, Workflow

from halfstep.commands.plan import LOCAL

OUTER = """
module halfstep:
    snakefile: {snakefile!r}
    config: config

use rule * from halfstep{renamed}
"""
CONFIG = ["--config", "preset=ci"]


def outer(folder, renamed: str = "") -> Workflow:
    """A folder with an outer Snakefile, and nothing else."""
    text = OUTER.format(snakefile=str(REPOSITORY / "Snakefile"), renamed=renamed)
    (folder / "Snakefile").write_text(text)
    return Workflow(folder)


def commands(plan: str) -> list[str]:
    return sorted(re.findall(r"^ +(halfstep .*? 2>&1.*)", plan.replace("\\\n", " "), re.MULTILINE))


def test_a_module_plans_what_the_workflow_itself_plans(workflow, tmp_path):
    own = workflow.plan("-p", *CONFIG)
    plan = outer(tmp_path).plan("-p", "--cores", "all", *CONFIG)
    assert commands(plan) == commands(own) and len(commands(own)) > 40


def test_rules_of_a_module_may_be_renamed(workflow, tmp_path):
    """Local rules stay local, and several GPUs are found under the new name."""
    words = ["results/tables/speed.csv", "--resources", "gpu=2", "--config", "preset=owt-small"]
    tree = outer(tmp_path, renamed=" as masked_*")
    plan = tree.plan("-p", "--cores", "all", *words)
    own = workflow.plan("-p", *words)
    assert commands(plan) == commands(own)
    assert "rule masked_pretrain:" in plan
    tree.edit("Snakefile", lambda text: text + "\nprint('local:', *sorted(workflow._localrules))\n")
    local = re.search(r"^local: (.*)", tree.plan("--cores", "1", *words), re.MULTILINE)[1]
    assert local.split() == [f"masked_{name}" for name in sorted({"all", *LOCAL})]


def test_a_module_runs(tmp_path):
    """Its outputs are in the outer workflow's folder, its environment and presets in ours."""
    short = {"num_steps": 1, "warmup_steps": 0, "validate_every": 1}
    settings = [*CONFIG, f"teachers={json.dumps({'stories-ci': {'pretraining': short}})}"]
    target = "results/models/stories-ci/teacher/meta.json"
    tree = outer(tmp_path)
    done = tree.run("--cores", "1", target, *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / target).read_text())["corpus"] == "stories-ci"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "data",
        "logs",
        "models",
    ]
    assert "Nothing to be done" in tree.run("--cores", "1", target, *settings).stderr


@pytest.mark.parametrize("words, fault", [
    (["preset=labtop"], "did you mean laptop?"),
    (["preset=ci", "seed=-1"], "configuration: seed: found -1: "),
])  # fmt: skip
def test_a_fault_in_the_modules_configuration_is_one_line(tmp_path, words, fault):
    done = outer(tmp_path).run("-n", "--cores", "1", "--config", *words)
    assert done.returncode != 0 and fault in done.stderr
    assert "Traceback" not in done.stdout + done.stderr

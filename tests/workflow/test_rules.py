"""The rules: lint and format are clean, docstrings are complete, commands are understood."""

import ast
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from dryrun import REPOSITORY, copy

from halfstep.cli import COMMANDS
from halfstep.commands.plan import LOCAL

FILES = [REPOSITORY / "Snakefile", *sorted((REPOSITORY / "rules").glob("*.smk"))]


def rules_of(file: Path) -> dict[str, str]:
    """The rules of a file by name, each with its text."""
    pieces = re.split(r"^rule (\w+):\n", file.read_text(), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_lint_is_clean(workflow):
    done = workflow.run("--lint")
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "Congratulations" in said, said


def test_format_is_clean():
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},  # snakefmt calls shfmt
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_rule_has_a_docstring_and_every_line_fits(file):
    text = file.read_text()
    assert text.startswith('"""')
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for rule, body in rules_of(file).items():
        assert re.match(r'    """[A-Z][^\n]*\.(""")?\n', body), f"rule {rule} has no docstring"


@pytest.mark.parametrize("file", FILES[1:], ids=lambda file: file.name)
def test_the_docstring_of_a_file_names_its_outputs(file):
    """Every output of a rule is in the list, itself or its folder; the list has no others."""
    rules = rules_of(file)
    if not rules:
        return
    docstring = ast.literal_eval(re.match(r'""".*?"""', file.read_text(), re.DOTALL)[0])
    assert "\nInputs:\n" in docstring
    listed = re.findall(
        r"^    (results/\S+)", re.split(r"\nOutputs[^\n]*:\n", docstring)[1], re.MULTILINE
    )
    outputs = [
        path
        for body in rules.values()
        for path in re.findall(r'"(results/[^"]+)"', re.split(r"^    log:", body, flags=re.M)[0])
        if path in body.partition("    output:")[2]
    ]
    for path in outputs:
        stem = path.removesuffix(".provenance.json")
        assert any(path.startswith(name) or f"{stem}.json" == name for name in listed), path
    for name in listed:
        assert any(path.startswith(name) for path in outputs), name


def test_local_rules_are_those_that_cost_no_job():
    local = {
        rule
        for file in FILES
        for rule, body in rules_of(file).items()
        if "    localrule: True\n" in body
    }
    assert local == {"all", *LOCAL}


def test_printed_commands_are_understood(workflow):
    """One command of every rule is parsed with its function's signature.

    A flag that a rule gives and the command lacks fails here.
    """
    published = '{"from": "kuleshov-group/mdlm-owt", "baseline": {"from": "gpt2"}}'
    imported = f'teachers={{"stories-ci": {published}}}'
    plans = workflow.plan("-p", "--config", "preset=ci")
    asked = 'evaluation={"tasks": ["piqa"], "task_steps": [8, "own"], "perplexity": ["ptb"]}'
    plans += workflow.plan("-p", "--config", "preset=ci", imported, asked)
    plans += workflow.plan("-p", "--config", "preset=ci", asked, "--", "paper")
    printed = re.sub(r"\$\{SLURM_JOB_ID:\+(.*?)\}", r"\1", plans.replace("\\\n", " "))
    commands = {}
    for line in re.findall(r"^ +(halfstep .*?) 2>&1 \| tee (?:\S+)$", printed, re.MULTILINE):
        commands.setdefault(line.split()[1], line)
    by_hand = {"init", "run", "summary", "verify", "write-schema", "write", "export", "plan"}
    by_hand |= {"doctor", "ui", "trust"}
    assert set(commands) == set(COMMANDS) - by_hand
    for name, line in commands.items():
        module, function = COMMANDS[name][0].split(":")
        real = getattr(importlib.import_module(module), function)
        given = tyro.cli(
            functools.wraps(real)(lambda **given: given),
            args=shlex.split(line)[2:],
            config=(tyro.conf.OmitArgPrefixes,),
        )
        assert given, line


def test_judges_weights_and_published_values_reach_their_commands(workflow):
    """Several judges are given to one command; `baseline` is the corpus's own, trained first."""
    settings = [
        "preset=ci",
        'evaluation={"judge": ["baseline", "gpt2-large"]}',
        'sampling={"weights": "raw"}',
        "published=true",
    ]
    targets = ["results/tables/lambada.md", "results/figures/ppl_vs_steps.pdf"]
    printed = workflow.plan("-p", *targets, "--config", *settings).replace("\\\n", " ")
    calls = {
        name: re.findall(rf"^ +halfstep {name} (.*?) 2>&1", printed, re.MULTILINE)
        for name in COMMANDS
    }
    assert calls["train-baseline"]
    for call in calls["score-samples"] + calls["score-corpus"]:
        assert "--judge results/models/stories-ci/baseline/hf gpt2-large " in call
    assert calls["score-lambada"]
    for call in calls["score-lambada"]:
        assert "--weights raw " in call
    assert [call.split()[-1] for call in calls["tabulate"] + calls["plot"]] == ["--published"] * 3
    assert "--published" not in workflow.plan("-p", *targets, "--config", "preset=ci")


def test_a_variant_that_asks_a_scorer_is_drawn_after_the_baseline_and_names_it(workflow):
    """Other variants are not, and do not."""
    variants = {"asked": {"sampler": "energy", "candidates": 3}, "sure": {"sampler": "threshold"}}
    sampling = json.dumps({"steps": [8], "rounds": [0], "variants": variants})
    settings = ("--config", "preset=ci", f"sampling={sampling}")
    folder = "results/samples/stories-ci/teacher"
    calls = {}
    for name in variants:
        plan = workflow.plan("-p", f"{folder}/{name}/provenance.json", *settings)
        plan = plan.replace("\\\n", " ")
        calls[name] = " ".join(re.search(r"halfstep generate (.*?) 2>&1", plan)[1].split())
        assert ("train_baseline" in plan) == (name == "asked")
    flags = "--scorer results/models/stories-ci/baseline"
    assert "--sampler energy --candidates 3" in calls["asked"] and flags in calls["asked"]
    assert "--sampler threshold" in calls["sure"] and "--scorer" not in calls["sure"]


def test_a_failed_run_ends_with_what_failed_and_how_to_continue(tmp_path):
    tree = copy(tmp_path)
    shell = """python -c 'raise SystemExit("no space left")'"""
    tree.edit("rules/data.smk", lambda text: text.replace("halfstep prepare-corpus", shell))
    words = ["results/data/stories-ci/manifest.json", "--config", "preset=ci"]
    done = tree.run("--cores", "1", *words)
    assert done.returncode != 0
    end = done.stderr.split("halfstep | stopped; what failed:")[1]
    lines = re.findall(r"^  halfstep \| (.*)", end, re.MULTILINE)
    assert lines[:3] == [
        "rule prepare_corpus",
        "  log: results/logs/prepare_corpus/stories-ci.log",
        "  | no space left",
    ]
    assert lines[-1].endswith(f" to continue: {shlex.join(['snakemake', '--cores', '1', *words])}")


def test_the_workflow_starts_without_torch(tmp_path):
    """Nor does it import pandas, which Snakemake itself imports: see test_targets.py."""
    tree = copy(tmp_path)
    check = (
        "\nprint('loaded:', *sorted({'torch', 'transformers', 'mlflow'} & sys.modules.keys()))\n"
    )
    tree.edit("Snakefile", lambda text: text + check)
    plan = tree.plan("results/data/stories-ci/manifest.json", "--config", "preset=ci")
    assert "loaded:\n" in plan

"""The rules themselves: lint and format are clean, and every command they print is one that `halfstep` understands."""

import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import tyro
from dryrun import REPOSITORY

from halfstep.cli import COMMANDS


def test_lint_is_clean(workflow):
    done = workflow.run("--lint")
    assert done.returncode == 0 and "Congratulations" in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )


def test_format_is_clean():
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])},  # snakefmt calls shfmt
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_printed_commands_are_understood(workflow):
    """One command of every rule, parsed with its function's signature: a flag that a rule gives and the command lacks fails here."""
    elsewhere = (
        'teachers={"stories-ci": {"from": "kuleshov-group/mdlm-owt"}}'  # for the command `import`
    )
    plans = (workflow.plan("-p", "--config", "preset=ci", *more) for more in ([], [elsewhere]))
    printed = re.sub(r"\$\{SLURM_JOB_ID:\+(.*?)\}", r"\1", "".join(plans).replace("\\\n", " "))
    commands = {}
    for line in re.findall(r"^ +(halfstep .*?) 2>&1 \| tee (?:\S+)$", printed, re.MULTILINE):
        commands.setdefault(line.split()[1], line)
    assert set(commands) == set(COMMANDS) - {
        "summary",
        "verify",
        "write-schema",
        "export",
        "plan",
        "doctor",
    }
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
    """Several judges are one command's; `baseline` among them is the corpus's own, which is trained first."""
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
    judges = "--judge results/models/stories-ci/baseline/hf gpt2-large "
    assert calls["train-baseline"] and all(
        judges in call for call in calls["score-samples"] + calls["score-corpus"]
    )
    assert calls["score-lambada"] and all(
        "--weights raw " in call for call in calls["score-lambada"]
    )
    assert [call.split()[-1] for call in calls["tabulate"] + calls["plot"]] == ["--published"] * 3
    assert "--published" not in workflow.plan("-p", *targets, "--config", "preset=ci")

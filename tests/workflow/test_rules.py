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
    assert done.returncode == 0 and "Congratulations" in done.stdout + done.stderr, done.stdout + done.stderr


def test_format_is_clean():
    done = subprocess.run(
        [sys.executable, "-m", "snakefmt", "--check", "Snakefile", "rules"], cwd=REPOSITORY, capture_output=True, text=True,
        env=os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])},  # snakefmt calls shfmt
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_printed_commands_are_understood(workflow):
    """One command of every rule, parsed with its function's signature: a flag that a rule gives and the command lacks fails here."""
    printed = workflow.plan("-p", "--config", "preset=ci").replace("\\\n", " ")
    commands = {}
    for line in re.findall(r"^ +(halfstep .*?) 2>&1 \| tee (?:\S+)$", printed, re.MULTILINE):
        commands.setdefault(line.split()[1], line)
    assert set(commands) == set(COMMANDS) - {"summary", "write-schema"}
    for name, line in commands.items():
        module, function = COMMANDS[name][0].split(":")
        real = getattr(importlib.import_module(module), function)
        given = tyro.cli(functools.wraps(real)(lambda **given: given), args=shlex.split(line)[2:], config=(tyro.conf.OmitArgPrefixes,))
        assert given, line

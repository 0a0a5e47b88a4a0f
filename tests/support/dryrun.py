"""Dry runs of a copy of the workflow, so that tests may edit its rules without any harm."""

import atexit
import contextlib
import functools
import gc
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from halfstep.workflow.graph import Graph, plan_graph

REPOSITORY = Path(__file__).parents[2]
PARTS = ["Snakefile", "rules", "workflow", "envs", "config.yaml", "slurm", "profiles"]
TOUCH = "touch {output}; : "  # in place of a command


def clean_environment() -> dict[str, str]:
    """The environment without the user's settings of Snakemake, halfstep and MLflow."""
    prefixes = ("SNAKEMAKE_", "HALFSTEP_", "MLFLOW_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


@dataclass
class Workflow:
    """A folder in which snakemake runs."""

    folder: Path
    patience_s: float = 300
    """how long a call may take"""

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess:
        """Run `snakemake ...` in the folder, as a user types it."""
        with tempfile.TemporaryDirectory() as outputs:
            out, err = Path(outputs, "out"), Path(outputs, "err")
            call = {
                "words": args,
                "folder": str(self.folder),
                "environment": clean_environment() | environment,
                "streams": [os.devnull, str(out), str(err)],
            }
            code = _forked_call(json.dumps(call), self.patience_s)
            printed = out.read_text(), err.read_text()
        return subprocess.CompletedProcess(["snakemake", *args], code, *printed)

    def plan(self, *args: str, **environment: str) -> str:
        """The output of a dry run, which must succeed."""
        done = self.run("-n", *args, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def graph(self, *args: str, **environment: str) -> Graph:
        """The graph of `snakemake ...`, built in this process."""
        with (
            contextlib.chdir(self.folder),
            patch.dict(os.environ, clean_environment() | environment, clear=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # Snakemake leaves temporary folders to the collector
            try:
                return plan_graph(list(args))
            finally:
                gc.collect()

    def jobs(self, *args: str) -> set[str]:
        """The jobs in a dry run, as `rule wildcard ...`: `distill_round a b 3`."""
        pattern, found = r"^(?:local)?rule (\w+):\n((?: +.*\n)*)", set()
        for rule, facts in re.findall(pattern, self.plan(*args), re.MULTILINE):
            wildcards = re.search(r"^ +wildcards: (.*)", facts, re.MULTILINE)
            values = re.findall(r"=([^,]+)", wildcards[1]) if wildcards else []
            found.add(" ".join([rule, *values]))
        return found

    def edit(self, file: str, change: Callable[[str], str]) -> None:
        """Replace the text of a file by `change` of it."""
        path = self.folder / file
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before, f"the test's edit of {file} changed nothing"


SERVER = """
import gc, json, os, sys
import snakemake.cli, snakemake.report.html_reporter, smart_open, platformdirs
import halfstep.commands.plan, halfstep.workflow.machine
gc.freeze()  # so that no collection in a fork reads and copies all of it
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()
call = json.loads(line)
os.chdir(call["folder"])
os.environ.clear()
os.environ.update(call["environment"])
for number, file in enumerate(call["streams"]):
    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o644), number)
sys.argv = [snakemake.__path__[0] + "/__main__.py", *call["words"]]
sys.exit(snakemake.cli.main())
"""


@functools.cache
def _server() -> subprocess.Popen:
    """A process with Snakemake imported, which calls it in forks: each takes 2 s less."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=clean_environment(), **pipes)
    atexit.register(server.communicate)  # which closes its input, and so ends it
    return server


def _forked_call(call: str, patience_s: float) -> int:
    """The exit code of one call of Snakemake by the server."""
    server = _server()
    server.stdin.write(f"{call}\n".encode())
    child = int(server.stdout.readline())
    if not select.select([server.stdout], [], [], patience_s)[0]:
        os.kill(child, signal.SIGKILL)
        server.stdout.readline()
        raise subprocess.TimeoutExpired(call, patience_s)
    return int(server.stdout.readline())


def copy(to: Path) -> Workflow:
    """Copy the workflow, without the package and results, into a folder."""
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_symlink():
            (to / part).symlink_to(os.readlink(source))
        elif source.is_dir():
            shutil.copytree(source, to / part)
        else:
            shutil.copy(source, to / part)
    return Workflow(to)


def counts(plan: str) -> dict[str, int]:
    """The table `Job stats` of a dry run: number of jobs by rule."""
    table = plan.split("\nReasons:")[0]
    return {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)}

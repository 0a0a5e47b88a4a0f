"""Dry runs of a copy of the workflow, so that tests may edit its rules and never touch the repository's results."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PARTS = ["Snakefile", "rules", "workflow", "envs", "config.yaml", "slurm", "profiles"]


@dataclass
class Workflow:
    folder: Path

    def run(self, *args: str, **environment: str) -> subprocess.CompletedProcess:
        """`snakemake ...` as a user types it, in the folder."""
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE_", "HALFSTEP_"))
        }
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *args],
            cwd=self.folder,
            env=clean | environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def plan(self, *args: str, **environment: str) -> str:
        """What a dry run prints; it must succeed."""
        done = self.run("-n", *args, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def jobs(self, *args: str) -> set[str]:
        """The jobs that a dry run would do, as `rule wildcard ...`: `distill_round a b 3`."""
        found = set()
        for rule, facts in re.findall(
            r"^(?:local)?rule (\w+):\n((?: +.*\n)*)", self.plan(*args), re.MULTILINE
        ):
            wildcards = re.search(r"^ +wildcards: (.*)", facts, re.MULTILINE)
            found.add(
                " ".join([rule, *(re.findall(r"=([^,]+)", wildcards[1]) if wildcards else [])])
            )
        return found

    def edit(self, file: str, change) -> None:
        path = self.folder / file
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before, f"the test's edit of {file} changed nothing"


def copy(to: Path) -> Workflow:
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_symlink():
            (to / part).symlink_to(os.readlink(source))
        else:
            (shutil.copytree if source.is_dir() else shutil.copy)(source, to / part)
    return Workflow(to)


def counts(plan: str) -> dict[str, int]:
    """The table `Job stats` of a dry run."""
    return {
        rule: int(n)
        for rule, n in re.findall(r"^(\w+) +(\d+)$", plan.split("\nReasons:")[0], re.MULTILINE)
    }

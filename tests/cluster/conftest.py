"""A local Slurm, started and stopped by the tests, which are skipped without its packages."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "munged": "munge",
    "slurmdbd": "slurmdbd",
    "mariadbd": "mariadb-server",
}
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")


@dataclass
class Cluster:
    """A running local Slurm in the folder `home`."""

    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment with this Slurm's commands first in PATH, without the user's settings."""
        prefixes = ("SNAKEMAKE_", "HALFSTEP_", "SLURM_", "PYTEST_")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
        return clean | {
            "PATH": os.pathsep.join([str(self.home / "bin"), *os.get_exec_path(), "/usr/sbin"]),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: str) -> str:
        """Output of a command of Slurm; empty while the controller is absent."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    def stop_controller(self) -> None:
        os.kill(int((self.home / "run/slurmctld.pid").read_text()), 15)

    def start_controller(self) -> None:
        subprocess.run(
            ["slurmctld"],
            env=self.environment | {"SLURM_CONF": str(self.home / "etc/slurm.conf")},
            check=True,
            timeout=60,
        )


@contextmanager
def running(home: Path, tools: tuple[str, ...], *words: str) -> Iterator[Cluster]:
    """Start a Slurm in the folder `home`, and stop it at the end; skip where a tool is missing."""
    path = os.pathsep.join([*os.get_exec_path(), "/usr/sbin", "/sbin"])
    missing = [tool for tool in tools if not shutil.which(tool, path=path)]
    if missing:
        packages = " ".join(dict.fromkeys(PACKAGES[tool] for tool in tools))
        pytest.skip(
            f"{', '.join(missing)} not found: this test needs Slurm (apt-get install {packages})"
        )
    up = subprocess.run(
        [HERE / "slurm.sh", "up", home, *words], capture_output=True, text=True, timeout=120
    )
    try:
        assert up.returncode == 0, f"the local Slurm did not start\n{up.stdout}{up.stderr}"
        yield Cluster(home)
    finally:
        subprocess.run([HERE / "slurm.sh", "down", home], capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Without a database of jobs."""
    with running(tmp_path_factory.mktemp("slurm"), TOOLS) as found:
        yield found


@pytest.fixture(scope="session")
def accounting(tmp_path_factory):
    """With a database of jobs (slurmdbd). Its squeue forgets ended jobs within seconds."""
    with running(
        tmp_path_factory.mktemp("accounting"), (*TOOLS, "slurmdbd", "mariadbd"), "accounting"
    ) as found:
        yield found

"""`halfstep doctor` finds each fault, says what to do, and sets the exit code."""

import http.server
import os
import platform
import re
import shlex
import shutil
import sys
import threading
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfstep.cli import main
from halfstep.commands import doctor
from halfstep.commands.doctor import (
    CHECKS,
    EXTRAS,
    check_extras,
    file_system_of,
    parse_time_limit,
)

SINFO = """case "$*" in
  *%l*) echo "gpu 3-00:00:00 up"; echo "short 4:00:00 up";;
  *%P*) echo "gpu*";;
  *%G*) echo "gpu:a100:4";;
  *) echo ok;;
esac"""
GOOD = {  # command -> its shell script
    "sbatch": "exit 0",
    "sinfo": SINFO,
    "scontrol": "echo 'MinJobAge               = 300 sec'",
    "sacct": "exit 1",
    "srun": 'while [ "$1" != ls ]; do shift; done; exec "$@"',
}


@pytest.fixture
def site(tmp_path, monkeypatch, capsys):
    """A simulated site: call it with other commands or variables for (exit code, output)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("PARTITION", "ACCOUNT", "QOS", "GPU_MODEL", "GPUS_PER_NODE", "MAX_MINUTES"):
        monkeypatch.delenv(f"HALFSTEP_SLURM_{name}", raising=False)
    for name in ("MLFLOW_TRACKING_URI", "WORLD_SIZE", "SLURM_GPUS_ON_NODE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    mounts = tmp_path / "mounts"

    def run(commands=None, kind="ext4", free_gb=100, **variables):
        # the free space of the machine that runs the tests is no matter
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free_gb * 1e9))
        for name, script in (GOOD | (commands or {})).items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        mounts.write_text(f"disk / ext4 rw 0 0\nserver:/ {tmp_path} {kind} rw 0 0\n")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code = main(["doctor", "--results", str(tmp_path / "results"), "--mounts", str(mounts)])
        return code, capsys.readouterr().out

    return run


def alone(monkeypatch, tmp_path):
    """A machine without a cluster: neither Slurm's commands nor its variables."""
    for name in [name for name in os.environ if "SLURM_" in name]:
        monkeypatch.delenv(name)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("MLFLOW_TRACKING_URI", "WORLD_SIZE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100e9))


def findings(printed: str) -> dict[str, list[tuple[str, str]]]:
    """(state, message) of each finding by its check, in the order of the lines."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in printed.splitlines():
        state, check, message = line.split(maxsplit=2)
        found.setdefault(check, []).append((state, message))
    return found


def test_a_laptop_hears_of_itself_and_of_no_cluster(monkeypatch, tmp_path, capsys):
    alone(monkeypatch, tmp_path)
    assert main(["doctor", "--results", str(tmp_path / "results")]) == 0
    found = findings(capsys.readouterr().out)
    assert list(found) == list(CHECKS)
    assert list(found)[:6] == ["python", "torch", "cores", "memory", "disk", "extras"]
    facts = {check: lines[0][1] for check, lines in found.items()}
    assert facts["python"].startswith(f"Python {platform.python_version()}, halfstep ")
    assert facts["torch"].startswith(f"torch {torch.__version__}, built for ")
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert facts["cores"].startswith(f"{allowed} of {os.cpu_count()} cores")
    assert re.match(r"(only )?[\d.]+ of \d+ GB are free", facts["memory"])
    assert len(found["extras"]) == len(EXTRAS)


@pytest.mark.parametrize("name", ["HALFSTEP_SLURM_PARTITION", "SLURM_JOB_ID"])
def test_a_variable_of_a_cluster_puts_it_in_sight(monkeypatch, tmp_path, capsys, name):
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv(name, "7")
    main(["doctor", "--results", str(tmp_path / "results")])
    assert "no sbatch here" in findings(capsys.readouterr().out)["slurm"][0][1]


def test_the_extras_are_those_of_the_project():
    """But dev, and all, which has the others."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert EXTRAS.keys() == project["optional-dependencies"].keys() - {"dev", "all"}


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path):
    """The command installs the checkout that runs; outside of one, the package."""
    version = doctor.metadata.version

    def without_pandas(name):
        if name in ("pandas", "scipy"):
            raise doctor.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor.metadata, "version", without_pandas)
    wanted = ["mlflow>=3; extra == 'track'", 'pandas>=2.2 ; extra == "report"', "torch>=2.9"]
    monkeypatch.setattr(
        doctor.metadata, "requires", lambda name: [*wanted, "scipy;extra=='report'"]
    )
    found = {
        message.split()[0]: (state, message) for state, message in check_extras(tmp_path, None)
    }
    state, message = found["report"]
    assert state == "warning" and "without pandas, scipy; install: " in message
    words = shlex.split(message.partition("install: ")[2])
    checkout = Path(doctor.__file__).parents[3]
    assert words == [sys.executable, "-m", "pip", "install", "-e", f"{checkout}[report]"]
    monkeypatch.setattr(doctor.halfstep, "__file__", str(tmp_path / "a/b/halfstep/__init__.py"))
    assert shlex.split(doctor.install_command("eval"))[-1] == "halfstep[eval]"


def test_little_memory_is_a_warning(monkeypatch, tmp_path):
    memory = SimpleNamespace(available=0.4e9, total=8e9)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    ((state, message),) = doctor.check_memory(tmp_path, None)
    assert state == "warning" and message.startswith("only 0.4 of 8 GB are free")


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    ((state, message),) = doctor.check_torch(tmp_path, None)
    assert state == "broken" and "install a CUDA build of torch" in message


def test_a_good_site_has_no_fault(site):
    code, printed = site()
    assert code == 0
    assert "broken" not in printed
    assert "a compute node sees" in printed
    assert "gpu:a100:4" in printed


@pytest.mark.parametrize(
    ("free_gb", "exit_code", "message"),
    [
        (0.3, 1, "broken disk 0.3 GB free"),
        (5, 0, "warning disk only 5 GB free"),
        (100, 0, "ok disk 100 GB free"),
    ],
)
def test_the_free_space_is_judged(site, free_gb, exit_code, message):
    code, printed = site(free_gb=free_gb)
    assert code == exit_code
    assert message in " ".join(printed.split())


def gpus(kinds: str) -> dict[str, str]:
    return {"sinfo": SINFO.replace("gpu:a100:4", kinds)}


def slurm(**variables: str) -> dict[str, str]:
    return {f"HALFSTEP_SLURM_{name}": value for name, value in variables.items()}


@pytest.mark.parametrize(
    ("commands", "variables", "check", "advice"),
    [
        ({"sinfo": "exit 1"}, {}, "slurm", "wait"),
        ({}, slurm(PARTITION="fast"), "slurm", "set HALFSTEP_SLURM_PARTITION"),
        ({}, slurm(PARTITION="short"), "slurm", "export HALFSTEP_SLURM_MAX_MINUTES=240"),
        ({"scontrol": "echo 'MinJobAge = 30 sec'"}, {}, "accounting", "ask for MinJobAge=200"),
        ({}, slurm(GPU_MODEL="h100"), "gpus", "set HALFSTEP_SLURM_GPU_MODEL"),
        ({}, slurm(GPUS_PER_NODE="8"), "gpus", "export HALFSTEP_SLURM_GPUS_PER_NODE=4"),
        (
            gpus("gpu:a100:2(S:0-1),gpu:v100:3"),
            {},
            "gpus",
            "export HALFSTEP_SLURM_GPUS_PER_NODE=3",
        ),
        (
            gpus("gpu:a100:4,gpu:v100:2"),
            slurm(GPU_MODEL="v100"),
            "gpus",
            "4 GPUs v100, which",
        ),
        ({}, slurm(GPUS_PER_NODE="many"), "gpus", "found 'many', expected a whole number"),
        ({"srun": "echo /; exit 2"}, {}, "shared", "a folder that all nodes share"),
        ({}, {"WORLD_SIZE": "1", "SLURM_GPUS_ON_NODE": "2"}, "world", "--processes 2"),
    ],
)
def test_a_broken_finding_is_named_and_fails(site, commands, variables, check, advice):
    code, printed = site(commands, **variables)
    (line,) = [line for line in printed.splitlines() if line.startswith("broken")]
    assert code == 1
    assert line.split()[1] == check
    assert advice in line


UNCONFIGURED = "echo 'sinfo: fatal: Could not establish a configuration source' >&2; exit 1"
ABSENT = "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1"


@pytest.mark.parametrize(
    ("sinfo", "variables", "state"),
    [
        (UNCONFIGURED, {}, "ok"),  # a laptop with Slurm's packages
        (UNCONFIGURED, {"SNAKEMAKE_PROFILE": "slurm"}, "broken"),
        (UNCONFIGURED, slurm(PARTITION="gpu"), "broken"),
        (ABSENT, {}, "broken"),  # a cluster whose controller is down
    ],
)
def test_slurm_is_broken_only_where_a_cluster_is_configured_or_asked_for(
    site, monkeypatch, sinfo, variables, state
):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SNAKEMAKE_"))]:
        monkeypatch.delenv(name)
    commands = dict.fromkeys(("sinfo", "scontrol", "sacct", "srun"), sinfo)
    code, printed = site(commands, **variables)
    ((found, message),) = findings(printed)["slurm"]
    assert (found, code) == (state, int(state == "broken"))
    assert ("everything runs on this machine" in message) == (state == "ok")


def test_warnings_do_not_fail(site):
    code, printed = site({"srun": "exit 1"}, kind="nfs4", HF_HUB_OFFLINE="1")
    assert code == 0
    assert "sqlite on nfs4 can lock up" in printed
    assert "no compute node was free" in printed
    assert "HF_HUB_OFFLINE is set" in printed
    code, printed = site(
        {"scontrol": "echo 'MinJobAge = 30 sec'", "sacct": "exit 0"},
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    assert code == 0
    assert "sacct answers" in printed
    assert "nothing is lost" in printed


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_a_server_that_answers(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, printed = site(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert code == 0
    assert "MLflow answers" in printed


@pytest.mark.parametrize(
    ("limit", "expected_minutes"),
    [("1-02:30:00", 1590), ("4:00:00", 240), ("30:00", 30), ("infinite", float("inf"))],
)
def test_time_limits_are_read(limit, expected_minutes):
    assert parse_time_limit(limit) == expected_minutes


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/x", "ext4"),
        ("/scratch/y", "lustre"),
        ("/scratch/own/z", "xfs"),
        ("/scratchy", "ext4"),
    ],
)
def test_mounts_are_read(tmp_path, path, kind):
    mounts = tmp_path / "mounts"
    mounts.write_text("a / ext4 rw\nb /scratch lustre rw\nc /scratch/own xfs rw\n")
    assert file_system_of(Path(path), mounts) == kind

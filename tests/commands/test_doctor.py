"""`halfstep doctor`: each fault is found, says what to do, and decides the exit code."""

import http.server
import threading

import pytest

from halfstep.cli import main
from halfstep.commands.doctor import file_system_of, parse_time_limit

GOOD = {
    "sbatch": "exit 0",
    "sinfo": 'case "$*" in *%l*) echo "gpu 3-00:00:00 up"; echo "short 4:00:00 up";; *%P*) echo "gpu*";; *%G*) echo "gpu:a100:4";; *) echo ok;; esac',
    "scontrol": "echo 'MinJobAge               = 300 sec'",
    "sacct": "exit 1",
    "srun": 'while [ "$1" != sh ]; do shift; done; exec "$@"',
}


@pytest.fixture
def site(tmp_path, monkeypatch, capsys):
    """A pretended site: replace a command or a variable, and get (exit code, lines)."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("PARTITION", "ACCOUNT", "QOS", "GPU_MODEL", "GPUS_PER_NODE", "MAX_MINUTES"):
        monkeypatch.delenv(f"HALFSTEP_SLURM_{name}", raising=False)
    for name in ("MLFLOW_TRACKING_URI", "WORLD_SIZE", "SLURM_GPUS_ON_NODE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    mounts = tmp_path / "mounts"
    mounts.write_text("disk / ext4 rw 0 0\n")

    def look(commands={}, kind="ext4", **variables):  # noqa: B006
        for name, text in (GOOD | commands).items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        mounts.write_text(f"disk / ext4 rw 0 0\nserver:/ {tmp_path} {kind} rw 0 0\n")
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        code = main(["doctor", "--results", str(tmp_path / "results"), "--mounts", str(mounts)])
        return code, capsys.readouterr().out

    return look


def test_a_good_site_is_good(site):
    code, said = site()
    assert (
        code == 0
        and "broken" not in said
        and "a compute node sees" in said
        and "gpu:a100:4" in said
    )


@pytest.mark.parametrize(
    "commands, variables, what, mend",
    [
        ({"sinfo": "exit 1"}, {}, "slurm", "wait"),
        ({}, {"HALFSTEP_SLURM_PARTITION": "fast"}, "slurm", "set HALFSTEP_SLURM_PARTITION"),
        (
            {},
            {"HALFSTEP_SLURM_PARTITION": "short"},
            "slurm",
            "export HALFSTEP_SLURM_MAX_MINUTES=240",
        ),
        ({"scontrol": "echo 'MinJobAge = 30 sec'"}, {}, "accounting", "ask for MinJobAge=200"),
        ({}, {"HALFSTEP_SLURM_GPU_MODEL": "h100"}, "gpus", "set HALFSTEP_SLURM_GPU_MODEL"),
        (
            {},
            {"HALFSTEP_SLURM_GPUS_PER_NODE": "8"},
            "gpus",
            "export HALFSTEP_SLURM_GPUS_PER_NODE=4",
        ),
        (
            {"sinfo": GOOD["sinfo"].replace("gpu:a100:4", "gpu:a100:2(S:0-1),gpu:v100:3")},
            {},
            "gpus",
            "export HALFSTEP_SLURM_GPUS_PER_NODE=3",
        ),
        (
            {"sinfo": GOOD["sinfo"].replace("gpu:a100:4", "gpu:a100:4,gpu:v100:2")},
            {"HALFSTEP_SLURM_GPU_MODEL": "v100"},
            "gpus",
            "4 GPUs v100, which",
        ),
        (
            {},
            {"HALFSTEP_SLURM_GPUS_PER_NODE": "many"},
            "gpus",
            "found 'many', expected a whole number",
        ),
        ({"srun": "echo unseen"}, {}, "shared", "a folder that all nodes share"),
        ({}, {"WORLD_SIZE": "1", "SLURM_GPUS_ON_NODE": "2"}, "world", "--processes 2"),
    ],
)
def test_what_is_broken_is_named_and_fails(site, commands, variables, what, mend):
    code, said = site(commands, **variables)
    (line,) = [line for line in said.splitlines() if line.startswith("broken")]
    assert code == 1 and line.split()[1] == what and mend in line


def test_warnings_do_not_fail(site):
    code, said = site({"srun": "exit 1"}, kind="nfs4", HF_HUB_OFFLINE="1")
    assert (
        code == 0
        and "sqlite on nfs4 can lock up" in said
        and "no compute node was free" in said
        and "HF_HUB_OFFLINE is set" in said
    )
    code, said = site(
        {"scontrol": "echo 'MinJobAge = 30 sec'", "sacct": "exit 0"},
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
    )
    assert code == 0 and "sacct answers" in said and "nothing is lost" in said


def test_a_server_that_answers(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Health", (http.server.BaseHTTPRequestHandler,), {
        "do_GET": lambda self: (self.send_response(200 if self.path == "/health" else 404), self.end_headers()), "log_message": lambda *_: None,
    }))  # fmt: skip
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        code, said = site(MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.server_port}")
        assert code == 0 and "MLflow answers" in said
    finally:
        server.shutdown()


def test_limits_and_mounts_are_read(tmp_path):
    assert [parse_time_limit(t) for t in ("1-02:30:00", "4:00:00", "30:00", "infinite")] == [
        1590,
        240,
        30,
        float("inf"),
    ]
    (tmp_path / "mounts").write_text("a / ext4 rw\nb /scratch lustre rw\nc /scratch/own xfs rw\n")
    from pathlib import Path

    kinds = [
        file_system_of(Path(p), tmp_path / "mounts")
        for p in ("/home/x", "/scratch/y", "/scratch/own/z", "/scratchy")
    ]
    assert kinds == ["ext4", "lustre", "xfs", "ext4"]

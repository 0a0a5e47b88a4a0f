"""One training on several nodes, through the real profile, equals the training of one process.

The job has 2 nodes with 2 processes each, and trains the teacher of preset ci. It has no dropout,
because only the draws of dropout depend on the number of processes.
"""

import json
import re
import sys
from pathlib import Path

import pytest
from dryrun import copy
from forked import launch, note_batches
from test_cluster import finish, snakemake

TEACHER = "results/models/stories-ci/teacher"
SAME = 'teachers={"stories-ci": {"pretraining": {"dropout": 0}}}'
PYTHON = """#!{python}
# torchrun starts this in place of python (PYTHON_EXEC). It notes its node and its batches, and runs
# halfstep.
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from forked import note_batches
from halfstep.cli import main
noted = Path({noted!r})
rank, told = os.environ["RANK"], ("SLURM_STEP_LAUNCHER_PORT", "SLURM_SRUN_COMM_PORT", "MASTER_PORT")
(noted / ("node-" + rank)).write_text(os.environ["SLURMD_NODENAME"])
(noted / ("ports-" + rank)).write_text(" ".join(os.environ[name] for name in told))
note_batches(noted, False)
assert sys.argv[1:4] == ["-u", "-m", "halfstep.cli"], sys.argv
sys.exit(main(sys.argv[4:]))
"""


@pytest.fixture(scope="module")
def trained(cluster, tmp_path_factory):
    """(folder with the trained teacher, folder with the notes of its processes, job id)"""
    folder, noted = copy(tmp_path_factory.mktemp("clone")).folder, tmp_path_factory.mktemp("noted")
    support = str(Path(__file__).parents[1] / "support")
    python = PYTHON.format(python=sys.executable, tests=support, noted=str(noted))
    (noted / "python").write_text(python)
    (noted / "python").chmod(0o755)
    words = ["--set-resources", "pretrain:nodes=2", "pretrain:gpu=4", "--set-threads", "pretrain=2"]
    words += ["--latency-wait", "5", "--config", "preset=ci", SAME]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON_EXEC", str(noted / "python"))
        code = finish(cluster, snakemake(cluster, folder, f"{TEACHER}/meta.json", *words))
    said = (folder / "out").read_text()
    assert code == 0, said[-6000:]
    return folder, noted, re.findall(r"SLURM jobid (\d+) .*rule_pretrain", said)[-1]


def test_a_job_of_two_nodes_has_two_processes_on_each(trained, cluster):
    _, noted, job = trained
    about = cluster.call("scontrol", "show", "job", job)
    assert "JobState=COMPLETED" in about and "NumNodes=2" in about, about
    assert re.search(r"gres.gpu[=:]4", about), about
    assert [(noted / f"node-{rank}").read_text() for rank in range(4)] == ["n1", "n1", "n2", "n2"]


def test_the_nodes_meet_at_a_port_that_srun_tells_them(trained):
    """The first two numbers are ports that the kernel gave to srun."""
    _, noted, _ = trained
    (ports,) = {(noted / f"ports-{rank}").read_text() for rank in range(4)}
    launcher, communication, meeting = map(int, ports.split())
    assert launcher > 1023 and communication > 1023
    assert 15_000 <= meeting < 25_000


def test_it_draws_the_batches_and_has_the_losses_of_one_process(trained, tmp_path):
    folder, noted, _ = trained
    line = json.loads((folder / TEACHER / "provenance.json").read_text())["command"]
    at = line.index("--processes")
    assert line[at + 1] == "4"
    alone = [*line[1:at], *line[at + 2 :], "--output", str(tmp_path / "t/out")]
    alone[alone.index("--corpus") + 1] = str(folder / "results/data/stories-ci")
    ((code, said),) = launch(" ".join(alone), 1, tmp_path, note_batches, tmp_path, False)
    assert code == 0, said
    batches = (tmp_path / "batches-0").read_text()
    assert len(set(batches.splitlines())) == 12
    for rank in range(4):
        assert (noted / f"batches-{rank}").read_text() == batches
        assert int((noted / f"rows-{rank}").read_text()) == 12 * 16 // 4

    def losses(place: Path) -> dict:
        points = map(json.loads, (place / "journal.jsonl").read_text().splitlines())
        return {
            (point["step"], key): value
            for point in points
            for key, value in point["metrics"].items()
            if key in ("train/loss", "train/grad_norm", "val/nelbo")
        }

    one, four = losses(tmp_path / "t/out"), losses(folder / TEACHER)
    assert one.keys() == four.keys() and len(one) >= 2 * 12 + 2
    assert four == pytest.approx(one, rel=1e-5)

"""Two Snakemakes on the same results: the second one refuses and changes nothing."""

import os
import subprocess
import sys
import time

from dryrun import copy

TARGET = "results/data/stories-ci/manifest.json"


def test_a_second_snakemake_on_the_same_results_refuses(tmp_path):
    """The second one starts while the first one's job waits; the first one then ends normally."""
    workflow = copy(tmp_path)
    options = [TARGET, "--config", "preset=ci", "--cores", "1"]
    hold, go = tmp_path / "hold", tmp_path / "go"
    waiting = f"touch {hold}; while [ ! -e {go} ]; do sleep 0.1; done; halfstep prepare"
    workflow.edit("rules/data.smk", lambda text: text.replace("halfstep prepare", waiting, 1))
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SNAKEMAKE_", "HALFSTEP_"))
    }
    first = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *options],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not hold.exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert hold.exists(), first.communicate(timeout=10)[0]

        second = workflow.run(*options)
        message = " ".join((second.stdout + second.stderr).split())
        assert second.returncode != 0
        assert "cannot be locked" in message
        assert first.poll() is None
        assert not (tmp_path / TARGET).exists()

        go.touch()
        printed = first.communicate(timeout=90)[0]
        assert first.returncode == 0, printed
    finally:
        go.touch()
        first.kill()
    assert (tmp_path / TARGET).is_file()
    assert "Nothing to be done" in workflow.run(*options).stderr

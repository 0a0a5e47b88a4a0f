"""Two runs of Snakemake on the same results: the second one refuses, and changes nothing."""

import subprocess
import sys
import time

from dryrun import clean_environment, copy

TARGET = "results/data/stories-ci/manifest.json"


def test_a_second_snakemake_on_the_same_results_refuses(tmp_path):
    """The job of the first waits for a file while the second tries to start.

    Then the first one succeeds, and nothing is left to do.
    """
    workflow = copy(tmp_path)
    options = [TARGET, "--config", "preset=ci", "--cores", "1"]
    hold, go = tmp_path / "hold", tmp_path / "go"
    wait = f"touch {hold}; while [ ! -e {go} ]; do sleep 0.1; done; halfstep prepare"
    workflow.edit("rules/data.smk", lambda text: text.replace("halfstep prepare", wait, 1))
    first = subprocess.Popen(
        [sys.executable, "-m", "snakemake", *options],
        cwd=tmp_path,
        env=clean_environment(),
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
        said = " ".join((second.stdout + second.stderr).split())
        assert second.returncode != 0 and "cannot be locked" in said
        assert first.poll() is None and not (tmp_path / TARGET).exists()
        go.touch()
        printed = first.communicate(timeout=90)[0]
        assert first.returncode == 0, printed
    finally:
        go.touch()
        first.kill()
    assert (tmp_path / TARGET).is_file()
    assert "Nothing to be done" in workflow.run(*options).stderr

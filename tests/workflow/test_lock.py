"""Two Snakemakes on the same results: the second one refuses, and harms nothing."""

import os
import subprocess
import sys
import time

from dryrun import copy

TARGET = "results/data/stories-ci/manifest.json"


def test_a_second_snakemake_on_the_same_results_refuses(tmp_path):
    """The first one's job waits for a file while the second asks; then it ends well, and nothing is to be done again."""
    workflow = copy(tmp_path)
    options = [TARGET, "--config", "preset=ci", "--cores", "1"]
    hold, go = tmp_path / "hold", tmp_path / "go"
    workflow.edit(
        "rules/data.smk",
        lambda text: text.replace(
            "halfstep prepare",
            f"touch {hold}; while [ ! -e {go} ]; do sleep 0.1; done; halfstep prepare",
            1,
        ),
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SNAKEMAKE_", "HALFSTEP_"))
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
        assert second.returncode != 0 and "cannot be locked" in " ".join(
            (second.stdout + second.stderr).split()
        )
        assert first.poll() is None and not (tmp_path / TARGET).exists()
        go.touch()
        said = first.communicate(timeout=90)[0]
        assert first.returncode == 0, said
    finally:
        go.touch()
        first.kill()
    assert (tmp_path / TARGET).is_file() and "Nothing to be done" in workflow.run(*options).stderr

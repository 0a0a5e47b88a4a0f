"""`python benchmarks/denoising.py`: the picture of a text after some of its steps."""

import subprocess
import sys
from xml.etree import ElementTree

from dryrun import REPOSITORY

from halfstep.commands.terminal import step_color


def test_the_picture_has_the_steps_and_their_colors(pipeline, tmp_path):
    call = [sys.executable, REPOSITORY / "benchmarks/denoising.py", pipeline.student]
    call += ["--output", tmp_path / "out.svg", "--prompt", "Tom<|mask|> was"]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    tree = ElementTree.parse(tmp_path / "out.svg")
    shown = " ".join("".join(tree.getroot().itertext()).split())
    styles = (tmp_path / "out.svg").read_text()
    for step in (1, 3, 5, 8):
        assert f"after step {step} of 8" in shown
    assert "░░░" in shown and "stories-tiny/kl_backward/round-1" in shown
    assert all(step_color(step, 8) in styles for step in range(1, 9))

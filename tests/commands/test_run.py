"""`halfstep run`: which words reach Snakemake, and how."""

import os
import sys

import pytest

from halfstep import cli
from halfstep.workflow.packaged import OURS


@pytest.fixture
def started(tmp_path, monkeypatch):
    """The call that takes the place of this process, in a folder with a config.yaml."""
    calls = []
    (tmp_path / "config.yaml").write_text("preset: laptop\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "execv", lambda program, words: calls.append([program, *words[1:]]))
    return calls


@pytest.mark.parametrize("line, expected", [
    ("", ""),
    ("all --cores 2 -n", "all --cores 2 -n"),
    ("-np results/figures/ppl_vs_steps.pdf", "-np results/figures/ppl_vs_steps.pdf"),
    ("--preset ci -j2", "-j2 --config preset=ci"),
    ("all --preset=ci --config seed=2", "all --config preset=ci seed=2"),
    ("--set-threads pretrain=4 -- all", "--set-threads pretrain=4 -- all"),
    ("--preset ci -- --preset", "--config preset=ci -- --preset"),
    ("--set_threads pretrain=4", "--set_threads pretrain=4"),
    ("--unlock", "--unlock"),
])  # fmt: skip
def test_all_words_but_its_own_go_to_snakemake(started, line, expected):
    assert cli.main(["run", *line.split()]) == 0
    assert started == [[sys.executable, "-m", "snakemake", OURS, *expected.split()]]


def test_words_with_blanks_stay_whole(started):
    words = ["--config", 'sampling={"steps": [8]}', ""]
    assert cli.main(["run", *words]) == 0
    assert started[0][4:] == words


def test_help_is_that_of_the_command(started, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["run", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and not started
    assert "--preset" in said and "--snakemake" not in said


def test_a_preset_without_a_name_is_refused(started, capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--preset"])
    assert "halfstep run: " in capsys.readouterr().err and not started

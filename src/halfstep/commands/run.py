"""`halfstep run`: Snakemake on the packaged workflow, in a folder that is no clone."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import tyro

from halfstep.workflow.packaged import snakemake_words, with_preset


def run(
    snakemake: Annotated[list[str], tyro.conf.Suppress] = [],  # noqa: B006
    preset: str | None = None,
) -> None:
    """Run the workflow of this package in the current folder.

    The configuration is config.yaml of this folder, and results go to results/. All other words go
    to snakemake: targets (all figures and tables without one) and any of its options, as in
    `halfstep run --cores 2 -n` or `halfstep run --profile slurm`. A Snakefile in this folder goes
    before that of the package. The exit code is Snakemake's.

    Args:
        snakemake: words that are no flags of this command
        preset: in place of the preset that config.yaml names: laptop, own-model, sdtt-small, ...
    """
    words = snakemake if preset is None else with_preset(snakemake, preset)
    call = [sys.executable, "-m", "snakemake", *snakemake_words(words)]
    sys.stdout.flush()
    os.execv(sys.executable, call)  # this process becomes Snakemake: its signals, its exit code

"""The workflow inside of the package, which runs in every folder that has no Snakefile."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from halfstep import __version__
from halfstep.errors import HalfstepError
from halfstep.records.journal import direct_url

PACKAGED = Path(__file__).parents[1] / "packaged"
"""Snakefile, rules, presets, profiles and schema: links in a clone, files in a wheel"""
NAMES = ("Snakefile", "snakefile", "workflow/Snakefile", "workflow/snakefile")  # Snakemake's
OURS = f"--snakefile={PACKAGED / 'Snakefile'}"
NO_SNAKEMAKE = (
    "snakemake is not installed here; install it: pip install 'halfstep[workflow]' (or [all])"
)


def has_snakefile() -> bool:
    """Does the current folder have a workflow, as a clone has?"""
    return any(Path(name).is_file() for name in NAMES)


def caller() -> str:
    """What a user calls in the current folder: snakemake, or `halfstep run` without a Snakefile."""
    return "snakemake" if has_snakefile() else "halfstep run"


def snakemake_words(words: list[str]) -> list[str]:
    """The arguments of snakemake in the current folder, from those that a user gives.

    Without a Snakefile here they name the packaged one, and its profile for `--profile slurm`.
    HalfstepError without snakemake, or if there is neither a config.yaml nor a preset.
    """
    if find_spec("snakemake") is None:
        raise HalfstepError(NO_SNAKEMAKE)
    if has_snakefile() or any(word.split("=")[0] in ("--snakefile", "-s") for word in words):
        return words
    names_one = any(word.startswith(("preset=", "--configfile")) for word in words)
    if not names_one and not Path("config.yaml").exists():
        raise HalfstepError(
            f"config.yaml: not found in {Path.cwd()}, expected the configuration of a project; "
            "call `halfstep init .`, or name a preset: halfstep run --preset laptop "
            "(halfstep plan -- --config preset=laptop)"
        )
    if not Path("slurm").is_dir():
        profile = str(PACKAGED / "profiles" / "slurm")
        words = [
            profile if (before, word) == ("--profile", "slurm") else word
            for before, word in pairwise(["", *words])
        ]
    return [OURS, *words]


def with_preset(words: list[str], preset: str) -> list[str]:
    """The arguments of snakemake with `preset=...` among those of their --config."""
    for i, word in enumerate(words):
        if word in ("--config", "-C"):
            return [*words[: i + 1], f"preset={preset}", *words[i + 1 :]]
    end = words.index("--") if "--" in words else len(words)
    return [*words[:end], "--config", f"preset={preset}", *words[end:]]


def pip_argument() -> str:
    """The halfstep of this process as `pip install` takes it: its clone, its address or version."""
    clone = PACKAGED.parents[2]
    if (clone / "pyproject.toml").is_file():
        return f"--editable={clone}"
    about = direct_url()
    if commit := about.get("vcs_info"):
        return f"halfstep @ {commit['vcs']}+{about['url']}@{commit['commit_id']}"
    return f"halfstep @ {about['url']}" if about else f"halfstep=={__version__}"


def resume_command(arguments: list[str]) -> str:
    """The command line that continues the run with these arguments of snakemake."""
    if OURS in arguments:
        return shlex.join(["halfstep", "run", *(word for word in arguments if word != OURS)])
    return shlex.join(["snakemake", *arguments])

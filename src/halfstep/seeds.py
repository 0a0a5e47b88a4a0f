"""Names of repeated trainings: x is the first one, and x-seed-2 is x trained with seed 2."""

from __future__ import annotations

import re
from collections.abc import Sequence

REPEAT = re.compile(r"-seed-([1-9]\d*)(?=/|$)")
"""The ending of the name of a repeat; in a path it ends the name of a teacher or of a run."""


def repeat_names(name: str, seeds: Sequence[int] | None) -> list[str]:
    """The names of the trainings with these seeds, in their order; the first keeps `name`."""
    return [name, *(f"{name}-seed-{seed}" for seed in (seeds or [])[1:])]


def first_training(name: str) -> str:
    """The first training of a repeat: a/b-seed-2/round-1 -> a/b/round-1; others stay the same."""
    return REPEAT.sub("", name)


def repeat_seed(name: str) -> int | None:
    """The training seed in the name of a repeat: 2 for a-seed-2/teacher; None for others."""
    found = REPEAT.search(name)
    return int(found[1]) if found else None

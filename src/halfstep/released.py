"""Names of SDTT's released weights: jdeschena/sdtt@baselines_kld_step_30000 is round 3 with kld."""

from __future__ import annotations

import re
from typing import NamedTuple

REPOSITORY = "jdeschena/sdtt"  # on the hub; it holds raw weights, no moving averages
ROUND = "<round>"  # in the names of a run's students: stands for the number of the round
STUDENT = r"(?:baselines_(?P<loss>\w+)|scaling_400k_\w+?)_step_(?P<round>\d)0000"
DIVERGENCES = {"kld": "kl_backward", "mse": "mse", "tvd": "l1_log_p"}  # by the hub's names
TEACHER_STEPS, SUBSTEPS = 1024, 2  # of all released students


class Student(NamedTuple):
    """A student: its round, and the divergence and the steps of the run that made it."""

    round: int
    divergence: str
    teacher_steps: int
    substeps: int


def name_of_round(names: str, number: int) -> str:
    """The name of the student of one round."""
    return names.replace(ROUND, str(number))


def read_student(name: str) -> Student | None:
    """What the revision in a hub name says of a released student; None for any other name."""
    match = re.fullmatch(STUDENT, name.partition("@")[2])
    if not match:
        return None
    loss = match["loss"] or "kld"
    divergence = DIVERGENCES.get(loss, loss)
    return Student(int(match["round"]), divergence, TEACHER_STEPS, SUBSTEPS)


def is_raw(name: str) -> bool:
    """Does the hub hold raw weights under this name, as the released code uploads them?"""
    return name.partition("@")[0] == REPOSITORY

"""The rounds of Self-Distillation Through Time: the step size and the step count of each round."""

from dataclasses import dataclass

from halfstep.config import Distillation
from halfstep.errors import HalfstepError


@dataclass(frozen=True)
class Round:
    """One round: the student learns to take one step for `substeps` teacher steps of size dt.

    `index` counts from 1.

    The student then samples in `student_steps` steps.
    """

    index: int
    dt: float
    substeps: int
    student_steps: int


def plan_round(run: Distillation, index: int) -> Round:
    """The step sizes of round r (SDTT section 3.2).

    dt = substeps^(r-1) / teacher_steps and student_steps = teacher_steps / substeps^r.

    Seven rounds of two substeps from 1,024 steps end at 8. Raises HalfstepError if the run has no
    such round.
    """
    if not 1 <= index <= run.rounds:
        raise HalfstepError(
            f"round: found {index}, expected 1 to {run.rounds}, the rounds of this run"
        )
    dt = run.substeps ** (index - 1) / run.teacher_steps
    return Round(index, dt, run.substeps, run.teacher_steps // run.substeps**index)

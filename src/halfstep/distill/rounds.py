"""The plan of Self-Distillation Through Time: which round takes which step."""

from dataclasses import dataclass

from halfstep.config import Distillation
from halfstep.errors import HalfstepError


@dataclass(frozen=True)
class Round:
    """Round `index` (1 ..): the teacher moves `substeps` times by dt, the student once; the student then samples in `student_steps`."""

    index: int
    dt: float
    substeps: int
    student_steps: int


def plan_round(run: Distillation, index: int) -> Round:
    """dt = substeps^(r-1) / teacher_steps and student_steps = teacher_steps / substeps^r (SDTT section 3.2): seven rounds from 1024 end at 8."""
    if not 1 <= index <= run.rounds:
        raise HalfstepError(
            f"round: found {index}, expected 1 to {run.rounds}, the rounds of this run"
        )
    return Round(
        index,
        run.substeps ** (index - 1) / run.teacher_steps,
        run.substeps,
        run.teacher_steps // run.substeps**index,
    )

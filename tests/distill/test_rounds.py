"""The rounds have the paper's numbers, and each student is the next teacher."""

import pytest

from halfstep.config import Distillation
from halfstep.distill.rounds import plan_round
from halfstep.errors import HalfstepError


def test_seven_rounds_from_1024_end_at_8():
    rounds = [plan_round(Distillation(), r) for r in range(1, 8)]
    assert [r.student_steps for r in rounds] == [512, 256, 128, 64, 32, 16, 8]
    assert [r.dt for r in rounds] == [1 / 1024, 1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16]
    assert [r.index for r in rounds] == list(range(1, 8)) and {r.substeps for r in rounds} == {2}


@pytest.mark.parametrize(
    ("teacher_steps", "rounds", "substeps"), [(1024, 7, 2), (64, 3, 4), (96, 5, 2), (27, 3, 3)]
)
def test_a_student_step_is_substeps_teacher_steps(teacher_steps, rounds, substeps):
    run = Distillation(teacher_steps=teacher_steps, rounds=rounds, substeps=substeps)
    steps = teacher_steps
    for index in range(1, rounds + 1):
        now = plan_round(run, index)
        assert (
            now.dt == pytest.approx(1 / steps) and now.student_steps * substeps == steps
        )  # the teacher walks on its own grid
        steps = now.student_steps


@pytest.mark.parametrize("index", [0, 8, -1])
def test_no_such_round(index):
    with pytest.raises(HalfstepError, match=f"round: found {index}, expected 1 to 7"):
        plan_round(Distillation(), index)

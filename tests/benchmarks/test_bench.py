"""The textbook versions say what halfstep says: value and gradient of the losses, law of the samples. And `make bench` runs, at a toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import Language, Perfect, ancestral_law, chi_square

from halfstep.diffusion.masking import corrupt
from halfstep.diffusion.objective import nelbo
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import DIVERGENCES
from halfstep.distill.targets import divergence_loss, teacher_targets
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import textbook  # noqa: E402

LANGUAGE, SCHEDULE = Language(4, 3, seed=2), LogLinear()


class Plain(Perfect):
    """The perfect denoiser with finite features, which a textbook readout can multiply."""

    def features(self, xt, t, where=None):
        return super().features(xt, t, where).clamp(min=-60)

    def __init__(self, language):
        super().__init__(language)
        self.readout = tuple(p.float() for p in self.readout)

    def log_p(self, h):
        return h.float().log_softmax(-1)


def network(seed: int) -> SubsDenoiser:
    torch.manual_seed(seed)
    net = DiT(31, 16, 1, 2)
    for p in net.parameters():  # gates begin at zero: the blocks would do nothing
        torch.nn.init.normal_(p, std=0.2)
    return SubsDenoiser(net, LogLinear())


def gradients(denoiser: SubsDenoiser, loss: torch.Tensor) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(denoiser.network.parameters()))


def same(denoiser: SubsDenoiser, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.allclose(ours, theirs, rtol=1e-5)
    for a, b in zip(gradients(denoiser, ours), gradients(denoiser, theirs), strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("steps", [2, 5])
def test_samplers_have_the_law(steps):
    torch.manual_seed(1)
    law = ancestral_law(Perfect(LANGUAGE), steps, torch.full((3,), 4))
    for ids in (
        textbook.sample(Plain(LANGUAGE), 20_000, 3, steps, SCHEDULE),
        sample(Plain(LANGUAGE), 20_000, 3, steps).ids,
    ):
        assert chi_square(LANGUAGE.index(ids).bincount(minlength=len(law)), law) > 1e-5


def test_pretraining_loss():
    denoiser, random = network(0), torch.Generator().manual_seed(2)
    x0, t = torch.randint(0, 31, (6, 9), generator=random), torch.rand(6, generator=random)
    u = torch.rand(6, 9, generator=random, dtype=torch.float64)
    same(
        denoiser,
        nelbo(denoiser, x0, t, u),
        textbook.pretraining_loss(denoiser, x0, t, u, SCHEDULE),
    )


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_loss(divergence):
    """A dt so small that nothing is revealed: no draw, one value."""
    student, teacher, random = network(0), network(1), torch.Generator().manual_seed(3)
    xt = corrupt(
        torch.randint(0, 31, (6, 9), generator=random),
        torch.full((6,), 0.6),
        torch.rand(6, 9, generator=random),
        SCHEDULE,
        31,
    )
    t, u = torch.full((6,), 0.6), torch.rand(2, 6, 9, generator=random, dtype=torch.float64)
    goal = teacher_targets(teacher, xt, t, 1e-12, 2, *u)
    ours = divergence_loss(
        DIVERGENCES[divergence],
        student.features(xt, t)[xt == 31],
        student.readout,
        goal,
        teacher.readout,
    )
    same(
        student,
        ours,
        textbook.distillation_loss(
            student, teacher, DIVERGENCES[divergence], xt, t, 1e-12, 2, SCHEDULE
        ),
    )


def test_the_mean_of_the_teachers_targets_is_one():
    """With draws: the mean over 4,000 copies of one text, ours against the textbook's, within 5 standard errors."""
    teacher, N, xt, t = network(1), 4000, torch.tensor([31, 3, 31, 31, 7]), 0.8
    torch.manual_seed(5)
    x, times = xt.expand(N, 5), torch.full((N,), t)
    with torch.no_grad():
        h = teacher_targets(teacher, x, times, 0.3, 2, *torch.rand(2, N, 5, dtype=torch.float64))
        ours, theirs = (
            teacher.log_p(h).view(N, 3, 31),
            textbook.teacher_targets(teacher, x, times, 0.3, 2, SCHEDULE)[:, xt == 31],
        )
    error = ((ours.var(0) + theirs.var(0)) / N).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-6).all() and error.max() > 0


@pytest.mark.parametrize("cases", [[], ["--h100"]], ids=["cpu", "h100"])
def test_bench_runs_and_writes_a_table(tmp_path, cases):
    """Every case at a toy size: a finite number for each, and a machine, a commit and versions beside them. No time is judged."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks/run.py"),
        "--tiny",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--output",
        str(tmp_path),
        *cases,
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,), (text,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    facts = json.loads(found.read_text())
    assert {
        "machine",
        "commit",
        "versions",
        "date",
        "rows",
    } <= facts.keys() and text.read_text() in printed
    assert ("H100" in printed) == bool(cases) and len(facts["rows"]) == (6 if cases else 10)
    for row in facts["rows"]:
        assert row["path"] in printed and all(
            0 <= row[k] < float("inf")
            for k in ("ours", "ratio", "times_faster", "memory_ratio")
            if k in row
        )

"""The textbook versions agree with halfstep, and `make bench` runs at a toy size.

They agree in value and gradient of the losses, and in the distribution of the samples.
"""

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
import run  # noqa: E402
import textbook  # noqa: E402

LANGUAGE, SCHEDULE = Language(4, 3, seed=2), LogLinear()


class Plain(Perfect):
    """The perfect denoiser with finite features, which a textbook readout can multiply."""

    def __init__(self, language):
        super().__init__(language)
        self.readout = tuple(p.float() for p in self.readout)

    def features(self, xt, t, where=None):
        return super().features(xt, t, where).clamp(min=-60)

    def log_p(self, h):
        return h.float().log_softmax(-1)


def network(seed: int) -> SubsDenoiser:
    torch.manual_seed(seed)
    net = DiT(31, 16, 1, 2)
    for p in net.parameters():  # gates start at zero, and the blocks would do nothing
        torch.nn.init.normal_(p, std=0.2)
    return SubsDenoiser(net, LogLinear())


def assert_same(denoiser: SubsDenoiser, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Value and gradient of two losses agree."""
    assert torch.allclose(ours, theirs, rtol=1e-5)
    parameters = list(denoiser.network.parameters())
    our_gradients, their_gradients = (
        torch.autograd.grad(loss, parameters) for loss in (ours, theirs)
    )
    for a, b in zip(our_gradients, their_gradients, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1e-3)


@pytest.mark.parametrize("steps", [2, 5])
def test_samplers_have_the_exact_distribution(steps):
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
    ours = nelbo(denoiser, x0, t, u)
    assert_same(denoiser, ours, textbook.pretraining_loss(denoiser, x0, t, u, SCHEDULE))


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=list(DIVERGENCES))
def test_distillation_loss(divergence):
    """dt is so small that no position is revealed, so the target does not depend on draws."""
    student, teacher, random = network(0), network(1), torch.Generator().manual_seed(3)
    t, dt = torch.full((6,), 0.6), 1e-12
    x0 = torch.randint(0, 31, (6, 9), generator=random)
    xt = corrupt(x0, t, torch.rand(6, 9, generator=random), SCHEDULE, 31)
    u = torch.rand(2, 6, 9, generator=random, dtype=torch.float64)
    goal = teacher_targets(teacher, xt, t, dt, 2, *u)
    h = student.features(xt, t)[xt == 31]
    ours = divergence_loss(divergence, h, student.readout, goal, teacher.readout)
    theirs = textbook.distillation_loss(student, teacher, divergence, xt, t, dt, 2, SCHEDULE)
    assert_same(student, ours, theirs)


def test_the_targets_have_the_same_mean():
    """With draws: the means over 4,000 copies of one text agree within 5 standard errors."""
    teacher, N, xt, t = network(1), 4000, torch.tensor([31, 3, 31, 31, 7]), 0.8
    torch.manual_seed(5)
    x, times = xt.expand(N, 5), torch.full((N,), t)
    with torch.no_grad():
        h = teacher_targets(teacher, x, times, 0.3, 2, *torch.rand(2, N, 5, dtype=torch.float64))
        ours = teacher.log_p(h).view(N, 3, 31)
        theirs = textbook.teacher_targets(teacher, x, times, 0.3, 2, SCHEDULE)[:, xt == 31]
    error = ((ours.var(0) + theirs.var(0)) / N).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 5 * error + 1e-6).all()
    assert error.max() > 0


@pytest.mark.parametrize(
    ("options", "rows"), [([], 10), (["--h100"], 6)], ids=["cpu table", "h100 table"]
)
def test_bench_runs_and_writes_a_table(tmp_path, options, rows):
    """Every case at a toy size gives a finite number; no time is judged.

    Machine, commit and versions are written too.
    """
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--tiny", "--device", "cpu"]
    command += ["--repeats", "1", "--output", str(tmp_path), *options]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (file,), (text,) = tmp_path.glob("*.json"), tmp_path.glob("*.md")
    facts = json.loads(file.read_text())
    assert {"machine", "commit", "versions", "date", "rows"} <= facts.keys()
    assert text.read_text() in printed
    assert ("H100" in printed) == bool(options)
    assert len(facts["rows"]) == rows
    assert facts["size"] == list(run.TINY) and str(run.TINY) in printed
    assert_released_ratios_are_apart(facts, text.read_text(), on_cpu=not options)
    for row in facts["rows"]:
        assert row["path"] in printed
        numbers = [row[k] for k in ("ours", "ratio", "times_faster", "memory_ratio") if k in row]
        assert numbers
        assert all(0 <= number < float("inf") for number in numbers)


def assert_released_ratios_are_apart(facts: dict, text: str, on_cpu: bool) -> None:
    """They are in a second table, which says that they were not measured in this run."""
    measured, heading, released = text.partition("not measured in this run")
    assert bool(heading) == on_cpu
    ratios = facts["released_ratios"]
    assert ratios == [row._asdict() for row in run.RELEASED_RATIOS if on_cpu]
    for ratio in ratios:
        assert all(ratio.values())  # path, against, size, ratio and source
        cells = [ratio[key] for key in ("path", "against", "size")]
        line = f"| {' | '.join(cells)} | {ratio['times_faster']}x | {ratio['source']} |"
        assert line in released and line not in measured
        assert any(row["path"].startswith(ratio["path"]) for row in facts["rows"])
        assert f"| {ratio['path']}" in measured

"""Parity with the released code: targets on both time grids, divergences, losses, gradients."""

import itertools

import pytest
import torch
from reference import MASK, arrays, denoiser, dit, subs

from halfstep.diffusion.masking import corrupt, reveal_probability
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import DIVERGENCES, kl_backward, kl_forward, mse, tvd
from halfstep.distill.targets import TEACHER_TIMES, divergence_loss, teacher_targets
from halfstep.models.denoiser import SubsDenoiser

SCHEDULE = LogLinear()
CASES = pytest.mark.parametrize("name", ["distill_m2_dt8.npz", "distill_m4_dt16.npz"])
NAMES = {"kl-bwd": kl_backward, "kl-fwd": kl_forward}


def reference_states(fixture, way, m):
    """The state before each teacher substep, and the one after the last."""
    states = [fixture[f"{way}_x{i}"] for i in range(m)]
    return [*states, fixture["alg_xfinal"] if way == "alg" else fixture[f"ref_xnew{m - 1}"]]


def uniforms_that_reveal(states, starts, dt, teacher):
    """Uniforms with which our draws repeat the reveals and tokens of the reference.

    Each is the middle of its interval.
    """
    B, L = states[0].shape
    chance = reveal_probability(starts, (starts - dt).clamp(min=0), SCHEDULE)
    hidden = torch.cat(
        [torch.ones(1, B, dtype=torch.float64), (1 - chance).cumprod(0)]
    )  # [m + 1, B]
    u_reveal = (hidden[-1] / 2)[:, None].expand(B, L).clone()  # never revealed
    u_token = torch.full((B, L), 0.5, dtype=torch.float64)
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        now = (before == MASK) & (after != MASK)
        middle = ((hidden[i] + hidden[i + 1]) / 2)[:, None].expand(B, L)
        assert (hidden[i] > hidden[i + 1])[now.any(1)].all()
        u_reveal[now] = middle[now]
        p = subs(teacher, before).double().exp()
        cdf = p.cumsum(-1) / p.sum(-1, keepdim=True)
        token = after.clamp(max=MASK - 1)[..., None]
        upper, lower = (
            cdf.gather(-1, token)[..., 0],
            torch.where(token > 0, cdf.gather(-1, (token - 1).clamp(min=0)), 0.0)[..., 0],
        )
        u_token[now] = ((upper + lower) / 2)[now]
    return u_reveal, u_token


def our_targets(fixture, way):
    m, dt = int(fixture["m"]), fixture["dt"].item()
    times, teacher = {"alg": "exact", "ref": "released"}[way], denoiser("teacher")
    starts = TEACHER_TIMES[times](fixture["t"].double(), dt, m)
    u_reveal, u_token = uniforms_that_reveal(reference_states(fixture, way, m), starts, dt, teacher)
    h = teacher_targets(
        teacher, fixture["xt"], fixture["t"].double(), dt, m, u_reveal, u_token, times
    )
    return teacher, h


@CASES
def test_forward_process_and_times(name):
    fixture = arrays(name)
    t, dt, m = fixture["t"].double(), fixture["dt"].item(), int(fixture["m"])
    assert torch.equal(
        corrupt(fixture["x0"], t, fixture["u_qxt"].double(), SCHEDULE, MASK), fixture["xt"]
    )
    for way, times in (("alg", "exact"), ("ref", "released")):
        found = TEACHER_TIMES[times](t, dt, m)
        for i in range(m):
            assert torch.allclose(
                found[i], fixture[f"{way}_t{'s' if way == 'ref' else ''}{i}"].double(), atol=2e-7
            )  # the released grid is float32


@CASES
@pytest.mark.parametrize("way", ["alg", "ref"])
def test_targets(name, way):
    """Log-probabilities at every masked position, absolute 5e-5.

    `alg` is Algorithm 1 (exact), `ref` the released code (released).
    """
    fixture = arrays(name)
    teacher, h = our_targets(fixture, way)
    masked = fixture["xt"] == MASK
    assert torch.allclose(teacher.log_p(h), fixture[f"{way}_target"][masked][:, :MASK], atol=5e-5)
    other = fixture[f"{'ref' if way == 'alg' else 'alg'}_target"][masked][:, :MASK]
    assert (
        teacher.log_p(h) - other
    ).abs().max() > 0.1  # the two grids differ, and the test can tell


@CASES
@pytest.mark.parametrize("loss", NAMES)
def test_kl_losses_and_gradients(name, loss):
    """The released mean over masked tokens (relative 1e-4) and gradient norms (relative 1e-3)."""
    fixture = arrays(name)
    masked = fixture["xt"] == MASK
    for way, key in (("alg", f"alg_loss_{loss}"), ("ref", f"loss_{loss}")):
        network = dit("student").eval()
        student = SubsDenoiser(network, LogLinear())
        teacher, goal = our_targets(fixture, way)
        value = (
            divergence_loss(
                NAMES[loss],
                student.features(fixture["xt"], fixture["t"])[masked],
                student.readout,
                goal,
                teacher.readout,
            )
            / masked.sum()
        )
        assert value.item() == pytest.approx(fixture[key].item(), rel=1e-4)
        value.backward()
    norms = torch.stack([p.grad.norm() for p in network.parameters()])
    assert torch.allclose(norms, fixture[f"grad_norms_{loss}"], rtol=1e-3, atol=1e-6)
    assert torch.allclose(
        network.output_layer.linear.bias.grad, fixture[f"grad_head_bias_{loss}"], atol=1e-5
    )


def test_student_log_probabilities():
    fixture = arrays("distill_m2_dt8.npz")
    masked = fixture["xt"] == MASK
    assert torch.allclose(
        subs(denoiser("student"), fixture["xt"])[masked],
        fixture["student_logp"][masked][:, :MASK],
        atol=5e-5,
    )


@CASES
def test_released_mse_and_tvd_are_other_formulas(name):
    """Both act on log-probabilities and count the mask's column, where both sides are about -1e6
    and their float32 difference is a multiple of 1/16. `mse` here leaves that column out: the
    released number is 256/257 of ours plus the column's share, which is below one percent. `tvd`
    here is the true distance; the released one is a sum of |log p - log q| without the half
    (hundreds, where a distance is below one).
    """
    fixture = arrays(name)
    masked = fixture["xt"] == MASK
    log_p, (teacher, h) = (
        subs(denoiser("student"), fixture["xt"])[masked].double(),
        our_targets(fixture, "ref"),
    )
    log_q = teacher.log_p(h).double()
    ours = mse(log_p, log_q).mean().item()
    column = fixture["loss_mse"].item() - ours * 256 / 257
    assert 0.001 * ours < column < 0.01 * ours
    l1 = (log_p - log_q).abs().sum(-1).mean().item()
    assert 0 <= fixture["loss_tvd"].item() - l1 < 0.01 * l1
    assert 0 < tvd(log_p, log_q).mean().item() < 1 < fixture["loss_tvd"].item()


@pytest.mark.parametrize("case", ["plain", "subs"])
def test_divergences(case):
    """Float64: relative 1e-9 where the formulas agree; ours leave out the column of the mask."""
    fixture = arrays("divergences.npz")
    log_p, log_q = (fixture[f"{case}_{side}_logp"].double() for side in ("student", "teacher"))
    if case == "subs":
        log_p, log_q = log_p[:, :MASK], log_q[:, :MASK]
    for name, key in (
        ("kl_backward", "kl_bwd_f64"),
        ("kl_backward", "KL_student_teacher"),
        ("kl_forward", "kl_fwd_f64"),
        ("kl_forward", "KL_teacher_student"),
        ("tvd", "tv_dist_unused_f64"),
    ):
        assert DIVERGENCES[name](log_p, log_q).mean().item() == pytest.approx(
            fixture[f"{case}_{key}"].item(), rel=1e-9
        ), name
    released = fixture["plain_mse_f64" if case == "plain" else "subs_mse_f64_no_mask_col"].item()
    found = mse(log_p, log_q).mean().item()
    assert found == pytest.approx(released, rel=1e-9) or found * 256 / 257 == pytest.approx(
        released, rel=1e-9
    )
    l1 = fixture["plain_tvd_f64" if case == "plain" else "subs_tvd_f64_no_mask_col"].item()
    assert (log_p - log_q).abs().sum(-1).mean().item() == pytest.approx(l1, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "key"), [("kl_backward", "kl_bwd"), ("kl_forward", "kl_fwd"), ("mse", "mse")]
)
def test_gradients_of_divergences(name, key):
    """With respect to the student's log-probabilities, float64, absolute 1e-12."""
    fixture = arrays("divergences.npz")
    log_p, log_q = (
        fixture["plain_student_logp"].double().requires_grad_(),
        fixture["plain_teacher_logp"].double(),
    )
    DIVERGENCES[name](log_p, log_q).mean().backward()
    assert torch.allclose(log_p.grad, fixture[f"plain_{key}_f64_grad"], atol=1e-12)

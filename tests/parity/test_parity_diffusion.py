"""Parity with the released code: noise, NELBO, transitions.

Float32 on both sides; tolerances are stated at each comparison.
"""

import pytest
import torch
from reference import MASK, arrays, denoiser, dit, subs

from halfstep.diffusion.masking import corrupt, reveal_probability
from halfstep.diffusion.objective import nelbo, nelbo_weight, stratified_times
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.diffusion.schedules import LogLinear
from halfstep.models.denoiser import SubsDenoiser

SCHEDULE = LogLinear()


def test_schedule():
    fixture = arrays("noise.npz")
    t = fixture["t"].double()
    assert SCHEDULE.eps == fixture["eps"].item()
    assert torch.allclose(
        SCHEDULE.sigma(t), fixture["sigma"].double(), rtol=2e-5
    )  # float32 there: 1 - alpha cancels near t = 1
    assert torch.allclose(1 - SCHEDULE.alpha(t), fixture["move_chance"].double(), atol=1e-7)
    assert torch.allclose(
        -SCHEDULE.alpha_prime(t) / SCHEDULE.alpha(t), fixture["dsigma"].double(), rtol=1e-4
    )
    inside = t > 0
    # the reference computes expm1(sigma) in float32, one part in 1e7 times 1 / t
    assert torch.allclose(
        nelbo_weight(t, SCHEDULE)[inside], fixture["loss_weight"].double()[inside], rtol=1e-4
    )


def test_stratified_times_as_mdlm_draws_them():
    """One uniform in each stratum, in order, min_t = 1e-3."""
    fixture = arrays("noise.npz")
    found = stratified_times(fixture["mdlm_u"].double(), fixture["mdlm_eps"].item())
    assert torch.allclose(found, fixture["mdlm_t"].double(), atol=1e-6)


def test_stratified_times_as_sdtt_draws_them():
    """The released lattice has one uniform for all, shifted by i / B and wrapped.

    It equals our set with the uniform frac(B u) in every stratum. Ours are drawn as MDLM does.
    """
    fixture = arrays("noise.npz")
    B, u = len(fixture["sdtt_t"]), fixture["sdtt_u"].double()
    found = stratified_times((B * u % 1).expand(B), fixture["sdtt_eps"].item())
    assert torch.allclose(found, fixture["sdtt_t"].double().sort().values, atol=1e-6)
    assert not torch.equal(fixture["sdtt_t"], fixture["sdtt_t"].sort().values)


@pytest.mark.parametrize("tag", ["cont", "T1000"])
def test_nelbo_and_its_gradient(tag):
    """Loss and gradient norms of the released objective, in continuous time and for T = 1000.

    T = 1000 is the same weight on a grid of times. The padding mask of the reference (row 1 ends in
    7 padded tokens) is applied by hand, because halfstep packs windows without padding.
    """
    fixture = arrays("mdlm_loss_a.npz")
    x0, t, u, kept = (
        fixture["x0"],
        fixture[f"{tag}_t"].double(),
        fixture[f"{tag}_u"].double(),
        fixture["attention_mask"].bool(),
    )
    xt = corrupt(x0, t, u, SCHEDULE, MASK)
    assert torch.equal(xt, fixture[f"{tag}_xt"])
    full = [0, 2, 3]
    for row in full:
        found = nelbo(denoiser("teacher"), x0[row : row + 1], t[row : row + 1], u[row : row + 1])
        assert abs(found.item() / fixture[f"{tag}_nll"][row].sum().item() - 1) < 2e-5
    per_token = (
        -subs(denoiser("teacher"), xt).gather(-1, x0[..., None])[..., 0]
        * nelbo_weight(t, SCHEDULE)[:, None]
        * ((xt == MASK) & kept)
    )
    assert torch.allclose(per_token.float(), fixture[f"{tag}_nll"], atol=1e-4, rtol=1e-4)
    assert (
        abs(per_token.sum().item() / kept.sum().item() / fixture[f"{tag}_loss"].item() - 1) < 2e-5
    )

    network = dit("teacher").eval()
    hidden = (~kept) & (xt == MASK)
    loss = nelbo(SubsDenoiser(network, LogLinear()), x0, t, u)
    model, rows = SubsDenoiser(network, LogLinear()), hidden.nonzero(as_tuple=True)
    padded = (
        nelbo_weight(t, SCHEDULE)[rows[0]].float()
        * -model.log_p(model.features(xt, t)[rows]).gather(-1, x0[rows][:, None])[:, 0]
    ).sum()
    ((loss - padded) / kept.sum()).backward()
    norms = torch.stack([p.grad.norm() for p in network.parameters()])
    assert torch.allclose(norms, fixture[f"{tag}_grad_norms"], rtol=1e-4, atol=1e-6)
    assert torch.allclose(
        network.output_layer.linear.bias.grad, fixture[f"{tag}_grad_head_bias"], atol=1e-5
    )


def transition(x, log_p, t, dt):
    """Our law of one step over 257 outcomes.

    A reveal has the probability of the posterior, its token is drawn from p(x0 | xt), and visible
    tokens stay.
    """
    r = reveal_probability(t, (t - dt).clamp(min=0), SCHEDULE)[:, None, None]
    moved = torch.cat([r * log_p.double().exp(), (1 - r).expand(*x.shape, 1)], -1)
    stays = torch.nn.functional.one_hot(x, MASK + 1).double()
    return torch.where((x == MASK)[..., None], moved, stays)


def test_ancestral_transition():
    """Rows at t = 0.9, 0.5, 0.2, steps 1/16 and 1/8: absolute 1e-6, with both log p."""
    fixture = arrays("transitions.npz")
    x, t = fixture["x"][1:4], fixture["t"][1:4].double()
    ours, theirs = subs(denoiser("student"), x), fixture["log_p_x0"][1:4, :, :MASK]
    masked = x == MASK
    assert torch.allclose(ours[masked], theirs[masked], atol=5e-5)
    for i in (
        1,
        2,
    ):  # the reference draws at visible positions too, and then carries their tokens over
        expected = fixture[f"q_norm_{i}"][masked].double()
        for log_p, tolerance in ((theirs, 1e-6), (ours, 2e-6)):
            assert torch.allclose(
                transition(x, log_p, t, fixture["dts"][i].item())[masked], expected, atol=tolerance
            )


def test_analytic_transition_has_the_same_law():
    """SEDD's Tweedie step in the released code equals ours, so one function has both names.

    Checked at t = 0.9, dt = 1/8.
    """
    fixture, log_p = arrays("analytic.npz"), arrays("transitions.npz")["log_p_x0"][..., :MASK]
    x = fixture["x"]
    t = fixture["t_1"].double().expand(len(x))
    assert torch.allclose(
        transition(x, log_p, t, fixture["dt_1"].item()), fixture["probs_1"].double(), atol=1e-6
    )
    assert SAMPLERS["analytic"] == SAMPLERS["ancestral"]


def test_the_released_noise_repeats_the_released_states():
    """With the uniforms of the reference, ancestral_float32 makes the same next states.

    Each position has the same token or mask.
    """
    from halfstep.kernels.categorical import released_race

    fixture, model = arrays("sample_ancestral.npz"), denoiser("teacher")
    dt = fixture["dt"].item()
    for step in (0, 1):
        x, u, t = fixture[f"x{step}"], fixture[f"u{step}"], fixture["ts"][step]
        r = reveal_probability(t, t - dt, LogLinear())
        p = subs(model, x).exp()
        new = released_race(torch.cat([p * r, (1 - r).expand(*x.shape, 1)], -1), u)
        assert torch.equal(torch.where(x == MASK, new, x), fixture[f"x{step + 1}"])


def test_two_steps_of_a_prompted_run():
    """The states of the reference from our probabilities and its noise.

    The noise is argmax of q / (1e-10 - log(u + 1e-10)).
    """
    fixture, model = arrays("sample_ancestral.npz"), denoiser("teacher")
    dt = fixture["dt"].item()
    for step in (0, 1):
        x, u = fixture[f"x{step}"], fixture[f"u{step}"].double()
        t = fixture["ts"][step].double().expand(len(x))
        q = transition(x, subs(model, x), t, dt)
        new = (q / (1e-10 - (u + 1e-10).log())).argmax(-1)
        assert torch.equal(torch.where(x == MASK, new, x), fixture[f"x{step + 1}"])
        assert (new[x == MASK] != MASK).sum() > 5

"""Differences from the released code (docs/deviations.md).

Arithmetic: both values. Control flow: the right value.

Q and R numbers are those of docs/deviations.md; facts about the released code are those of its
fixtures or of its formulas as described there.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import Language, Perfect, ancestral_law

import halfstep
from halfstep.config import Distillation
from halfstep.diffusion.masking import corrupt, reveal_probability
from halfstep.diffusion.objective import stratified_times
from halfstep.diffusion.samplers import sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.distill.divergences import DIVERGENCES, kl_backward, kl_forward, l1_log_p, tvd
from halfstep.distill.rounds import plan_round
from halfstep.distill.targets import divergence_loss, exact_times, released_times, teacher_targets
from halfstep.kernels.categorical import released_race
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT

PAGE = (Path(__file__).parents[2] / "docs" / "deviations.md").read_text()
SCHEDULE = LogLinear()


def test_every_fact_is_named_and_every_test_exists():
    assert {int(n) for n in re.findall(r"\bQ(\d+)", PAGE)} >= set(range(1, 23))
    assert {int(n) for n in re.findall(r"\bR(\d+)", PAGE)} >= set(range(1, 31))
    there = {
        name
        for file in Path(__file__).parents[1].rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = set(re.findall(r"\btest_\w+", PAGE.replace("tests/house/test_deviations.py", "")))
    assert named and named <= there, named - there
    rows = [line for line in PAGE.splitlines() if re.match(r"\| [QR]\d", line)]
    assert len(rows) > 20 and all(
        len(line.strip("|").split(" | ")) == 4 and "test_" in line.rsplit("|", 2)[1]
        for line in rows
    )


@pytest.mark.parametrize(
    ("dt", "ratio"), [(1 / 1024, 0.697), (8 / 1024, 0.719), (64 / 1024, 0.832), (128 / 1024, 0.917)]
)
def test_q1_q2_the_first_substep_reveals_too_little(dt, ratio):
    """Expected positions revealed in the first of two substeps over t uniform on [1e-5, 1],
    released over exact: a position is masked with chance t, so each time weighs t r(t). At t = 1/2
    and dt = 1/1024 the released times are 0.749 and 0.249.
    """
    t = torch.linspace(1e-5, 1, 200_001, dtype=torch.float64)
    revealed = {}
    for grid in (exact_times, released_times):
        start = grid(t, dt, 2)[0]
        revealed[grid] = (
            (t * reveal_probability(start, (start - dt).clamp(min=0), SCHEDULE)).mean().item()
        )
    assert revealed[released_times] / revealed[exact_times] == pytest.approx(ratio, abs=2e-3)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert released_times(half, 1 / 1024, 2)[:, 0].tolist() == pytest.approx(
        [0.749, 0.249], abs=5e-4
    )
    assert exact_times(half, 1 / 1024, 2)[:, 0].tolist() == pytest.approx([0.5, 0.5 - 1 / 1024])


def test_q3_the_mask_never_has_a_negative_weight():
    t, dt = torch.tensor(1e-5, dtype=torch.float64), 1 / 8
    assert (t - dt).item() == pytest.approx(-0.125, abs=1e-4)  # the released mask's weight
    assert reveal_probability(t, (t - dt).clamp(min=0), SCHEDULE).item() == pytest.approx(
        1
    )  # so everything is revealed, properly


def test_q5_the_last_draw_is_not_made():
    """Targets of two substeps do not depend on the uniforms of what would be revealed in the
    second.
    """
    language = Language(3, 4, seed=1)
    xt, t = torch.tensor([[3, 3, 1, 3]] * 50), torch.full((50,), 0.6, dtype=torch.float64)
    u = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = reveal_probability(torch.tensor(0.6), torch.tensor(0.35), SCHEDULE).item()
    late = u[0] < 1 - r  # not in the first substep
    other = torch.where(late, torch.rand_like(u[1]), u[1])
    first, second = (
        teacher_targets(Perfect(language), xt, t, 0.25, 2, u[0], u_token)
        for u_token in (u[1], other)
    )
    assert late.any() and not late.all() and torch.equal(first, second)
    assert not torch.equal(
        first, teacher_targets(Perfect(language), xt, t, 0.25, 2, u[0], u[1].flip(0))
    )


def test_q6_tvd_is_a_distance_and_l1_log_p_is_not():
    log_p, log_q = (
        torch.tensor([[0.5, 0.5 - 1e-9, 1e-9]]).log(),
        torch.tensor([[0.5 - 1e-3, 0.5, 1e-3]]).log(),
    )
    assert tvd(log_p, log_q).item() == pytest.approx(1e-3, rel=1e-3)
    assert l1_log_p(log_p, log_q).item() == pytest.approx(6 * math.log(10) + 2e-3, rel=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_q7_nothing_masked_costs_nothing(divergence):
    h = torch.zeros(0, 4, requires_grad=True)
    readout = torch.randn(5, 4), torch.zeros(5)
    loss = divergence_loss(DIVERGENCES[divergence], h, readout, torch.zeros(0, 4), readout)
    loss.backward()
    assert loss.item() == 0 and torch.zeros(0).mean().isnan()  # the released mean over no token


def truncated_law(p: np.ndarray, r: float) -> tuple[float, np.ndarray]:
    """Chance of a reveal, and the law of the revealed token, of the released race between tokens r
    p[V] and the mask 1 - r.

    Exact but for products of 2^-24: a token's noise is one of e_j, j = 1, 2, ... (the grid's top),
    each with chance 2^-24; every pair (token, j) that could win is enumerated by falling score r p
    / e_j, and wins when none above it occurred and the mask's exponential exceeds (1 - r) / score.
    """
    least = (1 - r) / 40  # below this score the mask wins but for e^-40
    counts = np.minimum(np.ceil(r * p / least * 2**24).astype(np.int64) + 1, 1 << 24)
    token = np.repeat(np.arange(len(p)), counts)
    j = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts) + 1
    u = (1 - torch.from_numpy(j) * 2.0**-24).float()
    noise = (1e-10 - (u + 1e-10).log()).double().numpy()
    score = r * p[token] / noise
    order = np.argsort(-score)
    chance = 2.0**-24 * (1 - 2.0**-24) ** np.arange(len(order)) * np.exp(-(1 - r) / score[order])
    law = np.bincount(token[order], chance, len(p))
    return law.sum(), law / law.sum()


V = 50_257
ZIPF = 1 / np.arange(1, V + 1)
STEEP = ZIPF**1.5


@pytest.mark.parametrize(
    ("weights", "steps", "kept", "drop", "temperature"),
    [
        (np.ones(V), 1024, 0.15, 0.0, None),
        (np.ones(V), 512, 0.42, 0.0, None),
        (ZIPF, 1024, 0.69, 1.68, 0.858),
        (ZIPF, 512, 0.75, 1.34, 0.885),
        (STEEP, 1024, 0.958, 0.36, 0.950),
    ],
)
def test_q8_truncated_noise_lowers_the_temperature(weights, steps, kept, drop, temperature):
    """P(reveal) / r; by how many nats revealed tokens are likelier than p says; the temperature
    that would make an exact draw as likely. The float64 draw has 1, 0 and 1.
    """
    p = weights / weights.sum()
    chance, law = truncated_law(p, 1 / steps)
    assert chance * steps == pytest.approx(kept, abs=0.012)
    entropy = -(p * np.log(p)).sum()
    assert entropy + (law * np.log(p)).sum() == pytest.approx(drop, abs=0.02)
    if temperature is None:
        return  # a flat law is flat at any temperature
    low, high = 0.2, 1.0  # p^(1 / T) has the same mean of -log p
    for _ in range(40):
        middle = (low + high) / 2
        cold = np.exp(np.log(p) / middle - (np.log(p) / middle).max())
        low, high = (
            (middle, high)
            if -(cold / cold.sum() * np.log(p)).sum() < entropy - drop
            else (low, middle)
        )
    assert low == pytest.approx(temperature, abs=2e-3)


def test_q8_the_race_is_exact_where_nothing_is_rare():
    """Weights of a few outcomes: the released race has the same law as the exact draw, so the loss
    is the truncation's alone.
    """
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    u = torch.from_numpy(
        np.random.Generator(np.random.Philox(3)).random((200_000, 4), dtype=np.float32)
    )
    found = released_race(q.expand(len(u), 4), u).bincount(minlength=4) / len(u)
    assert torch.allclose(found, q, atol=5 * 0.5 / len(u) ** 0.5)


def test_r9_how_old_the_average_is():
    """Shares of an average of decay 0.9999 that are older than a round of 10,000 steps, and than
    the two last.
    """
    assert 0.9999**10_000 == pytest.approx(0.37, abs=0.005) and 0.9999**20_000 == pytest.approx(
        0.14, abs=0.005
    )
    run = Distillation()
    assert (run.ema_decay, run.reset_ema, run.next_teacher) == (
        0.9999,
        False,
        "raw",
    )  # the released way is the default, each an option


def test_r11_backward_is_student_first():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    student, teacher = p.log(), q.log()
    assert kl_backward(student, teacher).item() == pytest.approx(
        0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5
    )
    assert kl_forward(student, teacher).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(5), rel=1e-5
    )


def random_dit(dropout=0.0):
    network = DiT(40, 32, 2, 4, dropout=dropout, cond_width=16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def test_q9_a_loaded_network_does_not_drop(pipeline):
    """Two passes agree in eval mode, as checkpoint.load leaves a network; in training mode, in
    which the released code samples, they do not.
    """
    network, x = random_dit(dropout=0.1), torch.randint(0, 41, (2, 12))
    assert not torch.equal(network.train()(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
    assert not any(module.training for module in halfstep.load(pipeline.teacher).network.modules())


def test_q12_rows_sum_to_one_under_autocast():
    """bf16 log-probabilities of logits like N(0, 3) sum to 1 ± 0.02; ours to 1 within 1e-5 whatever
    the autocast.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 50_257, generator=generator)
    half = (logits.bfloat16() - logits.bfloat16().logsumexp(-1, keepdim=True)).float().exp().sum(-1)
    assert 0.005 < half.std() < 0.05
    denoiser = SubsDenoiser(random_dit().eval(), LogLinear())
    with torch.autocast("cpu", torch.bfloat16):
        h = denoiser.features(torch.randint(0, 41, (4, 12)), torch.zeros(4)).flatten(0, 1)
        assert (denoiser.log_p(h).double().exp().sum(-1) - 1).abs().max() < 1e-5


def test_q17_the_last_step_draws():
    """One step over a language: the law is the product of marginals, where a greedy fill would give
    one text alone.
    """
    language = Language(3, 3, seed=2)
    ids = sample(Perfect(language), 2000, 3, 1).ids
    assert (ids < language.V).all() and len(ids.unique(dim=0)) > 10


def test_q18_strata_and_lattice():
    """Both cover every stratum once; the released lattice has one offset for all, so two of its
    times are never closer than 1 / B.
    """
    u = torch.rand(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = stratified_times(u, 1e-3)
    lattice = stratified_times(u[:1].expand(64), 1e-5)
    for t, low in ((ours, 1e-3), (lattice, 1e-5)):
        assert ((t - low) / (1 - low) * 64).floor().tolist() == list(range(64))
    assert (lattice.diff() - (1 - 1e-5) / 64).abs().max() < 1e-12
    assert ours.diff().min() < 0.5 / 64


def test_q19_a_thousandth_is_visible_at_one():
    x0, u = (
        torch.zeros(100, 1000, dtype=torch.long),
        torch.rand(100, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    visible = (
        (corrupt(x0, torch.ones(100, dtype=torch.float64), u, SCHEDULE, 7) == 0)
        .double()
        .mean()
        .item()
    )
    assert visible == pytest.approx(1e-3, abs=5 * (1e-3 / 1e5) ** 0.5)
    t, s = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    assert reveal_probability(t, s, SCHEDULE).item() == pytest.approx(0.75)


def test_q20_rounds_and_their_dt():
    rounds = [plan_round(Distillation(), r) for r in range(1, 8)]
    assert [r.dt for r in rounds] == [2**k / 1024 for k in range(7)] and rounds[
        -1
    ].student_steps == 8
    assert (1 - 1e-5) * rounds[0].dt == pytest.approx(
        rounds[0].dt, rel=2e-5
    )  # the released dt is this much shorter


def test_q21_masked_tokens_weigh_the_same():
    """Two rows of the same divergence count alike, however many tokens their texts have masked: a
    sum over rows, divided outside.
    """
    readout = torch.eye(3), torch.zeros(3)
    h, goal = torch.tensor([[1.0, 0, 0]] * 4), torch.tensor([[0, 1.0, 0]] * 4)
    one = divergence_loss(kl_backward, h[:1], readout, goal[:1], readout)
    assert divergence_loss(kl_backward, h, readout, goal, readout).item() == pytest.approx(
        4 * one.item(), rel=1e-6
    )


def test_one_step_costs_the_total_correlation():
    """A denoiser that never errs, run in one step, writes the product of the marginals: KL(language
    || law) is the total correlation, the sum of the marginals' entropies less the language's, and
    it falls to nothing as steps are added.
    """
    language = Language(3, 4, seed=6, sharpness=2.0)
    texts, start = language.index(language.texts), torch.full((4,), 3)
    marginal = language.posterior[-1]
    correlation = -(marginal * marginal.log()).sum().item() - language.entropy
    cost = [
        (language.p * (language.log_p - ancestral_law(Perfect(language), n, start)[texts].log()))
        .sum()
        .item()
        for n in (1, 2, 4, 8, 64)
    ]
    assert cost[0] == pytest.approx(correlation, rel=1e-9) and correlation > 0.3
    assert all(a > b for a, b in itertools.pairwise(cost)) and cost[-1] < 0.03 * correlation

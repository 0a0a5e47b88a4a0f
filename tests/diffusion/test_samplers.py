"""Samplers against their exact laws over an enumerated language, and what each sampler promises."""

from typing import get_args

import pytest
import torch
from oracle import (
    Language,
    Perfect,
    PerfectReader,
    ancestral_law,
    chi_square,
    first_hitting_law,
)

from halfstep.config import SAMPLER_OPTIONS, DrawOptions
from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.plans import ancestral_plan, first_hitting_plan, run_plan
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.schedules import SCHEDULES, LogLinear
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import uniforms

ALPHA = 1e-4 / 70  # corrected for the number of chi-square tests here
DRAWS = 10_000
SMALL, LONG = Language(4, 3, seed=2), Language(3, 5, seed=3)
GAPPY = Language(3, 4, seed=4, forbidden=40)  # half of its texts cannot be
LAW = {"ancestral": ancestral_law, "first_hitting": first_hitting_law}  # for any number of steps
EXACT = list(LAW)
EVERY = pytest.mark.parametrize("sampler", SAMPLERS)


def asked(sampler, denoiser):
    """The scorer of a sampler that asks one."""
    row = SAMPLERS.get(sampler)
    return {"scorer": PerfectReader(denoiser.language)} if row and "scorer" in row.options else {}


def draw(denoiser, steps, sampler, given=None, n=DRAWS, **draws):
    length, row, options = denoiser.language.L, SAMPLERS.get(sampler), asked(sampler, denoiser)
    if row and row.needs_first and given is None:
        given = unknown(denoiser.language).index_fill(0, torch.tensor([0]), 1)
    draws = Draws(**draws)
    return sample(denoiser, n, length, steps, sampler=sampler, draws=draws, given=given, **options)


def agree(language: Language, ids: torch.Tensor, law: torch.Tensor) -> float:
    return chi_square(language.index(ids).bincount(minlength=len(law)), law)


def unknown(language: Language) -> torch.Tensor:
    return torch.full((language.L,), language.mask_id)


def test_oracle_is_consistent():
    """Laws that need no sampler.

    One position at a time gives the language, one step the product of marginals, many steps
    converge to the language.
    """
    denoiser, texts = Perfect(SMALL), SMALL.index(SMALL.texts)
    assert torch.allclose(
        first_hitting_law(denoiser, 3, unknown(SMALL))[texts], SMALL.p, atol=1e-12
    )
    marginal = SMALL.posterior[-1]  # the last state is all masks
    product = torch.stack([marginal[i, SMALL.texts[:, i]] for i in range(SMALL.L)]).prod(0)
    for law in LAW.values():
        assert torch.allclose(law(denoiser, 1, unknown(SMALL))[texts], product, atol=1e-12)
    far = [
        (ancestral_law(denoiser, n, unknown(SMALL))[texts] - SMALL.p).abs().sum().item() / 2
        for n in (1, 2, 4, 8, 64)
    ]
    assert (
        far == sorted(far, reverse=True) and far[0] > 0.2 and far[-1] < 0.01
    )  # the factorisation error falls with the steps


CASES = [*((SMALL, n) for n in (1, 2, 3, 4, 7, 32)), (LONG, 2), (LONG, 5), (GAPPY, 1), (GAPPY, 3)]


@pytest.mark.parametrize("sampler", EXACT)
@pytest.mark.parametrize(
    ("language", "steps"),
    CASES,
    ids=lambda value: value if isinstance(value, int) else f"V{value.V}L{value.L}",
)
def test_law(language, sampler, steps):
    denoiser = Perfect(language)
    out = draw(denoiser, steps, sampler, seed=100 + steps)
    assert out.ids.dtype == torch.int64 and out.ids.max() < language.V
    assert agree(language, out.ids, LAW[sampler](denoiser, steps, unknown(language))) > ALPHA
    assert (
        out.network_evaluations.max() <= min(steps, language.L)
        and out.network_evaluations.min() >= 1
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [2, 5])
def test_law_under_each_schedule(schedule, steps):
    """Times and reveals follow the schedule of the denoiser, whose network knows the time."""
    alpha = SCHEDULES[schedule]().alpha
    denoiser = Perfect(SMALL, heat=3.0, alpha=alpha)
    out = draw(denoiser, steps, "ancestral", seed=500 + steps)
    assert agree(SMALL, out.ids, ancestral_law(denoiser, steps, unknown(SMALL))) > ALPHA
    if schedule != "loglinear":  # the test can tell schedules apart
        other = ancestral_law(Perfect(SMALL, heat=3.0), steps, unknown(SMALL))
        assert agree(SMALL, out.ids, other) < 1e-6


@pytest.mark.parametrize("sampler", EXACT)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_law_of_a_denoiser_that_knows_the_time(sampler, steps):
    """Each pass gets the time at the start of its own step."""
    denoiser = Perfect(SMALL, heat=3.0)
    out = draw(denoiser, steps, sampler, seed=200 + steps)
    assert agree(SMALL, out.ids, LAW[sampler](denoiser, steps, unknown(SMALL))) > ALPHA
    if (
        steps == 4 and LAW[sampler] is ancestral_law
    ):  # the test can tell: as many passes, all told t = 1
        stuck = Perfect(SMALL)
        stuck.table = lambda t: denoiser.table(1.0)
        assert agree(SMALL, out.ids, ancestral_law(stuck, steps, unknown(SMALL))) < 1e-6


@pytest.mark.parametrize("sampler", EXACT)
@pytest.mark.parametrize(
    "frame", [[1, 3, 3, 3, 3], [3, 3, 3, 3, 0], [3, 2, 3, 0, 3], [0, 1, 2, 0, 3]], ids=str
)
@pytest.mark.parametrize("steps", [2, 3])
def test_prompt_and_infilling(sampler, frame, steps):
    given, denoiser = torch.tensor(frame), Perfect(LONG)
    out = draw(denoiser, steps, sampler, given, seed=300 + steps)
    fixed = given != LONG.mask_id
    assert (out.ids[:, fixed] == given[fixed]).all()
    assert agree(LONG, out.ids, LAW[sampler](denoiser, steps, given)) > ALPHA
    assert out.network_evaluations.max() <= min(steps, int((~fixed).sum()))


def test_every_text_can_have_a_frame_of_its_own():
    frames = torch.tensor([[1, 3, 3, 3, 3], [3, 2, 3, 0, 3], [0, 1, 2, 0, 3]])
    together = draw(Perfect(LONG), 2, "ancestral", frames, n=3, seed=5).ids
    for i, frame in enumerate(frames):
        assert torch.equal(
            together[i : i + 1],
            draw(Perfect(LONG), 2, "ancestral", frame, n=1, seed=5, first=i).ids,
        )


def test_nothing_to_write_needs_no_pass():
    denoiser = Perfect(LONG)
    out = draw(denoiser, 4, "ancestral", torch.tensor([0, 1, 2, 1, 0]), n=3)
    assert (
        out.ids.tolist() == [[0, 1, 2, 1, 0]] * 3
        and out.network_evaluations.tolist() == [0, 0, 0]
        and denoiser.passes == 0
    )
    assert draw(denoiser, 4, "ancestral", n=0).ids.shape == (0, 5)


@EVERY
def test_with_all_steps_that_are_of_use_an_exact_denoiser_gives_the_language(sampler):
    """One position at a time, or nearly so: 64 steps, or the limit of the sampler."""
    limit = SAMPLERS[sampler].max_steps
    steps = limit(SMALL.L) if limit else 64
    out = draw(Perfect(SMALL), steps, sampler, seed=600, n=300)
    counts = SMALL.text_index(out.ids).bincount(minlength=len(SMALL.p))
    begins = (SMALL.texts[:, 0] == 1) | (not SAMPLERS[sampler].needs_first)
    law = SMALL.p * begins
    assert chi_square(counts, law / law.sum()) > ALPHA


@EVERY
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_given_tokens_stay_and_all_others_are_written(sampler, steps):
    given, N = torch.tensor([3, 2, 3, 0, 3]), 50
    if SAMPLERS[sampler].needs_first:  # it writes from left to right
        given = torch.tensor([2, 0, 3, 3, 3])
    out = draw(Perfect(LONG), steps, sampler, given, n=N, seed=700)
    assert out.ids.dtype == torch.int64 and out.ids.shape == (N, 5)
    fixed = given != LONG.mask_id
    assert (out.ids[:, fixed] == given[fixed]).all() and out.ids.max() < LONG.V
    assert (out.network_evaluations > 0).all() and (out.network_evaluations <= steps).all()


@EVERY
def test_same_seed_same_text_whatever_the_batch(sampler):
    denoiser = Perfect(LONG, heat=1.0)
    whole = draw(denoiser, 3, sampler, n=64, seed=5)
    parts = [
        draw(denoiser, 3, sampler, n=n, seed=5, first=first)
        for first, n in ((0, 1), (1, 30), (31, 33))
    ]
    assert torch.equal(whole.ids, torch.cat([p.ids for p in parts]))
    if sampler != "block":  # whose texts share their passes
        evaluations = torch.cat([p.network_evaluations for p in parts])
        assert torch.equal(whole.network_evaluations, evaluations)
    assert not torch.equal(whole.ids, draw(denoiser, 3, sampler, n=64, seed=6).ids)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_sharpens_each_draw(temperature):
    denoiser = Perfect(SMALL)
    cooled = Perfect(SMALL)
    cooled.table = lambda t: (
        (SMALL.posterior.log() / temperature).softmax(-1).nan_to_num(1 / SMALL.V)
    )
    out = draw(denoiser, 2, "ancestral", seed=400, temperature=temperature)
    assert agree(SMALL, out.ids, ancestral_law(cooled, 2, unknown(SMALL))) > ALPHA


def test_network_evaluations_are_the_non_empty_steps():
    """L positions fall independently into N equal steps: N (1 - (1 - 1/N)^L) are not empty."""
    for steps in (2, 5, 16):
        denoiser = Perfect(LONG)
        out = draw(denoiser, steps, "ancestral", seed=9)
        mean = steps * (1 - (1 - 1 / steps) ** LONG.L)
        found = out.network_evaluations.double()
        assert abs(found.mean() - mean) < 5 * found.std() / DRAWS**0.5 + 1e-12
        assert denoiser.texts == out.network_evaluations.sum() - (
            DRAWS - 1
        )  # all texts begin alike, so one stands for all in the first pass
        assert denoiser.passes == out.network_evaluations.max()


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 1024])
def test_ancestral_plan_has_the_law_of_the_schedule(steps):
    """P(revealed in step i) = (alpha(t_{i+1}) - alpha(t_i)) / (1 - alpha(1)).

    1 / steps for the log-linear schedule.
    """

    class Bent:
        def alpha(self, t):
            return 1 - 0.9 * t**2

    u = uniforms(1, 0, 1, 400_000).view(1000, 400)
    for schedule, law in ((LogLinear(), lambda t: t), (Bent(), lambda t: t**2)):
        plan = ancestral_plan(u, steps, schedule)
        t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        assert plan.shape == u.shape and plan.min() >= 0 and plan.max() < steps
        assert (
            chi_square(plan.flatten().bincount(minlength=steps), law(t[:-1]) - law(t[1:])) > ALPHA
        )
    assert ancestral_plan(torch.tensor([[0.0, 1 - 2**-53]]), steps, LogLinear()).tolist() == [
        [steps - 1, 0]
    ]


@pytest.mark.parametrize("L", [1, 5, 12, 64])
@pytest.mark.parametrize("steps", [1, 3, 5, 12, 100])
def test_first_hitting_groups_are_equal_up_to_one_and_uniform(L, steps):
    plan = first_hitting_plan(uniforms(2, 0, 500, L), steps, LogLinear())
    groups = min(steps, L)
    for row in plan:
        sizes = row.bincount(minlength=groups)
        assert len(sizes) == groups and sizes.max() - sizes.min() <= 1 and sizes.min() >= 1
    place = plan[:, L // 2].bincount(minlength=groups)
    assert chi_square(place, plan[0].bincount(minlength=groups).double() / L) > ALPHA


def test_run_plan_executes_any_plan():
    """A plan with gaps and steps out of order: each position sees exactly the earlier ones."""
    seen = []

    class Spy(Perfect):
        def features(self, xt, t, where=None):
            seen.append((xt.tolist(), t.tolist()))
            return super().features(xt, t, where)

    language = Language(3, 4, seed=1)
    x = torch.tensor([[3, 3, 1, 3], [3, 3, 3, 3]])
    plan = torch.tensor([[7, 2, 0, 7], [1, 1, 1, 1]])
    times = torch.linspace(1, 0, 9)[:-1]
    u = torch.full((2, 4), 0.5, dtype=torch.float64)
    out = run_plan(Spy(language), x, plan, times, u)
    assert out.network_evaluations.tolist() == [2, 1]
    assert x.tolist() == [[3, 3, 1, 3], [3, 3, 3, 3]]  # the argument stays as it was
    assert seen[0] == ([[3, 3, 1, 3], [3, 3, 3, 3]], [0.75, 0.875])
    assert seen[1:] == [([[3, out.ids[0, 1].item(), 1, 3]], [0.125])]
    assert out.ids[0, 2] == 1 and out.ids.max() < 3


@pytest.mark.parametrize("steps", [1, 3])
def test_released_noise_has_nearly_the_law_and_belongs_to_the_text(steps):
    """Over few outcomes the truncation is invisible: chi-square against the exact law.

    Text i is the same in any batch.
    """

    def draw_float32(**how):
        return draw(Perfect(SMALL), steps, "ancestral_float32", seed=40 + steps, **how)

    out = draw_float32(n=3000)
    law = ancestral_law(Perfect(SMALL), steps, unknown(SMALL))
    assert agree(SMALL, out.ids, law) > ALPHA
    assert out.network_evaluations.max() <= steps
    some = draw_float32(n=5, first=7)
    assert torch.equal(some.ids, out.ids[7:12])
    assert torch.equal(some.network_evaluations, out.network_evaluations[7:12])
    frame = torch.tensor([1, 4, 2])
    assert (draw_float32(given=frame, n=4).ids[:, [0, 2]] == frame[[0, 2]]).all()


def test_the_configuration_has_the_options_of_every_sampler():
    """An option that the configuration lacks, or gives to another sampler, could not be used."""
    for name, row in SAMPLERS.items():
        own = row.options.keys() - {"top_p"}  # an option of all draws
        assert own == set(SAMPLER_OPTIONS.get(name, ())), name
    with pytest.raises(ValueError, match="eta: found 0.1, but sampler ancestral has no such"):
        DrawOptions(eta=0.1)
    with pytest.raises(HalfstepError, match="eta: found a value, but sampler ancestral has no"):
        sample(Perfect(LONG), 1, 5, 2, eta=0.1)


def test_the_configuration_names_every_sampler():
    """A row of SAMPLERS that `sampling.sampler` does not allow could not be used."""
    assert set(get_args(DrawOptions.model_fields["sampler"].annotation)) == SAMPLERS.keys()


def test_which_samplers_have_rounded_noise():
    rounded = [name for name, row in SAMPLERS.items() if row.draw_dtype != "float64"]
    assert rounded == ["ancestral_float32"]


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if row.max_steps])
def test_a_sampler_refuses_more_steps_than_it_can_take(sampler):
    most = SAMPLERS[sampler].max_steps(LONG.L)
    SAMPLERS[sampler].check_steps(sampler, most, LONG.L)
    with pytest.raises(HalfstepError, match=f"steps: found {most + 1}.*{sampler}.*at most {most}"):
        SAMPLERS[sampler].check_steps(sampler, most + 1, LONG.L)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"steps": 0}, "steps: found 0, expected a number above zero"),
        ({"temperature": 0.0}, "temperature: found 0.0, expected a number above zero"),
        ({"temperature": -1.0}, "temperature: found -1.0, expected a number above zero"),
        ({"given": torch.tensor([1, 2])}, r"given: found shape \[2\], expected \[5\]"),
        ({"sampler": "greedy"}, "sampler: found 'greedy', allowed are ancestral"),
    ],
)
def test_impossible_arguments_are_one_sentence(fault, message):
    how = {"steps": 2, "sampler": "ancestral", "n": 2} | fault
    with pytest.raises(HalfstepError, match=message):
        draw(Perfect(LONG), **how)

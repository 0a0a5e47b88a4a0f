"""A watched denoiser draws the same tokens, and tells which step revealed each position."""

import pytest
import torch
from oracle import Language, Perfect, PerfectReader

from halfstep.diffusion.contracts import Draws
from halfstep.diffusion.plans import ancestral_plan, first_hitting_plan
from halfstep.diffusion.samplers import SAMPLERS, sample
from halfstep.diffusion.schedules import LogLinear
from halfstep.diffusion.watching import GIVEN, HIDDEN, Reveals, watched
from halfstep.errors import HalfstepError
from halfstep.kernels.categorical import uniforms

LANGUAGE = Language(3, 5, seed=3)
MASK = LANGUAGE.mask_id
FRAMES = [[MASK] * 5, [1, MASK, MASK, MASK, MASK], [MASK, 2, MASK, 0, MASK], [0, 1, 2, 0, 1]]


def asked(sampler):
    """The scorer of a sampler that asks one."""
    options = SAMPLERS[sampler].options
    return {"scorer": PerfectReader(LANGUAGE)} if "scorer" in options else {}


def watch(denoiser, frame, steps, sampler, seed):
    """The samples, and the states (ids, step_of) before each pass and at the end."""
    reveals, states = Reveals(frame, MASK, steps, SAMPLERS[sampler].by_time), []

    def show(xt, t):
        reveals.before_pass(xt, t)
        states.append((reveals.step, reveals.ids.clone(), reveals.step_of.clone()))

    draws = Draws(seed=seed)
    scorer = asked(sampler)
    samples = sample(
        watched(denoiser, show), 1, 5, steps, sampler=sampler, draws=draws, given=frame, **scorer
    )
    reveals.note(samples.ids[0])
    return samples, reveals, states


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("frame", FRAMES, ids=str)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_the_reveals_are_those_of_the_text_that_an_unwatched_sampler_draws(sampler, frame, steps):
    """Each pass reveals something, what is revealed stays, and what is given is no one's step."""
    frame, takes_back = torch.tensor(frame), sampler in ("remask", "speculative")
    if SAMPLERS[sampler].needs_first and frame.tolist() not in (FRAMES[1], FRAMES[3]):
        frame = torch.tensor([2, 0, MASK, MASK, MASK])
    for seed in range(5):
        plain = sample(
            Perfect(LANGUAGE),
            1,
            5,
            steps,
            sampler=sampler,
            draws=Draws(seed=seed),
            given=frame,
            **asked(sampler),
        )
        samples, reveals, states = watch(Perfect(LANGUAGE), frame, steps, sampler, seed)
        assert torch.equal(samples.ids, plain.ids)
        assert torch.equal(samples.network_evaluations, plain.network_evaluations)
        assert torch.equal(reveals.ids, plain.ids[0])
        assert torch.equal(reveals.step_of == GIVEN, frame != MASK)
        assert reveals.passes == len(states)
        if sampler != "block":  # where a pass over a block is a part of an evaluation
            assert reveals.passes == plain.network_evaluations.item()
        begun = [step for step, _, _ in states]
        assert begun == sorted(set(begun)) and all(1 <= step <= steps for step in begun)
        for step, ids, step_of in states:
            assert torch.equal(step_of == HIDDEN, ids == MASK)
            if takes_back:
                continue
            assert torch.equal(ids != MASK, reveals.step_of < step)
            assert torch.equal(ids[ids != MASK], reveals.ids[ids != MASK])
        if sampler != "ancestral_float32" and not takes_back:  # its race may reveal nothing
            assert set(begun) == set(reveals.step_of.tolist()) - {GIVEN}


@pytest.mark.parametrize(
    ("sampler", "plan"), [("ancestral", ancestral_plan), ("first_hitting", first_hitting_plan)]
)
def test_the_steps_are_those_of_the_plan(sampler, plan):
    """The reveal plan of a text is known before it is drawn."""
    for seed in range(20):
        u = uniforms(seed, 0, 1, 10)[:, :5]
        _, reveals, _ = watch(Perfect(LANGUAGE), torch.full((5,), MASK), 4, sampler, seed)
        assert torch.equal(reveals.step_of, 1 + plan(u, 4, LogLinear())[0])


def test_what_a_denoiser_lacks_its_watched_one_lacks_too():
    class Bare(Perfect):
        def __getattribute__(self, name):
            if name == "features_and_kv":
                raise AttributeError(name)
            return super().__getattribute__(name)

    with pytest.raises(HalfstepError, match="keeps no keys and values"):
        watch(Bare(LANGUAGE), torch.full((5,), MASK), 4, "block", 1)

"""Suggested sizes and steps: within text and hours, and at the prices of `halfstep plan`."""

import itertools

import pytest

from halfstep.config import Corpus
from halfstep.workflow.calls import Call, Facts
from halfstep.workflow.rates import Rates
from halfstep.workflow.suggestions import (
    EPOCHS,
    FEWEST,
    HOURS,
    RECIPES,
    Hardware,
    step_seconds,
    suggest,
    two_digits,
)
from halfstep.workflow.work import BYTES_PER_TOKEN, WORK

MACHINES = [
    Hardware(1, 4),
    Hardware(2, 25),
    Hardware(64, 512),
    Hardware(8, 4, "Tesla T4"),
    Hardware(8, 32, "Tesla T4"),
    Hardware(16, 128, "NVIDIA H100 80GB HBM3"),
]
SIZES = [1e3, 1e5, 4e5, 1e6, 1e7, 1e8, 1e9, 1e12]


@pytest.mark.parametrize("hardware", MACHINES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_neither_the_text_nor_the_hours_are_exceeded(hardware, size):
    found = suggest(size, hardware)
    tokens = found.num_steps * found.recipe.batch_size * found.recipe.length
    assert found.epochs == pytest.approx(tokens * BYTES_PER_TOKEN / size)
    assert found.epochs <= EPOCHS or found.num_steps == FEWEST
    assert found.seconds <= 3600 * HOURS
    assert found.seconds == pytest.approx(found.num_steps * step_seconds(found.recipe, hardware))
    assert two_digits(found.num_steps) == found.num_steps


@pytest.mark.parametrize("hardware", MACHINES, ids=str)
def test_more_text_never_gives_less_computation(hardware):
    seconds = [suggest(size, hardware).seconds for size in SIZES]
    sizes = [RECIPES.index(suggest(size, hardware).recipe) for size in SIZES]
    assert sizes == sorted(sizes)
    for (a, first), (b, second) in itertools.pairwise(zip(sizes, seconds, strict=True)):
        assert a != b or first <= second


def test_a_gpu_with_memory_and_text_is_given_a_larger_network():
    sizes = {str(hardware): suggest(1e8, hardware).recipe.size for hardware in MACHINES}
    assert [name for name, size in sizes.items() if size == "mini"] == [
        "8 cores, 32 GB, Tesla T4",
        "16 cores, 128 GB, NVIDIA H100 80GB HBM3",
    ]
    assert {suggest(1e5, hardware).recipe.size for hardware in MACHINES} == {"tiny"}


def test_the_configurations_that_were_run_come_out_again():
    """300 film reviews on two cores (the tutorial), 22 MB of docstrings on a GPU (preset docs)."""
    tutorial = suggest(3.9e5, Hardware(2, 25))
    assert tutorial.recipe.size == "tiny" and 1500 < tutorial.num_steps <= 2000
    docs = suggest(22e6, MACHINES[-1])
    assert docs.recipe.size == "mini" and 6000 < docs.num_steps <= 8000


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.size)
def test_a_step_costs_what_plan_says(recipe):
    """Without validations and the texts of a round, which plan counts too."""
    steps, corpus = 10_000, "results/data/c"
    shape = f"--length {recipe.length} --vocab-size {recipe.vocab_size}"
    train = f"--batch-size {recipe.batch_size} --precision {recipe.precision} --validate-every"
    folder = "--output results/models/t"
    lines = [
        f"prepare-corpus --output {corpus} --kind files {shape}",
        f"pretrain {folder}/teacher --corpus {corpus} --size {recipe.size} --num-steps {steps}",
        f"train-baseline {folder}/baseline --corpus {corpus} --size {recipe.size} "
        f"--num-steps {round(recipe.of_baseline * steps)}",
    ]
    lines += [
        f"distill-round {folder}/r/round-{number} --teacher results/models/t/teacher --corpus "
        f"{corpus} --round {number} --teacher-steps {recipe.length} --num-steps {0.075 * steps:.0f}"
        for number in range(1, 8)
    ]
    calls = [["halfstep", *f"{line} {train} {steps}".split()] for line in lines]
    calls[0] = ["halfstep", *lines[0].split()]
    rates, facts = Rates(), Facts()
    for call in calls:
        facts.note(call)
    gpus = int(recipe.size != "tiny")
    hardware = Hardware(1, 100, "h100" * gpus)
    work = [list(WORK[call[1]](Call(call, facts, rates))) for call in calls[1:]]
    planned = sum(rates.seconds(parts[0], gpus, 1) for parts in work)
    assert steps * step_seconds(recipe, hardware) == pytest.approx(planned, rel=1e-6)


def test_recipes_are_ordered_by_size():
    assert [recipe.num_steps for recipe in RECIPES] == sorted(r.num_steps for r in RECIPES)
    for recipe in RECIPES:
        Corpus(kind="docs", length=recipe.length, vocab_size=recipe.vocab_size)

"""Sizes and steps for a text of one's own, by its size and by what this machine computes in hours.

A recipe is a configuration that was run here. Its number of steps follows the text (EPOCHS times
through it) and the machine (HOURS for all trainings, at the speeds of `halfstep plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from halfstep.config import shape_of_size
from halfstep.gpus import GPUS, find_gpu
from halfstep.models.flops import (
    causal_shape,
    denoiser_shape,
    distillation_flops,
    training_flops,
)
from halfstep.workflow.machine import demand_of
from halfstep.workflow.rates import Rates, Work
from halfstep.workflow.work import BYTES_PER_TOKEN, MASKED

EPOCHS = 20
"""Times through the text in pretraining: both recipes were run with 19 to 22"""
HOURS = 2.0
"""Longest time of all trainings together, at assumed speeds"""
FEWEST = 100  # steps of pretraining
ROUNDS, SUBSTEPS = 7, 2
OF_ROUND = 0.075  # steps of a round for each step of pretraining, in both recipes


class Recipe(NamedTuple):
    """Options of one network size, from a configuration that was run."""

    size: str
    length: int
    vocab_size: int
    batch_size: int
    num_steps: int
    """of pretraining, when it was run"""
    of_baseline: float
    """steps of the baseline for each step of pretraining"""
    precision: str
    pretraining: dict[str, str]
    """further options of pretraining and of the baseline"""
    distillation: dict[str, str]
    """options of a round that differ from them"""
    source: str


RECIPES = (  # from the smallest on
    Recipe(
        *("tiny", 128, 1024, 8, 2000, 0.4, "float32"),
        {"lr": "2e-3", "ema_decay": "0.99"},
        {"lr": "1e-3", "ema_decay": "0.98"},
        "the tutorial on one's own text: 300 film reviews on two cores",
    ),
    Recipe(
        *("mini", 256, 8192, 64, 8000, 0.5, "bfloat16"),
        {"lr": "1e-3", "lr_decay": "cosine", "weight_decay": "0.01", "ema_decay": "0.999"},
        {"lr": "2e-4", "lr_decay": "linear", "ema_decay": "0.99"},
        "the preset docs: 22 MB of docstrings",
    ),
)


@dataclass(frozen=True)
class Hardware:
    """What a machine has."""

    cores: int
    memory_gb: float
    gpu: str = ""
    """name of its GPU; "" without one"""

    def __str__(self) -> str:
        return f"{self.cores} cores, {self.memory_gb:.0f} GB, {self.gpu or 'no GPU'}"


class Suggestion(NamedTuple):
    """A recipe with its number of steps."""

    recipe: Recipe
    num_steps: int
    epochs: float
    """times through the text in pretraining"""
    seconds: float
    """of all trainings, at assumed speeds"""


def suggest(text_bytes: float, hardware: Hardware) -> Suggestion:
    """The largest recipe that the text and the machine allow a quarter of its steps, or the first.

    Args:
        text_bytes: size of the text
        hardware: the machine that trains
    """
    tokens = text_bytes / BYTES_PER_TOKEN
    for recipe in reversed(RECIPES):
        tokens_per_step, seconds = recipe.batch_size * recipe.length, step_seconds(recipe, hardware)
        most = min(EPOCHS * tokens / tokens_per_step, HOURS * 3600 / seconds)
        has_memory = 1000 * hardware.memory_gb >= demand_of(recipe.size).mem_mb
        if recipe is RECIPES[0] or (has_memory and most >= recipe.num_steps / 4):
            break
    steps = max(FEWEST, two_digits(most))
    return Suggestion(recipe, steps, steps * tokens_per_step / tokens, steps * seconds)


def two_digits(number: float) -> int:
    """A number rounded down to two digits: 1,987 is 1,900."""
    unit = 10 ** max(0, len(str(int(number))) - 2)
    return int(number) // unit * unit


def step_seconds(recipe: Recipe, hardware: Hardware) -> float:
    """Seconds of all trainings for each step of pretraining, with the baseline and the rounds."""
    blocks, width, _, cond_width = shape_of_size(recipe.size)
    network = denoiser_shape(blocks, width, recipe.vocab_size, cond_width)
    baseline = causal_shape(blocks, width, recipe.vocab_size)
    texts, length, masked = recipe.batch_size, recipe.length, MASKED["loglinear"]
    flops = training_flops(network, texts, length, texts * length * masked)
    flops += recipe.of_baseline * training_flops(baseline, texts, length, texts * length)
    for number in range(ROUNDS):
        dt = SUBSTEPS**number / length  # of a round's teacher, which begins with a step per token
        shares = masked, dt - dt**2 / 2, SUBSTEPS
        flops += OF_ROUND * distillation_flops(network, network, texts, length, *shares)
    demand = demand_of(recipe.size)
    gpus = min(1, demand.pretrain[0]) if hardware.gpu else 0
    rates = Rates(find_gpu(hardware.gpu) or min(GPUS, key=lambda key: GPUS[key].bfloat16))
    work = Work(flops, width, recipe.precision)
    return rates.seconds(work, gpus, min(hardware.cores, demand.threads))

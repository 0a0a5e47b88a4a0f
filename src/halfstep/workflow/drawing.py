"""The work of drawing texts: by each sampler of a denoiser, and by an autoregressive network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from halfstep.models import flops
from halfstep.models.flops import Shape
from halfstep.workflow.calls import Call
from halfstep.workflow.rates import Work

BYTES = {"float32": 4, "bfloat16": 2}  # of a number


def draw_work(
    call: Call,
    number: int,
    length: int,
    free: int,
    steps: int,
    sampler: str,
    alike: bool = False,
) -> Iterator[Work]:
    """`number` texts of `length` tokens, of which `free` are written in `steps` steps.

    Texts that are `alike` at first, all masked, share the features of their first pass. A baseline
    reads every token once, and a step of it reads all weights and the keys and values before it.
    """
    network, precision = call.network, call.inference_precision
    batches = math.ceil(number / call.micro_batch)
    if call.is_baseline:
        yield decode_work(network, number, batches, length, free, precision)
        return
    if sampler == "speculative":
        yield from _speculative_work(call, number, length, free, steps)
        return
    passes, rows = SAMPLER_PASSES[sampler](steps, length, free)
    texts = number * passes
    if alike and sampler in ("ancestral", "analytic", "first_hitting"):
        texts -= number - batches
    wanted = texts * length if sampler == "ancestral_float32" else None
    work = flops.forward_flops(network, texts, length, number * rows, wanted=wanted)
    if sampler == "energy":  # the baseline has the denoiser's size, or nearly so
        asked = texts * int(call.text("candidates", "8"))
        work += flops.forward_flops(network, asked, length, asked * length)
    moved = batches * passes * network.weights * BYTES[precision]
    yield Work(work, network.width, precision, moved)


def _speculative_work(
    call: Call, number: int, length: int, free: int, steps: int
) -> Iterator[Work]:
    """Drafts for all texts of a batch, and their verification by a model that is about as large."""
    network, precision = call.network, call.inference_precision
    reads = draft_reads(int(call.text("draft_tokens", "4")), steps, length, free)
    texts = number * (reads.denoiser + reads.scorer) / length
    work = flops.forward_flops(network, texts, length, number * (reads.drafted + reads.scorer))
    batches = math.ceil(number / call.micro_batch)
    moved = batches * (reads.drafts + free) * network.weights * BYTES[precision]
    yield Work(work, network.width, precision, moved)


class DraftReads(NamedTuple):
    """What the sampler `speculative` takes for a text.

    drafts: passes of the denoiser; drafted: tokens that it draws
    denoiser, scorer: tokens that the denoiser and the autoregressive model read
    """

    drafts: int
    drafted: int
    denoiser: int
    scorer: int


def draft_reads(draft_tokens: int, steps: int, length: int, free: int) -> DraftReads:
    """For drafts of which no token is accepted: that depends on the text, and this is the most.

    The first pass computes the whole text, later ones two drafts and a token. The scorer reads the
    given tokens, then each draft and the token before it, and without a draft one token.
    """
    drafts = min(steps, free)
    return DraftReads(
        drafts=drafts,
        drafted=drafts * draft_tokens,
        denoiser=length + drafts * min(2 * draft_tokens + 1, length),
        scorer=length - free + drafts * (1 + draft_tokens) + free - drafts,
    )


def decode_work(
    network: Shape, number: int, batches: int, length: int, free: int, precision: str
) -> Work:
    """An autoregressive network writes the last `free` of `length` tokens of each text."""
    work = flops.forward_flops(network, number, length, number * free)
    cache = number * free * length * network.width * network.blocks  # keys and values, half of each
    moved = (batches * free * network.weights + cache) * BYTES[precision]
    return Work(work, network.width, precision, moved)


def nonempty_steps(steps: int, free: int) -> float:
    """Expected steps of `steps` in which one of `free` positions is revealed, each uniformly."""
    return steps * (1 - (1 - 1 / steps) ** free)


def _block_passes(steps: int, length: int, free: int) -> tuple[float, float]:
    size = min(length, max(16, math.ceil(length / steps)))
    blocks = math.ceil(length / size)
    inside = nonempty_steps(max(1, steps // blocks), size)
    return blocks * (1 + (inside - 1) * size / length), free


SAMPLER_PASSES: dict[str, Callable[[int, int, int], tuple[float, float]]] = {
    "ancestral": lambda steps, length, free: (nonempty_steps(steps, free), free),
    "analytic": lambda steps, length, free: (nonempty_steps(steps, free), free),
    "first_hitting": lambda steps, length, free: (min(steps, free), free),
    "block": _block_passes,
    "ancestral_float32": lambda steps, length, free: (steps, free * (steps + 1) / 2),
    # Their passes depend on the text: these are the most.
    "threshold": lambda steps, length, free: _all_masked(min(steps, free), free),
    "entropy_bounded": lambda steps, length, free: _all_masked(min(steps, free), free),
    "remask": lambda steps, length, free: (steps, 2 * free),
    "energy": lambda steps, length, free: _all_masked(nonempty_steps(steps, free), free),
}
"""(steps, length, free positions) -> passes of a text, and positions that it reads out"""


def _all_masked(passes: float, free: int) -> tuple[float, float]:
    """Each pass reads out all positions that are still masked."""
    return passes, free * (passes + 1) / 2

"""Answers that a model writes to the questions of lm-eval's tasks of type generate_until (GSM8K).

Protocol `written`: a text is what begins a text of the model, the context, max_gen_toks positions
that are written, and EOS. A denoiser fills them in with a sampler in a number of steps; an
autoregressive model writes one after the other. The answer ends before EOS, and before the first of
the task's strings `until`. Of a context that leaves no room for the answer the last tokens are
kept.

The task's generation_kwargs say how a token is drawn. With `do_sample: false`, as by default, or
temperature 0 it is the likeliest token at its position, drawn at temperature GREEDY; otherwise
`temperature` divides the logits. In which step a position is revealed is the sampler's choice, by
its seed. Other keys have no effect.

The texts of a task are numbered by their length and then in the order of its questions, and text i
has the random numbers of sample i. So answers depend neither on the micro-batch nor on the number
of processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from halfstep.diffusion.contracts import Samples
from halfstep.errors import HalfstepError, reason
from halfstep.metrics.likelihood import Question, Tick

if TYPE_CHECKING:
    from halfstep.checkpoint import Model

GREEDY = 1e-6  # temperature of draws that take the likeliest token

AnswerWriter = Callable[[Tensor, int, float, int], Samples]
"""(prompts[n, P], tokens, temperature, first) -> n texts of P + tokens tokens that begin with them.

Text i has the random numbers of sample first + i.
"""


@dataclass(frozen=True)
class Answering:
    """How a model writes answers.

    encode: the tokens of a context after what begins a text of the model
    writers: by numbers of steps; None is that of an autoregressive model
    """

    encode: Callable[[str], list[int]]
    writers: dict[int | None, AnswerWriter]


@dataclass(frozen=True)
class Costs:
    """What an answer took, or the means of several.

    passes: of the model
    asked: passes of the autoregressive model that the sampler asks (NaN if it asks none)
    tokens: that were written, before the answer was cut
    temperature: of their draws; 0 for the likeliest ones
    """

    passes: float
    asked: float
    tokens: float
    temperature: float


@dataclass(frozen=True)
class AnswerOptions:
    """What a task says of its answers.

    tokens: the largest number of tokens
    temperature: of their draws; 0 for the likeliest ones
    until: strings before which an answer ends
    """

    tokens: int
    temperature: float
    until: tuple[str, ...]

    @classmethod
    def of(cls, task: str, kwargs: dict[str, Any], model: Model) -> AnswerOptions:
        """The options in lm-eval's generation_kwargs; HalfstepError if the model cannot use them.

        Without max_gen_toks it is 256, as in lm-eval.
        """
        from lm_eval.models.utils import normalize_gen_kwargs

        try:
            found: Any = normalize_gen_kwargs(kwargs)
            temperature = float(found.get("temperature", 1)) if found["do_sample"] else 0.0
            until = tuple(map(str, found["until"]))
        except (TypeError, ValueError) as error:
            raise HalfstepError(
                f"tasks: {task}: its generation_kwargs cannot be read ({reason(error)}); "
                "correct the file"
            ) from error
        tokens = found["max_gen_toks"]
        most = model.length - len(model.framing.around([])) - 1  # a token of the context
        if not 1 <= tokens <= most:
            raise HalfstepError(
                f"tasks: {task}: max_gen_toks: found {tokens}, expected 1 to {most}, because a "
                f"text of this model has {model.length} tokens with the question; change it in "
                "the task's generation_kwargs"
            )
        if not 0 <= temperature < float("inf"):
            raise HalfstepError(
                f"tasks: {task}: temperature: found {temperature:g}, expected 0 or more; change it"
            )
        return cls(tokens, temperature, until)


def answer_window(model: Model, ids: list[int], options: AnswerOptions) -> tuple[Question, bool]:
    """The text of a question of which ids are the tokens, and whether it was cut to its last ones.

    The positions from `start` to `end` come after the ids.
    """
    framing = model.framing
    begin, room = len(framing.begin), model.length - len(framing.end) - options.tokens
    kept = ids if len(ids) <= room else [*ids[:begin], *ids[begin + len(ids) - room :]]
    start = len(kept)
    window = Question(tuple(kept), start, start + options.tokens, temperature=options.temperature)
    return window, len(kept) < len(ids)


def number_windows(
    tasks: Sequence[str], windows: Sequence[Question]
) -> tuple[list[int], list[Question]]:
    """Places of the windows in the order of their tasks and lengths, and the windows in this order.

    Each of them has its number among those of its task.
    """
    order = sorted(range(len(windows)), key=lambda i: (tasks[i], windows[i].start, windows[i].end))
    counts: Counter[str] = Counter()
    numbered = []
    for i in order:
        numbered.append(replace(windows[i], number=counts[tasks[i]]))
        counts[tasks[i]] += 1
    return order, numbered


def write_answers(
    write: AnswerWriter, questions: Sequence[Question], width: int, micro_batch: int, tick: Tick
) -> np.ndarray:
    """Write the texts of questions: [Q, 2 + width] float64.

    The columns are the passes of the model, those of an autoregressive model that its sampler asks
    (NaN if it asks none), and the token ids of the answer, filled up with -1.
    """
    found = np.full((len(questions), 2 + width), -1.0)
    at = 0
    for batch in _batches(questions, micro_batch):
        one = batch[0]
        prompts = torch.tensor([question.ids for question in batch])
        tokens = one.end - one.start
        texts = write(prompts, tokens, one.temperature or GREEDY, one.number)
        rows = found[at : at + len(batch)]
        rows[:, 0] = texts.network_evaluations.numpy()
        asked = texts.autoregressive_passes
        rows[:, 1] = np.nan if asked is None else asked.numpy()
        rows[:, 2 : 2 + tokens] = texts.ids[:, one.start : one.end].numpy()
        at += len(batch)
        if tick:
            tick(len(batch))
    return found


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Consecutive numbers with texts of one shape: a batch is one tensor, and nothing is padded."""

    def alike(numbered: tuple[int, Question]) -> tuple[float, ...]:
        place, one = numbered
        return one.number - place, one.start, one.end, one.temperature

    for _, group in groupby(enumerate(questions), alike):
        same = [question for _, question in group]
        yield from (same[at : at + size] for at in range(0, len(same), size))


def cut_at(text: str, until: Iterable[str]) -> str:
    """The text before the first of these strings; an empty string ends nothing."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends, default=len(text))]


def before_token(ids: np.ndarray, token: int) -> list[int]:
    """The token ids before the first one that is `token`, and before a negative one."""
    ends = np.flatnonzero((ids == token) | (ids < 0))
    return ids[: ends[0] if len(ends) else len(ids)].astype(int).tolist()

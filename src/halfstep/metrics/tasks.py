"""Tasks of lm-eval: likelihoods, as in SDTT's Table 1, and answers that a model writes (GSM8K).

lm-eval makes the questions, and its own metrics and standard errors judge the answers. Protocols:

    elbo            multiple choice: a text is BOS + question + answer + EOS, all of its tokens are
                    masked in turn, and the answer with the largest ELBO of the whole text is chosen
    elbo-per-token  the same, with the ELBO divided by the number of tokens of the text, as the
                    released harness ranks answers
    ar              multiple choice by an autoregressive model: log p(answer | question)
    written         the answer is what the model writes after the question (answers.py)

All answers to one question share their masks (elbo.py), so their order has little noise. The
released harness draws 1,024 times and masks for each answer alone, and gives the ELBO 0, which is
better than any other, to a text that is longer than the model; here it keeps its last tokens.

A task of another type, such as last words, is answered under `elbo` and `ar` as `HalfstepLM`
answers it: a continuation given its context, a whole text window by window.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.distributed.group import ALONE, Group
from halfstep.errors import HalfstepError, reason
from halfstep.metrics.answers import (
    Answering,
    AnswerOptions,
    AnswerWriter,
    Costs,
    answer_window,
    before_token,
    cut_at,
    number_windows,
    write_answers,
)
from halfstep.metrics.elbo import text_nelbo
from halfstep.metrics.lambada import ACCURACY, HalfstepLM, Request
from halfstep.metrics.likelihood import EXACT, Question, Tick
from halfstep.progress import only_our_bars
from halfstep.texts import check_regular, is_task_file

if TYPE_CHECKING:
    from lm_eval.api.group import Group as TaskGroup
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    from halfstep.checkpoint import Model

SHARES = ("acc", "acc_norm", "exact_match")  # measures of lm-eval that are shares of right answers
WRITES = "generate_until"  # type of the tasks that ask for written text
WRITTEN = "written"  # protocol of their answers
NO_FORK = "DISABLE_MULTIPROC"  # a variable of lm-eval
RESAMPLES = 1000  # of lm-eval's bootstrap, for measures without a closed form of the error


@dataclass(frozen=True)
class Score:
    """One number of lm-eval: `measure` of `task`, with its standard error if lm-eval has one.

    `count` questions; `data` is name[count]@sha256 of the questions; `passes` are the mean calls of
    the network for a text, if they are known. Of a written answer `steps` is the key of its writer,
    and `costs` are the mean numbers of an answer.
    """

    task: str
    measure: str
    protocol: str
    value: float
    error: float | None
    count: int
    data: str
    passes: float | None
    steps: int | None = None
    costs: Costs | None = None


class TaskLM(HalfstepLM):
    """A halfstep checkpoint for lm-eval: it answers multiple choice by the ELBO of whole texts, and
    writes what tasks ask it to write, where it is told how.

    `choices` are the names of the tasks that are multiple choice; `per_token` divides each ELBO by
    the number of tokens. Of a text longer than the model's length, BOS and the last tokens that
    fit are kept; `cut` counts them by task, and `cut_contexts` those of written answers.
    `steps` is the key of the writer that answers.
    """

    def __init__(
        self,
        model: Model,
        draws: int,
        micro_batch: int = 32,
        device: str = "cpu",
        seed: int = 0,
        group: Group = ALONE,
        answering: Answering | None = None,
    ):
        super().__init__(model, ACCURACY[model.kind][0], micro_batch, device, seed, group)
        self.draws, self.answering = draws, answering
        self.steps: int | None = None
        self.costs: dict[str, list[Costs]] = {}
        self.cut_contexts: dict[str, int] = {}
        self.choices: set[str] = set()
        self.per_token = False
        self.cut: dict[str, int] = {}
        self._nelbo: dict[tuple[str, int, tuple[str, ...]], tuple[float, int]] = {}

    def question(self, context: str, continuation: str) -> Question:
        """The framed window of context + continuation, in which the continuation is asked for."""
        return self._window(context, continuation)[0]

    def _window(self, context: str, continuation: str) -> tuple[Question, bool]:
        """The window of a text, and whether the text is longer than the window."""
        left, right = self.token_ids(context, continuation)
        if not right:
            raise HalfstepError(
                f"tasks: the answer {continuation[:40]!r} to {context[-40:]!r} has no tokens; "
                "correct the task's data or leave the task out"
            )
        framing = self.model.framing
        room = self.model.length - len(framing.around([]))
        kept = (left + right)[-room:]
        end = len(framing.begin) + len(kept)
        start = end - min(len(right), room)
        return Question(framing.around(kept), start, end), len(kept) < len(left + right)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """For multiple choice the ELBO of the whole text, which says nothing of a greedy guess."""
        found: dict[int, tuple[float, bool]] = {}
        diffusion = self.model.kind == "diffusion"
        whole = [i for i, one in enumerate(requests) if diffusion and one.task_name in self.choices]
        for i, value in zip(whole, self._elbos([requests[i] for i in whole]), strict=True):
            found[i] = value, False
        others = [i for i in range(len(requests)) if i not in found]
        answers = super().loglikelihood([requests[i] for i in others]) if others else []
        found |= dict(zip(others, answers, strict=True))
        if any(math.isnan(value) for value, _ in found.values()):
            raise HalfstepError(
                "tasks: a log-likelihood is not a number, so the weights hold NaN; "
                "check the training's journal"
            )
        return [found[i] for i in range(len(requests))]

    def _elbos(self, requests: list[Any]) -> list[float]:
        """The ELBO of each whole text in nats, or in nats per token. Repeated texts are asked once.

        The answers to one question of a task have its number, so that they share their masks.
        """
        keys = [(one.task_name, one.doc_id, one.args) for one in requests]
        new = [key for key in dict.fromkeys(keys) if key not in self._nelbo]
        questions = []
        for task, number, args in new:
            window, is_cut = self._window(*args)
            self.cut[task] = self.cut.get(task, 0) + is_cut
            inside = slice(0, len(window.ids))  # two EOS of our own are part of the text
            if self.model.is_framed:
                inside = self.model.framing.inside(len(window.ids))
            questions.append(replace(window, start=inside.start, end=inside.stop, number=number))
        if questions:
            nats = self._ask("elbo", questions).tolist()
            tokens = [question.end - question.start for question in questions]
            self._nelbo |= dict(zip(new, zip(nats, tokens, strict=True), strict=True))
        found = [self._nelbo[key] for key in keys]
        return [-nats / tokens if self.per_token else -nats for nats, tokens in found]

    def passes_each(self, tasks: Sequence[str]) -> float | None:
        """Mean calls of the network for a text of these tasks; None if it is not known."""
        if self.model.kind == "autoregressive":
            return 1.0
        tokens = [n for (task, _, _), (_, n) in self._nelbo.items() if task in tasks]
        found = [2**n - 1 if n <= EXACT else self.draws for n in tokens]
        return float(np.mean(found)) if found else None

    @property
    def answers(self) -> dict[str, Callable[[list[Question], int, Tick], np.ndarray]]:
        """What can be asked of the network."""
        writers = self.answering.writers if self.answering else {}
        written = {_label(steps): partial(self._write, write) for steps, write in writers.items()}
        return super().answers | {"elbo": self._whole} | written

    def _whole(self, questions: list[Question], first: int, tick: Tick) -> np.ndarray:
        tokens = self.micro_batch * self.model.length
        denoiser = self.model.denoiser
        return text_nelbo(denoiser, questions, self.draws, tokens, self.seed, self._device, tick)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers that the model writes, with the number of steps `steps` (answers.py)."""
        if self.answering is None:
            return super().generate_until(requests)
        self.costs, self.cut_contexts = {}, {}
        options, windows = [], []
        for one in requests:
            context, kwargs = one.args
            options.append(AnswerOptions.of(one.task_name, kwargs, self.model))
            window, is_cut = answer_window(self.model, self.answering.encode(context), options[-1])
            windows.append(window)
            cut = self.cut_contexts.get(one.task_name, 0)
            self.cut_contexts[one.task_name] = cut + is_cut
        order, numbered = number_windows([one.task_name for one in requests], windows)
        texts = [""] * len(requests)
        rows = self._ask(_label(self.steps), numbered) if numbered else []
        for i, (passes, asked, *ids) in zip(order, rows, strict=True):
            answer = self.model.tokenizer.decode(before_token(np.array(ids), self.model.eos_id))
            texts[i] = cut_at(answer, options[i].until)
            costs = Costs(passes, asked, options[i].tokens, options[i].temperature)
            self.costs.setdefault(requests[i].task_name, []).append(costs)
        return texts

    def _write(
        self, write: AnswerWriter, questions: list[Question], first: int, tick: Tick
    ) -> np.ndarray:
        return write_answers(write, questions, self.model.length, self.micro_batch, tick)

    def costs_of(self, tasks: Sequence[str]) -> Costs:
        """The means of the answers to these tasks."""
        every = [astuple(one) for task in tasks for one in self.costs[task]]
        return Costs(*np.mean(every, 0).tolist())


def _label(steps: int | None) -> str:
    """What is asked of a writer of TaskLM."""
    return "answers" if steps is None else f"answers in {steps} steps"


def evaluate_tasks(
    lm: TaskLM, names: Sequence[str], items: int | None = None
) -> list[Score] | None:
    """lm-eval's numbers of each task and each group of tasks.

    Rank 0 of the group evaluates; the other ranks answer their share of its questions and return
    None.

    Args:
        lm: the model
        names: names of lm-eval's tasks, tags and groups, or paths of .yaml files
        items: maximum number of questions of each task (all)
    """
    if not lm.group.is_main:
        lm.serve()
        return None
    tasks, groups = load_tasks(names)
    written = {name: task for name, task in tasks.items() if task.OUTPUT_TYPE == WRITES}
    _check_written(lm, written)
    lm.choices = {name for name, task in tasks.items() if task.OUTPUT_TYPE == "multiple_choice"}
    diffusion, scores = lm.model.kind == "diffusion", []
    if read := {name: task for name, task in tasks.items() if name not in written}:
        scores += _run(lm, read, _groups_of(groups, read), items, "elbo" if diffusion else "ar")
    if diffusion and lm.choices:
        lm.per_token = True
        chosen = {name: task for name, task in tasks.items() if name in lm.choices}
        found = _run(lm, chosen, {}, items, "elbo-per-token")
        scores += [score for score in found if score.measure == "acc"]
    if written and lm.answering:
        for steps in lm.answering.writers:
            lm.steps = steps
            scores += _run(lm, written, _groups_of(groups, written), items, WRITTEN)
    lm.group.broadcast(None)
    for task, count in lm.cut.items():
        if count:
            print(
                f"tasks: {count} texts of {task} are longer than {lm.model.length} tokens; "
                "BOS and their last tokens were kept",
                file=sys.stderr,
            )
    for task, count in lm.cut_contexts.items():
        if count:
            print(
                f"tasks: {count} questions of {task} leave no room for an answer in "
                f"{lm.model.length} tokens; BOS and their last tokens were kept",
                file=sys.stderr,
            )
    return scores


def _check_written(lm: TaskLM, written: dict[str, Task]) -> None:
    """HalfstepError unless the tasks that ask for written text and the ways to write agree."""
    answering = lm.answering
    if answering and not written and None not in answering.writers:
        raise HalfstepError(
            "--steps: found step counts, but no task asks for written text (generate_until); "
            "leave them out, or name such a task"
        )
    for name, task in written.items():
        if answering is None:
            raise HalfstepError(
                f"tasks: {name} asks the model to write text (generate_until), but no step counts "
                "are given; name some in evaluation.task_steps (--steps), or leave the task out"
            )
        AnswerOptions.of(name, task.config.generation_kwargs, lm.model)


def _groups_of(groups: dict[str, TaskGroup], tasks: dict[str, Task]) -> dict[str, TaskGroup]:
    """The groups of which all tasks are among these."""
    return {
        name: group
        for name, group in groups.items()
        if all(task.task_name in tasks for task in group.get_all_tasks())
    }


def load_tasks(names: Sequence[str]) -> tuple[dict[str, Task], dict[str, TaskGroup]]:
    """lm-eval's tasks and groups of tasks by these names or files, with the data of the tasks.

    HalfstepError for an unknown name, absent data, or a file of a task that asks for written text
    and does not say where it ends.
    """
    from datasets import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = _task_manager(include_defaults=not all(map(is_task_file, names)))
    for name in names:
        _check_known(name, manager.all_tasks)
    try:
        loaded: Any = manager.load(list(names))
    except Exception as error:  # the hub's client, datasets, YAML and the code of a task
        listed = ", ".join(names)
        raise HalfstepError(
            f"tasks: cannot load {listed[:100]} ({type(error).__name__}: {reason(error)}); correct "
            "the file, or run `halfstep fetch --repositories task:NAME` where there is a network"
        ) from error
    for name in filter(is_task_file, names):
        _check_until(name)
    return loaded["tasks"], loaded.get("groups", {})


@cache
def _task_manager(include_defaults: bool) -> TaskManager:
    """lm-eval's index of all its tasks, which takes seconds to make, or of none."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _check_known(name: str, known: Sequence[str]) -> None:
    """HalfstepError unless lm-eval knows the name, or the file exists."""
    if is_task_file(name):
        check_regular(Path(name), "tasks")
        if re.search(r"^group:", Path(name).read_text(errors="replace"), re.MULTILINE):
            raise HalfstepError(
                f"tasks: {name} defines a group, which lm-eval finds by its name only; "
                "name the .yaml file of each task"
            )
    elif name not in known:
        near = difflib.get_close_matches(name[:80], known, 1)
        hint = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists all names"
        raise HalfstepError(f"tasks: lm-eval has no task {name[:100]!r}; {hint}")


def _check_until(name: str) -> None:
    """HalfstepError if a task's file has no `until`: lm-eval would end answers at a blank line."""
    from lm_eval.tasks._yaml_loader import load_yaml

    raw = load_yaml(name, resolve_func=False)
    if raw.get("output_type") == WRITES and "until" not in (raw.get("generation_kwargs") or {}):
        raise HalfstepError(
            f"tasks: {name}: generation_kwargs.until: found none, expected the strings before "
            "which an answer ends; add them, or [] for answers that end with the text"
        )


def task_texts(name: str) -> Iterator[str]:
    """The whole texts of a task that asks for their likelihood (loglikelihood_rolling)."""
    for task in load_tasks([name])[0].values():
        if task.OUTPUT_TYPE != "loglikelihood_rolling":
            raise HalfstepError(
                f"perplexity: the task {name} is of type {task.OUTPUT_TYPE}, expected "
                "loglikelihood_rolling; name it in evaluation.tasks"
            )
        yield from (task.doc_to_target(doc) for doc in task.eval_docs)


def _run(
    lm: TaskLM,
    tasks: dict[str, Task],
    groups: dict[str, TaskGroup],
    items: int | None,
    protocol: str,
) -> list[Score]:
    """lm-eval's numbers of tasks and groups."""
    from lm_eval.evaluator import simple_evaluate

    members = {name: [task.task_name for task in groups[name].get_all_tasks()] for name in groups}
    grouped = {task for names in members.values() for task in names}
    inner = {child.name for group in groups.values() for child in group.get_all_groups()}
    asked = [group for name, group in groups.items() if name not in inner]
    asked += [task for name, task in tasks.items() if name not in grouped]
    with _one_process(), only_our_bars():
        found: Any = simple_evaluate(
            model=lm,
            tasks=asked,
            task_manager=_task_manager(include_defaults=False),
            limit=items,
            bootstrap_iters=RESAMPLES,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    scores: list[Score] = []
    for name, numbers in found["results"].items():
        of_task = members.get(name, [name])
        samples = [sample for task in of_task for sample in found["samples"][task]]
        shown = dict.fromkeys((sample["doc_hash"], sample["prompt_hash"]) for sample in samples)
        digest = hashlib.sha256("".join(map("".join, shown)).encode()).hexdigest()
        count = sum(found["n-samples"][task]["effective"] for task in of_task)
        for measure, value, error in _measures(numbers):
            if measure == "exact_match" and lm.choices.intersection(of_task):
                continue  # a greedy guess, of which the ELBO of a whole text says nothing
            about = f"{name}[{count}]@{digest[:12]}"
            score = Score(name, measure, protocol, value, error, count, about, None)
            if protocol == WRITTEN:
                costs = lm.costs_of(of_task)
                scores.append(replace(score, passes=costs.passes, steps=lm.steps, costs=costs))
            else:
                scores.append(replace(score, passes=lm.passes_each(of_task)))
    return scores


@contextmanager
def _one_process() -> Iterator[None]:
    """Let lm-eval's bootstrap fork no process: next to torch's threads a fork may hang forever."""
    before = os.environ.get(NO_FORK)
    os.environ[NO_FORK] = "1"
    try:
        yield
    finally:
        os.environ.pop(NO_FORK)
        if before is not None:
            os.environ[NO_FORK] = before


def _measures(numbers: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """Measure, value and standard error among lm-eval's numbers of a task: acc,none: 0.5, ..."""
    for key, value in numbers.items():
        measure, comma, chosen = key.partition(",")
        if not comma or measure.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = numbers.get(f"{measure}_stderr,{chosen}")
        error = float(error) if isinstance(error, int | float) else None
        yield measure if chosen == "none" else f"{measure}, {chosen}", float(value), error

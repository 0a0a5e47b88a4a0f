"""`halfstep score-tasks` and `score-perplexity`: what a model makes of questions and texts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.commands.writers import Writer, prompt_ids, sampler_name, text_writer
from halfstep.config import Count, DrawOptions, Evaluation, Machine, Steps, Weights, Word
from halfstep.data.files import READERS, read_documents
from halfstep.data.windows import Layout
from halfstep.data.zero_shot import DATA_SETS, cut_windows, find_data_set, read_rows_of
from halfstep.diffusion.contracts import Samples
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.metrics.rows import mean_row, model_name, name_parts, row, share_row, write_rows
from halfstep.texts import is_task_file
from halfstep.workflow.task_sources import names_file

if TYPE_CHECKING:
    from halfstep.metrics.answers import Answering, AnswerWriter
    from halfstep.metrics.tasks import Costs, Score

NORMAL = 1.959964  # 97.5% point of the normal distribution


def score_tasks(  # noqa: PLR0913  the flags of the command
    checkpoint: Path,
    output: Path,
    drawing: DrawOptions,
    machine: Machine,
    tasks: list[Word] = [],  # noqa: B006
    task_draws: Count = 128,
    task_items: Count | None = None,
    steps: list[Steps] = [],  # noqa: B006
) -> None:
    """Answer tasks of lm-eval, such as ARC, HellaSwag and GSM8K, with lm-eval's own metrics.

    A denoiser ranks the answers to a question by the ELBO of the whole text, an autoregressive
    model by their log-likelihood. Answers that a task wants to be written (generate_until) are
    written by a denoiser with the sampler at each of the step counts, by an autoregressive model
    token by token, at the temperature that the task's generation_kwargs say. Shares of right
    answers have Wilson's interval; other measures have 1.96 of lm-eval's standard errors to either
    side.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        output: JSON file of the rows
        tasks: names of lm-eval's tasks, or .yaml files
        task_draws: masks of each text by which its ELBO is estimated
        task_items: maximum number of questions of each task (default: all)
        steps: numbers of sampling steps of written answers
    """
    if not tasks:
        raise HalfstepError(
            "--tasks: found none, expected names of lm-eval's tasks or .yaml files; name one"
        )
    if drawing.temperature != 1:
        raise HalfstepError(
            f"--temperature: found {drawing.temperature:g}, but each task says at which "
            "temperature its answers are written; leave it out"
        )
    from halfstep.metrics.elbo import SEED
    from halfstep.metrics.tasks import SHARES, TaskLM, evaluate_tasks

    group, device = join_group(machine), str(find_device(machine))
    model = load_checkpoint(checkpoint, drawing.weights, device, drawing.precision)
    answering = make_answering(model, steps, drawing)
    lm = TaskLM(model, task_draws, machine.micro_batch, device, SEED, group, answering)
    scores = evaluate_tasks(lm, tasks, task_items)
    if scores is None:
        return
    rows = []
    for score in scores:
        columns = _columns(checkpoint, model, score.data) | {
            "task": score.task,
            "measure": score.measure,
            "network_evaluations": score.passes,
            "seed": SEED if model.kind == "diffusion" else None,
        }
        if score.costs:
            columns |= _columns_of_answers(model, score, score.costs, drawing)
        hits = round(score.value * score.count)
        is_share = abs(hits - score.value * score.count) < 1e-6  # not the mean of some groups
        if score.measure.partition(",")[0] in SHARES and is_share:
            rows.append(share_row("task_score", score.protocol, hits, score.count, columns))
            continue
        half = None if score.error is None else NORMAL * score.error
        interval = (None, None) if half is None else (score.value - half, score.value + half)
        columns |= {"num_samples": score.count}
        rows.append(row("task_score", score.protocol, score.value, interval, **columns))
    read = [*checkpoint_files(checkpoint, drawing.weights), *filter(is_task_file, tasks)]
    write_rows(output, rows, read)


def make_answering(model: Model, steps: list[int], drawing: DrawOptions) -> Answering | None:
    """How a model writes answers to tasks; None for a denoiser without step counts."""
    from halfstep.metrics.answers import Answering

    counts = sorted(set(steps)) if model.denoiser is not None else [None]
    writers = {count: _answer_writer(model, count, drawing) for count in counts}
    return Answering(partial(prompt_ids, model), writers) if writers else None


def _answer_writer(model: Model, steps: int | None, drawing: DrawOptions) -> AnswerWriter:
    """A function that writes texts of one shape after the other; each shape has its writer."""

    @lru_cache(1)
    def writer(length: int, temperature: float) -> Writer:
        options = drawing.model_copy(update={"temperature": temperature})
        return text_writer(model, length, steps or length, options, end=model.framing.end)

    def write(prompts: Tensor, tokens: int, temperature: float, first: int) -> Samples:
        return writer(prompts.shape[1] + tokens, temperature)(prompts, first)

    return write


def _columns_of_answers(
    model: Model, score: Score, costs: Costs, drawing: DrawOptions
) -> dict[str, Any]:
    """The columns of written answers; a greedy one has temperature 0."""
    columns: dict[str, Any] = {
        "sampler": "autoregressive",
        "steps": score.steps,
        "seed": drawing.sampling_seed,
        "draw_dtype": "float64",
        "temperature": costs.temperature,
        "top_p": drawing.top_p,
    }
    if score.steps is None:
        return columns
    sampler = SAMPLERS[drawing.sampler]
    columns |= {
        "sampler": sampler_name(drawing),
        "draw_dtype": sampler.draw_dtype,
        "tokens_per_step": costs.tokens / score.steps,
        "top_p": drawing.top_p if "top_p" in sampler.options else 1.0,
    }
    if not math.isnan(costs.asked):
        columns["autoregressive_passes"] = costs.asked
    made_for = model.meta.get("student_steps")
    return columns | ({"student_steps": made_for} if made_for else {})


def score_perplexity(
    checkpoint: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    weights: Weights = "ema",
) -> None:
    """Measure a model's perplexity per token of texts that it was not trained on (MDLM's Table 3).

    Of a denoiser it is an upper bound, exp(NELBO / tokens); of an autoregressive model it is exact.
    The bootstrap interval is over windows.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        output: JSON file of the rows
        weights: which weights of the checkpoint to score
    """
    if not evaluation.perplexity:
        raise HalfstepError(
            f"--perplexity: found none, expected {', '.join(DATA_SETS)}, a data set, a file of "
            "text or a task; name one"
        )
    from halfstep.metrics.elbo import SEED, window_nll

    group, device = join_group(machine), str(find_device(machine))
    model = load_checkpoint(checkpoint, weights, device, evaluation.precision)
    diffusion, draws = model.kind == "diffusion", evaluation.perplexity_draws
    rows = []
    for name in evaluation.perplexity:
        label = Path(name).name if names_file(name) else name
        windows = _windows(name, model, evaluation.task_items)
        batch = machine.micro_batch
        with computing(model.device, model.precision):
            values = window_nll(model, windows, draws, batch, device, group, label)
        if values is None:
            continue
        digest = hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest()
        about = f"{label}[{len(windows)}]@{digest[:12]}"
        columns = _columns(checkpoint, model, about) | {
            "task": label,
            "network_evaluations": float(draws if diffusion else 1),
            "num_samples": len(windows),
            "length": windows.shape[1],
            "seed": SEED if diffusion else None,
        }
        protocol, resamples = "elbo" if diffusion else "ar", evaluation.bootstrap
        rows.append(
            mean_row("zero_shot_perplexity", protocol, values, columns, resamples, _perplexity)
        )
    if group.is_main:
        read = [*checkpoint_files(checkpoint, weights), *filter(names_file, evaluation.perplexity)]
        write_rows(output, rows, read)


def _columns(checkpoint: Path, model: Model, data: str) -> dict[str, Any]:
    return {
        **name_parts(model_name(checkpoint)),
        "weights": model.weights,
        "precision": model.precision,
        "checkpoint": model.sha256[:16],
        "data": data,
    }


def _perplexity(nats: float, tokens: float) -> float:
    return np.exp(nats / tokens)


def _windows(name: str, model: Model, most: int | None) -> np.ndarray:
    """The windows of one text; an error begins with its name."""
    try:
        layout = Layout(model.length, model.eos_id, model.framing)
        return cut_windows(_texts(name), model.tokenizer, layout, most)
    except HalfstepError as error:
        where = "" if str(error).startswith(("perplexity:", "tasks:")) else f"perplexity: {name}: "
        raise HalfstepError(f"{where}{error}") from None


def _texts(name: str) -> Iterable[str]:
    """The texts of a data set, of a file, or of a task of lm-eval."""
    data = find_data_set(name)
    if data is not None:
        return read_rows_of(data)
    if name.endswith(tuple(READERS)):
        return (text for text, _ in read_documents(Path(name), "text"))
    from halfstep.metrics.tasks import task_texts

    return task_texts(name)

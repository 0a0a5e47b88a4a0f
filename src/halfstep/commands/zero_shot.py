"""`halfstep score-tasks` and `score-perplexity`: what a model makes of questions and texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.config import Evaluation, Machine, Weights
from halfstep.data.files import READERS, read_documents
from halfstep.data.pack import Layout
from halfstep.data.zero_shot import DATA_SETS, cut_windows, find_data_set, read_rows_of
from halfstep.distributed.device import find_device
from halfstep.distributed.group import join_group
from halfstep.errors import HalfstepError
from halfstep.kernels.precision import computing
from halfstep.metrics.rows import mean_row, model_name, name_parts, row, share_row, write_rows
from halfstep.texts import is_task_file
from halfstep.workflow.task_sources import names_file

NORMAL = 1.959964  # 97.5% point of the normal distribution


def score_tasks(
    checkpoint: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    weights: Weights = "ema",
) -> None:
    """Answer tasks of lm-eval, such as ARC and HellaSwag, with lm-eval's own metrics.

    A denoiser ranks the answers to a question by the ELBO of the whole text, an autoregressive
    model by their log-likelihood. Accuracies have Wilson's interval; other measures have 1.96 of
    lm-eval's standard errors to either side.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        output: JSON file of the rows
        weights: which weights of the checkpoint to score
    """
    if not evaluation.tasks:
        raise HalfstepError(
            "--tasks: found none, expected names of lm-eval's tasks or .yaml files; name one"
        )
    from halfstep.metrics.elbo import SEED
    from halfstep.metrics.tasks import SHARES, TaskLM, evaluate_tasks

    group, device = join_group(machine), str(find_device(machine))
    model = load_checkpoint(checkpoint, weights, device, evaluation.precision)
    lm = TaskLM(model, evaluation.task_draws, machine.micro_batch, device, SEED, group)
    scores = evaluate_tasks(lm, evaluation.tasks, evaluation.task_items)
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
        hits = round(score.value * score.count)
        is_share = abs(hits - score.value * score.count) < 1e-6  # not the mean of some groups
        if score.measure in SHARES and is_share:
            rows.append(share_row("task_score", score.protocol, hits, score.count, columns))
            continue
        half = None if score.error is None else NORMAL * score.error
        interval = (None, None) if half is None else (score.value - half, score.value + half)
        columns |= {"num_samples": score.count}
        rows.append(row("task_score", score.protocol, score.value, interval, **columns))
    read = [*checkpoint_files(checkpoint, weights), *filter(is_task_file, evaluation.tasks)]
    write_rows(output, rows, read)


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

"""`halfstep score-lambada`: metric rows of the last words that models predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.config import Evaluation, Machine, Weights
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.files import sha256
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.metrics.rows import KeptRows, mean_row, model_name, name_parts, share_row, write_rows
from halfstep.records.journal import commit
from halfstep.texts import items_file

LAMBADA_SEED = 0  # of the masks drawn for an item


def score_lambada(
    checkpoint: Annotated[list[Path], Field(min_length=1)],
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    weights: Weights = "ema",
) -> None:
    """Score the last words of models through lm-eval: accuracy and perplexity by each protocol.

    Accuracies have Wilson's interval; perplexities, which are per word, a bootstrap interval.

    Rows of a finished model are kept in {output without its ending}.partial until all are finished.
    So a call that was stopped is continued by the next one, unless the items or settings differ.

    Args:
        checkpoint: checkpoint folders, diffusion or autoregressive
        corpus: folder of `halfstep prepare-corpus`, which holds the items if lambada is last_words
        output: JSON file of the rows
        weights: which weights of the checkpoints to score
    """
    items = evaluation.lambada
    if items is None:
        raise HalfstepError(
            "--lambada: found None, expected last_words, a hub name or a .jsonl file"
        )
    if items == "last_words":
        items = str(corpus / "last_words.jsonl")
    names = [model_name(folder) for folder in checkpoint]
    if len(set(names)) < len(names):
        raise HalfstepError(
            f"--checkpoint: found {', '.join(names)}, expected each model once; leave one out"
        )
    group = join_group(machine)
    kept = _kept_rows(output, items, evaluation) if group.is_main else None

    def score(folder: Path) -> list[dict[str, Any]]:
        model = load_checkpoint(folder, weights, str(find_device(machine)), evaluation.precision)
        of_model = name_parts(model_name(folder)) | {
            "weights": model.weights,
            "checkpoint": model.sha256[:16],
        }
        found = kept.of(**of_model) if kept else []
        if not group.broadcast(bool(found)):
            found = _rows_of_model(model, of_model, items, evaluation, machine, group)
            if kept:
                kept.add(found)
        return found

    rows = [row for folder in checkpoint for row in score(folder)]
    if kept:
        read = [file for folder in checkpoint for file in checkpoint_files(folder, weights)]
        write_rows(output, rows, [*read, items])
        kept.file.unlink(missing_ok=True)


def _kept_rows(output: Path, items: str, evaluation: Evaluation) -> KeptRows:
    """The rows that an earlier call kept, if it had these items and settings."""
    settings: dict[str, Any] = evaluation.model_dump(
        include={"lambada_items", "bootstrap", "precision"}
    )
    settings |= {"items": items, "commit": commit()}
    settings |= {name: PROTOCOLS[name] for name in ("lambada_accuracy", "lambada_perplexity")}
    if file := items_file(items):
        settings["sha256"] = sha256(file) if file.is_file() else None
    return KeptRows(output.with_suffix(".partial"), settings)


def _rows_of_model(
    model: Model,
    columns: dict[str, Any],
    items: str,
    evaluation: Evaluation,
    machine: Machine,
    group: Group,
) -> list[dict[str, Any]]:
    """The rows of one model, which have these columns and more; [] on other ranks than 0."""
    from halfstep.metrics.lambada import evaluate_lambada

    found = evaluate_lambada(
        model,
        items,
        evaluation.lambada_items,
        machine.micro_batch,
        str(model.device),
        LAMBADA_SEED,
        group,
    )
    if found is None:
        return []
    columns = columns | {"precision": model.precision, "data": found["data"]}

    def columns_of(protocol: str) -> dict[str, Any]:
        seed = LAMBADA_SEED if protocol.startswith("elbo") else None
        return columns | {"network_evaluations": found["passes"][protocol], "seed": seed}

    rows = []
    for name, hits in found["hits"].items():
        counts = int(hits.sum()), len(hits)
        rows.append(share_row("lambada_accuracy", name, *counts, columns_of(name)))
    for name, nll in found["nll"].items():
        of_protocol = columns_of(name) | {"num_samples": len(nll)}
        resamples = evaluation.bootstrap
        rows.append(mean_row("lambada_perplexity", name, nll, of_protocol, resamples, np.exp))
    return rows

"""`halfstep continue-prompts` and `score-continuations`: continue held-out text, and score that."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer
from torch import Tensor

from halfstep.checkpoint import checkpoint_files, load_checkpoint
from halfstep.commands.evaluate import load_judges, sample_columns
from halfstep.commands.generate import (
    describe,
    record_of,
    save_samples,
    step_folders,
    write_record_of_sets,
)
from halfstep.commands.samples import is_written, read_samples, sample_files
from halfstep.commands.writers import draw_texts, note_unused_options, text_writer
from halfstep.config import CONTINUE_STAGE, DrawOptions, Evaluation, Machine, Prompts, Steps
from halfstep.data.windows import (
    Windows,
    corpus_files,
    corpus_name,
    corpus_tokenizer,
    read_manifest,
    without_frame,
)
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.metrics.diversity import distinct, self_bleu
from halfstep.metrics.mauve import judge_features, mauve
from halfstep.metrics.perplexity import Judge, ids_nll
from halfstep.metrics.rows import mean_row, model_name, row, write_rows
from halfstep.resolve import check_fields

PROTOCOL = "continuations"
AT_ONCE = 1024  # windows read at a time in the search for documents


def continue_prompts(
    checkpoint: Path,
    corpus: Path,
    output: Path,
    steps: Annotated[list[Steps], Field(min_length=1)],
    prompts: Prompts,
    drawing: DrawOptions,
    machine: Machine,
) -> None:
    """Continue the beginnings of held-out documents: write samples.npy, samples.txt, samples.json.

    With several step counts the name of the output has {steps} in it: continuations/steps-{steps}.
    Finished sets of the same checkpoint, prompts and options are kept, so an interrupted call
    continues, and a further step count is drawn alone.

    samples.npy holds ids [num_prompts * per_prompt, prompt_tokens + continuation_tokens]; the
    continuations of a prompt are neighbors.

    A denoiser was trained on windows between two EOS, so it would write EOS at its last position,
    but no document ends there. Therefore it is given an EOS to the right of each text, which is not
    kept; a model of transformers is given the end of its frame. An autoregressive checkpoint takes
    one step per token, whatever `steps` is.

    Args:
        checkpoint: a checkpoint folder
        corpus: folder of `halfstep prepare-corpus` with the held-out documents to continue
        output: folder of the continuations, with {steps} where there are several step counts
        steps: numbers of sampling steps
    """
    group, device = join_group(machine), find_device(machine)
    folders = step_folders(output, steps)
    model = load_checkpoint(checkpoint, drawing.weights, str(device), drawing.precision)
    name = model_name(checkpoint)
    if model.tokenizer.get_vocab() != corpus_tokenizer(corpus).get_vocab():
        raise HalfstepError(
            f"{corpus}: its tokenizer is not that of {name}; "
            "name the corpus on which the model was trained"
        )
    texts = references(corpus, prompts)
    length = texts.shape[1]
    end = model.framing.end
    if length + len(end) > model.length:
        raise HalfstepError(
            f"prompt_tokens + continuation_tokens: found {prompts.prompt_tokens} + "
            f"{prompts.continuation_tokens}, but a text of {name} has {model.length} tokens, the "
            "last of them EOS; lower one of them"
        )
    if group.is_main:
        tokens = length if model.denoiser is not None else prompts.continuation_tokens
        note_unused_options(model, tokens, max(steps), drawing)
    for count in folders:  # a sampler may refuse a step count: before anything is drawn
        text_writer(model, length, count, drawing, end=end)
    given = texts[:, : prompts.prompt_tokens].repeat_interleave(prompts.per_prompt, 0)
    for count, folder in folders.items():
        how: dict[str, Any] = {"prompts": prompts.model_dump(), "stage": CONTINUE_STAGE}
        about = describe(checkpoint, model, count, len(given), drawing) | how
        label = f"continue {name} at {count} steps"
        is_kept = group.is_main and _is_finished(folder, about, given, model.tokenizer)
        if group.broadcast(is_kept):
            if group.is_main:
                print(f"{label}: kept, all {len(given)} texts are there", file=sys.stderr)
            continue
        started = time.monotonic()
        write = text_writer(model, length, count, drawing, end=end)
        written = draw_texts(write, given, machine.micro_batch, label, group)
        if written is not None:
            how["elapsed_s"] = time.monotonic() - started
            save_samples(checkpoint, folder, model, count, written, drawing, **how)
    if group.is_main:
        inputs = [
            *checkpoint_files(checkpoint, drawing.weights),
            *corpus_files(corpus, "validation"),
        ]
        write_record_of_sets(record_of(output), list(folders.values()), inputs)


def _is_finished(folder: Path, about: dict[str, Any], given: Tensor, tokenizer: Tokenizer) -> bool:
    """Does the folder hold finished continuations as `about` says, of the prompts given[N, P]?"""
    if not is_written(folder, about, tokenizer):
        return False
    ids, _ = read_samples(folder)
    return np.array_equal(ids[:, : given.shape[1]], given.numpy())


class _Continued(NamedTuple):
    """Continuations ids[num_prompts * per_prompt, L], and the columns of their metric rows."""

    ids: np.ndarray
    prompts: Prompts
    columns: dict[str, Any]


class _Judged(NamedTuple):
    """What one judge computes for a set of continuations; arrays are None on all ranks but 0."""

    prompts: Prompts
    columns: dict[str, Any]
    reference: np.ndarray | None
    """features of the documents themselves, [num_prompts, D]"""
    features: np.ndarray | None
    """features of the continuations, [num_prompts * per_prompt, D]"""
    nll: np.ndarray | None
    """mean -log p of each continuation; None also for a judge with another tokenizer"""


def score_continuations(
    samples: list[Path], corpus: Path, output: Path, evaluation: Evaluation, machine: Machine
) -> None:
    """Score one model's continuations: MAUVE, self-BLEU, distinct bigrams and perplexity.

    Perplexity is exp(mean over texts of the mean over continuation_tokens of
    -log p(token | all before it)), under a judge with the corpus's tokenizer.

    Args:
        samples: folders of `halfstep continue-prompts`, one per step count, all of the same prompts
        corpus: folder of `halfstep prepare-corpus` that holds the prompts
        output: JSON file of the rows
    """
    group = join_group(machine)
    documents: dict[Prompts, np.ndarray] = {}
    texts = [_read_continuations(folder, corpus, documents) for folder in samples]
    judged = []
    for judge in load_judges(evaluation, machine):
        judged += _judge_continuations(judge, texts, documents, corpus, machine, group)
        del judge  # before the next one is loaded
    if not group.is_main:
        return
    resamples = evaluation.bootstrap
    rows = []
    for prompts, columns, reference, features, nll in judged:
        rows.append(row("mauve", PROTOCOL, *mauve(reference, features), **columns))
        if nll is not None:
            # A prompt is the unit of the bootstrap: its continuations depend on one another.
            values = nll.reshape(prompts.num_prompts, -1).mean(1)
            metric = "continuation_perplexity"
            rows.append(mean_row(metric, PROTOCOL, values, columns, resamples, np.exp))
    for ids, prompts, columns in texts:
        new = ids[:, prompts.prompt_tokens :]
        new = new.reshape(prompts.num_prompts, prompts.per_prompt, -1)
        metric = "continuation_distinct_2"
        rows.append(mean_row("self_bleu", PROTOCOL, self_bleu(new), columns, resamples))
        rows.append(mean_row(metric, PROTOCOL, distinct(new, 2), columns, resamples))
    inputs = [*sample_files(samples), *corpus_files(corpus, "validation"), *evaluation.judge]
    write_rows(output, rows, inputs)


def _read_continuations(
    folder: Path, corpus: Path, documents: dict[Prompts, np.ndarray]
) -> _Continued:
    """The continuations of one folder, after a check of their prompts; adds to `documents`."""
    ids, facts = read_samples(folder)
    if "prompts" not in facts:
        raise HalfstepError(
            f"{folder}: samples without prompts; name folders that halfstep continue-prompts wrote"
        )
    about = folder / "samples.json"
    check_fields(facts["prompts"], Prompts, f"{about}: prompts", "continue its prompts again")
    prompts = Prompts.model_validate(facts["prompts"])
    texts = prompts.num_prompts * prompts.per_prompt
    expected = (texts, prompts.prompt_tokens + prompts.continuation_tokens)
    if ids.shape != expected:
        raise HalfstepError(
            f"{folder}: texts of shape {list(ids.shape)}, but its prompts need {list(expected)}; "
            "continue its prompts again"
        )
    if prompts not in documents:
        documents[prompts] = references(corpus, prompts).numpy()
    P = prompts.prompt_tokens
    if not np.array_equal(ids[:, :P], documents[prompts][:, :P].repeat(prompts.per_prompt, 0)):
        raise HalfstepError(
            f"{folder}: its prompts are not those of {corpus}; "
            "name the corpus of the samples, or continue its prompts again"
        )
    data = (
        f"{corpus_name(corpus)}, {prompts.num_prompts} prompts of {P} tokens, "
        f"documents of {prompts.document_tokens}"
    )
    columns = sample_columns(facts, prompts.continuation_tokens)
    return _Continued(ids, prompts, columns | {"data": data, "length": ids.shape[1]})


def _judge_continuations(
    judge: Judge,
    texts: list[_Continued],
    documents: dict[Prompts, np.ndarray],
    corpus: Path,
    machine: Machine,
    group: Group,
) -> Iterator[_Judged]:
    """What the judge computes for each set of continuations; the documents' features only once."""
    tokenizer, manifest = corpus_tokenizer(corpus), read_manifest(corpus)
    eos_id = manifest["eos_id"]
    batch = machine.micro_batch

    def features_of(ids: np.ndarray, label: str) -> np.ndarray | None:
        ids = without_frame(ids, manifest)
        return judge_features(judge, ids, tokenizer, eos_id, batch, label, group)

    references_of = {
        prompts: features_of(ids, "judge, held-out text") for prompts, ids in documents.items()
    }
    for ids, prompts, columns in texts:
        label = f"{columns['model']} at {columns['steps'] or 'all'} steps: judge"
        features, nll = features_of(ids, f"{label}, features"), None
        if judge.shares(tokenizer):
            span = prompts.prompt_tokens, ids.shape[1]
            spans = np.array([span]).repeat(len(ids), 0)
            nll = ids_nll(judge, ids, batch, f"{label}, perplexity", group, spans)
        yield _Judged(prompts, columns | judge.columns, references_of[prompts], features, nll)


def references(corpus: Path, prompts: Prompts) -> Tensor:
    """BOS or the begin of a frame, and beginnings of held-out documents, [num_prompts, L] int64.

    They are the first num_prompts documents that are long enough. The first prompt_tokens of a row
    are a prompt; the rest is how its document goes on. L is prompt_tokens + continuation_tokens.
    """
    windows = Windows(corpus, "validation")
    begin = torch.tensor(windows.layout.framing.begin, dtype=torch.long)
    new = prompts.prompt_tokens + prompts.continuation_tokens - len(begin)
    documents = (
        text for text in held_out_documents(windows) if len(text) >= prompts.document_tokens
    )
    found = [text[:new] for text in islice(documents, prompts.num_prompts)]
    if len(found) < prompts.num_prompts:
        raise HalfstepError(
            f"{corpus}: found {len(found)} held-out documents of document_tokens "
            f"({prompts.document_tokens}) or more, expected num_prompts ({prompts.num_prompts}); "
            "lower one of the two, or raise the corpus's validation_documents"
        )
    return torch.cat([begin.expand(len(found), -1), torch.stack(found)], 1)


def held_out_documents(windows: Windows) -> Iterator[Tensor]:
    """The documents of a split in order, without EOS; the last one may be cut short.

    They are joined from the windows, without their frames.
    """
    inside = windows.layout.framing.inside(windows.length)
    rest = torch.empty(0, dtype=torch.long)
    for first in range(0, len(windows), AT_ONCE):
        stream = torch.cat([rest, windows[first : first + AT_ONCE][:, inside].flatten()])
        ends = (stream == windows.eos_id).nonzero()[:, 0]
        *whole, rest = stream.tensor_split(ends + 1)
        yield from (text[:-1] for text in whole)
    yield rest

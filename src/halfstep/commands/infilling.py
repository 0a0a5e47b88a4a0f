"""`halfstep score-infilling`: accuracy of filled-in positions at each number of tokens a pass."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer

from halfstep.checkpoint import Model, checkpoint_files, load_checkpoint
from halfstep.commands.variety import held_out_texts, spread_rows
from halfstep.commands.writers import draw_texts, load_scorer, sampler_name, text_writer
from halfstep.config import Count, DrawOptions, Machine, Whole, Word
from halfstep.data.stories import judge, repeated_mentions
from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.data.windows import (
    Layout,
    Windows,
    corpus_files,
    corpus_tokenizer,
    layout_of,
    read_manifest,
)
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.metrics.infilling import (
    MaskedItems,
    area_of_means,
    right_items,
    right_tokens,
)
from halfstep.metrics.rows import mean_row, model_name, name_parts, row, write_rows

MASK_SEED = 0  # of the masked tokens of a corpus that is not stories
LAST_WORDS, INFILLING = "last_words", "infilling"  # tasks


def score_infilling(  # noqa: PLR0913  the flags of the command
    checkpoint: Path,
    corpus: Path,
    output: Path,
    infilling_items: Count,
    drawing: DrawOptions,
    machine: Machine,
    lambada: Word | None = None,
    bootstrap: Annotated[Whole, Field(ge=100, le=10**6)] = 1000,
    variant: Word | None = None,
) -> None:
    """Fill in masked positions of windows: accuracy at each number of tokens a pass, and its area.

    Task last_words: as many items of the last-word task as fit into a window, EOS between them, all
    last words masked. Task infilling: held-out windows of the corpus. In each of its stories all
    mentions of one fact are masked; in windows of other corpora half of the tokens are. Windows and
    masks are the same for all models of a corpus. The intervals are over windows.

    Args:
        checkpoint: a checkpoint folder of a diffusion model
        corpus: folder of `halfstep prepare-corpus` on which the model was trained
        output: JSON file of the rows
        infilling_items: number of windows of each task
        lambada: items of last_words: last_words for those of the corpus, a hub name or a .jsonl
            file (default: no such task)
        bootstrap: bootstrap resamples for each 95% interval
        variant: name of the way in which the positions are drawn, a column of the rows
    """
    group, device = join_group(machine), str(find_device(machine))
    read = [*checkpoint_files(checkpoint, drawing.weights), *corpus_files(corpus, "validation")]
    if SAMPLERS[drawing.sampler].needs_first:
        if group.is_main:
            print(
                f"note: sampler {drawing.sampler} writes from left to right and cannot fill in "
                f"positions with tokens behind them; {output} has no rows",
                file=sys.stderr,
            )
            write_rows(output, [], read)
        return
    model = load_checkpoint(checkpoint, drawing.weights, device, drawing.precision)
    _check_model(model, checkpoint, corpus)
    tasks = []
    if lambada is not None:
        items = str(corpus / "last_words.jsonl") if lambada == LAST_WORDS else lambada
        tasks.append(_last_words(items, model, infilling_items))
        read.append(items)
    tasks.append(corpus_items(corpus, infilling_items))
    columns = _columns(checkpoint, model, drawing) | ({"variant": variant} if variant else {})
    rows = []
    for task in tasks:
        rows += _rows_of_task(task, model, drawing, columns, bootstrap, machine, group)
    if group.is_main:
        write_rows(output, rows, read)


def _check_model(model: Model, checkpoint: Path, corpus: Path) -> None:
    if model.denoiser is None:
        raise HalfstepError(
            f"{checkpoint}: an autoregressive model, which cannot fill in a position; "
            "name a diffusion model"
        )
    if vocabulary_sha256(model.tokenizer) != vocabulary_sha256(corpus_tokenizer(corpus)):
        raise HalfstepError(
            f"{checkpoint}: its model has another vocabulary than the corpus {corpus}; "
            "name the corpus on which it was trained"
        )


def _columns(checkpoint: Path, model: Model, drawing: DrawOptions) -> dict[str, Any]:
    return name_parts(model_name(checkpoint)) | {
        "sampler": sampler_name(drawing),
        "seed": drawing.sampling_seed,
        "weights": model.weights,
        "draw_dtype": SAMPLERS[drawing.sampler].draw_dtype,
        "precision": model.precision,
        "temperature": drawing.temperature,
        "checkpoint": model.sha256[:16],
    }


def _rows_of_task(
    task: MaskedItems,
    model: Model,
    drawing: DrawOptions,
    columns: dict[str, Any],
    resamples: int,
    machine: Machine,
    group: Group,
) -> list[dict]:
    """The rows of one task on rank 0; all ranks fill in their windows."""
    scorer = load_scorer(model, drawing) if drawing.asks_scorer else None
    masked = task.masked.sum(1)
    frames = torch.from_numpy(np.where(task.masked, model.mask_id, task.windows))
    about = columns | {
        "task": task.task,
        "num_samples": len(frames),
        "length": frames.shape[1],
        "data": _data_name(task),
    }
    rows: list[dict] = []
    right: dict[str, list[np.ndarray]] = {protocol: [] for protocol in task.count}
    passes, items = [], {}
    for limit in task.limits:
        write = text_writer(model, frames.shape[1], limit, drawing, scorer=scorer)
        label = f"{task.task} in {limit} steps"
        filled = draw_texts(write, frames, machine.micro_batch, label, group)
        if filled is None:
            continue
        evaluations = filled.network_evaluations.numpy()
        passes.append(evaluations)
        of_limit = about | {
            "steps": limit,
            "network_evaluations": float(evaluations.mean()),
            "tokens_per_forward": float(masked.sum() / evaluations.sum()),
        }
        if filled.autoregressive_passes is not None:
            asked = filled.autoregressive_passes.double()
            of_limit["autoregressive_passes"] = float(asked.mean())
        for protocol, count in task.count.items():
            found = count(filled.ids.numpy())
            right[protocol].append(found[:, 0])
            items[protocol] = found[:, 1]
            name = "infilling_accuracy"
            rows.append(mean_row(name, protocol, found, of_limit, resamples, _share))
    for protocol, found in right.items():
        if found:
            values = np.column_stack([*found, *passes, items[protocol], masked])
            rows.append(_area_row(protocol, values, about, resamples))
    return rows


def _share(right: float, items: float) -> float:
    return right / items


def _area_row(protocol: str, values: np.ndarray, columns: dict[str, Any], resamples: int) -> dict:
    """The area under the accuracy, from the columns of `area_of_means` for each window."""
    name = "accuracy_under_parallelism"
    if np.isnan(area_of_means(*values.mean(0))):
        about = columns | {"reached": "no: never all positions in one pass"}
        return row(name, protocol, None, (None, None), **about)
    return mean_row(name, protocol, values, columns, resamples, area_of_means)


def _data_name(task: MaskedItems) -> str:
    """What was filled in, with a checksum of the windows and their masks."""
    content = task.windows.astype("<i4").tobytes() + np.packbits(task.masked).tobytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    count = f"{len(task.windows)} windows, {int(task.masked.sum())} positions"
    return f"{task.task}[{count}]@{digest}"


def corpus_items(corpus: Path, count: int) -> MaskedItems:
    """At most `count` held-out windows of a corpus with masked positions: task infilling.

    Of pairs, half of each response is masked; of other windows half of all within the frame.
    """
    windows, manifest = held_out_texts(corpus, count).ids, read_manifest(corpus)
    if manifest["corpus"].get("kind") == "stories":
        return story_items(windows, corpus_tokenizer(corpus), layout_of(manifest))
    rows = _places_to_mask(corpus, windows)
    masked = np.zeros(windows.shape, bool)
    for i, (mask, places) in enumerate(zip(masked, rows, strict=True)):
        order = np.random.default_rng([MASK_SEED, i]).permutation(len(places))
        mask[places[order[: len(places) // 2]]] = True
    if not masked.any():
        raise HalfstepError(
            f"{corpus}: windows of {windows.shape[1]} tokens have no position to mask; "
            "prepare the corpus with a larger length"
        )
    return MaskedItems(
        INFILLING, windows, masked, {"tokens": partial(right_tokens, windows, masked)}
    )


def _places_to_mask(corpus: Path, windows: np.ndarray) -> list[np.ndarray]:
    """The positions of each of windows[N, L] that are text, or its response with one end."""
    held_out = Windows(corpus, "validation")
    inside = held_out.layout.framing.inside(held_out.length)
    if not held_out.is_pairs:
        return [np.arange(inside.start, inside.stop)] * len(windows)
    asked = held_out.asked(spread_rows(len(held_out), len(windows)))
    assert asked is not None
    places = []
    for ids, of_response in zip(windows, asked.numpy(), strict=True):
        response = np.flatnonzero(of_response)
        ends = np.flatnonzero(ids[response] == held_out.eos_id)
        places.append(response[: ends[0] + 1])
    return places


def story_items(windows: np.ndarray, tokenizer: Tokenizer, layout: Layout) -> MaskedItems:
    """Windows of stories in which all mentions of one fact are masked, in each whole story.

    The fact is one that the story mentions more than once. Windows without such a story are left
    out.
    """
    masked, stories = np.zeros(windows.shape, bool), []
    inside = layout.framing.inside(layout.length)
    for i, ids in enumerate(windows):
        stories.append(found := [])
        rng = np.random.default_rng([MASK_SEED, i])
        ends = inside.start + np.flatnonzero(ids[inside] == layout.eos_id)
        for before, end in pairwise(ends):
            if facts := _places_of_facts(ids[before + 1 : end], tokenizer):
                masked[i, before + 1 + facts[rng.integers(len(facts))]] = True
                found.append(slice(before + 1, end))
    kept = masked.any(1)
    if not kept.any():
        raise HalfstepError(
            f"infilling_items: found no whole story in {len(windows)} held-out windows of "
            f"{windows.shape[1]} tokens; choose more windows, or a corpus with a larger length"
        )
    windows, masked = windows[kept], masked[kept]
    stories = [found for found in stories if found]

    def consistent(filled: np.ndarray) -> np.ndarray:
        counts = []
        for ids, found in zip(filled, stories, strict=True):
            texts = [tokenizer.decode(ids[s].tolist(), skip_special_tokens=False) for s in found]
            counts.append([sum(judge(text).consistent for text in texts), len(texts)])
        return np.array(counts)

    count = {"grammar": consistent, "tokens": partial(right_tokens, windows, masked)}
    return MaskedItems(INFILLING, windows, masked, count)


def _places_of_facts(ids: np.ndarray, tokenizer: Tokenizer) -> list[np.ndarray]:
    """For each fact that a story mentions more than once the places of the tokens that say it."""
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in ids.tolist()]
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    return [
        np.flatnonzero(np.any([(starts < b) & (a < ends) for a, b in mentions], 0))
        for mentions in repeated_mentions("".join(pieces))
    ]


def _last_words(items: str, model: Model, count: int) -> MaskedItems:
    """The last-word items of a file or of the hub in at most `count` windows of a model."""
    from halfstep.metrics.lambada import HalfstepLM, context_of, lambada_texts, last_word_of

    lm = HalfstepLM(model, "parallel")
    texts = ({"text": text} for text in lambada_texts(items))
    encoded = (lm.token_ids(context_of(doc), last_word_of(doc)) for doc in texts)
    return last_word_items(encoded, Layout(model.length, model.eos_id, model.framing), count)


def last_word_items(texts: Iterable[list[list[int]]], layout: Layout, count: int) -> MaskedItems:
    """Windows of items (context, last word), EOS between them, with all last words masked.

    A window has as many whole items as fit; what is left is filled up with the beginning of the
    next item, as windows of a corpus are cut. Of a longer item the last tokens that fit are kept.
    There are at most `count` windows. HalfstepError if a last word is longer than a window.
    """
    begin, end = layout.framing.begin, layout.framing.end
    eos_id, stop = layout.eos_id, layout.length - len(end)
    windows, items = [], []
    window, spans = [*begin], []
    for number, (context, word) in enumerate(texts, start=1):
        room = layout.room - len(word)
        if room < 0 or not word:
            raise HalfstepError(
                f"lambada: the last word of item {number} has {len(word)} tokens, expected 1 to "
                f"{layout.room} in windows of {layout.length}; correct the item or leave it out"
            )
        ids = [*context[max(0, len(context) - room) :], *word]
        if len(window) + len(ids) > stop:
            windows.append([*[*window, *ids][:stop], *end])
            items.append(spans)
            window, spans = [*begin], []
        if len(windows) == count:
            break
        spans.append(slice(len(window) + len(ids) - len(word), len(window) + len(ids)))
        window += [*ids, eos_id]
    if not windows:  # all items fit into one window
        windows, items = [[*(window + stop * [eos_id])[:stop], *end]], [spans]
    found = np.array(windows)
    masked = np.zeros(found.shape, bool)
    for mask, spans in zip(masked, items, strict=True):
        for span in spans:
            mask[span] = True
    return MaskedItems(LAST_WORDS, found, masked, {"exact": partial(right_items, found, items)})

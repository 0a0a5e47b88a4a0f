"""`halfstep score-samples` and `score-corpus`: metric rows of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from halfstep.commands.samples import read_samples, sample_files
from halfstep.commands.variety import (
    DATA_WINDOWS,
    Features,
    Texts,
    compare_texts,
    grammar_rows,
    held_out_texts,
    text_label,
    variety_rows,
)
from halfstep.config import Count, Evaluation, Machine, Word
from halfstep.data.tokenizer import vocabulary_sha256
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
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.mauve import mauve
from halfstep.metrics.perplexity import Judge, ids_nll, load_judge, retokenized_nll
from halfstep.metrics.rows import mean_row, name_parts, row, share_row, write_rows

# Keys of samples.json that are columns of a row.
DRAWN = ("sampler", "network_evaluations", "num_samples", "seed", "weights", "draw_dtype")

Judged = tuple[str, np.ndarray | None, dict[str, Any], Callable[..., float]]
"""Protocol, values of each text, columns, and statistic of a perplexity; on rank 0 the values"""


def score_samples(
    samples: list[Path],
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    variant: Word | None = None,
) -> None:
    """Score the samples of one model: generative perplexity, entropy, MAUVE and variety.

    Samples of stories also get the shares that the grammar accepts, and their variety: how many
    accepted stories are different, and how far their facts are from the grammar's own law.
    MAUVE compares with held-out windows. It has a row where there are at least 50 of either.

    Args:
        samples: folders of `halfstep generate` or `draw-naive`, one per step count or sampler; each
            judge is loaded only once
        corpus: folder of `halfstep prepare-corpus` on which the model was trained
        output: JSON file of the rows
        variant: name of the way in which these samples were drawn, a column of the rows
    """
    group = join_group(machine)
    texts = read_texts(samples, corpus, variant)
    rows = score_texts(texts, corpus, evaluation, machine, group)
    if rows is not None:
        read = corpus_files(corpus, "validation")
        write_rows(output, rows, [*sample_files(samples), *read, *evaluation.judge])


def read_texts(samples: list[Path], corpus: Path, variant: Word | None = None) -> list[Texts]:
    """The texts of folders of samples, and their columns, of which one may be a variant's name.

    HalfstepError if they are not in the corpus's vocabulary, or do not answer its held-out prompts.
    """
    held_out = Windows(corpus, "validation")
    vocabulary = vocabulary_sha256(corpus_tokenizer(corpus))
    named = {"variant": variant} if variant else {}
    texts = []
    for folder in samples:
        ids, facts = read_samples(folder)
        if facts.get("vocabulary", vocabulary) != vocabulary:
            raise HalfstepError(
                f"{folder}: its samples use another vocabulary than the corpus {corpus}; "
                "name the corpus on which their model was trained"
            )
        columns = sample_columns(facts, ids.shape[-1]) | named
        made_for = (facts.get("meta") or {}).get("student_steps")
        columns |= {"student_steps": made_for} if made_for else {}
        spans = response_spans(held_out, ids, folder) if held_out.is_pairs else None
        texts.append(Texts(ids, columns, spans))
    return texts


def response_spans(windows: Windows, ids: np.ndarray, folder: Path) -> np.ndarray:
    """Where the responses begin and end in texts ids[N, L] that answer the prompts of windows.

    Text i has the prompt of window i, again from the first where there are fewer: [N, 2].
    HalfstepError if it has another one.
    """
    rows = np.arange(len(ids)) % len(windows)
    asked = windows[rows].numpy()
    spans = windows.spans(rows, ids) if ids.shape == asked.shape else None
    given = None if spans is None else np.arange(windows.length) < spans[:, :1]
    if given is None or (ids != asked)[given].any():
        raise HalfstepError(
            f"{folder}: its texts do not answer the held-out prompts of {windows.path.parent}; "
            "draw them with halfstep generate --pairs"
        )
    return spans


def score_corpus(
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    num_samples: Count = 1024,
) -> None:
    """Score held-out text by the measures of samples, as the reference for models.

    MAUVE compares one half of the windows with the other.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: JSON file of the rows, in a folder named after the teacher
        num_samples: number of texts of each model, for MAUVE as many windows at most
    """
    group, texts = join_group(machine), held_out_texts(corpus, DATA_WINDOWS)
    columns = {
        "model": "data",
        "teacher": output.parent.name,
        "run": "data",
        "round": 0,
        "num_samples": len(texts.ids),
    }
    half = held_out_texts(corpus, num_samples, first=1, every=2)
    compared = [half.with_columns(columns | {"num_samples": len(half.ids)})]
    texts = [texts.with_columns(columns)]
    rows = score_texts(texts, corpus, evaluation, machine, group, compared)
    if group.is_main:
        write_rows(output, rows, [*corpus_files(corpus, "validation"), *evaluation.judge])


def sample_columns(facts: dict[str, Any], written: int) -> dict[str, Any]:
    """The contents of samples.json as columns of a row; the model wrote `written` tokens a text."""
    columns = {key: facts.get(key) for key in (*DRAWN, "temperature", "top_p")}
    columns |= name_parts(facts["model"])
    steps = None if facts.get("kind") == "autoregressive" else facts["steps"]
    columns["precision"] = facts.get("precision", "float32")  # older samples have none
    if facts.get("kind") == "naive":
        columns |= {"weights": None, "precision": None}
    if "autoregressive_passes" in facts:  # of a sampler that asks an autoregressive model
        columns["autoregressive_passes"] = facts["autoregressive_passes"]
    tokens = written / steps if steps else None
    about = {"checkpoint": facts["checkpoint"][:16], "steps": steps, "tokens_per_step": tokens}
    return columns | about


def score_texts(
    texts: list[Texts],
    corpus: Path,
    evaluation: Evaluation,
    machine: Machine,
    group: Group,
    compared: list[Texts] | None = None,
) -> list[dict] | None:
    """All rows of sets of texts of a corpus.

    MAUVE is that of the texts `compared` (the same). The ranks share what the judges read; all but
    rank 0 return None.
    """
    data = {"data": corpus_name(corpus)}
    texts = [one.with_columns(data) for one in texts]
    compared = [one.with_columns(data) for one in compared or texts]
    judged, features = judge_texts(texts, corpus, evaluation, machine, group, compared)
    return rows_of_texts(texts, judged, features, corpus, evaluation) if group.is_main else None


def rows_of_texts(
    texts: list[Texts],
    judged: list[Judged],
    features: list[Features],
    corpus: Path,
    evaluation: Evaluation,
) -> list[dict]:
    """The rows of sets of texts, from what the judges found: `judge_texts` returns it."""
    manifest, tokenizer = read_manifest(corpus), corpus_tokenizer(corpus)
    resamples = evaluation.bootstrap
    rows = []
    for protocol, values, columns, statistic in judged:
        median = columns | {"median_text": _median_text(values)}
        metric = "generative_perplexity"
        rows.append(mean_row(metric, protocol, values, median, resamples, statistic))
    for reference, written, columns in features:
        rows.append(row("sample_mauve", "windows", *mauve(reference, written), **columns))
    for one in texts:
        entropy, columns, eos_id = unigram_entropy(one.counted), one.columns, manifest["eos_id"]
        rows.append(mean_row("entropy", "unigram", entropy, columns, resamples))
        rows += variety_rows(one, resamples)
        if one.spans is not None:
            empty, number = sum(text[0] == eos_id for text in one.counted), len(one.ids)
            rows.append(share_row("only_end_of_text", "responses", empty, number, columns))
        if manifest.get("corpus", {}).get("kind") == "stories":
            end, ids = tokenizer.id_to_token(eos_id), without_frame(one.ids, manifest)
            rows += grammar_rows(ids, columns, tokenizer, resamples, end)
    return rows


def judge_texts(
    texts: list[Texts],
    corpus: Path,
    evaluation: Evaluation,
    machine: Machine,
    group: Group,
    compared: list[Texts] | None = None,
) -> tuple[list[Judged], list[Features]]:
    """Every perplexity of sets of texts of a corpus, and the judges' features of those `compared`.

    Only one judge is in memory at a time. Protocol `ids` needs a judge with the corpus's tokenizer
    and is left out for other judges.
    """
    manifest, tokenizer = read_manifest(corpus), corpus_tokenizer(corpus)
    for one in texts:
        _check_ids(one.ids, text_label(one.columns), corpus, manifest["vocab_size"])
    judged: list[Judged] = []
    features: list[Features] = []
    for judge in load_judges(evaluation, machine):
        judged += _judge_by_one(judge, texts, tokenizer, manifest, machine, group)
        features += compare_texts(judge, compared or [], corpus, machine, group)
        del judge  # before the next one is loaded
    return judged, features


def _judge_by_one(
    judge: Judge,
    texts: list[Texts],
    tokenizer: Tokenizer,
    manifest: dict[str, Any],
    machine: Machine,
    group: Group,
) -> Iterator[Judged]:
    """Every perplexity of the texts under one judge."""
    batch = machine.micro_batch
    for one in texts:
        label, columns = f"{text_label(one.columns)}: judge", one.columns | judge.columns
        if judge.shares(tokenizer):
            nll = ids_nll(judge, one.ids, batch, f"{label}, ids", group, one.spans)
            yield "ids", nll, columns, np.exp
        label = f"{label}, retokenized"
        ids, eos_id = without_frame(one.ids, manifest), manifest["eos_id"]
        sums = retokenized_nll(judge, ids, tokenizer, eos_id, batch, label, group, one.spans)
        yield "retokenized", sums, columns, exp_ratio


def _median_text(values: np.ndarray) -> int:
    """Number of the text with the median of values[N] or, if [N, 2], of their ratios."""
    of_texts = values if values.ndim == 1 else values[:, 0] / np.maximum(values[:, 1], 1)
    return int(np.argsort(of_texts, kind="stable")[(len(of_texts) - 1) // 2])


def exp_ratio(total: float, number: float) -> float:
    """The perplexity of a mean sum of -log p and a mean number of tokens."""
    return np.exp(total / number)


def _check_ids(ids: np.ndarray, label: str, corpus: Path, vocab_size: int) -> None:
    """HalfstepError unless ids are texts of the corpus."""
    if ids.ndim != 2 or not ids.size:
        raise HalfstepError(
            f"samples of {label}: an array of shape {list(ids.shape)}, expected [texts, tokens], "
            "at least one of each; run halfstep generate again"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise HalfstepError(
            f"samples of {label}: token ids from {ids.min()} to {ids.max()}, the corpus "
            f"{corpus.name} has 0 to {vocab_size - 1}; they belong to another corpus, "
            "or a mask was left"
        )


def load_judges(evaluation: Evaluation, machine: Machine) -> Iterator[Judge]:
    """Load the judges of the configuration one after another."""
    if "baseline" in evaluation.judge:
        raise HalfstepError(
            "judge: found 'baseline', which only the workflow can resolve; "
            "name the folder, results/models/<teacher>/baseline/hf"
        )
    for name in evaluation.judge:
        yield load_judge(name, find_device(machine), evaluation.precision)

"""`halfstep score-samples`, `score-corpus` and `score-lambada`: metric rows of texts and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from tokenizers import Tokenizer

from halfstep.checkpoint import checkpoint_files, load_checkpoint
from halfstep.config import Evaluation, Machine, Weights
from halfstep.data.pack import Windows, corpus_files, corpus_tokenizer, read_manifest
from halfstep.data.stories import judge_window
from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError, reason
from halfstep.files import read_json, sha256
from halfstep.metrics.diversity import distinct, unigram_entropy
from halfstep.metrics.perplexity import Judge, ids_nll, load_judge, retokenized_nll
from halfstep.metrics.rows import mean_row, model_name, name_parts, share_row, write_rows
from halfstep.records.shapes import MODEL_NAME
from halfstep.resolve import check_fields

LAMBADA_SEED = 0  # of the masks drawn for an item
DATA_WINDOWS = 500  # held-out windows behind the "data" rows, or all of them if there are fewer

# Keys of samples.json that are columns of a row.
DRAWN = ("sampler", "network_evaluations", "num_samples", "seed", "weights", "draw_dtype")
GENERATE_AGAIN = "run halfstep generate again"

Texts = tuple[np.ndarray, dict[str, Any]]
"""Token ids[N, L] of texts, and the columns of a metric row that describe them."""
Judged = tuple[str, np.ndarray | None, dict[str, Any], Callable[..., float]]
"""Protocol, values of each text, columns, and statistic of a perplexity; on rank 0 the values"""


class SamplesFacts(BaseModel):
    """What a samples.json must and may hold."""

    model_config = ConfigDict(strict=True)

    model: Annotated[str, Field(pattern=MODEL_NAME)]
    checkpoint: str
    steps: PositiveInt
    sha256: str
    sampler: str
    network_evaluations: Annotated[float, Field(ge=0)]
    num_samples: Annotated[int, Field(ge=0)]
    seed: int
    weights: str
    draw_dtype: str
    kind: str = "diffusion"
    temperature: float = 1.0
    top_p: float = 1.0
    vocabulary: str = ""


def score_samples(
    samples: list[Path], corpus: Path, output: Path, evaluation: Evaluation, machine: Machine
) -> None:
    """Score the samples of one model: generative perplexity, entropy and distinct bigrams.

    Samples of stories also get the shares that the grammar accepts.

    Args:
        samples: folders of `halfstep generate`, one per step count; each judge is loaded only once
        corpus: folder of `halfstep prepare-corpus` on which the model was trained
        output: JSON file of the rows
    """
    group = join_group(machine)
    rows = score_texts(read_texts(samples, corpus), corpus, evaluation, machine, group)
    if group.is_main:
        inputs = [*sample_files(samples), *corpus_files(corpus), *evaluation.judge]
        write_rows(output, rows, inputs)


def read_texts(samples: list[Path], corpus: Path) -> list[Texts]:
    """The texts of folders of samples; HalfstepError if they are not in the corpus's vocabulary."""
    vocabulary = vocabulary_sha256(corpus_tokenizer(corpus))
    texts = []
    for folder in samples:
        ids, facts = read_samples(folder)
        if facts.get("vocabulary", vocabulary) != vocabulary:
            raise HalfstepError(
                f"{folder}: its samples use another vocabulary than the corpus {corpus}; "
                "name the corpus on which their model was trained"
            )
        texts.append((ids, sample_columns(facts, ids.shape[-1])))
    return texts


def score_corpus(corpus: Path, output: Path, evaluation: Evaluation, machine: Machine) -> None:
    """Score held-out text by the measures of samples, as the reference for models.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: JSON file of the rows, in a folder named after the teacher
    """
    group, windows = join_group(machine), Windows(corpus, "validation")
    count = min(DATA_WINDOWS, len(windows))
    chosen = np.unique(np.linspace(0, len(windows) - 1, count).astype(int))
    columns = {
        "model": "data",
        "teacher": output.parent.name,
        "run": "data",
        "round": 0,
        "num_samples": len(chosen),
    }
    texts = [(windows[chosen].numpy(), columns)]
    rows = score_texts(texts, corpus, evaluation, machine, group)
    if group.is_main:
        write_rows(output, rows, [*corpus_files(corpus, "validation"), *evaluation.judge])


def score_lambada(
    checkpoint: Path,
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    weights: Weights = "ema",
) -> None:
    """Score a model's last words through lm-eval: accuracy and perplexity under each protocol.

    Accuracies have Wilson's interval; perplexities, which are per word, a bootstrap interval.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        corpus: folder of `halfstep prepare-corpus`, which holds the items if lambada is last_words
        output: JSON file of the rows
        weights: which weights of the checkpoint to score
    """
    from halfstep.metrics.lambada import evaluate_lambada

    items = evaluation.lambada
    if items is None:
        raise HalfstepError(
            "--lambada: found None, expected last_words, a hub name or a .jsonl file"
        )
    group, device = join_group(machine), str(find_device(machine))
    model = load_checkpoint(checkpoint, weights, device)
    if items == "last_words":
        items = str(corpus / "last_words.jsonl")
    found = evaluate_lambada(
        model,
        items,
        evaluation.lambada_items,
        machine.micro_batch,
        device,
        LAMBADA_SEED,
        group,
    )
    if found is None:
        return
    columns = name_parts(model_name(checkpoint)) | {
        "weights": weights,
        "checkpoint": model.sha256[:16],
        "data": found["data"],
    }

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
    write_rows(output, rows, [*checkpoint_files(checkpoint, weights), items])


def sample_files(samples: list[Path]) -> list[Path]:
    """The files that a command reads from folders of samples, for its provenance record."""
    return [folder / name for folder in samples for name in ("samples.json", "samples.npy")]


def sample_columns(facts: dict[str, Any], written: int) -> dict[str, Any]:
    """The contents of samples.json as columns of a row; the model wrote `written` tokens a text."""
    columns = {key: facts.get(key) for key in (*DRAWN, "temperature", "top_p")}
    columns |= name_parts(facts["model"])
    steps = None if facts.get("kind") == "autoregressive" else facts["steps"]
    tokens = written / steps if steps else None
    about = {"checkpoint": facts["checkpoint"][:16], "steps": steps, "tokens_per_step": tokens}
    return columns | about


def read_samples(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """ids[N, L] and samples.json of one folder, after the checksum is verified."""
    about, path = folder / "samples.json", folder / "samples.npy"
    facts = read_json(about)
    check_fields(facts, SamplesFacts, about, GENERATE_AGAIN)
    if not path.exists():
        raise HalfstepError(f"{path}: no such file, though samples.json exists; {GENERATE_AGAIN}")
    found = sha256(path)
    if found != facts["sha256"]:
        raise HalfstepError(
            f"{path}: sha256 is {found[:12]}, samples.json has {facts['sha256'][:12]}: "
            f"the file has changed; {GENERATE_AGAIN}"
        )
    try:
        ids = np.load(path, mmap_mode="r")  # mapped, so that a false size in it is found
    except Exception as error:  # a damaged header raises what Python's parser raises
        raise HalfstepError(f"{path}: no array ({reason(error)}); {GENERATE_AGAIN}") from None
    if not isinstance(ids, np.ndarray) or ids.dtype != np.int32:
        kind = getattr(ids, "dtype", "several arrays")
        raise HalfstepError(f"{path}: found {kind}, expected one array of int32; {GENERATE_AGAIN}")
    return np.array(ids), facts


def score_texts(
    texts: list[Texts], corpus: Path, evaluation: Evaluation, machine: Machine, group: Group
) -> list[dict] | None:
    """All rows of sets of texts of a corpus.

    The ranks share what the judges read; all but rank 0 return None.
    """
    manifest, tokenizer = read_manifest(corpus), corpus_tokenizer(corpus)
    texts = [(ids, columns | {"data": corpus_name(corpus)}) for ids, columns in texts]
    judged = judge_texts(texts, corpus, evaluation, machine, group)
    if not group.is_main:
        return None
    resamples = evaluation.bootstrap
    rows = []
    for protocol, values, columns, statistic in judged:
        median = columns | {"median_text": _median_text(values)}
        row = mean_row("generative_perplexity", protocol, values, median, resamples, statistic)
        rows.append(row)
    for ids, columns in texts:
        rows.append(mean_row("entropy", "unigram", unigram_entropy(ids), columns, resamples))
        rows.append(mean_row("distinct_2", "bigrams", distinct(ids, 2), columns, resamples))
        if manifest.get("corpus", {}).get("kind") == "stories":
            rows += _grammar_rows(ids, columns, tokenizer)
    return rows


def judge_texts(
    texts: list[Texts], corpus: Path, evaluation: Evaluation, machine: Machine, group: Group
) -> list[Judged]:
    """Every perplexity of sets of texts of a corpus; only one judge is in memory at a time.

    Protocol `ids` needs a judge with the corpus's tokenizer and is left out for other judges.
    """
    manifest, tokenizer = read_manifest(corpus), corpus_tokenizer(corpus)
    for ids, columns in texts:
        _check_ids(ids, _label(columns), corpus, manifest["vocab_size"])
    judged: list[Judged] = []
    for judge in load_judges(evaluation, machine):
        judged += _judge_by_one(judge, texts, tokenizer, manifest["eos_id"], machine, group)
        del judge  # before the next one is loaded
    return judged


def _judge_by_one(
    judge: Judge,
    texts: list[Texts],
    tokenizer: Tokenizer,
    eos_id: int,
    machine: Machine,
    group: Group,
) -> Iterator[Judged]:
    """Every perplexity of the texts under one judge."""
    batch = machine.micro_batch
    for ids, columns in texts:
        label, columns = f"{_label(columns)}: judge", columns | judge.columns
        if judge.shares(tokenizer):
            yield "ids", ids_nll(judge, ids, batch, f"{label}, ids", group), columns, np.exp
        label = f"{label}, retokenized"
        sums = retokenized_nll(judge, ids, tokenizer, eos_id, batch, label, group)
        yield "retokenized", sums, columns, exp_ratio


def _median_text(values: np.ndarray) -> int:
    """Number of the text with the median of values[N] or, if [N, 2], of their ratios."""
    of_texts = values if values.ndim == 1 else values[:, 0] / np.maximum(values[:, 1], 1)
    return int(np.argsort(of_texts, kind="stable")[(len(of_texts) - 1) // 2])


def exp_ratio(total: float, number: float) -> float:
    """The perplexity of a mean sum of -log p and a mean number of tokens."""
    return np.exp(total / number)


def _grammar_rows(ids: np.ndarray, columns: dict[str, Any], tokenizer: Tokenizer) -> list[dict]:
    """The shares of the texts' whole stories that the grammar finds accepted and consistent."""
    texts = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    counts = [judge_window(text) for text in texts]
    stories = sum(count.stories for count in counts)
    accepted = sum(count.accepted for count in counts)
    consistent = sum(count.consistent for count in counts)
    return [
        share_row("accepted_share", "grammar", accepted, stories, columns),
        share_row("consistent_share", "grammar", consistent, stories, columns),
    ]


def corpus_name(corpus: Path) -> str:
    """The corpus in a row: its folder's name, and the checksum of its held-out tokens."""
    return f"{corpus.name}@{read_manifest(corpus)['splits']['validation']['sha256'][:12]}"


def _label(columns: dict[str, Any]) -> str:
    """The name of a set of texts in log lines and errors."""
    steps, temperature = columns.get("steps"), columns.get("temperature", 1)
    label = columns["model"] if steps is None else f"{columns['model']} {steps} steps"
    return label if temperature == 1 else f"{label} temperature {temperature}"


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
        yield load_judge(name, find_device(machine))

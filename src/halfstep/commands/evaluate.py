"""`halfstep score-samples`, `score-corpus` and `score-lambada`: texts and models in, metric rows with intervals out."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from halfstep import checkpoint
from halfstep.config import Evaluation, Machine
from halfstep.data.pack import Windows
from halfstep.data.stories import judge_window
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics.diversity import distinct, unigram_entropy
from halfstep.metrics.intervals import bootstrap, wilson
from halfstep.metrics.perplexity import Judge, ids_nll, load_judge, retokenized_nll
from halfstep.metrics.rows import model_name, name_parts, row
from halfstep.training.loop import device_of

DATA_WINDOWS = 500  # held-out windows behind the "data" rows, or all there are


def score_samples(samples: list[Path], corpus: Path, output: Path, evaluation: Evaluation, machine: Machine) -> None:
    """Generative perplexity, entropy, distinct bigrams, and for stories the shares that the grammar accepts, of one model's samples.

    Args:
        samples: folders of `halfstep generate`, one per step count; the judge is loaded once for all
        corpus: folder of `halfstep prepare-corpus` that the model was trained on
        output: JSON file of the rows
    """
    judge = _judge(evaluation, machine)
    rows = []
    for folder in samples:
        ids, facts = read_samples(folder)
        autoregressive = facts.get("kind") == "autoregressive"
        about = {key: facts[key] for key in ("sampler", "network_evaluations", "num_samples", "seed", "weights", "draw_dtype")}
        about |= name_parts(facts["model"]) | {"checkpoint": facts["checkpoint"][:16], "steps": None if autoregressive else facts["steps"]}
        rows += measures(ids, corpus, judge, evaluation, machine, about)
    write_json(output, rows)


def score_corpus(corpus: Path, output: Path, evaluation: Evaluation, machine: Machine) -> None:
    """The measures of samples, taken of held-out text itself: the line that a model should meet.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: JSON file of the rows, in a folder named after the teacher
    """
    windows = Windows(corpus, "validation")
    chosen = np.unique(np.linspace(0, len(windows) - 1, min(DATA_WINDOWS, len(windows))).astype(int))
    about = {"model": "data", "teacher": output.parent.name, "run": "data", "round": 0, "num_samples": len(chosen)}
    write_json(output, measures(windows[chosen].numpy(), corpus, _judge(evaluation, machine), evaluation, machine, about))


def score_lambada(checkpoint: Path, corpus: Path, output: Path, evaluation: Evaluation, machine: Machine) -> None:
    """Last words through lm-eval: accuracy under each protocol with Wilson's interval, perplexity per word with a bootstrap interval.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        corpus: folder of `halfstep prepare-corpus`, which holds the items when lambada is last_words
        output: JSON file of the rows
    """
    from halfstep.metrics.lambada import PERPLEXITY, examine

    device = device_of(machine)
    model = load(checkpoint, device)
    items = str(corpus / "last_words.jsonl") if evaluation.lambada == "last_words" else evaluation.lambada
    found = examine(model, items, evaluation.lambada_items, machine.micro_batch, str(device))
    nll = found["nll"]
    about = name_parts(model_name(checkpoint)) | {"num_samples": len(nll), "weights": "ema", "checkpoint": model.sha256[:16]}
    rows = [
        row("lambada_accuracy", protocol, hits.mean(), wilson(int(hits.sum()), len(hits)), **about)
        for protocol, hits in found["hits"].items()
    ]
    interval = bootstrap(nll, np.exp, evaluation.bootstrap)
    rows.append(row("lambada_perplexity", PERPLEXITY[model.kind], np.exp(nll.mean()), interval, **about))
    write_json(output, rows)


def load(folder: Path, device: torch.device) -> checkpoint.Model:
    return checkpoint.load(folder, "ema", str(device))


def read_samples(folder: Path) -> tuple[np.ndarray, dict]:
    """ids [N, L] and samples.json of one folder, the checksum compared."""
    facts, path = read_json(folder / "samples.json"), folder / "samples.npy"
    if not path.is_file():
        raise HalfstepError(f"{path}: no such file, though samples.json is there; run halfstep generate again")
    found = sha256(path)
    if found != facts["sha256"]:
        raise HalfstepError(
            f"{path}: sha256 {found[:12]}, samples.json says {facts['sha256'][:12]}: the file has changed; run halfstep generate again"
        )
    return np.load(path), facts


def measures(ids: np.ndarray, corpus: Path, judge: Judge, evaluation: Evaluation, machine: Machine, about: dict) -> list[dict]:
    """All rows of texts ids[N, L] of a corpus. Protocol `ids` needs a judge with the corpus's tokenizer, and is left out otherwise."""
    manifest, tokenizer = read_json(corpus / "manifest.json"), Tokenizer.from_file(str(corpus / "tokenizer.json"))
    label = " ".join(str(about[key]) + unit for key, unit in (("model", ""), ("steps", " steps")) if about.get(key) is not None)
    if ids.min() < 0 or ids.max() >= manifest["vocab_size"]:
        raise HalfstepError(
            f"samples of {label}: token ids from {ids.min()} to {ids.max()}, the corpus {corpus.name} has 0 to {manifest['vocab_size'] - 1}; "
            "they belong to another corpus, or a mask was left"
        )

    def mean_row(metric: str, protocol: str | None, values: np.ndarray, statistic=float, **more) -> dict:
        value = statistic(*values.reshape(len(values), -1).mean(0))
        return row(metric, protocol, value, bootstrap(values, statistic, evaluation.bootstrap), **about, **more)

    rows = []
    if judge.shares(tokenizer):
        nll = ids_nll(judge, ids, machine.micro_batch, f"{label}: judge, ids")
        rows.append(mean_row("generative_perplexity", "ids", nll, np.exp, judge=judge.name))
    sums = retokenized_nll(judge, ids, tokenizer, manifest["eos_id"], machine.micro_batch, f"{label}: judge, retokenized")
    rows.append(mean_row("generative_perplexity", "retokenized", sums, lambda total, number: np.exp(total / number), judge=judge.name))
    rows.append(mean_row("entropy", None, unigram_entropy(ids)))
    rows.append(mean_row("distinct_2", None, distinct(ids, 2)))
    if manifest["corpus"]["kind"] == "stories":
        texts = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
        stories, accepted, consistent = map(sum, zip(*map(judge_window, texts), strict=True))
        for metric, count in (("accepted_share", accepted), ("consistent_share", consistent)):  # no whole story: nothing is known
            interval = wilson(count, stories) if stories else (0.0, 1.0)
            rows.append(row(metric, None, count / max(stories, 1), interval, **about))
    return rows


def _judge(evaluation: Evaluation, machine: Machine) -> Judge:
    if evaluation.judge == "baseline":
        raise HalfstepError(
            "judge: found 'baseline', which only the workflow can resolve; name the folder, results/models/<teacher>/baseline/hf"
        )
    return load_judge(evaluation.judge, device_of(machine))

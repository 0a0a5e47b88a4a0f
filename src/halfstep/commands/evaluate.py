"""`halfstep score-samples`, `score-corpus` and `score-lambada`: texts and models in, metric rows with intervals out."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from halfstep import checkpoint
from halfstep.checkpoint import checkpoint_files as model_files
from halfstep.config import Evaluation, Machine, Weights
from halfstep.data.pack import Windows, corpus_files, read_manifest, tokenizer_of
from halfstep.data.stories import judge_window
from halfstep.data.tokenizer import vocabulary_sha256
from halfstep.distributed.device import find_device
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics.diversity import distinct, unigram_entropy
from halfstep.metrics.intervals import bootstrap, wilson
from halfstep.metrics.perplexity import Judge, ids_nll, load_judge, retokenized_nll
from halfstep.metrics.rows import model_name, name_parts, row
from halfstep.records import provenance

LAMBADA_SEED = 0  # of the masks drawn for an item
DATA_WINDOWS = 500  # held-out windows behind the "data" rows, or all there are

DRAWN = (
    "sampler",
    "network_evaluations",
    "num_samples",
    "seed",
    "weights",
    "draw_dtype",
)  # of samples.json, and columns of a row
FACTS = {"model", "checkpoint", "steps", "sha256", *DRAWN}  # what every samples.json holds


def score_samples(
    samples: list[Path], corpus: Path, output: Path, evaluation: Evaluation, machine: Machine
) -> None:
    """Generative perplexity, entropy, distinct bigrams, and for stories the shares that the grammar accepts, of one model's samples.

    Args:
        samples: folders of `halfstep generate`, one per step count; each judge is loaded once for all
        corpus: folder of `halfstep prepare-corpus` that the model was trained on
        output: JSON file of the rows
    """
    group, texts, words = join_group(machine), [], vocabulary_sha256(tokenizer_of(corpus))
    for folder in samples:
        ids, facts = read_samples(folder)
        if facts.get("vocabulary", words) != words:
            raise HalfstepError(
                f"{folder}: samples of other tokens than those of the corpus {corpus}; name the corpus that their model was trained on"
            )
        texts.append((ids, about_samples(facts)))
    rows = measures(texts, corpus, evaluation, machine, group)
    if not group.is_main:
        return
    write_json(output, rows)
    read = (folder / name for folder in samples for name in ("samples.json", "samples.npy"))
    provenance.write_record(
        output.with_suffix(f".{provenance.NAME}"),
        [output],
        [*read, *corpus_files(corpus), *evaluation.judge],
    )


def score_corpus(corpus: Path, output: Path, evaluation: Evaluation, machine: Machine) -> None:
    """The measures of samples, taken of held-out text itself: the line that a model should meet.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: JSON file of the rows, in a folder named after the teacher
    """
    group, windows = join_group(machine), Windows(corpus, "validation")
    chosen = np.unique(
        np.linspace(0, len(windows) - 1, min(DATA_WINDOWS, len(windows))).astype(int)
    )
    about = {
        "model": "data",
        "teacher": output.parent.name,
        "run": "data",
        "round": 0,
        "num_samples": len(chosen),
    }
    rows = measures([(windows[chosen].numpy(), about)], corpus, evaluation, machine, group)
    if not group.is_main:
        return
    write_json(output, rows)
    provenance.write_record(
        output.with_suffix(f".{provenance.NAME}"),
        [output],
        [*corpus_files(corpus, "validation"), *evaluation.judge],
    )


def score_lambada(
    checkpoint: Path,
    corpus: Path,
    output: Path,
    evaluation: Evaluation,
    machine: Machine,
    weights: Weights = "ema",
) -> None:
    """Last words through lm-eval: accuracy under each protocol with Wilson's interval, perplexity per word with a bootstrap interval.

    Args:
        checkpoint: a checkpoint folder, diffusion or autoregressive
        corpus: folder of `halfstep prepare-corpus`, which holds the items when lambada is last_words
        output: JSON file of the rows
        weights: which weights of the checkpoint are examined
    """
    from halfstep.metrics.lambada import examine

    group, device = join_group(machine), find_device(machine)
    model = load(checkpoint, weights, device)
    items = (
        str(corpus / "last_words.jsonl")
        if evaluation.lambada == "last_words"
        else evaluation.lambada
    )
    found = examine(
        model,
        items,
        evaluation.lambada_items,
        machine.micro_batch,
        str(device),
        LAMBADA_SEED,
        group,
    )
    if not group.is_main:
        return
    about = name_parts(model_name(checkpoint)) | {
        "weights": weights,
        "checkpoint": model.sha256[:16],
        "data": found["data"],
    }

    def row_of(
        metric: str, protocol: str, value: float, interval: tuple[float, float], each: np.ndarray
    ) -> dict:
        seed = LAMBADA_SEED if protocol.startswith("elbo") else None
        return row(
            metric,
            protocol,
            value,
            interval,
            num_samples=len(each),
            network_evaluations=found["passes"][protocol],
            seed=seed,
            **about,
        )

    write_json(output, [
        *(row_of("lambada_accuracy", name, hits.mean(), wilson(int(hits.sum()), len(hits)), hits) for name, hits in found["hits"].items()),
        *(row_of("lambada_perplexity", name, np.exp(nll.mean()), bootstrap(nll, np.exp, evaluation.bootstrap), nll) for name, nll in found["nll"].items()),
    ])  # fmt: skip
    provenance.write_record(
        output.with_suffix(f".{provenance.NAME}"),
        [output],
        [*model_files(checkpoint, weights), items],
    )


def load(folder: Path, weights: str, device: torch.device) -> checkpoint.Model:
    return checkpoint.load_checkpoint(folder, weights, str(device))


def about_samples(facts: dict) -> dict:
    """What samples.json says of samples, as columns of a row."""
    about = {key: facts.get(key) for key in (*DRAWN, "temperature", "top_p")}
    steps = None if facts.get("kind") == "autoregressive" else facts["steps"]
    return (
        about
        | name_parts(facts["model"])
        | {"checkpoint": facts["checkpoint"][:16], "steps": steps}
    )


def read_samples(folder: Path) -> tuple[np.ndarray, dict]:
    """ids [N, L] and samples.json of one folder, the checksum compared."""
    facts, path = read_json(folder / "samples.json"), folder / "samples.npy"
    if lacks := sorted(FACTS - facts.keys()) if isinstance(facts, dict) else FACTS:
        raise HalfstepError(
            f"{folder}/samples.json: has no {', '.join(lacks)}; run halfstep generate again"
        )
    if not path.is_file():
        raise HalfstepError(
            f"{path}: no such file, though samples.json is there; run halfstep generate again"
        )
    found = sha256(path)
    if found != facts["sha256"]:
        raise HalfstepError(
            f"{path}: sha256 {found[:12]}, samples.json says {facts['sha256'][:12]}: the file has changed; run halfstep generate again"
        )
    return np.load(path), facts


def measures(
    texts: list[tuple[np.ndarray, dict]],
    corpus: Path,
    evaluation: Evaluation,
    machine: Machine,
    group: Group,
) -> list[dict] | None:
    """All rows of sets of texts of a corpus, each a pair of ids[N, L] and what its rows say of it. Judges are loaded one after another.

    Protocol `ids` needs a judge with the corpus's tokenizer, and is left out otherwise. The processes share what the judges read; all but
    the first get None.
    """
    manifest, tokenizer = read_manifest(corpus), tokenizer_of(corpus)
    named = [
        (
            ids,
            about | {"data": corpus_name(corpus)},
            _label(ids, about, corpus, manifest["vocab_size"]),
        )
        for ids, about in texts
    ]

    def mean_row(
        metric: str, protocol: str, values: np.ndarray, about: dict, statistic=float
    ) -> dict:
        value = statistic(*values.reshape(len(values), -1).mean(0))
        return row(
            metric, protocol, value, bootstrap(values, statistic, evaluation.bootstrap), **about
        )

    found = []
    for judge in judges(evaluation, machine):
        for ids, about, label in named:
            if judge.shares(tokenizer):
                nll = ids_nll(judge, ids, machine.micro_batch, f"{label}: judge, ids", group)
                found.append(("ids", nll, about | judge.about, np.exp))
            sums = retokenized_nll(
                judge,
                ids,
                tokenizer,
                manifest["eos_id"],
                machine.micro_batch,
                f"{label}: judge, retokenized",
                group,
            )
            found.append(
                (
                    "retokenized",
                    sums,
                    about | judge.about,
                    lambda total, number: np.exp(total / number),
                )
            )
        del judge  # before the next is loaded
    if not group.is_main:
        return None
    rows = [mean_row("generative_perplexity", *of_judge) for of_judge in found]
    for ids, about, _ in named:
        rows.append(mean_row("entropy", "unigram", unigram_entropy(ids), about))
        rows.append(mean_row("distinct_2", "bigrams", distinct(ids, 2), about))
        if manifest["corpus"]["kind"] == "stories":
            written = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
            stories, accepted, consistent = map(sum, zip(*map(judge_window, written), strict=True))
            for metric, count in (
                ("accepted_share", accepted),
                ("consistent_share", consistent),
            ):  # no whole story: nothing is known
                interval = wilson(count, stories) if stories else (0.0, 1.0)
                rows.append(
                    row(
                        metric,
                        "grammar",
                        count / max(stories, 1),
                        interval,
                        **about | {"num_samples": stories},
                    )
                )  # what was examined
    return rows


def corpus_name(corpus: Path) -> str:
    """The corpus in a row: its folder's name, and the checksum of its held-out tokens."""
    return f"{corpus.name}@{read_manifest(corpus)['splits']['validation']['sha256'][:12]}"


def _label(ids: np.ndarray, about: dict, corpus: Path, vocab_size: int) -> str:
    """What the texts are called while they are judged; HalfstepError when they are no texts of the corpus."""
    label = " ".join(
        str(about[key]) + unit
        for key, unit in (("model", ""), ("steps", " steps"))
        if about.get(key) is not None
    )
    if ids.ndim != 2 or not ids.size:
        raise HalfstepError(
            f"samples of {label}: an array of shape {list(ids.shape)}, expected [texts, tokens], at least one of each; run halfstep generate again"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise HalfstepError(
            f"samples of {label}: token ids from {ids.min()} to {ids.max()}, the corpus {corpus.name} has 0 to {vocab_size - 1}; "
            "they belong to another corpus, or a mask was left"
        )
    return label


def judges(evaluation: Evaluation, machine: Machine) -> Iterator[Judge]:
    """The judges of the configuration, one in memory at a time."""
    if "baseline" in evaluation.judge:
        raise HalfstepError(
            "judge: found 'baseline', which only the workflow can resolve; name the folder, results/models/<teacher>/baseline/hf"
        )
    for name in evaluation.judge:
        yield load_judge(name, find_device(machine))

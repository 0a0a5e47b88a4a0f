"""`halfstep draw-naive`: texts of naive samplers, which no metric should rank above a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from halfstep.commands.samples import write_texts
from halfstep.commands.variety import DATA_WINDOWS, Texts, held_out_texts
from halfstep.config import NAIVE, Count, Seed
from halfstep.data.naive import (
    bigram_texts,
    count_bigrams,
    count_unigrams,
    find_sentences,
    fit_temperature,
    training_stream,
    unigram_texts,
)
from halfstep.data.windows import Windows, corpus_files, corpus_tokenizer, read_manifest
from halfstep.metrics.diversity import unigram_entropy
from halfstep.records import provenance

NEAR = 0.005  # in nats: the standard error that a match of entropies is granted at least


def draw_naive(
    corpus: Path, output: Path, num_samples: Count = 1024, sampling_seed: Seed = 1
) -> None:
    """Draw texts without a network: by unigrams, by bigrams, and by pasting training sentences.

    Of a corpus of pairs, text i has the prompt and the length of held-out pair i, as the samples of
    models have.

    Unigrams and bigrams are sharpened or flattened by a temperature, which is chosen so that the
    mean unigram entropy of the texts is that of held-out text. Each sampler has a folder with
    samples.npy, samples.txt and samples.json, as `halfstep generate` writes them.

    Args:
        corpus: folder of `halfstep prepare-corpus`
        output: folder of the three folders, in a folder named after the teacher
        num_samples: number of texts of each sampler
        sampling_seed: seed of the draws
    """
    manifest, tokenizer = read_manifest(corpus), corpus_tokenizer(corpus)
    wanted = unigram_entropy(held_out_texts(corpus, DATA_WINDOWS).counted)
    checkpoint = manifest["splits"]["train"]["sha256"]
    drawn = _draw_all(corpus, num_samples, sampling_seed, wanted.mean())
    for name, (texts, temperature) in zip(NAIVE, drawn, strict=True):
        found = unigram_entropy(texts.counted)
        about = {
            "model": f"{output.parent.name}/{name}",
            "checkpoint": checkpoint,
            "kind": "naive",
            "sampler": name,
            "steps": None,
            "network_evaluations": 0.0,
            "num_samples": num_samples,
            "seed": sampling_seed,
            "weights": "none",
            "draw_dtype": "float64",
            "fitted_temperature": temperature,
            "entropy": float(found.mean()),
            "held_out_entropy": float(wanted.mean()),
        }
        write_texts(output / name, texts.ids, tokenizer, about)
        _print_entropy(name, temperature, found, wanted)
    files = [file for name in NAIVE for file in sorted((output / name).glob("samples.*"))]
    inputs = corpus_files(corpus, "train", "validation")
    provenance.write_record(output / provenance.NAME, files, inputs)


def _draw_all(
    corpus: Path, number: int, seed: int, entropy: float
) -> Iterator[tuple[Texts, float | None]]:
    """For each sampler of NAIVE its texts, BOS and EOS included, and its temperature."""
    manifest, stream = read_manifest(corpus), training_stream(corpus)
    held_out = Windows(corpus, "validation")
    layout = held_out.layout
    unigrams, bigrams = count_unigrams(stream), count_bigrams(stream, manifest["vocab_size"])
    generators = [np.random.default_rng([seed, i]) for i in range(number)]
    u = np.stack([generator.random(layout.room) for generator in generators])

    def by_unigrams(temperature: float) -> Texts:
        return _framed(unigram_texts(unigrams.at(temperature), u), held_out)

    def by_bigrams(temperature: float) -> Texts:
        laws = unigrams.at(temperature), bigrams.at(temperature)
        return _framed(bigram_texts(*laws, u), held_out)

    yield _fitted(by_unigrams, entropy)
    yield _fitted(by_bigrams, entropy)
    sentences = find_sentences(stream, corpus_tokenizer(corpus), layout.eos_id)
    pasted = [sentences.paste(layout.room, generator) for generator in generators]
    yield _framed(np.array(pasted), held_out), None


def _fitted(draw: Callable[[float], Texts], entropy: float) -> tuple[Texts, float | None]:
    """The texts that a sampler draws at the temperature that gives this entropy, and that."""
    temperature = fit_temperature(lambda t: unigram_entropy(draw(t).counted).mean(), entropy)
    return draw(temperature), temperature


def _framed(ids: np.ndarray, held_out: Windows) -> Texts:
    """Texts ids[N, room] in the frame of a corpus's windows, or in place of their responses."""
    layout = held_out.layout
    windows = layout.frames(len(ids), ids.dtype)
    windows[:, layout.framing.inside(layout.length)] = ids
    if not held_out.is_pairs:
        return Texts(windows, {})
    rows = np.arange(len(ids)) % len(held_out)
    pairs = held_out[rows].numpy()
    words = held_out.words(rows, pairs)
    pairs[words] = windows[words]
    return Texts(pairs, {}, held_out.spans(rows, pairs))


def _print_entropy(
    name: str, temperature: float | None, found: np.ndarray, wanted: np.ndarray
) -> None:
    """Print the entropy of a sampler's texts, and a note where it misses that of held-out text."""
    how = "" if temperature is None else f" at temperature {temperature:.3f}"
    line = f"{name}{how}: entropy {found.mean():.3f} nats, held-out text {wanted.mean():.3f}"
    errors = [values.std() / len(values) ** 0.5 for values in (found, wanted)]
    if abs(found.mean() - wanted.mean()) <= 2 * max(NEAR, float(np.hypot(*errors))):
        print(line)
    else:
        print(f"note: {line}: not reached", file=sys.stderr)

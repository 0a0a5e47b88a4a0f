"""Variety of texts and their nearness to held-out text: rows of `halfstep score-samples`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from halfstep.config import Machine
from halfstep.data.stories import (
    fact_law,
    is_accepted,
    judge_window,
    story_facts,
    whole_stories,
)
from halfstep.data.tokenizer import EOS
from halfstep.data.windows import Windows, corpus_tokenizer, read_manifest, without_frame
from halfstep.distributed.group import Group
from halfstep.metrics.diversity import (
    distinct,
    distinct_in_groups,
    divergence_from_laws,
    repetition,
    self_bleu,
)
from halfstep.metrics.mauve import judge_features
from halfstep.metrics.perplexity import Judge, counted_parts
from halfstep.metrics.rows import mean_row, row, share_row

DATA_WINDOWS = 500  # windows behind the "data" rows, or all of them if there are fewer
MAUVE_TEXTS = 50  # fewest texts of either kind: five bins
BLEU_GROUP, BLEU_GROUPS = 5, 20  # texts that are compared with one another, and groups of them
STORY_GROUP = 20  # accepted stories among which repetitions are counted; fewer give no row


@dataclass(frozen=True)
class Texts:
    """Token ids[N, L] of texts, and the columns of a metric row that describe them.

    With the spans[N, 2] of their responses, only these count; all of each text does without.
    """

    ids: np.ndarray
    columns: dict[str, Any]
    spans: np.ndarray | None = None

    @property
    def counted(self) -> Sequence[np.ndarray]:
        """What counts of each text."""
        return counted_parts(self.ids, self.spans)

    def with_columns(self, columns: dict[str, Any]) -> Texts:
        """The same texts with more columns."""
        return replace(self, columns=self.columns | columns)


Features = tuple[np.ndarray | None, np.ndarray | None, dict[str, Any]]
"""A judge's features [n, D] of the reference and of texts (None but on rank 0), and columns."""


def held_out_texts(corpus: Path, count: int, first: int = 0, every: int = 1) -> Texts:
    """At most `count` of the held-out windows first, first + every, ..., evenly spaced.

    Of every other window those from 0 on are MAUVE's reference, and those from 1 on are compared
    with them.
    """
    windows = Windows(corpus, "validation")
    rows = spread_rows(len(windows), count, first, every)
    ids = windows[rows].numpy()
    return Texts(ids, {}, windows.spans(rows, ids))


def spread_rows(windows: int, count: int, first: int = 0, every: int = 1) -> np.ndarray:
    """The numbers of at most `count` of the windows first, first + every, ..., evenly spaced."""
    known = np.arange(first, windows, every)
    chosen = np.linspace(0, len(known) - 1, min(count, len(known))).astype(int)
    return known[np.unique(chosen)]


def text_label(columns: dict[str, Any]) -> str:
    """The name of a set of texts in log lines and errors."""
    steps, temperature = columns.get("steps"), columns.get("temperature", 1)
    label = columns["model"] if steps is None else f"{columns['model']} {steps} steps"
    return label if temperature == 1 else f"{label} temperature {temperature}"


def compare_texts(
    judge: Judge, texts: list[Texts], corpus: Path, machine: Machine, group: Group
) -> Iterator[Features]:
    """The judge's features of texts, and of as many reference windows, which are read only once.

    Sets of fewer than MAUVE_TEXTS are left out.
    """
    tokenizer, manifest = corpus_tokenizer(corpus), read_manifest(corpus)
    eos_id = manifest["eos_id"]

    def features_of(texts: Texts, label: str) -> np.ndarray | None:
        ids, batch = without_frame(texts.ids, manifest), machine.micro_batch
        label = f"{label}: judge, features"
        return judge_features(
            judge, ids, tokenizer, eos_id, batch, label, group, mean=True, spans=texts.spans
        )

    known: dict[int, np.ndarray | None] = {}
    for written in texts:
        reference = held_out_texts(corpus, len(written.ids), every=2)
        number = len(reference.ids)
        if min(len(written.ids), number) < MAUVE_TEXTS:
            continue
        if number not in known:
            known[number] = features_of(reference, "reference")
        found = features_of(written, text_label(written.columns))
        yield known[number], found, written.columns | judge.columns


def variety_rows(texts: Texts, resamples: int) -> list[dict]:
    """Distinct bigrams and repetition within the texts, and self-BLEU between them."""
    counted, columns = texts.counted, texts.columns
    rows = [
        mean_row("distinct_2", "bigrams", distinct(counted, 2), columns, resamples),
        mean_row("repetition", "fourgrams", repetition(counted), columns, resamples),
    ]
    groups = min(len(counted) // BLEU_GROUP, BLEU_GROUPS)
    if groups:
        starts = range(0, groups * BLEU_GROUP, BLEU_GROUP)
        values = self_bleu([counted[i : i + BLEU_GROUP] for i in starts])
        read = columns | {"num_samples": groups * BLEU_GROUP}
        rows.append(mean_row("sample_self_bleu", "groups-of-5", values, read, resamples))
    return rows


def grammar_rows(
    ids: np.ndarray, columns: dict[str, Any], tokenizer: Tokenizer, resamples: int, end: str = EOS
) -> list[dict]:
    """The shares of the texts' whole stories that the grammar finds accepted and consistent, and of
    their sentences that it knows.

    `end` is the token that ends a story.

    The variety of the accepted ones has rows where there are at least STORY_GROUP.
    """
    texts = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    texts = [text.replace(end, EOS) for text in texts]
    counts = [judge_window(text) for text in texts]
    stories, accepted, consistent, sentences, known = map(sum, zip(*counts, strict=True))
    return [
        share_row("sentence_share", "grammar", known, sentences, columns),
        share_row("accepted_share", "grammar", accepted, stories, columns),
        share_row("consistent_share", "grammar", consistent, stories, columns),
        *story_rows(texts, columns, resamples),
    ]


def story_rows(texts: list[str], columns: dict[str, Any], resamples: int) -> list[dict]:
    """How many of the texts' accepted stories are different, and how far their facts are from the
    law of the grammar. A fact is taken from its first mention, if there is one.

    """
    windows = [list(filter(is_accepted, whole_stories(text))) for text in texts]
    rows = []
    different, counted = distinct_in_groups(list(chain(*windows)), STORY_GROUP)
    if counted:
        rows.append(share_row("distinct_stories", "grammar", different, counted, columns))
    facts = [[known for story in window if (known := story_facts(story))] for window in windows]
    stories = sum(map(len, facts))
    if stories >= STORY_GROUP:
        laws = fact_law()
        counts = [_count_options(facts, fact, list(law)) for fact, law in laws.items()]
        chances = [np.array(list(law.values())) for law in laws.values()]
        found = divergence_from_laws(counts, chances, resamples)
        of_stories = columns | {"num_samples": stories}
        rows.append(row("fact_divergence", "grammar", *found, **of_stories))
    return rows


def _count_options(
    windows: list[list[dict[str, str]]], fact: str, options: list[str]
) -> np.ndarray:
    """How often the stories of each window have each option of a fact: [N, K]."""
    counts = np.zeros((len(windows), len(options)))
    for i, stories in enumerate(windows):
        for facts in stories:
            if facts.get(fact) in options:
                counts[i, options.index(facts[fact])] += 1
    return counts

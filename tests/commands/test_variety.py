"""Variety: a sampler that narrows to a few stories is seen, and MAUVE ranks real windows first."""

import random

import numpy as np
import pytest

from halfstep.commands.data import prepare_corpus
from halfstep.commands.evaluate import score_corpus, score_texts
from halfstep.commands.variety import Texts, held_out_texts, story_rows
from halfstep.config import Corpus, Evaluation, Machine
from halfstep.data.stories import fact_law, sample_stories, story_facts
from halfstep.data.tokenizer import EOS
from halfstep.distributed.group import ALONE
from halfstep.files import read_json

MACHINE = Machine(device="cpu", threads=1)


def windows(stories, each=5):
    """Texts as windows hold them: fragments at both ends, and `each` whole stories between."""
    groups = [stories[i : i + each] for i in range(0, len(stories) - each + 1, each)]
    return [EOS.join([f"{EOS}the end.", *group, f"Once{EOS}"]) for group in groups]


def rows_of(stories, run="kl_backward"):
    columns = {"model": "m", "run": run}
    return {row["metric"]: row for row in story_rows(windows(stories), columns, 200)}


@pytest.fixture(scope="module")
def lawful():
    return list(sample_stories(400, 5))


def test_a_sampler_that_follows_the_law_is_told_from_one_that_repeats_three_stories(lawful):
    found = rows_of(lawful)
    repeated = rows_of(random.Random(1).choices(lawful[:3], k=400))
    assert found["fact_divergence"]["low"] < 0.01 and found["fact_divergence"]["value"] < 0.02
    assert found["distinct_stories"]["value"] > 0.95
    assert repeated["distinct_stories"]["value"] == pytest.approx(3 / 20)
    assert repeated["fact_divergence"]["low"] > 10 * found["fact_divergence"]["high"]


def test_a_sampler_that_prefers_the_most_frequent_facts_diverges(lawful):
    """All its stories are different: only the facts show that it is narrower than the law."""
    law = fact_law()
    favorites = {fact: max(chances, key=chances.get) for fact, chances in law.items()}

    def matches(story):
        facts = story_facts(story)
        return sum(facts.get(fact) == favorite for fact, favorite in favorites.items())

    many = list(sample_stories(2000, 6))
    narrow = sorted(dict.fromkeys(many), key=matches, reverse=True)[:400]
    random.Random(0).shuffle(narrow)
    found = rows_of(narrow)
    assert found["distinct_stories"]["value"] == 1
    assert found["fact_divergence"]["low"] > rows_of(lawful)["fact_divergence"]["high"]


def test_few_stories_have_no_variety(lawful):
    assert rows_of(lawful[:15]) == {}
    assert rows_of(["No story."] * 400) == {}


def test_held_out_stories_follow_the_law_and_those_of_last_words_another():
    held_out, others = (list(sample_stories(300, 5, name)) for name in ("validation", "last_words"))
    assert rows_of(held_out, run="data")["fact_divergence"]["low"] < 0.01
    assert rows_of(others)["fact_divergence"]["low"] > 0.05


def test_mauve_is_near_one_for_the_corpus_itself_and_lower_for_unigrams(world, tmp_path):
    """Windows of one half against the other; unigrams keep all counts and lose the order."""
    corpus = tmp_path / "stories"
    sizes = {"num_documents": 50, "validation_documents": 300}
    prepare_corpus(corpus, Corpus(kind="stories", length=48, vocab_size=500, **sizes), workers=1)
    evaluation = Evaluation(judge=str(world.models / "baseline" / "hf"), bootstrap=100)
    reference, other = (held_out_texts(corpus, 90, first, 2).ids for first in (0, 1))
    assert len(reference) == len(other) == 90 and not np.array_equal(reference, other)
    score_corpus(corpus, tmp_path / "t" / "data.json", evaluation, MACHINE, num_samples=90)
    data = [row for row in read_json(tmp_path / "t" / "data.json") if row["metric"].endswith("uve")]
    unigrams = np.random.default_rng(0).permuted(other.ravel()).reshape(other.shape)
    texts = [Texts(ids, {"model": "m", "run": "m"}) for ids in (unigrams, unigrams[:49])]
    rows = score_texts(texts, corpus, evaluation, MACHINE, ALONE)
    found = [row for row in rows if row["metric"] == "sample_mauve"]
    assert len(found) == len(data) == 1  # 49 texts are too few
    assert data[0]["value"] > 0.9 > found[0]["high"]
    assert data[0]["num_samples"] == 90

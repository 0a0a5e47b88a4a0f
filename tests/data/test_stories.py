"""The grammar of stories: it accepts what it writes, and its probabilities are exact."""

import math
import random
import re
from collections import Counter
from itertools import product

import pytest

from halfstep.data import stories
from halfstep.data.stories import EOS, is_held_out, judge, judge_window, log_likelihood

TRAIN = list(stories.sample_stories(4000, seed=3))
LAST_WORDS = list(stories.sample_stories(1000, seed=3, split="last_words"))
VALIDATION = list(stories.sample_stories(1000, seed=3, split="validation"))


def words_of(story):
    return set(re.findall(r"\w+", story))


def facts_of(story):
    return stories._facts_of(stories._parse(story))


def test_the_grammar_accepts_everything_that_it_writes():
    assert all(judge(story) == (True, True) for story in TRAIN + VALIDATION + LAST_WORDS)


def test_a_longer_run_begins_with_the_shorter_and_seeds_differ():
    assert list(stories.sample_stories(50, seed=3)) == TRAIN[:50]
    assert list(stories.sample_stories(50, seed=4)) != TRAIN[:50]


def test_the_pairs_of_last_words_occur_neither_in_training_nor_in_validation():
    in_train = set()
    for words in map(words_of, TRAIN + VALIDATION):
        names, things = (words & set(stories.WORDS[kind]) for kind in ("NAME", "THING"))
        in_train |= set(product(names, things))
    assert len(in_train) > 50 and not any(is_held_out(*pair) for pair in in_train)
    heroes = {(facts["name"], facts["thing"]) for facts in map(facts_of, LAST_WORDS)}
    assert len(heroes) > 2 and all(is_held_out(*pair) for pair in heroes)
    pairs = [is_held_out(n, t) for n in stories.WORDS["NAME"] for t in stories.WORDS["THING"]]
    assert 0.05 < sum(pairs) / len(pairs) < 0.15
    # The combinations are new, but no word is.
    assert set().union(*map(words_of, LAST_WORDS)) <= set().union(*map(words_of, TRAIN))


def test_no_story_of_validation_is_in_training_and_both_follow_one_law():
    """Each fact's commonest value is as frequent in both, and in last words it is not."""
    assert not set(TRAIN) & set(VALIDATION)

    def differences(others):
        found = []
        for fact in ("name", "thing", "place", "friend", "colour"):
            mine, theirs = (
                Counter(facts_of(text).get(fact) for text in texts) for texts in (TRAIN, others)
            )
            value, count = mine.most_common(1)[0]
            p, q = count / len(TRAIN), theirs[value] / len(others)
            found.append(abs(p - q) / math.sqrt(p * (1 - p) * (1 / len(TRAIN) + 1 / len(others))))
        return found

    assert max(differences(VALIDATION)) < 4 < max(differences(LAST_WORDS))


def test_the_shares_of_the_splits_are_exact():
    rng, draws = random.Random(0), 20_000
    found = Counter(stories.split_of(stories.write_story(rng)[1]) for _ in range(draws))
    shares = stories.split_shares()
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
    for split, p in shares.items():
        assert abs(found[split] - draws * p) < 5 * math.sqrt(draws * p * (1 - p))


@pytest.fixture
def reduced(monkeypatch):
    """A grammar with few words per class and few patterns per part: small enough to enumerate."""
    few = {"event": None, "name": 3, "thing": 2, "friend": 3, "feeling": 2, "weather": 2}
    facts = {
        fact: (options[: few.get(fact, 1)], *rest)
        for fact, (options, *rest) in stories.FACTS.items()
    }
    all_of = ("event", "ending")
    patterns = {
        part: (given, dict(list(rows.items())[: None if part in all_of else 2]))
        for part, (given, rows) in stories.PATTERNS.items()
    }
    held_out = ("Tom", "kite")
    monkeypatch.setattr(stories, "is_held_out", lambda *pair: pair == held_out)
    monkeypatch.setattr(stories, "FACTS", facts)
    monkeypatch.setattr(stories, "PATTERNS", patterns)
    caches = (stories.fact_choice, stories.pattern_choice, stories.split_shares)
    for function in caches:
        function.cache_clear()
    yield
    for function in caches:
        function.cache_clear()


def enumerate_texts():
    """Every derivation as a text, by brute force and without probabilities."""
    for values in product(*(options for options, _, _ in stories.FACTS.values())):
        facts = dict(zip(stories.FACTS, values, strict=True))
        if facts["friend"] == facts["name"]:
            continue
        words = stories._with_pronouns(facts)
        parts = []
        for given, rows in stories.PATTERNS.values():
            allowed = [p for p, values in rows.items() if values is None or facts[given] in values]
            parts.append(allowed)
        for chosen in product(*parts):
            yield " ".join(filter(None, chosen)).format_map(words)


def test_the_probabilities_of_all_stories_sum_to_one(reduced):
    texts = set(enumerate_texts())  # facts that a text does not mention make no other text
    assert len(texts) > 5000
    log_p = {text: log_likelihood(text) for text in texts}
    assert math.fsum(map(math.exp, log_p.values())) == pytest.approx(1, abs=1e-9)
    for split in ("train", "last_words"):
        inside = [p for text in texts if (p := log_likelihood(text, split)) is not None]
        assert 100 < len(inside) < len(texts)
        assert math.fsum(map(math.exp, inside)) == pytest.approx(1, abs=1e-9)
    rng, draws = random.Random(5), 20_000
    counts = Counter(stories.write_story(rng)[0] for _ in range(draws))
    assert counts.keys() <= log_p.keys()
    for text in sorted(texts, key=lambda text: (log_p[text], text))[-40:]:  # the likeliest
        p = math.exp(log_p[text])
        assert abs(counts[text] - draws * p) < 5 * math.sqrt(draws * p)


def test_choices_are_skewed_and_depend_on_each_other():
    choices = [stories.fact_choice("place", kind, None) for kind in stories.WORDS["KIND"]]
    favorites = {choice.options[choice.chances.index(max(choice.chances))] for choice in choices}
    # Uniform choices would have a chance of 0.17; independent ones would share one favorite.
    assert min(max(choice.chances) for choice in choices) > 0.3 and len(favorites) >= 3
    nats = -sum(log_likelihood(story, "train") for story in TRAIN) / len(TRAIN)
    assert 20 < nats < 25
    print(f"{nats:.2f} nats per story")


def test_each_word_has_one_class_and_the_english_is_right():
    vocabulary = [word for group in stories.WORDS.values() for word in group]
    assert len(vocabulary) == len(set(vocabulary))
    literals = {
        word for pattern in stories.SLOTS for word in stories._words(pattern) if word[0] != "{"
    }
    assert not literals & set(stories.WORD_CLASS)
    patterns = [pattern for _, rows in stories.PATTERNS.values() for pattern in rows if pattern]
    assert len(stories.SHAPES) == len(patterns)
    assert not [story for story in TRAIN if re.search(r"\ba [aeiou]", story)]
    assert 100 <= len(set().union(*map(words_of, TRAIN))) <= 160


STORY = (
    "A brave cat named Lily had a red kite. She met Tom at the park. They played softly with the "
    "kite. "
    "Lily was happy and took home the kite."
)


@pytest.mark.parametrize(
    "old, new",
    [
        ("Lily was", "Mia was"),  # another name
        ("She met", "He met"),  # pronouns
        ("They played softly with the kite.", "She let Ben keep the big kite."),  # another friend
        ("They played softly with the kite.", "He let Tom keep the big kite."),
        ("softly with the kite", "softly with the ball"),  # things
        ("home the kite", "home the doll"),
        ("met Tom", "met Lily"),  # hero and friend are the same
        ("They played softly with the kite.", "Tom wanted the blue kite."),  # colors
        ("and took home the kite", "and went slowly back to the farm"),  # places
        (
            "They played softly with the kite.",
            "The warm wind took the kite.",
        ),  # so it cannot be taken home
    ],
)
def test_a_broken_reference_is_accepted_but_inconsistent(old, new):
    assert judge(STORY) == (True, True) and old in STORY
    assert judge(STORY.replace(old, new)) == (True, False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        STORY[:-1],
        STORY + " ",
        STORY + " They played softly with the kite.",
        STORY.replace("kite", "kites"),
        STORY.replace("Lily", "happy"),
        STORY.replace("met Tom", "met her"),
        STORY.replace(" the park", ""),
        STORY.replace("cat", "<KIND>"),
        "Lily was happy and took home the kite.",
        STORY.replace("She met Tom at the park. ", ""),
        STORY.replace(". ", ".  "),
        STORY + STORY,
    ],
)
def test_other_texts_are_not_accepted(text):
    assert judge(text) == (False, False) and log_likelihood(text) is None


def test_a_swapped_name_is_found_and_scrambled_sentences_are_not_accepted():
    rng = random.Random(1)
    for story in TRAIN[:300]:
        name = facts_of(story)["name"]
        other = rng.choice([n for n in stories.WORDS["NAME"] if n not in story])
        places = [m.start() for m in re.finditer(rf"\b{name}\b", story)]
        if len(places) > 1:  # a name that is mentioned once may be any name
            at = rng.choice(places)
            assert judge(story[:at] + other + story[at + len(name) :]) == (True, False)
        sentences = story[:-1].split(". ")
        scrambled = rng.sample(sentences, len(sentences))
        assert judge(". ".join(scrambled) + ".").accepted == (scrambled == sentences)


def test_pronouns_follow_the_name():
    for story in TRAIN[:500]:
        is_he = facts_of(story)["name"] in stories.HE
        other = r"\b[Ss]he\b" if is_he else r"\b[Hh]e\b"
        assert not re.search(other, story)


def test_last_words_follow_from_the_story():
    items = stories.last_words(500, seed=3)
    assert [item["text"] + "." for item in items] == LAST_WORDS[:500]
    classes = Counter()
    for item in items:
        context, word = item["text"].rsplit(" ", 1)
        told = context.rpartition(". ")[0]  # all sentences before the last
        assert word.isalpha() and word in re.findall(r"\w+", told)
        classes[stories.WORD_CLASS[word]] += 1
    assert len(classes) >= 3 and max(classes.values()) < 0.8 * len(items), classes


def test_a_window_is_judged_by_its_whole_stories():
    inside = [TRAIN[0], STORY.replace("met Tom", "met Lily"), "no story", ""]
    window = EOS + "end of one." + EOS + EOS.join(inside) + EOS + "Once there" + EOS
    known = sum(story.count(".") for story in inside[:2])
    assert judge_window(window) == (4, 2, 1, known + 2, known)
    assert judge_window(["end of one.", *inside, "Once there"]) == (4, 2, 1, known + 2, known)
    assert judge_window(EOS + TRAIN[0] + EOS) == (0, 0, 0, 0, 0)  # alone, it may be a fragment
    assert judge_window(EOS * 10) == (7, 0, 0, 7, 0)  # a collapse into EOS is no success


def test_a_sentence_is_known_at_any_place_and_only_whole():
    """Sentences in another order are known, though the story is not accepted; half a one is not."""
    story = TRAIN[0].removesuffix(".").split(". ")
    assert len(story) > 2
    window = [".", ". ".join(reversed(story)) + ".", TRAIN[0].replace(story[1], story[1][:-4]), "."]
    assert judge_window(window) == (2, 0, 0, 2 * len(story), 2 * len(story) - 1)

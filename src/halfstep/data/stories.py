"""`stories`: a seeded grammar of short English children's stories that writes them and judges them.

A story is drawn in two steps. First its facts, each given an earlier one (`FACTS`: places that kinds prefer, colours that things
prefer, ...), with chances that fall like Zipf's law: P(option | parent) ~ 1 / (rank in general ** 0.8 * rank for this parent ** 2).
Then one sentence pattern per part (`PATTERNS`), which mentions facts. Every pattern has a shape of its own once its words are
replaced by their classes, so a text has at most one parse, and its probability is the product of the choices along it:

    log P(story) = sum_facts log P(fact | parent) + sum_parts log P(pattern | parent)        [nats]

The judge uses the same tables: *accepted* when every sentence has a known shape at its place, *consistent* when moreover all
mentions of a fact agree and no rule is broken, which is exactly when P(story) > 0. One pair of a name and a thing in ten is held
out: in training no story has both; in validation they are the hero and what the hero brings.
"""

from __future__ import annotations

import math
import random
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from halfstep.data.tokenizer import EOS

# Words by class, the most frequent first. A word belongs to one class only, and none after "a" begins with a vowel.
SHE = "Lily Mia Anna Rosie".split()
HE = "Tom Ben Sam Max".split()
WORDS = {
    "NAME": [name for pair in zip(SHE, HE, strict=True) for name in pair],
    "KIND": "rabbit fox bear mouse duck cat".split(),
    "PLACE": "park garden forest beach river farm".split(),
    "THING": "kite ball hat book drum boat bell doll".split(),
    "COLOUR": "red blue green yellow pink".split(),
    "FEELING": "happy glad proud tired calm".split(),
}
PRONOUNS = {
    "She": ("She", "He"),
    "she": ("she", "he"),
    "her": ("her", "his"),
    "him": ("her", "him"),
}  # her, him as in `his` and `to him`

EVENTS = "play gift lose save wish".split()

# fact: (options, the fact it depends on, the fact it must differ from), in the order of drawing
FACTS: dict[str, tuple[list[str], str | None, str | None]] = {
    "kind": (WORDS["KIND"], None, None),
    "name": (WORDS["NAME"], "kind", None),
    "place": (WORDS["PLACE"], "kind", None),
    "thing": (WORDS["THING"], "place", None),
    "colour": (WORDS["COLOUR"], "thing", None),
    "friend": (WORDS["NAME"], "name", "name"),
    "event": (EVENTS, "thing", None),
    "feeling": (WORDS["FEELING"], "event", None),
}

# part: (the fact its pattern depends on, {pattern: the fact's values that allow it, all when None}), the most frequent first.
# she, her and him are the hero.
Patterns = dict[str, tuple[str, ...] | None]
PATTERNS: dict[str, tuple[str, Patterns]] = {
    "opening": ("kind", {
        "{name} the {kind} had a {colour} {thing} .": None,
        "One day {name} the {kind} found a {colour} {thing} .": None,
        "A {kind} named {name} had a {colour} {thing} .": None,
    }),
    "meeting": ("place", {
        "{She} met {friend} at the {place} .": None,
        "At the {place} {she} saw {friend} .": None,
        "{friend} came to the {place} with {him} .": None,
    }),
    "event": ("event", {
        "They played with the {thing} .": ("play",),
        "They played at the {place} until dark .": ("play",),
        "{name} gave {friend} the {thing} .": ("gift",),
        "{She} let {friend} keep the {thing} .": ("gift",),
        "The {thing} broke but {friend} was kind .": ("lose",),
        "The wind took the {thing} .": ("lose",),
        "The {thing} fell but {friend} saved it .": ("save",),
        "{friend} found the lost {thing} .": ("save",),
        "{friend} wanted the {colour} {thing} .": ("wish",),
    }),
    "ending": ("event", {
        "{name} was {feeling} and took home the {thing} .": ("play", "save"),
        "{name} was {feeling} because {she} had a friend {friend} .": ("gift", "lose", "wish"),
        "{friend} was {feeling} because the {thing} was {colour} .": ("gift", "wish"),
        "{name} was {feeling} and went back to the {place} .": ("play", "lose", "save"),
        "{name} felt {feeling} and thanked {friend} .": None,
    }),
}  # fmt: skip

CLASS = {"name": "NAME", "friend": "NAME", "kind": "KIND", "thing": "THING", "colour": "COLOUR", "place": "PLACE",
         "feeling": "FEELING", "She": "She", "she": "she", "her": "her", "him": "her"}  # fmt: skip
WORD_CLASS = {word: name for name, words in WORDS.items() for word in words}
WORD_CLASS |= {
    "She": "She",
    "He": "She",
    "she": "she",
    "he": "she",
    "her": "her",
    "his": "her",
    "him": "her",
}


Shape = tuple[str | tuple[str], ...]


def _shape(words: Sequence[str]) -> Shape:
    """A sentence with each word that names something replaced by its class, as a 1-tuple: no literal word is equal to it."""
    return tuple((WORD_CLASS[word],) if word in WORD_CLASS else word for word in words)


def _slots(pattern: str) -> list[tuple[int, str]]:
    return [(i, word[1:-1]) for i, word in enumerate(pattern.split()) if word[0] == "{"]


SHAPES: dict[Shape, tuple[str, str]] = {  # shape of a sentence: its part and pattern
    tuple((CLASS[word[1:-1]],) if word[0] == "{" else word for word in pattern.split()): (
        part,
        pattern,
    )
    for part, (_, patterns) in PATTERNS.items()
    for pattern in patterns
}
SLOTS = {pattern: _slots(pattern) for _, patterns in PATTERNS.values() for pattern in patterns}
TEXTS = {pattern: pattern.replace(" .", ".") for pattern in SLOTS}


class Choice(NamedTuple):
    """A finite distribution."""

    options: list[str]
    chances: list[float]
    sums: list[float]

    def draw(self, rng: random.Random) -> str:
        return self.options[min(bisect(self.sums, rng.random()), len(self.options) - 1)]

    def log_p(self, option: str) -> float | None:
        return (
            math.log(self.chances[self.options.index(option)]) if option in self.options else None
        )


def _choice(options: list[str], label: str) -> Choice:
    """P(option) ~ 1 / (rank in the list ** 0.8 * rank in an order of this label's own ** 2)."""
    own = sorted(options, key=lambda option: zlib.crc32(f"{label}/{option}".encode()))
    weights = [(i + 1) ** -0.8 * (own.index(option) + 1) ** -2 for i, option in enumerate(options)]
    chances = [weight / sum(weights) for weight in weights]
    return Choice(options, chances, list(accumulate(chances)))


@cache
def fact_choice(fact: str, parent: str | None, taken: str | None) -> Choice:
    """P(fact | the fact it depends on, the fact it must differ from)."""
    return _choice(
        [option for option in FACTS[fact][0] if option != taken], f"{fact} given {parent}"
    )


@cache
def pattern_choice(part: str, given: str) -> Choice:
    """P(pattern of this part | the fact it depends on)."""
    return _choice(
        [p for p, allowed in PATTERNS[part][1].items() if allowed is None or given in allowed],
        f"{part} given {given}",
    )


def is_held_out(name: str, thing: str) -> bool:
    """One pair in ten, the same in every run."""
    return zlib.crc32(f"{name} and the {thing}".encode()) % 10 == 0


def split_of(facts: dict[str, str]) -> str | None:
    """validation: hero and thing are a held-out pair; train: nobody in the story meets a held-out thing; None: in no split."""
    if is_held_out(facts["name"], facts["thing"]):
        return "validation"
    pairs = ((name, facts["thing"]) for name in (facts["name"], facts["friend"]))
    return None if any(is_held_out(*pair) for pair in pairs) else "train"


@cache
def split_shares() -> dict[str | None, float]:
    """Exact chance of each split: the sum of P(facts) over all that decide on it."""
    shares: dict[str | None, float] = {"train": 0.0, "validation": 0.0, None: 0.0}
    for kind, p_kind in _chances("kind"):
        things: dict[str, float] = {}
        for place, p_place in _chances("place", kind):
            for thing, p in _chances("thing", place):
                things[thing] = things.get(thing, 0) + p_kind * p_place * p
        for thing, p_thing in things.items():
            for name, p_name in _chances("name", kind):
                for friend, p_friend in _chances("friend", name, name):
                    shares[split_of({"name": name, "thing": thing, "friend": friend})] += (
                        p_thing * p_name * p_friend
                    )
    return shares


def _chances(fact: str, parent: str | None = None, taken: str | None = None):
    choice = fact_choice(fact, parent, taken)
    return zip(choice.options, choice.chances, strict=True)


def _derived(facts: dict[str, str]) -> dict[str, str]:
    """The facts with the pronouns that follow from them."""
    return {**facts, **{word: forms[facts["name"] in HE] for word, forms in PRONOUNS.items()}}


def write(rng: random.Random) -> tuple[str, dict[str, str]]:
    """One story and its facts."""
    facts: dict[str, str] = {}
    for fact, (_, parent, unlike) in FACTS.items():
        facts[fact] = fact_choice(
            fact, facts[parent] if parent else None, facts[unlike] if unlike else None
        ).draw(rng)
    words = _derived(facts)
    said = [
        TEXTS[pattern_choice(part, facts[given]).draw(rng)] for part, (given, _) in PATTERNS.items()
    ]
    return " ".join(said).format_map(words), facts


def sample_stories(count: int, seed: int, split: str = "train") -> Iterator[str]:
    """`count` stories of a split, train or validation; a longer run begins with the shorter one."""
    rng = random.Random(f"{seed}/{split}")
    while count:
        text, facts = write(rng)
        if split_of(facts) == split:
            count -= 1
            yield text


def last_words(count: int, seed: int) -> list[dict[str, str]]:
    """Items in LAMBADA's form, from held-out stories: the word after the last space follows from the story alone."""
    return [{"text": story.rstrip(".")} for story in sample_stories(count, seed, "validation")]


class Verdict(NamedTuple):
    accepted: bool
    """every sentence has the shape of a pattern, at its place in the story"""
    consistent: bool
    """and all mentions agree: the story has a probability"""


def _parse(text: str) -> dict[str, tuple[str, list[str]]] | None:
    """part -> (pattern, words), or None when the text is not accepted."""
    if not text.endswith("."):
        return None
    found: dict[str, tuple[str, list[str]]] = {}
    for sentence in text[:-1].split(". "):
        words = [*sentence.split(" "), "."]
        part, pattern = SHAPES.get(_shape(words), (None, ""))
        forms = [(words[i], PRONOUNS.get(slot)) for i, slot in SLOTS[pattern]] if part else []
        if (
            part is None
            or part in found
            or any(allowed and word not in allowed for word, allowed in forms)
        ):
            return None
        found[part] = (pattern, words)
    return found if list(found) == list(PATTERNS) else None


def log_likelihood(text: str, split: str | None = None) -> float | None:
    """Exact log P(text) in nats, None when the grammar cannot write it.

    split None: over all stories; "train" or "validation": among the stories of that split, P(text) / P(split).
    """
    parse = _parse(text)
    if parse is None:
        return None
    mentions: dict[str, set[str]] = {}
    for pattern, words in parse.values():
        for i, slot in SLOTS[pattern]:
            mentions.setdefault(slot, set()).add(words[i])
    if any(len(words) > 1 for words in mentions.values()):
        return None
    told = {slot: words.copy().pop() for slot, words in mentions.items()}
    event = next(iter(PATTERNS["event"][1][parse["event"][0]] or ()))
    facts = {
        fact: told.get(fact, event) for fact in FACTS
    }  # every part tells its own; the event is told by its pattern
    derived = _derived(facts)
    if any(derived.get(slot) != word for slot, word in told.items()):
        return None
    terms = [
        fact_choice(
            fact, facts[parent] if parent else None, facts[unlike] if unlike else None
        ).log_p(facts[fact])
        for fact, (_, parent, unlike) in FACTS.items()
    ]
    terms += [
        pattern_choice(part, facts[PATTERNS[part][0]]).log_p(pattern)
        for part, (pattern, _) in parse.items()
    ]
    if None in terms:
        return None
    if split is not None:
        if split_of(facts) != split:
            return None
        terms.append(-math.log(split_shares()[split]))
    return math.fsum(terms)


def judge(text: str) -> Verdict:
    """Is this a story of the grammar, and do its references agree?"""
    accepted = _parse(text) is not None
    return Verdict(accepted, accepted and log_likelihood(text) is not None)


class Counts(NamedTuple):
    stories: int
    accepted: int
    consistent: int


def judge_window(window: str | Sequence[str]) -> Counts:
    """Counts over the whole stories of a generated window, given as text with EOS between stories or as its pieces.

    A window is BOS + stream + EOS cut anywhere, so its first and last pieces are fragments and are left out. An empty piece between
    two EOS counts as a story that is not accepted: a model that fills its window with EOS must not look good.
    """
    if isinstance(window, str):
        window = window.removeprefix(EOS).removesuffix(EOS).split(EOS)
    verdicts = [judge(piece) for piece in window[1:-1]]
    return Counts(
        len(verdicts), sum(v.accepted for v in verdicts), sum(v.consistent for v in verdicts)
    )

"""Corpus kind `stories`: a seeded grammar that writes and judges short English children's stories.

A story is drawn in two steps. First come its facts, each given an earlier one (`FACTS`: places that
kinds prefer, colors that things prefer, ...). Chances fall like Zipf's law: P(option) ~ 1 / rank **
0.8; where an option depends on another fact, that is divided by (rank for this parent) ** 2. Then
comes one sentence pattern per part, or none (`PATTERNS`), which mentions facts. No two patterns
have the same shape once words are replaced by their classes. So a text has at most one parse, and
its probability is the product of the choices along it:

    log P(story) = sum_facts log P(fact | parent) + sum_parts log P(pattern | parent)        [nats]

The first sum is over the facts that the text mentions: no other fact depends on the rest, so their
chances sum to one.

The judge uses the same tables. A text is *accepted* if every sentence has a known shape at its
place. It is *consistent* if, in addition, all mentions of a fact agree and no rule is broken, which
holds exactly when P(story) > 0.

One pair of a name and a thing in ten is kept for last words. No story of training or validation
contains both; in the items of last words they are the hero and the thing. Of the other stories
one in ten, by a checksum of its text, is for validation. So held-out text follows the law that a
model learns, and no story of it is in training.
"""

from __future__ import annotations

import math
import random
import re
import zlib
from bisect import bisect
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, islice
from typing import NamedTuple

from halfstep.data.tokenizer import EOS

# Words by class, the most frequent first. A word has one class only, and no word that follows "a"
# begins with a vowel.
SHE = "Lily Mia Anna Rosie".split()
HE = "Tom Ben Sam Max".split()
WORDS = {
    "NAME": [name for pair in zip(SHE, HE, strict=True) for name in pair],
    "KIND": "rabbit fox bear mouse duck cat".split(),
    "PLACE": "park garden forest beach river farm".split(),
    "THING": "kite ball hat book drum boat bell doll".split(),
    "COLOUR": "red blue green yellow pink".split(),
    "FEELING": "happy glad proud tired calm".split(),
    "TRAIT": "little brave clever gentle funny shy lazy hungry".split(),
    "LOOK": "big shiny new round pretty soft tiny wooden".split(),
    "WEATHER": "sunny warm windy cold cloudy rainy foggy snowy".split(),
    "TIME": "day morning evening afternoon".split(),
    "MANNER": "quickly happily slowly softly gently quietly bravely proudly".split(),
    "PRAISE": "nice lovely wonderful great perfect beautiful".split(),
}
PRONOUNS = {  # slot: (form for a girl, form for a boy)
    "She": ("She", "He"),
    "she": ("she", "he"),
    "him": ("her", "him"),
}
EVENTS = "play gift lose save wish".split()

# fact: (options, the fact it depends on, the fact it must differ from), in the order of drawing.
# The names of facts and parts are hashed into the chances (`_choice`): another spelling would
# change the stories.
FACTS: dict[str, tuple[list[str], str | None, str | None]] = {
    "kind": (WORDS["KIND"], None, None),
    "name": (WORDS["NAME"], "kind", None),
    "place": (WORDS["PLACE"], "kind", None),
    "thing": (WORDS["THING"], "place", None),
    "colour": (WORDS["COLOUR"], "thing", None),
    "friend": (WORDS["NAME"], "name", "name"),
    "event": (EVENTS, "thing", None),
    "feeling": (WORDS["FEELING"], "event", None),
    "trait": (WORDS["TRAIT"], None, None),
    "look": (WORDS["LOOK"], None, None),
    "weather": (WORDS["WEATHER"], None, None),
    "time": (WORDS["TIME"], None, None),
    "pace": (WORDS["MANNER"], None, None),
    "manner": (WORDS["MANNER"], None, None),
    "praise": (WORDS["PRAISE"], None, None),
}

# part: (the fact its pattern depends on, {pattern: values of that fact that allow it, None for
# all}), the most frequent first; she, her and him are the hero. "" is no sentence.
Patterns = dict[str, tuple[str, ...] | None]
PATTERNS: dict[str, tuple[str, Patterns]] = {
    "opening": ("kind", {
        "One {weather} {time} {name} the {kind} found a {look} {colour} {thing}.": None,
        "{name} the {trait} {kind} had a {look} {colour} {thing}.": None,
        "A {trait} {kind} named {name} had a {colour} {thing}.": None,
        "One {time} {name} the {trait} {kind} found a {look} {thing}.": None,
    }),
    "setting": ("place", {
        "": None,
        "It was a {weather} {time}.": None,
        "The {time} was {weather}.": None,
    }),
    "meeting": ("place", {
        "{She} met {friend} at the {place}.": None,
        "{She} walked {pace} to the {place} and met {friend}.": None,
        "At the {place} {she} saw {friend}.": None,
        "{friend} came {pace} to the {place} with {him}.": None,
    }),
    "talk": ("friend", {
        '"What a {praise} {thing}!" said {friend}.': None,
        "": None,
        '"Your {thing} is {look} and {praise}," said {friend}.': None,
        '"Let us play," said {name}.': None,
    }),
    "event": ("event", {
        "They played {manner} with the {thing}.": ("play",),
        "They played at the {place} until dark.": ("play",),
        "{name} {manner} gave {friend} the {thing}.": ("gift",),
        "{She} let {friend} keep the {look} {thing}.": ("gift",),
        "The {thing} broke but {friend} laughed {manner}.": ("lose",),
        "The {weather} wind took the {thing}.": ("lose",),
        "The {thing} fell but {friend} {manner} saved it.": ("save",),
        "{friend} looked {manner} and found the lost {thing}.": ("save",),
        "{friend} wanted the {colour} {thing}.": ("wish",),
    }),
    "ending": ("event", {
        "{name} was {feeling} and took home the {thing}.": ("play", "save"),
        "{name} was {feeling} because {she} had a friend {friend}.": ("gift", "lose", "wish"),
        "{friend} was {feeling} because the {thing} was {colour}.": ("gift", "wish"),
        "{name} was {feeling} and went {pace} back to the {place}.": ("play", "lose", "save"),
        "{name} felt {feeling} and {manner} thanked {friend}.": ("save",),
    }),
}  # fmt: skip

LAW_STORIES = 10_000  # drawn for the chances of each fact

# The class of each slot and of each word; a pronoun's class is its slot.
SLOT_CLASS = {name.lower(): name for name in WORDS}
SLOT_CLASS |= {"friend": "NAME", "pace": "MANNER"}
SLOT_CLASS |= {slot: slot for slot in PRONOUNS}
WORD_CLASS = {word: name for name, words in (WORDS | PRONOUNS).items() for word in words}

Shape = tuple[str | tuple[str], ...]


def _shape(words: Sequence[str], classes: dict[str, str]) -> Shape:
    """A sentence with each key of `classes` replaced by its class.

    The class is a 1-tuple, so that no literal word equals it.
    """
    return tuple((classes[word],) if word in classes else word for word in words)


def _words(text: str) -> list[str]:
    """The words, slots and punctuation marks of a text."""
    return re.findall(r"{\w+}|\w+|[^\w\s]", text)


def _slots(pattern: str) -> list[tuple[int, str]]:
    return [(i, word[1:-1]) for i, word in enumerate(_words(pattern)) if word[0] == "{"]


_FIELD_CLASS = {f"{{{slot}}}": name for slot, name in SLOT_CLASS.items()}
SHAPES = {  # shape of a sentence: its part and pattern
    _shape(_words(pattern), _FIELD_CLASS): (part, pattern)
    for part, (_, patterns) in PATTERNS.items()
    for pattern in patterns
    if pattern
}
SLOTS = {pattern: _slots(pattern) for _, patterns in PATTERNS.values() for pattern in patterns}


class Choice(NamedTuple):
    """A finite distribution."""

    options: list[str]
    chances: list[float]
    sums: list[float]

    def draw(self, rng: random.Random) -> str:
        """One option, by one uniform of `rng`."""
        place = bisect(self.sums, rng.random())
        return self.options[min(place, len(self.options) - 1)]

    def log_p(self, option: str) -> float:
        """log P(option) in nats; -inf for an option that does not exist."""
        if option not in self.options:
            return -math.inf
        return math.log(self.chances[self.options.index(option)])


def _choice(options: list[str], label: str | None) -> Choice:
    """P(option) ~ 1 / (rank in the list ** 0.8 * rank in this label's own order ** 2).

    Without a label there is no order but that of the list.
    """
    weights = [(i + 1) ** -0.8 for i in range(len(options))]
    if label is not None:
        own = sorted(options, key=lambda option: zlib.crc32(f"{label}/{option}".encode()))
        weights = [
            weight * (own.index(option) + 1) ** -2
            for weight, option in zip(weights, options, strict=True)
        ]
    chances = [weight / sum(weights) for weight in weights]
    return Choice(options, chances, list(accumulate(chances)))


@cache
def fact_choice(fact: str, parent: str | None, taken: str | None) -> Choice:
    """P(fact | the fact it depends on, the fact it must differ from)."""
    options = [option for option in FACTS[fact][0] if option != taken]
    return _choice(options, f"{fact} given {parent}" if parent else None)


def _choice_among(facts: dict[str, str], fact: str) -> Choice:
    """P(fact | the facts it depends on)."""
    _, parent, unlike = FACTS[fact]
    return fact_choice(fact, facts[parent] if parent else None, facts[unlike] if unlike else None)


@cache
def pattern_choice(part: str, given: str) -> Choice:
    """P(pattern of this part | the fact it depends on)."""
    patterns = PATTERNS[part][1].items()
    options = [pattern for pattern, allowed in patterns if allowed is None or given in allowed]
    return _choice(options, f"{part} given {given}")


def is_held_out(name: str, thing: str) -> bool:
    """True for one pair in ten, the same in every run."""
    return zlib.crc32(f"{name} and the {thing}".encode()) % 10 == 0


def split_of(facts: dict[str, str]) -> str | None:
    """The split of a story by its facts; train and validation are one until the text is known.

    last_words: hero and thing are a held-out pair; train: neither hero nor friend makes a held-out
    pair with the thing; None: the friend does, and the story is in no split.
    """
    if is_held_out(facts["name"], facts["thing"]):
        return "last_words"
    return None if is_held_out(facts["friend"], facts["thing"]) else "train"


def is_for_validation(text: str) -> bool:
    """True for one text in ten, the same in every run."""
    return zlib.crc32(text.encode()) % 10 == 0


@cache
def split_shares() -> dict[str | None, float]:
    """Exact probability of each split: the sum of P(facts) over all facts that decide on it."""
    shares: dict[str | None, float] = {"train": 0.0, "last_words": 0.0, None: 0.0}
    for kind, p_kind in _chances("kind"):
        things: dict[str, float] = {}
        for place, p_place in _chances("place", kind):
            for thing, p in _chances("thing", place):
                things[thing] = things.get(thing, 0) + p_kind * p_place * p
        for thing, p_thing in things.items():
            for name, p_name in _chances("name", kind):
                for friend, p_friend in _chances("friend", name, name):
                    split = split_of({"name": name, "thing": thing, "friend": friend})
                    shares[split] += p_thing * p_name * p_friend
    return shares


def _chances(
    fact: str, parent: str | None = None, taken: str | None = None
) -> Iterator[tuple[str, float]]:
    choice = fact_choice(fact, parent, taken)
    return zip(choice.options, choice.chances, strict=True)


def _with_pronouns(facts: dict[str, str]) -> dict[str, str]:
    """The facts, and the pronouns that follow from them."""
    gender = int(facts["name"] in HE)
    return {**facts, **{slot: forms[gender] for slot, forms in PRONOUNS.items()}}


def _draw_facts(rng: random.Random) -> dict[str, str]:
    facts: dict[str, str] = {}
    for fact in FACTS:
        facts[fact] = _choice_among(facts, fact).draw(rng)
    return facts


@cache
def fact_law() -> dict[str, dict[str, float]]:
    """P(option) of each fact among training and held-out stories, from LAW_STORIES stories.

    Half a story is added to each option.
    """
    rng = random.Random("law")
    counts = {fact: dict.fromkeys(options, 0.5) for fact, (options, _, _) in FACTS.items()}
    drawn = 0
    while drawn < LAW_STORIES:
        facts = _draw_facts(rng)
        if split_of(facts) == "train":
            drawn += 1
            for fact, option in facts.items():
                counts[fact][option] += 1
    laws = {}
    for fact, found in counts.items():
        laws[fact] = {option: count / sum(found.values()) for option, count in found.items()}
    return laws


def write_story(rng: random.Random) -> tuple[str, dict[str, str]]:
    """One story and its facts."""
    facts = _draw_facts(rng)
    patterns = [
        pattern_choice(part, facts[given]).draw(rng) for part, (given, _) in PATTERNS.items()
    ]
    text = " ".join(pattern for pattern in patterns if pattern)
    return text.format_map(_with_pronouns(facts)), facts


def sample_stories(count: int, seed: int, split: str = "train") -> Iterator[str]:
    """`count` stories of a split: train, validation or last_words.

    A longer run begins with the shorter one.
    """
    rng = random.Random(f"{seed}/{split}")
    while count:
        text, facts = write_story(rng)
        found = split_of(facts)
        if found == "train" and is_for_validation(text):
            found = "validation"
        if found == split:
            count -= 1
            yield text


def last_words(count: int, seed: int) -> list[dict[str, str]]:
    """Items in LAMBADA's form, of held-out pairs: the story alone implies its last word."""
    return [{"text": story.rstrip(".")} for story in sample_stories(count, seed, "last_words")]


class Verdict(NamedTuple):
    """The verdict of the grammar on a text."""

    accepted: bool
    """every sentence has the shape of a pattern, at its place in the story"""
    consistent: bool
    """in addition, all mentions agree: the story has a probability"""


def _parse(text: str) -> dict[str, tuple[str, dict[int, str]]] | None:
    """part -> (pattern, slot words by their place in it), or None if the text is not accepted."""
    found: dict[str, tuple[str, dict[int, str]]] = {}
    for sentence in _sentences(text):
        words = _words(sentence)
        part, pattern = SHAPES.get(_shape(words, WORD_CLASS), (None, ""))
        if part is None or part in found:
            return None
        found[part] = (pattern, {i: words[i] for i, _ in SLOTS[pattern]})
    needed = [
        part for part, (_, patterns) in PATTERNS.items() if part in found or "" not in patterns
    ]
    written = " ".join(_written(pattern, words) for pattern, words in found.values())
    return found if list(found) == needed and written == text else None


def _sentences(text: str) -> list[str]:
    return [f"{sentence}." for sentence in text.removesuffix(".").split(". ")]


def _written(pattern: str, words: dict[int, str]) -> str:
    """The sentence of a pattern with these words in its slots."""
    remaining = iter(words.values())
    return re.sub(r"{\w+}", lambda _: next(remaining), pattern)


def _facts_of(parse: dict[str, tuple[str, dict[int, str]]]) -> dict[str, str] | None:
    """The facts that a parsed story mentions, or None if two mentions disagree."""
    facts = _first_mentions(parse)
    expected = _with_pronouns(facts)
    for pattern, words in parse.values():
        if any(words[i] != expected.get(slot) for i, slot in SLOTS[pattern]):
            return None
    return facts


def repeated_mentions(text: str) -> list[list[tuple[int, int]]]:
    """Where a story mentions each fact that it mentions more than once: (start, end) in characters.

    A pronoun mentions the hero. Words that take these places must fit one another. A text that is
    not accepted has none.
    """
    places = re.finditer(r"\w+|[^\w\s]", text)
    mentions: dict[str, list[tuple[int, int]]] = {}
    for pattern, _ in (_parse(text) or {}).values():
        slots = dict(SLOTS[pattern])
        for i, place in enumerate(islice(places, len(_words(pattern)))):
            if i in slots:
                fact = "name" if slots[i] in PRONOUNS else slots[i]
                mentions.setdefault(fact, []).append(place.span())
    return [found for found in mentions.values() if len(found) > 1]


def _first_mentions(parse: dict[str, tuple[str, dict[int, str]]]) -> dict[str, str]:
    """The facts that a parsed story mentions, each by its first mention."""
    # The event's pattern implies the event.
    mentions = {"event": next(iter(PATTERNS["event"][1][parse["event"][0]] or ()))}
    for pattern, words in parse.values():
        for i, slot in SLOTS[pattern]:
            mentions.setdefault(slot, words[i])
    return {fact: mentions[fact] for fact in FACTS if fact in mentions}


def log_likelihood(text: str, split: str | None = None) -> float | None:
    """Exact log P(text) in nats; None if the grammar cannot write it.

    split None: over all stories; otherwise among the stories of that split, P(text) / P(split),
    where "train" is training and validation together, and "last_words" the other one.
    """
    parse = _parse(text)
    facts = _facts_of(parse) if parse else None
    if parse is None or facts is None:
        return None
    terms = [_choice_among(facts, fact).log_p(facts[fact]) for fact in facts]
    for part, (given, _) in PATTERNS.items():
        pattern, _ = parse.get(part, ("", {}))
        terms.append(pattern_choice(part, facts[given]).log_p(pattern))
    if -math.inf in terms or split not in (None, split_of(facts)):
        return None
    if split is not None:
        terms.append(-math.log(split_shares()[split]))
    return math.fsum(terms)


def judge(text: str) -> Verdict:
    """Is this a story of the grammar, and do its references agree?"""
    accepted = is_accepted(text)
    return Verdict(accepted, accepted and log_likelihood(text) is not None)


class Counts(NamedTuple):
    """Numbers of whole stories in a window, and of their sentences.

    A sentence is known if it has the shape of a pattern, at any place in the story. An empty story
    counts as one unknown sentence.
    """

    stories: int
    accepted: int
    consistent: int
    sentences: int
    known_sentences: int


def is_accepted(text: str) -> bool:
    """Has every sentence the shape of a pattern, at its place in the story?"""
    return _parse(text) is not None


def story_facts(text: str) -> dict[str, str] | None:
    """The facts of a story, each by its first mention; None if the story is not accepted."""
    parse = _parse(text)
    return _first_mentions(parse) if parse else None


def whole_stories(window: str | Sequence[str]) -> list[str]:
    """The whole stories of a window: a text with EOS between stories, or its pieces.

    A window is BOS + stream + EOS, cut anywhere. So its first and last pieces are fragments, which
    are left out. An empty piece between two EOS counts as a story that is not accepted: a model
    that fills its window with EOS must not look good.
    """
    if isinstance(window, str):
        window = window.removeprefix(EOS).removesuffix(EOS).split(EOS)
    return list(window[1:-1])


def judge_window(window: str | Sequence[str]) -> Counts:
    """Counts over the whole stories of a window."""
    stories = whole_stories(window)
    verdicts = [judge(story) for story in stories]
    accepted = sum(verdict.accepted for verdict in verdicts)
    consistent = sum(verdict.consistent for verdict in verdicts)
    sentences = [sentence for story in stories for sentence in _sentences(story)]
    known = sum(_shape(_words(sentence), WORD_CLASS) in SHAPES for sentence in sentences)
    return Counts(len(verdicts), accepted, consistent, len(sentences), known)

"""`stories`: a seeded grammar of short English children's stories that writes them and judges them.

A story is drawn in two steps. First its facts, each given an earlier one (`FACTS`: places that kinds prefer, colours that things
prefer, ...), with chances that fall like Zipf's law: P(option | parent) ~ 1 / (rank in general ** 0.6 * rank for this parent ** 1.5).
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
SHE = "Lily Mia Anna Rosie Ella Nora Ruby Daisy".split()
HE = "Tom Ben Sam Max Leo Finn Jack Hugo".split()
WORDS = {
    "NAME": [name for pair in zip(SHE, HE, strict=True) for name in pair],
    "KIND": "rabbit fox bear mouse duck frog cat dog pig hen".split(),
    "TRAIT": "small brave kind shy clever funny quiet young".split(),
    "PLACE": "park garden forest beach river hill farm market lake meadow".split(),
    "THING": "kite ball hat book drum boat bell doll cup coat lamp shell box rope horn flag".split(),
    "COLOUR": "red blue green yellow pink brown white black".split(),
    "FEELING": "happy glad proud tired merry calm sleepy thankful".split(),
}
PRONOUNS = {"She": ("She", "He"), "she": ("she", "he"), "her": ("her", "his"), "him": ("her", "him")}  # her, him as in `his` and `to him`

# What happens, and what hero and friend then carry home.
EVENTS = {
    "play": ("thing", "thing2"),
    "swap": ("thing2", "thing"),
    "gift": ("thing2", None),
    "give": (None, "thing"),
    "lose": ("thing2", None),
    "save": ("thing", "thing2"),
}

# fact: (options, the fact it depends on, the fact it must differ from), in the order of drawing
FACTS: dict[str, tuple[list[str], str | None, str | None]] = {
    "kind": (WORDS["KIND"], None, None),
    "name": (WORDS["NAME"], "kind", None),
    "trait": (WORDS["TRAIT"], "name", None),
    "place": (WORDS["PLACE"], "kind", None),
    "thing": (WORDS["THING"], "place", None),
    "colour": (WORDS["COLOUR"], "thing", None),
    "friend": (WORDS["NAME"], "name", "name"),
    "kind2": (WORDS["KIND"], "friend", "kind"),
    "thing2": (WORDS["THING"], "kind2", "thing"),
    "colour2": (WORDS["COLOUR"], "thing2", "colour"),
    "event": (list(EVENTS), "thing", None),
    "feeling": ([*WORDS["FEELING"], ""], "event", None),  # "": the story does not say
}

# part: (the fact its pattern depends on, {pattern: the fact's values that allow it, all when None}), the most frequent first.
# held and held2 are what hero and friend carry home, in colours tint and tint2; she, her and him are the hero, her2 the friend.
Patterns = dict[str, tuple[str, ...] | None]
PATTERNS: dict[str, tuple[str, Patterns]] = {
    "opening": ("trait", {
        "Once there was a {trait} {kind} named {name} .": None,
        "One day a {trait} {kind} named {name} woke up .": None,
        "Near the {place} lived {name} the {trait} {kind} .": None,
        "This is a story of {name} the {trait} {kind} .": None,
    }),
    "travel": ("place", {
        "{She} took {her} {colour} {thing} to the {place} .": None,
        "{name} went to the {place} with a {colour} {thing} .": None,
        "{She} carried a {colour} {thing} to the {place} .": None,
        "At the {place} {she} found a {colour} {thing} .": None,
    }),
    "meeting": ("kind2", {
        "There {she} met {friend} the {kind2} with a {colour2} {thing2} .": None,
        "{friend} the {kind2} was there with {her2} {colour2} {thing2} .": None,
        "Then a {kind2} named {friend} brought a {colour2} {thing2} .": None,
        "{She} saw {friend} the {kind2} who had a {colour2} {thing2} .": None,
    }),
    "event": ("event", {
        "They played until it was dark .": ("play",),
        "All day they played with the {thing} and the {thing2} .": ("play",),
        "They traded the {thing} for the {thing2} .": ("swap",),
        "{name} gave {her} {thing} and got the {thing2} .": ("swap",),
        "{friend} gave {him} the {thing2} .": ("gift",),
        "The {kind2} let {name} keep the {thing2} .": ("gift",),
        "{friend} had no {thing} so {she} gave it away .": ("give",),
        "The {trait} {kind} gave {friend} the {thing} .": ("give",),
        "The {thing} broke so {friend} gave {him} the other .": ("lose",),
        "The wind took the {thing} so {friend} shared the {thing2} .": ("lose",),
        "The {thing} fell down but {friend} saved it .": ("save",),
        "The wind took the {thing} but the {kind2} brought it back .": ("save",),
    }),
    "feeling": ("feeling", {
        "{name} was very {feeling} .": None,
        "{She} felt {feeling} .": None,
        "The {trait} {kind} was {feeling} .": None,
    }),
    "ending": ("event", {
        "At last {she} went home with the {tint} {held} .": ("play", "swap", "gift", "lose", "save"),
        "{friend} ran home with the {tint2} {held2} .": ("play", "swap", "give", "save"),
        "That night {name} slept beside the {held} .": ("play", "swap", "gift", "lose", "save"),
        "{She} never forgot {her} friend {friend} .": None,
        "Soon {she} came back to the {place} .": None,
        "Since then {friend} is the best friend of {name} .": None,
        "{friend} loved the {held2} because it was {tint2} .": ("swap", "give"),
        "Now the {kind2} was a friend of the {kind} .": None,
    }),
}  # fmt: skip

CLASS = {"name": "NAME", "friend": "NAME", "kind": "KIND", "kind2": "KIND", "thing": "THING", "thing2": "THING", "held": "THING",
         "held2": "THING", "colour": "COLOUR", "colour2": "COLOUR", "tint": "COLOUR", "tint2": "COLOUR", "trait": "TRAIT",
         "place": "PLACE", "feeling": "FEELING", "She": "She", "she": "she", "her": "her", "him": "her", "her2": "her"}  # fmt: skip
WORD_CLASS = {word: name for name, words in WORDS.items() for word in words}
WORD_CLASS |= {"She": "She", "He": "She", "she": "she", "he": "she", "her": "her", "his": "her", "him": "her"}


Shape = tuple[str | tuple[str], ...]


def _shape(words: Sequence[str]) -> Shape:
    """A sentence with each word that names something replaced by its class, as a 1-tuple: no literal word is equal to it."""
    return tuple((WORD_CLASS[word],) if word in WORD_CLASS else word for word in words)


def _slots(pattern: str) -> list[tuple[int, str]]:
    return [(i, word[1:-1]) for i, word in enumerate(pattern.split()) if word[0] == "{"]


SHAPES: dict[Shape, tuple[str, str]] = {  # shape of a sentence: its part and pattern
    tuple((CLASS[word[1:-1]],) if word[0] == "{" else word for word in pattern.split()): (part, pattern)
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
        return math.log(self.chances[self.options.index(option)]) if option in self.options else None


def _choice(options: list[str], label: str) -> Choice:
    """P(option) ~ 1 / (rank in the list ** 0.6 * rank in an order of this label's own ** 1.5)."""
    own = sorted(options, key=lambda option: zlib.crc32(f"{label}/{option}".encode()))
    weights = [(i + 1) ** -0.6 * (own.index(option) + 1) ** -1.5 for i, option in enumerate(options)]
    chances = [weight / sum(weights) for weight in weights]
    return Choice(options, chances, list(accumulate(chances)))


@cache
def fact_choice(fact: str, parent: str | None, taken: str | None) -> Choice:
    """P(fact | the fact it depends on, the fact it must differ from)."""
    return _choice([option for option in FACTS[fact][0] if option != taken], f"{fact} given {parent}")


@cache
def pattern_choice(part: str, given: str) -> Choice:
    """P(pattern of this part | the fact it depends on)."""
    return _choice([p for p, allowed in PATTERNS[part][1].items() if allowed is None or given in allowed], f"{part} given {given}")


def is_held_out(name: str, thing: str) -> bool:
    """One pair in ten, the same in every run."""
    return zlib.crc32(f"{name} and the {thing}".encode()) % 10 == 0


def split_of(facts: dict[str, str]) -> str | None:
    """validation: hero and thing are a held-out pair; train: nobody in the story meets a held-out thing; None: in no split."""
    if is_held_out(facts["name"], facts["thing"]):
        return "validation"
    pairs = ((name, thing) for name in (facts["name"], facts["friend"]) for thing in (facts["thing"], facts["thing2"]))
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
            second = {friend: _second_things(friend, kind, thing) for friend in FACTS["friend"][0]}
            for name, p_name in _chances("name", kind):
                for friend, p_friend in _chances("friend", name, name):
                    for thing2, p in second[friend].items():
                        split = split_of({"name": name, "thing": thing, "friend": friend, "thing2": thing2})
                        shares[split] += p_thing * p_name * p_friend * p
    return shares


def _second_things(friend: str, kind: str, thing: str) -> dict[str, float]:
    """P(thing2 | friend, kind, thing), summed over the friend's kind."""
    out: dict[str, float] = {}
    for kind2, p_kind2 in _chances("kind2", friend, kind):
        for thing2, p in _chances("thing2", kind2, thing):
            out[thing2] = out.get(thing2, 0) + p_kind2 * p
    return out


def _chances(fact: str, parent: str | None = None, taken: str | None = None):
    choice = fact_choice(fact, parent, taken)
    return zip(choice.options, choice.chances, strict=True)


def _derived(facts: dict[str, str]) -> dict[str, str]:
    """The facts with everything that follows from them: pronouns, and who carries what home."""
    out = {**facts, **{word: forms[facts["name"] in HE] for word, forms in PRONOUNS.items()}}
    out["her2"] = PRONOUNS["her"][facts["friend"] in HE]
    held, held2 = EVENTS[facts["event"]]
    for carried, tint, source in (("held", "tint", held), ("held2", "tint2", held2)):
        if source:
            out[carried], out[tint] = facts[source], facts[source.replace("thing", "colour")]
    return out


def write(rng: random.Random) -> tuple[str, dict[str, str]]:
    """One story and its facts."""
    facts: dict[str, str] = {}
    for fact, (_, parent, unlike) in FACTS.items():
        facts[fact] = fact_choice(fact, facts[parent] if parent else None, facts[unlike] if unlike else None).draw(rng)
    words = _derived(facts)
    said = [TEXTS[pattern_choice(part, facts[given]).draw(rng)] for part, (given, _) in PATTERNS.items() if facts[given]]
    return " ".join(said).format_map(words), facts


def sample(count: int, seed: int, split: str = "train") -> Iterator[str]:
    """`count` stories of a split, train or validation; a longer run begins with the shorter one."""
    rng = random.Random(f"{seed}/{split}")
    while count:
        text, facts = write(rng)
        if split_of(facts) == split:
            count -= 1
            yield text


def last_words(count: int, seed: int) -> list[dict[str, str]]:
    """Items in LAMBADA's form, from held-out stories: the word after the last space follows from the story alone."""
    return [{"text": story.rstrip(".")} for story in sample(count, seed, "validation")]


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
        forms = [(words[i], PRONOUNS.get(slot.rstrip("2"))) for i, slot in SLOTS[pattern]] if part else []
        if part is None or part in found or any(allowed and word not in allowed for word, allowed in forms):
            return None
        found[part] = (pattern, words)
    order = [part for part in PATTERNS if part in found or part != "feeling"]
    return found if list(found) == order else None


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
    facts = {fact: told.get(fact, "") for fact in FACTS} | {"event": event}
    derived = _derived(facts)
    if any(derived.get(slot) != word for slot, word in told.items()):
        return None
    terms = [
        fact_choice(fact, facts[parent] if parent else None, facts[unlike] if unlike else None).log_p(facts[fact])
        for fact, (_, parent, unlike) in FACTS.items()
    ]
    terms += [pattern_choice(part, facts[PATTERNS[part][0]]).log_p(pattern) for part, (pattern, _) in parse.items()]
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
    return Counts(len(verdicts), sum(v.accepted for v in verdicts), sum(v.consistent for v in verdicts))

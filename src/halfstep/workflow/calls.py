"""One call of halfstep, and what other calls of the graph say about its network and its texts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from halfstep.config import (
    Corpus,
    DrawOptions,
    GenerateOptions,
    Network,
    Prompts,
    SampledModels,
    shape_of_size,
)
from halfstep.errors import HalfstepError
from halfstep.files import read_json
from halfstep.models.flops import Shape, causal_shape, denoiser_shape
from halfstep.workflow.networks import GPT2_TOKENS, UnknownWork, known_network
from halfstep.workflow.rates import Rates, Work

HELD_OUT = {"openwebtext": 100_000}  # held-out documents where the corpus names no number, or 1,000
STORY_TOKENS = 47  # of a story


def flag_lists(command: Sequence[str]) -> dict[str, list[str]]:
    """The flags of a command with all their values."""
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for word in command:
        if word.startswith("--"):
            values = found.setdefault(word.removeprefix("--").replace("-", "_"), [])
        else:
            values.append(word)
    return found


def flag_values(command: Sequence[str]) -> dict[str, str]:
    """The flags of a command with their first values."""
    return {flag: values[0] for flag, values in flag_lists(command).items() if values}


def teacher_of(command: Sequence[str]) -> str:
    """The teacher in a command's paths; "" if there is none."""
    folders = "models|samples|continuations|metrics|benchmarks"
    found = re.search(rf"\b(?:{folders})/([^/\s]+)", " ".join(command))
    return found[1] if found else ""


@dataclass
class Facts:
    """What the calls of a graph, and finished models, say about networks and texts.

    A printed command omits defaults.
    """

    sizes: dict[str, str] = field(default_factory=dict)
    """of networks, by teacher"""
    without_adaln: set[str] = field(default_factory=set)
    """teachers with the architecture of GPT-2 or of another model of transformers"""
    imported: dict[str, str] = field(default_factory=dict)
    """names of the autoregressive networks that are no training of ours, by teacher"""
    corpora: dict[str, str] = field(default_factory=dict)
    """by teacher"""
    lengths: dict[str, int] = field(default_factory=dict)
    """tokens in a window, by corpus"""
    vocabularies: dict[str, int] = field(default_factory=dict)
    """number of tokens, by corpus"""
    held_out: dict[str, int] = field(default_factory=dict)
    """held-out windows, at most, by corpus"""
    documents: dict[str, int] = field(default_factory=dict)
    """held-out documents, by corpus"""
    samples: dict[str, int] = field(default_factory=dict)
    """number of texts in a set of samples, by teacher"""
    prompts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """number of prompts, continuations of each, and tokens of a text, by teacher"""

    def note(self, command: Sequence[str]) -> None:
        """Note what the flags of one call say."""
        name, given, teacher = command[1], flag_values(command), teacher_of(command)
        if "output" not in given:
            return
        if name == "prepare-corpus":
            self._note_corpus(Path(given["output"]).name, given)
        elif "corpus" in given and teacher:
            self.corpora[teacher] = Path(given["corpus"]).name
        if name in ("pretrain", "train-baseline", "import"):
            self.sizes[teacher] = given.get("size", Network.model_fields["size"].default)
        adapted = given.get("adapt", "baseline") if name == "pretrain" else "baseline"
        published = given.get("source" if name == "import" else "from", "")
        if Path(adapted).name != "baseline" or published.startswith("hf:"):
            self.without_adaln.add(teacher)
        if name == "import-baseline" and "source" in given:
            self.imported[teacher] = given["source"]
        if name in ("generate", "draw-naive"):
            section = GenerateOptions if name == "generate" else SampledModels
            default = section.model_fields["num_samples"].default
            self.samples[teacher] = int(given.get("num_samples", default))
        if name == "continue-prompts":
            number, each, old, new = (
                int(given.get(key, Prompts.model_fields[key].default))
                for key in ("num_prompts", "per_prompt", "prompt_tokens", "continuation_tokens")
            )
            self.prompts[teacher] = number, each, old + new

    def _note_corpus(self, name: str, given: dict[str, str]) -> None:
        fields = Corpus.model_fields
        self.lengths[name] = length = int(given.get("length", fields["length"].default))
        bpe = given.get("tokenizer", "bpe") == "bpe"
        size = int(given.get("vocab_size", fields["vocab_size"].default))
        self.vocabularies[name] = size if bpe else GPT2_TOKENS
        kind = given.get("kind", "")
        documents = int(given.get("validation_documents", HELD_OUT.get(kind, 1000)))
        self.documents[name] = documents
        if kind == "stories":
            documents = math.ceil(documents * STORY_TOKENS / length)
        self.held_out[name] = documents

    def note_results(self, results: Path) -> None:
        """Note what finished corpora and models say. The command that reads a broken one reports
        what is wrong with it."""
        about: Any
        for manifest in (results / "data").glob("*/manifest.json"):
            with suppress(HalfstepError, KeyError, TypeError):
                about, corpus = read_json(manifest), manifest.parts[-2]
                self.held_out[corpus] = about["splits"]["validation"]["windows"]
                self.documents[corpus] = about["splits"]["validation"]["documents"]
                self.lengths[corpus] = about["length"]
                self.vocabularies[corpus] = about["vocab_size"]
        for meta in (results / "models").glob("*/*/meta.json"):
            with suppress(HalfstepError, KeyError, TypeError):
                about, teacher = read_json(meta), meta.parts[-3]
                self.sizes[teacher] = about["network"]["size"]
                self.corpora[teacher] = about["corpus"]
                self.lengths.setdefault(about["corpus"], about["length"])
                self.vocabularies.setdefault(about["corpus"], about["vocab_size"])
                if about["network"].get("architecture", "dit") != "dit":
                    self.without_adaln.add(teacher)

    def length(self, corpus: str) -> int:
        """Tokens in a window; of an unknown corpus those of the only known one, or 1,024."""
        lengths = set(self.lengths.values())
        return self.lengths.get(corpus, lengths.pop() if len(lengths) == 1 else 1024)


@dataclass(frozen=True)
class Call:
    """One call of halfstep: its flags, its network, and how fast it runs."""

    words: Sequence[str]
    facts: Facts
    rates: Rates
    gpus: int = 0
    files: Sequence[str] = ()
    """the job's inputs"""

    @property
    def name(self) -> str:
        return self.words[1]

    @cached_property
    def given(self) -> Mapping[str, list[str]]:
        return flag_lists(self.words)

    def values(self, flag: str) -> list[str]:
        """All values of a flag; [] if it is not given."""
        return self.given.get(flag, [])

    def text(self, flag: str, default: str | type[BaseModel]) -> str:
        """The first value of a flag, its default in a section of the configuration, or another."""
        if values := self.values(flag):
            return values[0]
        return default if isinstance(default, str) else str(default.model_fields[flag].default)

    def number(self, flag: str, default: int | type[BaseModel] = 1) -> int:
        """The value of a flag that is a whole number."""
        return int(self.text(flag, str(default) if isinstance(default, int) else default))

    @property
    def teacher(self) -> str:
        return teacher_of(self.words)

    @property
    def corpus(self) -> str:
        named = self.values("corpus")
        return Path(named[0]).name if named else self.facts.corpora.get(self.teacher, "")

    @property
    def length(self) -> int:
        """Tokens of a text."""
        return self.facts.length(self.corpus)

    @property
    def vocabulary(self) -> int:
        return self.facts.vocabularies.get(self.corpus, GPT2_TOKENS)

    @property
    def held_out(self) -> int:
        """Held-out windows of the corpus, at most."""
        return self.facts.held_out.get(self.corpus, 1000)

    @property
    def held_out_documents(self) -> int:
        return self.facts.documents.get(self.corpus, 1000)

    @property
    def size(self) -> str:
        """The network size of the call's teacher; raises UnknownWork."""
        if size := self.facts.sizes.get(self.teacher):
            return size
        raise UnknownWork(f"no size is known of {self.teacher or 'any model'}")

    @property
    def is_baseline(self) -> bool:
        """Is its network the autoregressive baseline?"""
        named = [*self.values("checkpoint"), *self.values("output")]
        return bool(named) and Path(named[0]).name == "baseline"

    @property
    def network(self) -> Shape:
        """The network that the call trains, samples from or scores."""
        if not self.is_baseline:
            return self.denoiser_of(self.size)
        if source := self.facts.imported.get(self.teacher):
            return known_network(source)[0]
        return self.causal_of(self.size)

    def denoiser_of(self, size: str) -> Shape:
        """The denoiser of this size and of the architecture of the call's teacher."""
        blocks, width, _, cond_width = shape_of_size(size)
        cond_width = 0 if self.teacher in self.facts.without_adaln else cond_width
        return denoiser_shape(blocks, width, self.vocabulary, cond_width)

    def causal_of(self, size: str) -> Shape:
        """The autoregressive baseline of this size."""
        blocks, width, *_ = shape_of_size(size)
        return causal_shape(blocks, width, self.vocabulary)

    def judges(self) -> Iterator[tuple[Shape, str]]:
        """The judges of the call, each with the precision of its products; raises UnknownWork."""
        for name in self.values("judge"):
            network, stored = self.causal_network(name)
            yield network, stored if stored == "bfloat16" else self.text("precision", stored)

    def causal_network(self, name: str) -> tuple[Shape, str]:
        """A judge and the precision of its weights; the folder hf is that of a baseline."""
        source = self.facts.imported.get(teacher_of([name]), name)
        if source == name and Path(name).name == "hf":
            return self.causal_of(self.size), "float32"
        return known_network(source)

    @property
    def inference_precision(self) -> str:
        """The precision in which the call samples, scores and times."""
        return self.text("timed_dtype", self.text("precision", DrawOptions))

    @property
    def number_of_samples(self) -> int:
        """Texts in each set of samples of the call's teacher."""
        default = SampledModels.model_fields["num_samples"].default
        return self.facts.samples.get(self.teacher, default)

    @property
    def prompts(self) -> tuple[int, int, int]:
        """Number of prompts, continuations of each, and tokens of a text."""
        number, each, old, new = (
            Prompts.model_fields[key].default
            for key in ("num_prompts", "per_prompt", "prompt_tokens", "continuation_tokens")
        )
        return self.facts.prompts.get(self.teacher, (number, each, old + new))

    @property
    def micro_batch(self) -> int:
        return self.number("micro_batch", 32)

    @property
    def processes(self) -> int:
        """Number of processes that share the call's work evenly."""
        return self.number("processes", 1)

    @property
    def bytes_read(self) -> int:
        """Bytes of its inputs that exist."""
        return sum(path.stat().st_size for path in map(Path, self.files) if path.is_file())

    def seconds(self, *work: Work) -> float:
        """Seconds of work on the devices of this call."""
        gpus = self.processes if self.gpus else 0
        return sum(self.rates.seconds(part, gpus, self.number("threads", 1)) for part in work)

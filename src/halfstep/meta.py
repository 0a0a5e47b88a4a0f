"""The content of a meta.json: what must and may be in it, as pydantic checks it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from halfstep.config import Network
from halfstep.errors import HalfstepError

LARGEST_VOCABULARY = 1 << 31  # ids of samples are int32
LONGEST_TEXT = 1 << 20  # tokens
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Trained(BaseModel):
    """How a model was trained, as far as a later round depends on it."""

    model_config = ConfigDict(strict=True, extra="allow")

    min_t: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Transformers(BaseModel):
    """The entry `transformers` of meta.json: a diffusion model's network that transformers builds.

    auto: class of transformers that builds it; config: content of its config.json
    mask_id: its mask token at the source, which here is the last token and has changed ids with it
    source: hub name or folder that it was imported from
    code: sha256 of the code that it brings along (`remote_code.read_code`)
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    auto: Literal["AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"]
    config: dict[str, Any]
    mask_id: Count
    source: str = ""
    code: Sha256 | None = None


class Framing(BaseModel):
    """The tokens that a model of transformers has before and after each text, such as [CLS], [SEP].

    They are always given: noise never masks them, no loss counts them, and samplers keep them.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    begin: list[Count] = []
    end: list[Count] = []

    def inside(self, length: int) -> slice:
        """The positions of a window of `length` tokens that hold text."""
        return slice(len(self.begin), length - len(self.end))

    def around(self, ids: Iterable[int]) -> tuple[int, ...]:
        """The tokens of a text with its frame."""
        return (*self.begin, *ids, *self.end)


def framing_of(about: dict[str, Any]) -> Framing:
    """The frame of each text of a model or corpus, from its meta.json or manifest.json.

    It is EOS on both sides for models and corpora of our own, which have no entry `framing`. These
    two EOS are part of the text: they are masked and learned like any token (MDLM). The texts of an
    autoregressive model begin with EOS if their frame begins with nothing.
    """
    found, ends = about.get("framing"), [about["eos_id"]]
    if found is None:
        return Framing(begin=ends, end=ends)
    framing = Framing.model_validate(found)
    if about.get("kind") == "autoregressive" and not framing.begin:
        return Framing(begin=ends, end=framing.end)
    return framing


class Turn(BaseModel):
    """What stands around the prompt and the response of a pair: a chat template's, or a line break.

    A text is before + prompt + after + response + end.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    before: str = ""
    after: str = "\n"
    end: str = ""


def check_framing(about: dict[str, Any], path: object, advice: str) -> None:
    """HalfstepError unless a frame has tokens of the vocabulary, and leaves room for a text."""
    if about.get("framing") is None:
        return
    framing, size, length = framing_of(about), about["vocab_size"], about["length"]
    largest = max(framing.around([]), default=0)
    if largest >= size:
        raise HalfstepError(
            f"{path}: framing: found the token {largest}, but vocab_size is {size}; {advice}"
        )
    if len(framing.around([])) > length - 2:
        raise HalfstepError(
            f"{path}: framing: found {len(framing.around([]))} tokens around a text, but length "
            f"is {length}; {advice}"
        )


class Lora(BaseModel):
    """The entry `lora` of meta.json: the adapters of a round, which are merged into its weights."""

    model_config = ConfigDict(strict=True, extra="forbid")

    rank: PositiveInt
    alpha: Annotated[float, Field(gt=0)]
    targets: list[str] = []


class Meta(BaseModel):
    """What a meta.json must and may hold; other keys are records for people."""

    model_config = ConfigDict(strict=True, extra="allow")

    kind: str
    network: Network
    vocab_size: Annotated[int, Field(ge=1, lt=LARGEST_VOCABULARY)]
    eos_id: Count
    length: Annotated[int, Field(ge=3, le=LONGEST_TEXT)]
    sha256: dict[str, Sha256]
    round: Count = 0
    student_steps: PositiveInt | None = None
    ema_updates: Count = 0
    training: Trained = Trained()
    run: dict[str, Any] = {}
    imported: dict[str, Any] = {}
    adapted: dict[str, Any] = {}
    corpus: str | None = None
    transformers: Transformers | None = None
    framing: Framing | None = None
    pairs: Turn | None = None
    lora: Lora | None = None

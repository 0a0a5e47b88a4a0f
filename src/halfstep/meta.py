"""The content of a meta.json: what must and may be in it, as pydantic checks it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from halfstep.config import Network

LARGEST_VOCABULARY = 1 << 31  # ids of samples are int32
LONGEST_TEXT = 1 << 20  # tokens
Count = Annotated[int, Field(ge=0)]


class Trained(BaseModel):
    """How a model was trained, as far as a later round depends on it."""

    model_config = ConfigDict(strict=True, extra="allow")

    min_t: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Transformers(BaseModel):
    """The entry `transformers` of meta.json: a diffusion model's network that transformers builds.

    auto: class of transformers that builds it; config: content of its config.json
    mask_id: its mask token at the source, which here is the last token and has changed ids with it
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    auto: Literal["AutoModelForMaskedLM", "AutoModelForCausalLM"]
    config: dict[str, Any]
    mask_id: Count


class Framing(BaseModel):
    """The tokens that the source of an imported model puts before and after a text."""

    model_config = ConfigDict(strict=True, extra="forbid")

    begin: list[Count] = []
    end: list[Count] = []


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
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]]
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
    lora: Lora | None = None

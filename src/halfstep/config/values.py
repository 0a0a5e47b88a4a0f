"""The kinds of values that a configuration holds: numbers, words, names, and sections of them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from halfstep.sanitize import CONTROL, mask_secrets


def _number(value: Any) -> Any:
    """YAML 1.1 reads `6e-5` and `1_000.0` as text; a float field means a number."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return value
    try:
        return float(value)
    except ValueError:
        return value


Float = Annotated[float, pydantic.BeforeValidator(_number), Field(allow_inf_nan=False)]
Positive = Annotated[Float, Field(gt=0)]
Share = Annotated[Float, Field(ge=0, lt=1)]


def whole_number(value: Any) -> Any:
    """Take `1e6` and `1_000_000`, texts in YAML 1.1 or on a command line, for whole numbers."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d[\d_]{,99}", value):
        return int(value.replace("_", ""))
    number = _number(value)
    if isinstance(number, float) and number.is_integer() and abs(number) <= 2**53:
        return int(number)
    return value


# Every number has an upper bound: nothing may count to 10**12 before it is refused.
Whole = Annotated[int, pydantic.BeforeValidator(whole_number)]
Count = Annotated[Whole, Field(gt=0, le=10**9)]
TokenCount = Annotated[Whole, Field(ge=1, le=2**20)]
Threads = Annotated[Whole, Field(ge=1, le=2**16)]
Seed = Annotated[Whole, Field(ge=0, le=2**63 - 1)]


def _each_once(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("expected every seed once; remove the others")
    return seeds


Seeds = Annotated[
    list[Annotated[Whole, Field(ge=1, le=10**9)]],
    Field(min_length=1),
    pydantic.AfterValidator(_each_once),
]
"""Seeds of a training and of its repeats"""
MOST_ROUNDS = 20
MOST_STEPS = 2**MOST_ROUNDS
Steps = Annotated[Whole, Field(ge=1, le=MOST_STEPS)]
RoundNumber = Annotated[Whole, Field(ge=0, le=MOST_ROUNDS)]
TeacherSteps = Annotated[
    Steps,
    pydantic.WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MOST_STEPS}, {"const": "length"}]}
    ),
]


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def check_path(path: str) -> str:
    """Refuse a path that Snakemake would change or print raw; it may begin as it likes."""
    if CONTROL.search(path) or "\n" in path or "\t" in path:
        raise ValueError("has a control character; rename the file or folder")
    if "{" in path or "}" in path:
        raise ValueError(
            "braces are not expanded: Snakemake takes them for a wildcard; "
            "give each file its own entry, or rename it"
        )
    return path


def _check_word(word: str) -> str:
    """Refuse what a rule's command would read as a flag, and what would show a secret."""
    if not word.strip():
        raise ValueError("expected a name or a path; fill it in, or leave the key out")
    if word.startswith("-"):
        raise ValueError(f"a command would read it as a flag; write ./{word} for a file")
    if mask_secrets(word) != word:
        raise ValueError(
            "holds a password or a token, which commands and logs would show; "
            "put it into the environment, such as HF_TOKEN"
        )
    return check_path(word)


Word = Annotated[str, pydantic.AfterValidator(_check_word)]
"""A name or a path that rules write into their commands"""
Names = Annotated[
    list[Word], pydantic.BeforeValidator(_list, json_schema_input_type=str | list[str])
]
Weights = Literal["ema", "raw", "best"]
Precision = Literal["float32", "bfloat16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, and values do not change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Join the lines of each description, for `--help`."""
        for field in cls.model_fields.values():
            field.description = field.description and " ".join(field.description.split())


def _step_count(value: Any) -> int | str:
    count = whole_number(value)
    if value == "own" or (type(count) is int and 0 < count <= MOST_STEPS):
        return count
    if type(count) is int and count > MOST_STEPS:
        raise ValueError(f"expected at most {MOST_STEPS} steps, or own")
    raise ValueError("expected a whole number above zero, or own")


StepCount = Annotated[
    Any,
    pydantic.PlainValidator(_step_count),
    pydantic.WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MOST_STEPS},
                {"const": "own"},
            ]
        }
    ),
]


def section_type(annotation: Any) -> type[Section] | None:
    """The section that a field holds: directly, optionally, or as the values of a dict."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def flag_name(key: str) -> str:
    """The flag of a key: `num_steps` -> `--num-steps`."""
    return "--" + key.replace("_", "-")


def negated_flag(name: str) -> str:
    """The flag that sets a switch to false: `--x` -> `--no-x`."""
    return "--no-" + name.removeprefix("--")

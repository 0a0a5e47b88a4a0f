"""From the user's YAML to a Config, and from a section to flags or a schema; every fault is one line.

`config.yaml` names a preset and overrides it: `resolve` merges the two, `validate` turns the result into a `Config` or raises `ConfigError`
with the path of each fault, the value, what is allowed and the nearest known name.
"""

from __future__ import annotations

import difflib
import functools
import shlex
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from halfstep.config import Config, Section

PRESETS = Path("workflow/presets")  # relative to the repository root


class ConfigError(ValueError):
    """Faults of a configuration, one line each."""


def explain(error: pydantic.ValidationError, top: type[BaseModel] = Config) -> list[str]:
    """One line per fault: where, what was found, what is allowed, the nearest known name."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "configuration"
        message, value = fault["msg"].removeprefix("Value error, "), fault["input"]
        if fault["type"] == "extra_forbidden":
            names = _allowed(top, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), names, 1, 0.5)
            message = (
                f"unknown key; did you mean {near[0]}?"
                if near
                else f"unknown key; known are {', '.join(names)}"
            )
        elif fault["type"] == "literal_error":
            near = difflib.get_close_matches(
                str(value),
                [
                    w.strip("'\"")
                    for w in fault["ctx"]["expected"].replace(" or ", ", ").split(", ")
                ],
                1,
                0.5,
            )
            message = f"allowed are {fault['ctx']['expected']}" + (
                f"; did you mean {near[0]}?" if near else ""
            )
        shown = repr(value) if not isinstance(value, dict | BaseModel) else "this section"
        lines.append(
            f"{path}: found {shown}: {message[0].lower() + message[1:]}"
            if shown != "this section"
            else f"{path}: {message}"
        )
    return list(dict.fromkeys(lines))


def _allowed(top: type[BaseModel], path: tuple) -> list[str]:
    """Names of the keys of the section at `path`."""
    model: Any = top
    for key in path:
        annotation = (
            model.model_fields[key].annotation
            if isinstance(model, type) and key in model.model_fields
            else model
        )
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
        else:  # dict[Name, Section]: the field gives the section, the next key is a free name
            model = next(
                (
                    a
                    for a in getattr(annotation, "__args__", ())
                    if isinstance(a, type) and issubclass(a, BaseModel)
                ),
                model,
            )
    return [field.alias or name for name, field in model.model_fields.items()]


def merge_sections(base: dict, over: dict) -> dict:
    """`over` laid on `base`, section by section; lists and values are replaced, and null removes a named entry."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge_sections(out[key], value)
        elif value is None and isinstance(out.get(key), dict):
            del out[key]
        else:
            out[key] = value
    return out


def resolve(user: dict, presets: Path = PRESETS) -> Config:
    """The user's config.yaml laid on the preset it names (which may name one in turn), validated. Raises ConfigError."""
    names, layers = [user.get("preset", Config.model_fields["preset"].default)], [user]
    while (name := names[-1]) is not None:
        file = presets / f"{name}.yaml"
        if not file.is_file():
            known = sorted(p.stem for p in presets.glob("*.yaml"))
            near = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ConfigError(f"preset: found {name!r}: no file {file}; {hint}")
        if name in names[:-1]:
            raise ConfigError(
                f"preset: {' is laid on '.join(names)}: a circle; remove the key `preset` from one of these files"
            )
        try:
            layers.append(yaml.safe_load(file.read_text()) or {})
        except yaml.YAMLError as error:
            raise ConfigError(
                f"preset: {file} is not YAML: {' '.join(str(error).split())}"
            ) from None
        names.append(layers[-1].get("preset"))
    return validate(functools.reduce(merge_sections, reversed(layers)) | {"preset": names[0]})


def validate(raw: dict) -> Config:
    """A Config, or ConfigError with one line per fault."""
    try:
        return Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from None


def flags(section: Section, *names: str) -> str:
    """A section as command-line flags, `--lr 6e-05 --batch-size 128`: all that differ from the defaults, or those named."""
    words = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if name not in names if names else value == field.default:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *(shlex.quote(str(v)) for v in value)]
        elif value is not None:
            words += [flag, shlex.quote(str(value))]
    return " ".join(words)


def subsection(section: Section, kind: type[Section]) -> Section:
    """The `kind` that a section is a kind of: its fields alone, as `Writing` of `Sampling`."""
    return kind(**section.model_dump(include=set(kind.model_fields)))


def schema() -> dict:
    """The JSON schema of config.yaml, for editors; every key is optional there, since the preset fills it."""
    tree = Config.model_json_schema()
    for model in [tree, *tree["$defs"].values()]:
        model.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}

"""From the user's YAML to a Config, and from a section to flags or a schema.

`config.yaml` names a preset and overrides it. `resolve` merges the two and validates the result. It
raises ConfigError with one line per fault: the path, what was found, what is allowed, and the
nearest known name. Former names of keys (renamed.py) are replaced, with a warning.
"""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pydantic
import yaml
from pydantic import BaseModel

from halfstep import config
from halfstep.config import Config, Section, flag_name, negated_flag, section_type
from halfstep.errors import ConfigError, HalfstepError, excerpt
from halfstep.renamed import former_names, rename_keys
from halfstep.sanitize import one_line

PRESETS = Path("workflow/presets")  # relative to the repository root


def explain(error: pydantic.ValidationError, top: type[BaseModel] = Config) -> list[str]:
    """One line per fault: where, what was found, what is allowed, the nearest known name."""
    lines = []
    for fault in error.errors():
        path = ".".join(str(part) for part in fault["loc"]) or "configuration"
        message, value = fault["msg"].removeprefix("Value error, "), fault["input"]
        if fault["type"] == "extra_forbidden":
            known = _known_keys(top, fault["loc"][:-1])
            hint = _nearest(fault["loc"][-1], known) or f"; known are {', '.join(known)}"
            message = f"unknown key{hint}"
        elif fault["type"] == "literal_error":
            expected = fault["ctx"]["expected"]
            names = [name.strip("'\"") for name in expected.replace(" or ", ", ").split(", ")]
            message = f"allowed are {expected}{_nearest(value, names)}"
        if isinstance(value, dict | BaseModel):  # a fault of a whole section
            lines.append(f"{path}: {message}")
        else:
            lines.append(f"{path}: found {value!r}: {message[0].lower() + message[1:]}")
    return list(dict.fromkeys(map(one_line, lines)))


def check_fields(value: object, model: type[BaseModel], where: object, advice: str) -> None:
    """HalfstepError, about the first fault, unless `value` is an object with the model's fields.

    The values come from a file; `where` names it.
    """
    try:
        model.model_validate(value)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        path = ".".join(excerpt(part).strip("'") for part in fault["loc"])
        if fault["type"] == "missing":
            kind = model.model_fields[path].annotation if path in model.model_fields else None
            said = f"{path}: found nothing, expected {getattr(kind, '__name__', 'a value')}"
        else:
            said = explain(error, model)[0]
    else:
        return
    raise HalfstepError(f"{where}: {said}; {advice}")


def _nearest(name: object, known: Iterable[str]) -> str:
    """A hint at the known name most like `name`, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(top: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `path`."""
    model = top
    for key in path:  # a name that the user chose, as that of a corpus, is no field
        field = model.model_fields.get(key)
        model = (field and section_type(field.annotation)) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def merge_sections(base: dict, over: dict) -> dict:
    """`base` overridden by `over`: sections merge, values are replaced, null removes a section."""
    out = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = merge_sections(out[key], value)
        elif value is None and isinstance(out.get(key), dict):
            del out[key]
        else:
            out[key] = value
    return out


def resolve(user: dict, presets: Path = PRESETS, quiet: bool = False) -> Config:
    """Lay the user's config.yaml over the preset that it names, and validate the result.

    A preset may name another preset. Unless `quiet`, one line of warning is printed for each
    renamed key. Raises ConfigError.
    """
    default = Config.model_fields["preset"].default
    names, layers = [user.get("preset", default)], [("configuration", user)]
    while (name := names[-1]) is not None:
        file = presets / f"{name}.yaml"
        if not file.is_file():
            known = sorted(path.stem for path in presets.glob("*.yaml"))
            hint = _nearest(name, known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"preset: found {name!r}: no file {file}{hint}")
        if name in names[:-1]:
            raise ConfigError(
                f"preset: {' -> '.join(names)} is a cycle; "
                "remove the key `preset` from one of these files"
            )
        preset = _read_yaml(file)
        layers.append((str(file), preset))
        names.append(preset.get("preset"))
    merged: dict = {}
    for source, layer in reversed(layers):
        layer, notices = rename_keys(layer, merged)
        if not quiet:
            for notice in notices:
                print(one_line(f"{source}: {notice}"), file=sys.stderr)
        merged = merge_sections(merged, layer)
    return validate(merged | {"preset": names[0]})


def _read_yaml(file: Path) -> dict:
    try:
        return yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"preset: {file} is not YAML: {reason}") from None


def validate(raw: dict) -> Config:
    """A Config, or ConfigError with one line per fault."""
    try:
        return Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(explain(error))) from None


def flags(section: Section, *names: str) -> str:
    """A section as flags, `--lr 6e-05 --batch-size 128`: all but the defaults, or only `names`."""
    words = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        wanted = name in names if names else value != field.default
        if not wanted:
            continue
        if isinstance(value, bool):
            words.append(flag_name(name) if value else negated_flag(flag_name(name)))
        elif isinstance(value, list):
            words += [flag_name(name), *(shlex.quote(str(v)) for v in value)]
        elif value is not None:
            words += [flag_name(name), shlex.quote(str(value))]
    return " ".join(words)


def subsection(section: Section, kind: type[Section]) -> Section:
    """The fields of `section` that `kind`, a base class of its class, has."""
    return kind(**section.model_dump(include=set(kind.model_fields)))


def schema() -> dict:
    """The JSON schema of config.yaml, for editors. No key is required: presets have the others."""
    tree = Config.model_json_schema()
    for model in [tree, *tree["$defs"].values()]:
        model.pop("required", None)
        for row in former_names(getattr(config, model["title"])):
            notice = f"former name of {row.new}"
            model["properties"][row.old] = {"deprecated": True, "description": notice}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}

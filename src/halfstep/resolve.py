"""From the user's YAML to a Config, and from a section to flags or a schema.

`config.yaml` names a preset and overrides it. `resolve` merges the two and validates the result. It
raises ConfigError with one line per fault: the path, what was found, what is allowed, and the
nearest known name. Former names of keys and flags (config.RENAMED) are replaced, with a warning.
"""

from __future__ import annotations

import difflib
import inspect
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel

from halfstep import config
from halfstep.config import RENAMED, Config, Renamed, Section
from halfstep.errors import HalfstepError

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
    return list(dict.fromkeys(lines))


def _nearest(name: object, known: Iterable[str]) -> str:
    """A hint at the known name most like `name`, or nothing."""
    near = difflib.get_close_matches(str(name), list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _section_type(annotation: Any) -> type[Section] | None:
    """The section that a field holds: directly, optionally, or as the values of a dict."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _known_keys(top: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `path`."""
    model = top
    for key in path:  # a name that the user chose, as that of a corpus, is no field
        field = model.model_fields.get(key)
        model = (field and _section_type(field.annotation)) or model
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
                print(f"{source}: {notice}", file=sys.stderr)
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


def _flag(key: str) -> str:
    """The flag of a key: `num_steps` -> `--num-steps`."""
    return "--" + key.replace("_", "-")


def flags(section: Section, *names: str) -> str:
    """A section as flags, `--lr 6e-05 --batch-size 128`: all but the defaults, or only `names`."""
    words = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        wanted = name in names if names else value != field.default
        if not wanted:
            continue
        if isinstance(value, bool):
            words.append(_flag(name) if value else _negated(_flag(name)))
        elif isinstance(value, list):
            words += [_flag(name), *(shlex.quote(str(v)) for v in value)]
        elif value is not None:
            words += [_flag(name), shlex.quote(str(value))]
    return " ".join(words)


def subsection(section: Section, kind: type[Section]) -> Section:
    """The fields of `section` that `kind`, a base class of its class, has."""
    return kind(**section.model_dump(include=set(kind.model_fields)))


def schema() -> dict:
    """The JSON schema of config.yaml, for editors. No key is required: presets have the others."""
    tree = Config.model_json_schema()
    for model in [tree, *tree["$defs"].values()]:
        model.pop("required", None)
        for row in _renamed(getattr(config, model["title"])):
            notice = f"former name of {row.new}"
            model["properties"][row.old] = {"deprecated": True, "description": notice}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def rename_keys(layer: dict, below: dict) -> tuple[dict, list[str]]:
    """`layer` with the new names of renamed keys, and a notice for each.

    `below` is the configuration that `layer` overrides. Raises ConfigError for a refused value.
    """
    layer, notices = _unshared(layer), []
    for path, kind, section in _sections(layer, Config):
        for row in _renamed(kind):
            if row.old not in section:
                continue
            old = ".".join([*path, row.old])
            if row.translate is None and row.new in section:
                raise ConfigError(f"{old}: found with its new name {row.new}; remove {row.old}")
            value = section.pop(row.old)
            keys = {row.new: value}
            if row.translate is not None:
                try:
                    keys = row.translate(value, _at(below, path) | section)
                except ValueError as error:
                    raise ConfigError(".".join([*path, str(error)])) from None
            section |= keys
            written = ", ".join(f"{key}: {value}" for key, value in keys.items())
            notices.append(_notice(old, row.new, written))
    return layer, notices


def rename_flags(words: list[str], command: Callable[..., None]) -> tuple[list[str], list[str]]:
    """The words after a command's name with the new names of renamed flags, and a notice for each.

    Raises HalfstepError for a refused value.
    """
    notices = []
    parameters = inspect.signature(command, eval_str=True).parameters.values()
    kinds = [kind for p in parameters if (kind := _section_type(p.annotation))]
    for row in [row for kind in kinds for row in _renamed(kind)]:
        old, new = _flag(row.old), _flag(row.new)
        if row.translate is None:
            names = {old: new, _negated(old): _negated(new)}
            before, words = words, [_replace_flag(word, names) for word in words]
            if words != before:
                notices.append(_notice(old, new, new))
            continue
        value, others = _split_flag(words, old)
        if value is None:
            continue
        given, _ = _split_flag(words, new)
        try:
            keys = row.translate(value, {} if given is None else {row.new: given})
        except ValueError as error:
            raise HalfstepError(str(error)) from None
        written = [word for key, text in keys.items() for word in (_flag(key), str(text))]
        words = others + written  # of a flag given twice, the last one counts
        notices.append(_notice(old, new, " ".join(written)))
    return words, notices


def _notice(old: str, new: str, written: str) -> str:
    todo = f"write {written}" if written else "leave it out"
    return f"{old} is the former name of {new} and works for one release only; {todo}"


def _unshared(tree: Any) -> Any:
    """A copy in which no two sections are one dict, as they are after an alias in YAML."""
    if not isinstance(tree, dict):
        return tree
    return {key: _unshared(value) for key, value in tree.items()}


def _renamed(kind: type[Section]) -> list[Renamed]:
    return [row for row in RENAMED if issubclass(kind, row.section)]


def _at(tree: Any, path: tuple[str, ...]) -> dict:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _sections(
    raw: dict, kind: type[Section], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], type[Section], dict]]:
    """(path, class, keys) of each section of an unchecked configuration."""
    yield path, kind, raw
    for name, field in kind.model_fields.items():
        key = field.alias or name
        inner, value = _section_type(field.annotation), raw.get(key)
        if inner is None or not isinstance(value, dict):
            continue
        if get_origin(field.annotation) is not dict:
            yield from _sections(value, inner, (*path, key))
            continue
        for entry, keys in value.items():
            if isinstance(keys, dict):
                yield from _sections(keys, inner, (*path, key, str(entry)))


def _negated(name: str) -> str:
    return "--no-" + name.removeprefix("--")


def _replace_flag(word: str, names: dict[str, str]) -> str:
    head, equals, tail = word.partition("=")
    return names.get(head.replace("_", "-"), head) + equals + tail


def _split_flag(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of a flag (None without it), and the words without the flag."""
    value, others, rest = None, [], iter(words)
    for word in rest:
        head, equals, tail = word.partition("=")
        if head.replace("_", "-") != name:
            others.append(word)
        else:
            value = tail if equals else next(rest, "")
    return value, others

"""Former names of keys and flags: accepted for one release, with a warning that names the new one.

A row of RENAMED is a renamed key. `rename_keys` treats a layer of config.yaml, `rename_flags` the
flags of a command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_origin

from halfstep.config import Config, DrawOptions, Section, flag_name, negated_flag, section_type
from halfstep.errors import ConfigError, HalfstepError


@dataclass(frozen=True)
class Renamed:
    """A former key of a section, and its former flag: both are accepted for one release.

    By default the value moves to the key `new`. Otherwise translate(value, section) gives the keys
    that replace it, from the section's other keys; it raises ValueError for a value that is wrong.
    """

    section: type[Section]
    old: str
    new: str
    translate: Callable[[Any, dict[str, Any]], dict[str, Any]] | None = None


def _sampler_of_draw_dtype(value: Any, section: dict[str, Any]) -> dict[str, Any]:
    sampler = section.get("sampler", "ancestral")
    if value == "float64":
        return {"sampler": "ancestral"} if sampler == "ancestral_float32" else {}
    if value != "float32-released":
        raise ValueError(f"draw_dtype: found {value!r}, allowed are float64 and float32-released")
    if sampler not in ("ancestral", "ancestral_float32"):
        raise ValueError(
            "draw_dtype float32-released is the noise of sampler ancestral, "
            f"found sampler {sampler}; change one of the two"
        )
    return {"sampler": "ancestral_float32"}


# One row per renamed key. A row is removed in the second release after the renaming.
RENAMED = [Renamed(DrawOptions, "draw_dtype", "sampler", _sampler_of_draw_dtype)]


def former_names(kind: type[Section]) -> list[Renamed]:
    """The renamed keys of a section."""
    return [row for row in RENAMED if issubclass(kind, row.section)]


def rename_keys(layer: dict, below: dict) -> tuple[dict, list[str]]:
    """`layer` with the new names of renamed keys, and a notice for each.

    `below` is the configuration that `layer` overrides. Raises ConfigError for a refused value.
    """
    layer, notices = _unshared(layer), []
    for path, kind, section in _sections(layer, Config):
        for row in former_names(kind):
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
    kinds = [kind for p in parameters if (kind := section_type(p.annotation))]
    for row in [row for kind in kinds for row in former_names(kind)]:
        old, new = flag_name(row.old), flag_name(row.new)
        if row.translate is None:
            names = {old: new, negated_flag(old): negated_flag(new)}
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
        written = [word for key, text in keys.items() for word in (flag_name(key), str(text))]
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
        inner, value = section_type(field.annotation), raw.get(key)
        if inner is None or not isinstance(value, dict):
            continue
        if get_origin(field.annotation) is not dict:
            yield from _sections(value, inner, (*path, key))
            continue
        for entry, keys in value.items():
            if isinstance(keys, dict):
                yield from _sections(keys, inner, (*path, key, str(entry)))


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

"""From the user's YAML to a Config, and from a section to flags or a schema.

`config.yaml` names a preset and overrides it. `resolve` merges the two and validates the result. It
raises ConfigError with one line per fault: the path, what was found, what is allowed, and the
nearest known name. Former names of keys (renamed.py) are replaced, with a warning.
"""

from __future__ import annotations

import codecs
import difflib
import shlex
import stat
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
from halfstep.sanitize import one_line, shorten

PRESETS = Path("workflow/presets")  # relative to the repository root
MOST_BYTES = 1_000_000  # of a configuration file
MOST_VALUES = 100_000  # in a configuration, with each alias written out
MOST_FAULTS = 20  # that are printed
MOST_LEVELS = 100  # of sections and lists in one another
KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text", dict: "an object"}


def explain(error: pydantic.ValidationError, top: type[BaseModel] = Config) -> list[str]:
    """One line per fault: where, what was found, what is allowed, the nearest known name."""
    lines = []
    faults = _without_inherited(error.errors())
    for fault in faults[:MOST_FAULTS]:
        path = ".".join(shorten(str(part)) for part in fault["loc"]) or "configuration"
        message, value = fault["msg"].removeprefix("Value error, "), fault["input"]
        if fault["type"] == "extra_forbidden":
            known = _known_keys(top, fault["loc"][:-1])
            hint = _nearest(fault["loc"][-1], known) or f"; known are {', '.join(known)}"
            message = f"unknown key{hint}"
        elif fault["type"].startswith("int_"):
            message += ", as 1000000, 1_000_000 or 1e6"
        elif fault["type"] == "literal_error":
            expected = fault["ctx"]["expected"]
            names = [name.strip("'\"") for name in expected.replace(" or ", ", ").split(", ")]
            message = f"allowed are {expected}{_nearest(value, names)}"
        if isinstance(value, dict | BaseModel):  # a fault of a whole section
            lines.append(f"{path}: {message}")
        else:
            message = message[0].lower() + message[1:]
            lines.append(f"{path}: found {excerpt(value)}: {message}")
    if len(faults) > MOST_FAULTS:
        lines.append(f"and {len(faults) - MOST_FAULTS} more faults")
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
        if not path:
            said = f"found {excerpt(value)}, expected an object"
        elif fault["type"] == "missing":
            kind = model.model_fields[path].annotation if path in model.model_fields else None
            said = f"{path}: found nothing, expected {KINDS.get(kind, 'a value')}"
        else:
            said = explain(error, model)[0]
    else:
        return
    raise HalfstepError(f"{where}: {said}; {advice}")


def _without_inherited(faults: list[Any]) -> list[Any]:
    """The faults without those that a section has from another one.

    A run has the keys of its teacher's `distillation`, and a variant those of `sampling`.
    """
    known, own = set(), []
    for fault in faults:
        path = list(fault["loc"])
        inherits = path[2:3] == ["runs"] or path[1:2] == ["variants"]
        if path[2:3] == ["runs"]:
            path[2:4] = ["distillation"]
        elif inherits:
            del path[1:3]
        about = (*path, fault["type"], fault["msg"])
        if not (inherits and about in known):
            own.append(fault)
        known.add(about)
    return own


def _nearest(name: object, known: Iterable[str]) -> str:
    """A hint at the known name most like `name`, or nothing."""
    near = difflib.get_close_matches(str(name)[:80], list(known), 1, 0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _known_keys(top: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys of the section at `path`."""
    model = top
    for key in path:  # a name that the user chose, as that of a corpus, is no field
        field = model.model_fields.get(key)
        model = (field and section_type(field.annotation)) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def merge_sections(base: dict, over: dict, path: tuple[Any, ...] = ()) -> dict:
    """`base` overridden by `over`: sections merge, values are replaced, null removes a section.

    `path` leads to these sections. A baseline of null stays, because it means none; a baseline that
    is trained and one with `from` replace each other.
    """
    out = dict(base)
    for key, value in over.items():
        below = out.get(key)
        is_baseline = path[:1] == ("teachers",) and len(path) == 2 and key == "baseline"
        if not isinstance(below, dict):
            out[key] = value
        elif value is None and not is_baseline:
            del out[key]
        elif isinstance(value, dict) and not (is_baseline and _replaces(value, below)):
            out[key] = merge_sections(below, value, (*path, key))
        else:
            out[key] = value
    return out


def _replaces(over: dict, below: dict) -> bool:
    """Is one of these baselines trained, and the other published?"""
    return bool(over) and bool(over.get("from")) != bool(below.get("from"))


def resolve(user: dict, presets: Path = PRESETS, quiet: bool = False) -> Config:
    """Lay the user's config.yaml over the preset that it names, and validate the result.

    A preset may name another preset. Unless `quiet`, one line is printed for each renamed key, and
    for each value that is allowed and will disappoint. Raises ConfigError.
    """
    check_size("configuration", user)
    default = Config.model_fields["preset"].default
    names, layers = [user.get("preset", default)], [("configuration", user)]
    while (name := names[-1]) is not None:
        known = sorted(path.stem for path in presets.glob("*.yaml"))
        if name not in known:
            hint = _nearest(name, known) or f"; known are {', '.join(known)}"
            raise ConfigError(f"preset: found {excerpt(name)}: no such file in {presets}{hint}")
        file = presets / f"{name}.yaml"
        if name in names[:-1]:
            raise ConfigError(
                f"preset: {' -> '.join(names)} is a cycle; "
                "remove the key `preset` from one of these files"
            )
        preset = read_yaml(file)
        layers.append((str(file), preset))
        names.append(preset.get("preset"))
    merged: dict = {}
    for source, layer in reversed(layers):
        layer, notices = rename_keys(layer, merged)
        if not quiet:
            for notice in notices:
                print(one_line(f"{source}: {notice}"), file=sys.stderr)
        merged = merge_sections(merged, layer)
    found = validate(merged | {"preset": names[0]})
    if not quiet:
        for warning in found.warnings():
            print(f"configuration: warning: {warning}", file=sys.stderr)
    return found


def read_yaml(file: Path) -> dict:
    """The sections of a YAML or JSON file.

    Raises ConfigError with one line if it is no regular file, too large, not UTF-8 or not YAML, if
    a key is given twice, or if its aliases or its nesting are out of all proportion.
    """
    text = _read_text(file)
    try:
        loader = _OneKeyLoader(text)
        loader.name = str(file)
        tree = loader.get_single_node()
        check_size(str(file), tree)
        found = None if tree is None else loader.construct_document(tree)
    except RecursionError:
        raise ConfigError(_too_deep(str(file))) from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be
        raise ConfigError(f"{file}: is not YAML: {_yaml_reason(error)}; correct it") from None
    if found is None:
        raise ConfigError(f"{file}: holds no key; write for example `preset: laptop`")
    if not isinstance(found, dict):
        raise ConfigError(
            f"{file}: found {excerpt(found)}, expected lines such as `preset: laptop`; change it"
        )
    return found


def _read_text(file: Path) -> str:
    try:
        mode, size = file.stat().st_mode, file.stat().st_size
        if not stat.S_ISREG(mode):
            raise ConfigError(f"{file}: is no regular file; name a YAML file")
        if size > MOST_BYTES:
            raise ConfigError(
                f"{file}: has {size:,} bytes, expected at most {MOST_BYTES:,}; name a YAML file"
            )
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; check the path") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"{file}: is UTF-16; save the file as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}: line {line} has a byte that is not UTF-8; save the file as UTF-8"
        ) from None


class _OneKeyLoader(yaml.SafeLoader):
    """A loader that refuses a key which is given twice in a section; YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ConfigError(
                    f"{self.name}: key {shorten(key.value)} is given on line {lines[name]} and "
                    f"again on line {line}; remove one of them"
                )
            lines[name] = line
        return node

    def construct_short_int(self, node: yaml.ScalarNode) -> int:
        """A whole number, unless it has more digits than Python prints."""
        if len(node.value) > 100:
            problem = f"a number of {len(node.value)} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return self.construct_yaml_int(node)


_OneKeyLoader.add_constructor("tag:yaml.org,2002:int", _OneKeyLoader.construct_short_int)


def _yaml_reason(error: Exception) -> str:
    """Line and problem of an error of the YAML parser."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    where = f"line {mark.line + 1}: " if mark else ""
    return where + shorten(" ".join(str(problem or error).split()))


def check_size(name: str, tree: Any) -> None:
    """Raise ConfigError if a tree of YAML nodes or of Python objects is too large or too deep."""
    sizes: dict[int, tuple[int, int]] = {}  # (values, levels) below each object, by its id

    def measure(part: Any) -> tuple[int, int]:
        if id(part) in sizes:
            return sizes[id(part)]
        sizes[id(part)] = 0, MOST_LEVELS + 1  # found again below itself
        below = [measure(child) for child in _children(part)]
        found = 1 + sum(n for n, _ in below), 1 + max((level for _, level in below), default=0)
        sizes[id(part)] = found
        return found

    try:
        values, levels = measure(tree)
    except RecursionError:
        raise ConfigError(_too_deep(name)) from None
    if levels > MOST_LEVELS:
        raise ConfigError(_too_deep(name))
    if values > MOST_VALUES:
        raise ConfigError(
            f"{name}: has {values:.3g} values with its aliases written out, expected at most "
            f"{MOST_VALUES:,}; write fewer"
        )


def _too_deep(name: str) -> str:
    return (
        f"{name}: sections or lists are more than {MOST_LEVELS} levels deep, or an alias contains "
        "itself; write fewer levels"
    )


def _children(part: Any) -> list:
    if isinstance(part, yaml.MappingNode):
        return [node for pair in part.value for node in pair]
    if isinstance(part, yaml.SequenceNode):
        return part.value
    if isinstance(part, dict):
        return list(part.values())
    return part if isinstance(part, list) else []


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
    tree = _with_bounds(Config.model_json_schema())
    for model in [tree, *tree["$defs"].values()]:
        model.pop("required", None)
        for row in former_names(getattr(config, model["title"])):
            notice = f"former name of {row.new}"
            model["properties"][row.old] = {"deprecated": True, "description": notice}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


BOUNDS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
}


def _with_bounds(tree: Any) -> Any:
    """A schema with JSON's words for bounds; pydantic keeps its own behind a BeforeValidator."""
    if isinstance(tree, list):
        return [_with_bounds(part) for part in tree]
    if not isinstance(tree, dict):
        return tree
    is_number = tree.get("type") in ("integer", "number")
    words = BOUNDS if is_number else {}
    return {words.get(key, key): _with_bounds(value) for key, value in tree.items()}

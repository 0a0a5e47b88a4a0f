"""`halfstep init`: a project for one's own text, with sizes and steps for this machine."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from itertools import islice
from pathlib import Path
from typing import Annotated

import psutil
import tyro
import yaml

from halfstep.config import Word
from halfstep.data.files import READERS, find_files, read_documents
from halfstep.errors import ConfigError, HalfstepError
from halfstep.resolve import resolve
from halfstep.sanitize import one_line
from halfstep.workflow.packaged import PACKAGED
from halfstep.workflow.prices import clock
from halfstep.workflow.suggestions import EPOCHS, OF_ROUND, Hardware, Suggestion, suggest

PATTERN = "text/*.txt"  # where no text is named
ASSUMED_BYTES, ASSUMED_DOCUMENTS = 1_000_000, 1000  # of it
COUNTED = 20_000  # documents that are counted at most
HELD_OUT = 0.05  # of all documents, and at most 1,000
IGNORED = "/results/\n/.snakemake/\n"
CONFIG = """\
# yaml-language-server: $schema={schema}

# A corpus of your text, and a teacher that is trained on it and distilled in seven rounds.
# Suggested by `halfstep init` for {machine};
# {text}.
# The options are those of {source}.
# To start from a masked language model of the hub instead, put your text into text/*.txt of another
# folder, and call `halfstep run --preset own-model` there.

preset: laptop # its samples, scores and timings; its corpus and its teacher are left out below

corpora:
  stories: null
  my-text:
    kind: files
    files: {files}
    length: {length} # tokens per window
    vocab_size: {vocab_size} # tokens of the tokenizer, which is trained on your text
    validation_documents: {held_out} # documents that no model is trained on: the last ones

teachers:
  stories-tiny: null
  my-text-{size}:
    corpus: my-text
    # tiny has 1M parameters, mini 19M. Larger ones need a GPU, more text and more steps: small has
    # 169M, as in the preset owt-small.
    network: {{ size: {size} }}
    adapt: baseline # start from the baseline's weights, which is much faster at these sizes
    pretraining: &training
      num_steps: {num_steps} # {epochs:.1f} times through the text; many more learn it by heart
      batch_size: {batch_size} # windows per step
      warmup_steps: {warmup}
      validate_every: {validate_every}
      precision: {precision}
{pretraining}
    baseline: # the autoregressive model that everything is compared with, and the judge
      <<: *training
      num_steps: {baseline_steps}
    distillation: # each of the seven rounds
      <<: *training
      teacher_steps: length # the first teacher takes a step for each token
      num_steps: {round_steps}
      warmup_steps: {round_warmup}
      validate_every: {round_steps}
{distillation}

evaluation:
  lambada: null # last words are only in the built-in stories

# Every other key with its default. To set one, write it in its section, above.

{reference}"""


def init(
    path: Annotated[Path, tyro.conf.Positional] = Path("."),
    text: list[Word] = [],  # noqa: B006
    slurm: bool = False,
) -> None:
    """Write a project: config.yaml, the profile of Snakemake for this machine, and .gitignore.

    config.yaml holds a corpus of your text with a teacher, and explains every key. Sizes and steps
    are suggested for this machine (cores, memory, GPU) and for the size of the text. A file that
    exists is never changed.

    Args:
        path: folder of the project, which need not exist
        text: your files or patterns: .txt, .jsonl, .jsonl.gz, .parquet (text/*.txt, assumed 1 MB)
        slurm: write the profile of a cluster too: `halfstep run --profile slurm`
    """
    hardware = this_hardware()
    by_name = sum(map(os.path.lexists, text))
    text = as_pattern(text)
    size, documents = measure_text(text) if text else (ASSUMED_BYTES, ASSUMED_DOCUMENTS)
    suggestion = suggest(size, hardware)
    named = [seen_from(path, pattern) for pattern in text] or [PATTERN]
    about = f"{' '.join(text) or PATTERN}: {'' if text else 'assumed '}{size_in_words(size)}"
    files = {
        "config.yaml": config_text(suggestion, named, documents, (str(hardware), about)),
        "profiles/default/config.yaml": _packaged("profiles/default/config.yaml"),
        ".gitignore": IGNORED,
    }
    for name in ("config.yaml", "cluster-default.yaml") if slurm else ():
        files[f"slurm/{name}"] = _packaged(f"profiles/slurm/{name}")
    wrote = {name: write_new(path / name, content) for name, content in files.items()}
    for name, is_new in wrote.items():
        print(f"{'wrote' if is_new else 'kept, as it was,'} {path / name}")
    next_line = f"next: cd {shlex.quote(str(path))}; halfstep plan; halfstep run"
    if not wrote["config.yaml"]:  # what is suggested would not be what it says
        print(next_line)
        return
    print(f"this machine: {hardware}")
    if text:
        more = " or more" if documents == COUNTED else ""
        about += f", {documents:,}{more} documents (in a .txt a blank line ends one)"
    print(
        f"text: {about}; suggested: {suggestion.recipe.size}, {suggestion.num_steps:,} steps "
        f"({suggestion.epochs:,.1f} times through the text); "
        f"trainings take about {clock(suggestion.seconds)} (assumed)"
    )
    if suggestion.epochs > EPOCHS + 1:
        print("note: this is little text, which the models will learn by heart")
    if by_name > 1 and len(text) == 1:
        print(f"stored as the pattern {text[0]}: files that match it later are found, too")
    elif by_name > 1:
        print(
            f"note: {by_name} files are stored by their names, so new files are not found; "
            "for a pattern that your shell leaves alone, quote it: --text 'letters/*.txt'"
        )
    if not text:
        print(f"put your text into {path / PATTERN}, or write its place into {path}/config.yaml")
    print(next_line)


def this_hardware() -> Hardware:
    """The cores that this process may use, the memory, and the first GPU."""
    import torch

    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return Hardware(cores, psutil.virtual_memory().total / 1e9, gpu)


def measure_text(patterns: list[str]) -> tuple[int, int]:
    """Bytes of all files, and the number of their documents, as far as they are counted.

    HalfstepError if a file is missing or no text, or if there are fewer than two documents.
    """
    files = find_files(patterns)
    documents = (text for file in files for text in read_documents(file, "text"))
    found = sum(1 for _ in islice(documents, COUNTED))
    if found < 2:
        raise HalfstepError(
            f"--text: found one document in {files[0]}, expected two or more, because some are "
            "held out; end each document of a .txt with a line <|endoftext|> or a blank line"
        )
    return sum(file.stat().st_size for file in files), found


def size_in_words(size: int) -> str:
    """Bytes as a reader sees them: 1.25 MB, and 820 bytes of a short text."""
    return f"{size / 1e6:,.2f} MB" if size >= 10_000 else f"{size:,} bytes"


def as_pattern(text: list[str]) -> list[str]:
    """The files of a pattern that a shell has expanded, as this pattern again.

    They are several, and all files of one suffix in one folder; any others stay as they are.
    """
    paths = {Path(name) for name in text}
    folders = {path.parent for path in paths}
    suffixes = {suffix for path in paths for suffix in READERS if path.name.endswith(suffix)}
    if len(paths) < 2 or len(folders) > 1 or len(suffixes) != 1:
        return text
    pattern = str(folders.pop() / f"*{suffixes.pop()}")
    return [pattern] if {Path(name) for name in glob.glob(pattern)} == paths else text


def seen_from(folder: Path, pattern: str) -> str:
    """A path or pattern as the project in `folder` names it: relative inside of it, else absolute.

    A home folder, ~, stays.
    """
    if pattern.startswith("~"):
        return pattern
    path, top = os.path.abspath(pattern), os.path.abspath(folder)
    return os.path.relpath(path, top) if path.startswith(top + os.sep) else path


def config_text(
    suggestion: Suggestion, files: list[str], documents: int, about: tuple[str, str]
) -> str:
    """config.yaml, which resolves; HalfstepError for a path that it cannot hold.

    Args:
        suggestion: recipe and steps
        files: paths and patterns, as the project names them
        documents: of the text
        about: machine and text, for a reader
    """
    recipe, steps = suggestion.recipe, suggestion.num_steps
    of_round = max(10, round(OF_ROUND * steps))
    values = recipe._asdict() | {
        "schema": PACKAGED / "workflow/schemas/config.schema.json",
        "machine": one_line(about[0]),
        "text": one_line(about[1]),
        "files": json.dumps(files),
        "held_out": max(1, min(1000, round(HELD_OUT * documents))),
        "num_steps": steps,
        "epochs": suggestion.epochs,
        "warmup": steps // 20,
        "validate_every": steps // 4,
        "pretraining": _lines(recipe.pretraining),
        "baseline_steps": round(recipe.of_baseline * steps),
        "distillation": _lines(recipe.distillation),
        "round_steps": of_round,
        "round_warmup": of_round // 15,
        "reference": _reference(),
    }
    text = CONFIG.format(**values)
    try:
        resolve(yaml.safe_load(text), PACKAGED / "workflow/presets", quiet=True)
    except ConfigError as error:
        raise HalfstepError(f"--text: {error}") from None
    return text


def _lines(options: dict[str, str]) -> str:
    return "\n".join(f"      {key}: {value}" for key, value in options.items())


def _reference() -> str:
    """The keys in the comments of the packaged config.yaml, without its introduction.

    In an editable install its user may have set some of them, which are comments here again.
    """
    keys = _packaged("config.yaml").rpartition("\n##")[2].partition("\n\n")[2]
    return re.sub(r"^(?=[^#\n])", "# ", keys, flags=re.MULTILINE)


def _packaged(name: str) -> str:
    return (PACKAGED / name).read_text(encoding="utf-8")


def write_new(file: Path, content: str) -> bool:
    """Write a file that does not exist; False if it does, and then nothing is changed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(file, "x", encoding="utf-8") as opened:
            opened.write(content)
    except FileExistsError:
        return False
    return True

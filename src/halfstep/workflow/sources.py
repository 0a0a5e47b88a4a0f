"""What a configuration takes from outside of its graph: files of the user, and the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from halfstep.config import Config, RunOptions, Teacher, check_path
from halfstep.data.files import find_files
from halfstep.errors import ConfigError, HalfstepError
from halfstep.released import name_of_round
from halfstep.seeds import first_training
from halfstep.texts import check_regular, items_file
from halfstep.workflow.task_sources import faults_of_tasks, tasks_of_hub, texts_of_hub

HUB_NAME = r"[\w-][\w.-]*(/[\w.-]+)?(@[\w./-]+)?"


def plain_source(source: str) -> str:
    """A file, folder or hub name without the hf: before a model of transformers."""
    return source.removeprefix("hf:")


def local_file(source: str) -> list[str]:
    """This path where it exists; else it is a name on the hub, and no file is needed."""
    path = plain_source(source)
    return [path] if os.path.lexists(path) else []


def check_sources(config: Config) -> None:
    """Raise ConfigError, a line per fault, if a text, tokenizer or item file is not there."""
    faults = []
    for name, corpus in config.corpora.items():
        try:
            for path in find_files(corpus.files):
                _check_name(path, "files")
        except HalfstepError as error:
            faults.append(f"corpora.{name}.{error}")
        tokenizer = plain_source(corpus.tokenizer)
        if tokenizer.startswith((".", "/", "~")) and not is_folder(tokenizer):
            faults.append(
                f"corpora.{name}.tokenizer: {tokenizer} is not a folder; "
                "name a folder with vocab.json and merges.txt, a hub name, or bpe"
            )
    for name, teacher in config.teachers.items():
        source = teacher.baseline and teacher.baseline.source
        if source and not is_folder(source) and not is_hub_name(source):
            faults.append(
                f"teachers.{name}.baseline.from: {source} is not a folder; "
                "name a hub name such as gpt2, or a folder that save_pretrained wrote"
            )
    try:
        if items := items_file(config.evaluation.lambada):
            check_regular(items, "lambada")
            _check_name(items, "lambada")
    except HalfstepError as error:
        faults.append(f"evaluation.{error}")
    faults += faults_of_tasks(config.evaluation)
    for name, teacher in config.teachers.items():
        faults += [f"teachers.{name}.{fault}" for fault in _absent_weights(teacher)]
    if faults:
        raise ConfigError("\n".join(faults))


def _absent_weights(teacher: Teacher) -> list[str]:
    """A line for the teacher and for each run whose `from` names nothing."""
    named = [("from", [teacher.source])]
    for key, run in teacher.runs.items():
        numbers = range(1, run.rounds + 1)
        names = [run.source and name_of_round(run.source, number) for number in numbers]
        named.append((f"runs.{key}.from", names))
    faults = []
    for key, sources in named:
        for source in filter(None, sources):
            if not local_file(source) and not re.fullmatch(HUB_NAME, plain_source(source)):
                faults.append(
                    f"{key}: {source} is no file, no folder and no name on the hub; check the path"
                )
                break
    return faults


def _check_name(path: Path, key: str) -> None:
    """HalfstepError for a name that Snakemake would change or print raw."""
    try:
        check_path(str(path))
    except ValueError as error:
        raise HalfstepError(f"{key}: found {str(path)!r}: {error}") from None


def is_folder(name: str) -> bool:
    """Is this a folder of this machine, and not a name on the hub?"""
    return os.path.isdir(os.path.expanduser(name))


def is_hub_name(name: str) -> bool:
    """Is this the name of a model on the hub, such as gpt2, and nothing on this machine?

    A path of two folders that does not exist counts as such a name.
    """
    known = os.path.lexists(os.path.expanduser(name))
    return not known and re.fullmatch(HUB_NAME, name) is not None


class Sources:
    """The weights, texts and judges of a configuration that are not made in its graph."""

    def __init__(self, config: Config):
        self.config = config
        self.imported_rounds = [
            f"{name}/{key}/round-{number}"
            for name, teacher in config.teachers.items()
            for key, options in teacher.runs.items()
            if options.source
            for number in range(1, options.rounds + 1)
        ]
        """students whose weights are published"""

    def last_words(self) -> list[str]:
        """The user's file of last words, where LAMBADA is not a data set of the hub or corpus."""
        items = items_file(self.config.evaluation.lambada)
        return [str(items)] if items else []

    def baseline_source(self, name: str) -> str | None:
        """The folder or hub name of a teacher's published baseline."""
        baseline = self.config.teachers[first_training(name)].baseline
        return baseline and baseline.source

    def published_round(self, model: str) -> tuple[str, RunOptions, int]:
        """Source, run and number of a round whose student is published."""
        teacher, run, folder = model.split("/")
        options, number = (
            self.config.teachers[teacher].runs[run],
            int(folder.removeprefix("round-")),
        )
        assert options.source is not None
        return name_of_round(options.source, number), options, number

    def hub_repositories(self) -> list[str]:
        """What the hub must provide, as `model:name` or `dataset:name`.

        It is fetched once, where snakemake runs, because compute nodes have no internet.
        """
        found = {*self.judges_of_hub(), *self.lambada_of_hub()}
        found |= {*tasks_of_hub(self.config.evaluation), *texts_of_hub(self.config.evaluation)}
        for name in self.config.corpora:
            found.update(self.corpus_of_hub(name))
        for name in self.config.teachers:
            found.update(self.source_of_hub(name) + self.baseline_of_hub(name))
        for model in self.imported_rounds:
            found.update(self.round_of_hub(model))
        return sorted(found)

    def corpus_of_hub(self, name: str) -> list[str]:
        """What a corpus needs from the hub; own text with an own tokenizer needs nothing."""
        corpus, found = self.config.corpora[name], []
        tokenizer = plain_source(corpus.tokenizer)
        if tokenizer != "bpe" and not is_folder(tokenizer):
            found.append(f"model:{tokenizer}")
        if corpus.kind == "openwebtext":
            found.append("dataset:Skylion007/openwebtext")
        return found

    def judges_of_hub(self) -> list[str]:
        """The judges that come from the hub."""
        names = self.config.evaluation.judge
        return [f"model:{name}" for name in names if name != "baseline" and not os.path.isdir(name)]

    def lambada_of_hub(self) -> list[str]:
        """The data set of last words, where it comes from the hub."""
        name = self.config.evaluation.lambada
        return [] if name in (None, "last_words") or self.last_words() else [f"dataset:{name}"]

    def source_of_hub(self, name: str) -> list[str]:
        """The weights that a teacher has or starts from, where they come from the hub."""
        teacher = self.config.teachers[first_training(name)]
        source, adapt = teacher.source, teacher.adapt
        if adapt and adapt != "baseline" and is_hub_name(adapt):
            return [f"model:{adapt}"]
        return [f"model:{plain_source(source)}"] if source and not local_file(source) else []

    def baseline_of_hub(self, name: str) -> list[str]:
        """The published baseline of a teacher, where it comes from the hub."""
        source = self.baseline_source(name)
        return [f"model:{source}"] if source and is_hub_name(source) else []

    def round_of_hub(self, model: str) -> list[str]:
        """The published weights of a round, where they come from the hub."""
        source, _, _ = self.published_round(model)
        return [] if local_file(source) else [f"model:{source}"]

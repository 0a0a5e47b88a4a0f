"""What the tasks and the zero-shot texts of a configuration need: files of the user, and the hub.

Snakemake imports this module at every start, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml

from halfstep.config import Evaluation, check_path
from halfstep.data.files import READERS
from halfstep.data.zero_shot import find_data_set
from halfstep.errors import HalfstepError
from halfstep.texts import check_regular, is_task_file


def tasks_of_hub(evaluation: Evaluation) -> list[str]:
    """The tasks of lm-eval; those in .yaml files have their data on this machine."""
    return [f"task:{name}" for name in evaluation.tasks if not is_task_file(name)]


def texts_of_hub(evaluation: Evaluation) -> list[str]:
    """The zero-shot texts that come from the hub."""
    found = []
    for name in evaluation.perplexity:
        data = find_data_set(name)
        if data is not None:
            found.append(data.source)
        elif not names_file(name):
            found.append(f"task:{name}")
    return found


def files_of(names: list[str]) -> list[str]:
    """The files among the names of tasks or texts, and the data files that tasks name."""
    found = [name for name in names if names_file(name)]
    return found + [file for name in names if is_task_file(name) for file in _data_files(name)]


def faults_of_tasks(evaluation: Evaluation) -> list[str]:
    """A sentence for each file that cannot be read, or whose task lacks evaluation.task_steps."""
    faults = []
    for key in ("tasks", "perplexity"):
        for name in filter(names_file, getattr(evaluation, key)):
            try:
                check_regular(Path(name), f"evaluation.{key}")
                check_path(name)
                if is_task_file(name) and not evaluation.task_steps and _is_written(name):
                    faults.append(
                        f"evaluation.tasks: {name} asks for written text (generate_until), but "
                        "found no step counts; name some in evaluation.task_steps"
                    )
            except HalfstepError as error:
                faults.append(str(error))
            except ValueError as error:
                faults.append(f"evaluation.{key}: found {name!r}: {error}")
    return faults


def _is_written(name: str) -> bool:
    """Does the .yaml file of a task say that its answers are written?"""
    text = Path(name).read_text(errors="replace")
    return bool(re.search(r"^output_type: *[\"']?generate_until\b", text, re.MULTILINE))


def names_file(name: str) -> bool:
    """Is this the name of a file of tasks or of text, and not a name that others gave?"""
    return is_task_file(name) or name.endswith(tuple(READERS))


def _data_files(name: str) -> list[str]:
    """The local files under `data_files` in the .yaml file of a task.

    Those below results/ are not among them: they are made with the corpus, before any model.
    """
    try:
        tree = yaml.compose(Path(name).read_text(), yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return []  # lm-eval says what is wrong with it
    found, parts = [], [(False, tree)]
    while parts:
        is_data, node = parts.pop()
        if isinstance(node, yaml.ScalarNode):
            if is_data and os.path.isfile(node.value) and not node.value.startswith("results/"):
                found.append(node.value)
        elif isinstance(node, yaml.SequenceNode):
            parts += [(is_data, child) for child in node.value]
        elif isinstance(node, yaml.MappingNode):
            parts += [(is_data or key.value == "data_files", child) for key, child in node.value]
    return sorted(found)

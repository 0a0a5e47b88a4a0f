"""Which runs of MLflow a results folder created: it changes and deletes no others.

    .track.json   {"id": "<32 hex digits>", "runs": {"<key>": "<run id>"}}

`id` names the results folder and moves with it. Each run that the folder creates has a key of its
own in its tags, which is written here before MLflow is asked. So a run whose creation was not
confirmed is recognized by its key, and a copy of a run, with all its tags, is not taken for ours.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json

FOLDER_TAG, KEY_TAG = "halfstep.results", "halfstep.key"


class OwnRuns:
    """The runs that a results folder created, kept in a file of it."""

    def __init__(self, results: Path):
        self._file = results / ".track.json"
        if not self._file.exists():
            self.folder_id, self._runs = uuid.uuid4().hex, {}
            self._write()
            return
        found = read_json(self._file)
        if not _is_valid(found):
            raise HalfstepError(
                f"{self._file}: found other content than an id and a table of runs; "
                "delete the file; all models then get new runs, and the old runs stay"
            )
        self.folder_id: str = found["id"]
        self._runs: dict[str, str] = found["runs"]

    def new_key(self) -> str:
        """A key for a run that will be created."""
        key = uuid.uuid4().hex
        self._runs[key] = ""
        self._write()
        return key

    def confirm(self, key: str, run_id: str) -> None:
        """MLflow gave the run with this key an id."""
        self._runs[key] = run_id
        self._write()

    def owns(self, run_id: str, tags: Mapping[str, str]) -> bool:
        """Did this folder create the run with this id and these tags?"""
        key = tags.get(KEY_TAG, "")
        if key not in self._runs:
            return False
        if not self._runs[key]:
            self.confirm(key, run_id)
        return self._runs[key] == run_id

    def _write(self) -> None:
        write_json(self._file, {"id": self.folder_id, "runs": self._runs})


def _is_valid(found: object) -> bool:
    if not isinstance(found, dict) or not isinstance(found.get("runs"), dict):
        return False
    is_id = isinstance(found.get("id"), str) and re.fullmatch("[0-9a-f]{32}", found["id"])
    return bool(is_id) and all(isinstance(run, str) for run in found["runs"].values())

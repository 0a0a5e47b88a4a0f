"""The figures and tables of the paper that a graph can make, and what they are made from."""

from __future__ import annotations

from pathlib import Path

from halfstep.errors import ConfigError
from halfstep.report.paper import ITEMS, missing, paper_items
from halfstep.workflow.targets import Targets


class PaperTargets:
    """The items of report/paper.py that the configuration of `targets` can make.

    Attributes:
        items: their names, with the rows that each shows, as values by column
    """

    def __init__(self, targets: Targets):
        self.targets, self.config = targets, targets.config
        self.tables = targets.table_inputs()
        self.items = paper_items(self.config, self.tables)

    def named(self, is_figure: bool) -> list[str]:
        """Names of the figures, or of the tables."""
        return [name for name in self.items if ITEMS[name].is_figure == is_figure]

    def sources(self, name: str) -> list[str]:
        """The files that an item is made from."""
        item = ITEMS[name]
        if item.is_figure:
            return [f"results/tables/{table}.csv" for table in item.tables]
        return self.tables[item.shows]

    def rows(self, name: str) -> list[str]:
        """Which rows an item shows, as `column=value,value`."""
        return [f"{column}={','.join(values)}" for column, values in self.items[name].items()]

    def compared_teacher(self) -> str:
        """Flags for the teacher whose numbers are compared with published ones of 169M."""
        sizes = {name: teacher.network.size for name, teacher in self.config.teachers.items()}
        first = self.targets.teachers[0]
        name = next((name for name, size in sizes.items() if size == "small"), first)
        return f"--teacher {name} --size {sizes[name]}"

    def check(self, target: str) -> None:
        """Raise ConfigError for a target in results/paper that this configuration cannot make."""
        path = Path(target)
        name = path.name.partition(".")[0]
        if path.parent != Path("results/paper") or name in ("report", "table-2"):
            return
        if name not in ITEMS:
            raise ConfigError(
                f"{target}: found {name}, expected one of {', '.join(ITEMS)}; "
                "docs/paper.md says what became of the others"
            )
        if lacking := missing(ITEMS[name], self.config, self.tables):
            raise ConfigError(f"{target}: needs {lacking}")

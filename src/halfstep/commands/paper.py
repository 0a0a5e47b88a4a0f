"""`halfstep compare-published` and `list-sizes`: the reproduction report, and table 2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.commands.report import output_paths
from halfstep.config import SIZES, Network, Size, Word, shape_of_size
from halfstep.errors import HalfstepError
from halfstep.files import write_atomic
from halfstep.records import provenance
from halfstep.report.catalogue import TABLES

if TYPE_CHECKING:
    from pandas import DataFrame

VOCABULARY = 50_257  # of GPT-2, the mask not counted


def compare_published(
    tables: list[Path],
    output: Path,
    teacher: Word | None = None,
    size: Size = "small",
    preset: Word = "sdtt-losses",
) -> None:
    """Write published numbers and the claims of the paper next to ours: {output}.md and .html.

    A cell without a number of ours names the command that measures it.

    Args:
        tables: .csv tables of `halfstep tabulate`, or folders of them
        output: path of the report; an ending .md or .html is dropped
        teacher: the teacher that is compared, with its students (the first in the tables)
        size: network size of this teacher
        preset: the preset that the commands name
    """
    from tabulate import tabulate

    from halfstep.report.pages import as_markup, make_page
    from halfstep.report.published import FILE, published_rows
    from halfstep.report.reproduction import report_parts

    files = [file for path in tables for file in _table_files(path)]
    frames = {file.stem: _read_own(file, teacher) for file in files}
    commands = {
        name: f"snakemake results/tables/{name}.csv --config preset={preset}" for name in TABLES
    }
    grid = partial(tabulate, tablefmt="github", disable_numparse=True)
    parts = report_parts(published_rows(), frames, size, commands, grid)
    sections = (f"## {heading}\n\n{body}" for heading, body in parts)
    text = "\n\n".join(["# Reproduction report", *sections]) + "\n"
    md, page, record = output_paths(output, ".md", ".html", f".{provenance.NAME}")
    write_atomic(md, text)
    write_atomic(page, make_page("Reproduction report", as_markup(text)))
    provenance.write_record(record, [md, page], [*files, FILE])


def _table_files(path: Path) -> list[Path]:
    """This file, or the tables of the catalogue in this folder."""
    found = [path] if not path.is_dir() else sorted(path.glob("*.csv"))
    found = [file for file in found if file.stem in TABLES]
    if not found:
        raise HalfstepError(
            f"tables: found no table of halfstep tabulate at {path}, expected one of "
            f"{', '.join(f'{name}.csv' for name in TABLES)}; run snakemake first"
        )
    return found


def _read_own(file: Path, teacher: str | None) -> DataFrame:
    """Our rows of a table: those of one teacher, and of untrained networks."""
    from halfstep.report.published import without_published
    from halfstep.report.rows import read_table
    from halfstep.report.trainings import pool_trainings

    table = pool_trainings(without_published(read_table(file)))
    trained = ~table["teacher"].str.endswith("-untrained")
    if teacher and not (table["teacher"] == teacher).any():
        raise HalfstepError(
            f"teacher: found {teacher}, but {file} has {', '.join(table['teacher'].unique())}; "
            "name one of them"
        )
    name = teacher or next(iter(table.loc[trained, "teacher"]), "")
    return table[~trained | (table["teacher"] == name)]


def list_sizes(output: Path) -> None:
    """Write the network sizes of the paper with their parameters: {output}.csv and .md (table 2).

    Args:
        output: path of the table; an ending .csv or .md is dropped
    """
    import torch
    from tabulate import tabulate

    from halfstep.checkpoint import build_network

    header = ("size", "parameters", "blocks", "width", "heads", "width of adaLN's input")
    rows = []
    for size in SIZES:
        meta = {
            "kind": "diffusion",
            "network": Network(size=size).model_dump(),
            "vocab_size": VOCABULARY,
            "length": 1024,
        }
        with torch.device("meta"):
            network = build_network(meta)
        rows.append([size, sum(p.numel() for p in network.parameters()), *shape_of_size(size)])
    csv, md, record = output_paths(output, ".csv", ".md", f".{provenance.NAME}")
    write_atomic(csv, "\n".join(",".join(map(str, row)) for row in [header, *rows]) + "\n")
    shown = [[size, f"{parameters / 1e6:,.0f}M", *shape] for size, parameters, *shape in rows]
    title = "## Network sizes of the denoiser, with the vocabulary of GPT-2 and the mask"
    write_atomic(md, f"{title}\n\n{tabulate(shown, header, 'github')}\n")
    provenance.write_record(record, [csv, md], [])

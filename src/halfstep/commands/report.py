"""`halfstep tabulate`, `plot`, `summary`: rows to tables, tables to figures, and a last page."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from halfstep.config import Whole
from halfstep.errors import HalfstepError
from halfstep.files import write_atomic
from halfstep.records import provenance
from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES

Width = Annotated[Whole, Field(ge=20, le=1000)]

if TYPE_CHECKING:
    from pandas import DataFrame

    from halfstep.report.sentences import Headline


def tabulate(
    table: str,
    metrics: list[Path],
    output: Path,
    published: bool = False,
    where: list[str] = [],  # noqa: B006
) -> None:
    """Gather metric rows into one table: {output}.csv (complete) and {output}.md (to read).

    Rows that were measured under different conditions are refused. Rows of more than one commit
    are allowed; a warning and the table name the commits.

    Tables:
    {catalogue}

    Args:
        table: name of the table, as listed above
        metrics: files of metric rows, or folders of such files
        output: path of the table; an ending .csv or .md is dropped
        published: add published values, in separate rows and grids that name their source
        where: only rows with these values, as column=value,value; baselines, teachers and
            held-out text stay among the rows of a run
    """
    import pandas

    from halfstep.report.conditions import describe_commits
    from halfstep.report.published import FILE, published_markdown, published_rows
    from halfstep.report.rows import keep_rows, read_rows, row_files

    row = TABLES[_known_name("table", table, TABLES)]
    select, markdown = pkgutil.resolve_name(row.select), pkgutil.resolve_name(row.markdown)
    inputs = row_files(metrics)
    selected = keep_rows(select(read_rows(metrics)), where)
    parts = [markdown(selected)] if len(selected) else [f"No rows of {table} yet.\n"]
    warning = describe_commits(selected)
    if warning:
        print(f"halfstep tabulate: warning: {table}: {warning}", file=sys.stderr)
        parts.append(f"**Mind:** {warning}\n")
    if published:
        inputs.append(FILE)
        others = published_rows(row.metrics)
        if len(others):
            parts.append(published_markdown(others, row.metrics) + "\n")
            frames = [frame for frame in (selected, others) if len(frame)]
            filled = [frame.dropna(axis="columns", how="all") for frame in frames]
            selected = pandas.concat(filled, ignore_index=True)
    csv, md, record = output_paths(output, ".csv", ".md", f".{provenance.NAME}")
    write_atomic(csv, selected.dropna(axis="columns", how="all").to_csv(index=False))
    write_atomic(md, "\n".join(parts))
    provenance.write_record(record, [csv, md], inputs)


def plot(
    figure: str,
    tables: list[Path],
    output: Path,
    published: bool = False,
    where: list[str] = [],  # noqa: B006
) -> None:
    """Draw one figure as {output}.pdf and .svg, with its points as .csv.

    A record of its origin is written as .provenance.json. Figures, and what each is drawn from:
    {catalogue}

    Args:
        figure: name of the figure, as listed above
        tables: the .csv tables that the figure needs; for journals, the folders that hold them
        output: path of the figure; an ending .pdf, .svg or .csv is dropped
        published: draw published values under ours, thin and gray, in {published}
        where: only rows with these values, as column=value,value; baselines, teachers and
            held-out text stay among the rows of a run
    """
    from halfstep.report.published import FILE, published_rows
    from halfstep.report.style import save_figure

    row = FIGURES[_known_name("figure", figure, FIGURES)]
    draw = pkgutil.resolve_name(row.draw)
    inputs = _figure_inputs(figure, tables)
    frames = _read_inputs(figure, inputs, where)
    files = [file for paths in inputs.values() for file in paths]
    if published:
        frames["published"] = published_rows()
        files.append(FILE)
    drawn, points = draw(frames)
    endings = (".pdf", ".svg", ".csv", f".{provenance.NAME}")
    pdf, svg, csv, record = output_paths(output, *endings)
    write_atomic(pdf, lambda part: save_figure(drawn, part, ".pdf"))
    write_atomic(svg, lambda part: save_figure(drawn, part, ".svg"))
    write_atomic(csv, points.to_csv(index=False))
    provenance.write_record(record, [pdf, svg, csv], files)


def _figure_inputs(figure: str, paths: list[Path]) -> dict[str, list[Path]]:
    """The files of each need of a figure, among these tables and folders."""
    from halfstep.report.curves import journal_files

    needs = FIGURES[figure].needs
    given = {path.stem: [path] for path in paths if path.suffix == ".csv"}
    if JOURNALS in needs:
        given[JOURNALS] = journal_files(paths)
    missing = [f"{name}.csv" for name in needs if name not in given]
    if missing:
        needed = ", ".join(f"{name}.csv" for name in needs)
        raise HalfstepError(f"--tables: {figure} needs {needed}; found no {', '.join(missing)}")
    return {name: given[name] for name in needs}


def _read_inputs(
    figure: str, inputs: dict[str, list[Path]], where: list[str]
) -> dict[str, DataFrame]:
    """The table or the curves of each need, without published values."""
    from halfstep.report.curves import read_curves
    from halfstep.report.published import without_published
    from halfstep.report.rows import keep_rows, read_table
    from halfstep.report.trainings import pool_trainings

    frames = {}
    for name, files in inputs.items():
        if name == JOURNALS:
            frames[name] = read_curves(files)
        else:
            table = keep_rows(without_published(read_table(files[0])), where)
            frames[name] = pool_trainings(table)
    empty = [name for name, frame in frames.items() if frame.empty]
    if empty:
        of = f" with {' '.join(where)}" if where else ""
        raise HalfstepError(f"{figure}: no rows{of} in {', '.join(empty)}; measure something first")
    return frames


def _known_name(flag: str, name: str, rows: Collection[str]) -> str:
    """The name, or HalfstepError if the catalogue has no such row."""
    if name in rows:
        return name
    near = difflib.get_close_matches(name, rows, 1, 0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise HalfstepError(f"--{flag} {name}: no such {flag}; known are {', '.join(rows)}{hint}")


def output_paths(output: Path, *endings: str) -> list[Path]:
    """The output path with each of these endings, in place of one of them that it already has."""
    stem = output.stem if output.suffix in endings else output.name
    return [output.with_name(f"{stem}{ending}") for ending in endings]


def _complete_help() -> None:
    """Put the rows of the catalogue into the help of `tabulate` and `plot`."""
    tables = [f"- {name}: {row.title}" for name, row in TABLES.items()]
    figures = [
        f"- {name}: {row.title} (from {', '.join(row.needs)})" for name, row in FIGURES.items()
    ]
    published = [name for name, row in FIGURES.items() if row.published]
    for command, lines in ((tabulate, tables), (plot, figures)):
        text = (inspect.getdoc(command) or "").replace("{catalogue}", "\n".join(lines))
        command.__doc__ = text.replace("{published}", ", ".join(published))


_complete_help()


def summary(results: Path = Path("results"), width: Width = 100) -> None:
    """Print the tables, three texts, and the places of figure, report and runs.

    What is not there (yet) is left out.

    Args:
        results: the folder with tables, samples and figures
        width: of the texts, in characters
    """
    tables = results / "tables"
    texts = [tables / f"{name}.md" for name in ("lambada", "speed")]
    if not any(file.is_file() for file in [tables / "steps.csv", *texts]):
        raise HalfstepError(f"{tables}: holds no tables; run snakemake, or name another --results")
    if (tables / "steps.csv").is_file():
        _print_steps(tables / "steps.csv", texts, results, width)
    else:
        _print_files(texts)
    print()
    _print_places(results)


def _print_files(files: list[Path]) -> None:
    """Print the texts of these files, where they exist."""
    for file in files:
        if file.is_file():
            print(file.read_text(errors="replace"))


def _print_steps(file: Path, others: list[Path], results: Path, width: int) -> None:
    """Print the table of steps, other tables, and for each teacher what the table says."""
    from halfstep.report import sentences
    from halfstep.report.markdown import steps_markdown

    table = _read_pooled(file)
    print(steps_markdown(table, ("generative_perplexity", "entropy")))
    _print_files(others)
    for teacher, mine in table.groupby("teacher", sort=False):
        perplexity = mine[mine["metric"] == "generative_perplexity"]
        entropy = mine[mine["metric"] == "entropy"]
        found = sentences.headlines(perplexity)
        trainings = mine["trainings"].max() if "trainings" in mine else 1
        over = "trainings, comparisons in pairs of one training" if trainings > 1 else "texts"
        lines = [
            f"Number of trainings: {trainings:g}; 95% intervals over {over}.",
            *_equal_entropy(file.with_name("temperatures.csv"), perplexity),
            *map(sentences.headline_sentence, found),
            *sentences.gains(perplexity, entropy),
            *sentences.own_steps(perplexity, results),
            *sentences.story_shares(mine),
            *_last_words(file.with_name("lambada.csv"), str(teacher)),
        ]
        print(*lines, sep="\n")
        for headline in found[:1]:
            _print_samples(headline, results, width)


def _read_pooled(file: Path) -> DataFrame:
    """Our own rows of a table, with one row for all trainings of a model."""
    from halfstep.report.published import without_published
    from halfstep.report.rows import read_table
    from halfstep.report.trainings import pool_trainings

    return pool_trainings(without_published(read_table(file)))


def read_headlines(file: Path) -> dict[str, list[Headline]]:
    """For each teacher in the table of steps the headlines of its runs, the first one first."""
    from halfstep.report.sentences import headlines

    table = _read_pooled(file)
    found = {}
    for teacher, mine in table.groupby("teacher", sort=False):
        found[str(teacher)] = headlines(mine[mine["metric"] == "generative_perplexity"])
    return found


def _equal_entropy(file: Path, perplexity: DataFrame) -> list[str]:
    """What the table `temperatures` says of a teacher's runs, where there is such a table."""
    from halfstep.report.rows import sampled_rows
    from halfstep.report.sentences import equal_entropy

    if not file.is_file() or perplexity.empty:
        return []
    table = _read_pooled(file)
    mine = table[table["teacher"] == perplexity["teacher"].iloc[0]]
    return equal_entropy(mine, sampled_rows(perplexity)["temperature"].fillna(1).iloc[0])


def _last_words(file: Path, teacher: str) -> list[str]:
    """What the table `lambada` says of a teacher's runs, where there is such a table."""
    from halfstep.report.sentences import last_word_verdicts

    if not file.is_file():
        return []
    table = _read_pooled(file)
    return last_word_verdicts(table[table["teacher"] == teacher])


def _print_samples(headline: Headline, results: Path, width: int) -> None:
    """The median text by the judge of each of the three: teacher, student, teacher at its best."""
    import pandas

    from halfstep.report.sentences import sample_text

    for row in (headline.same_steps, headline.student, headline.best):
        model, steps = row["model"], row["steps"]
        file = results / "samples" / model / f"steps-{steps}" / "samples.txt"
        number = row.get("median_text")
        text = None if pandas.isna(number) else sample_text(file, int(number))
        if not text:
            continue
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
        print(f"\n{model}, {steps} steps, the median text by perplexity:")
        print(textwrap.indent("\n".join(lines), "  "))


def _print_places(results: Path) -> None:
    from halfstep.commands.track import how_to_look

    places = {
        "figure": results / "figures" / "ppl_vs_steps.pdf",
        "report": results / "report.html",
        "tables": results / "tables",
    }
    for name, path in places.items():
        if path.exists():
            print(f"{name}  {path}")
    if (results / "mlflow.db").exists():
        print(f"runs    {how_to_look(f'sqlite:///{results}/mlflow.db')}")

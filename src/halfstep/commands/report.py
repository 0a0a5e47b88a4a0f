"""`halfstep tabulate`, `plot`, `summary`: rows to tables, tables to figures, and a last page."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from halfstep.config import Whole
from halfstep.errors import HalfstepError
from halfstep.files import write_atomic
from halfstep.records import provenance
from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES
from halfstep.report.labels import name_model

Width = Annotated[Whole, Field(ge=20, le=1000)]

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from halfstep.report.sentences import Headline


def tabulate(
    table: str,
    metrics: list[Path],
    output: Path,
    published: bool = False,
    where: list[str] = [],  # noqa: B006
) -> None:
    """Gather metric rows into one table: {output}.csv (complete), .md and .html (to read).

    Rows that were measured under different conditions are refused. Rows of more than one commit
    are allowed; a warning and the table name the commits.

    Tables:
    {catalogue}

    Args:
        table: name of the table, as listed above
        metrics: files of metric rows, or folders of such files
        output: path of the table; an ending .csv, .md or .html is dropped
        published: add published values, in separate rows and grids that name their source
        where: only rows with these values, as column=value,value; baselines, teachers and
            held-out text stay among the rows of a run
    """
    import pandas

    from halfstep.report.conditions import describe_commits
    from halfstep.report.pages import as_markup, make_page, rows_markup
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
    endings = (".csv", ".md", ".html", f".{provenance.NAME}")
    csv, md, page, record = output_paths(output, *endings)
    grids = "\n".join(parts)
    write_atomic(csv, selected.dropna(axis="columns", how="all").to_csv(index=False))
    write_atomic(md, grids)
    title = row.title[0].upper() + row.title[1:]
    top = as_markup(f"# {title}\n\n{grids}\n\n## All rows")
    write_atomic(page, make_page(table, top + rows_markup(selected)))
    provenance.write_record(record, [csv, md, page], inputs)


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
    """Print what was found, three texts of each teacher, and where the rest is.

    What is not there (yet) is left out. Without a table of steps the other tables are printed.

    Args:
        results: the folder with tables, samples and figures
        width: of the texts, and on a terminal of all lines, in characters
    """
    tables = results / "tables"
    others = [file for name in ("lambada", "speed") if (file := tables / f"{name}.md").is_file()]
    if (tables / "steps.csv").is_file():
        _print_findings(results, width)
    elif others:
        print(*(file.read_text(errors="replace") for file in others), sep="\n")
    else:
        raise HalfstepError(f"{tables}: holds no tables; run snakemake, or name another --results")
    print()
    _print_places(results)


def _print_findings(results: Path, width: int) -> None:
    """For each teacher the main result of each run, three texts, all comparisons, and speed."""
    from halfstep.report.equal_quality import speed_verdict
    from halfstep.report.sentences import headlines, lead_sentences

    tables = results / "tables"
    steps, *others = (
        read_pooled(tables / f"{name}.csv") for name in ("steps", "temperatures", "speed")
    )
    for teacher, mine in steps.groupby("teacher", sort=False):
        frontier, speed = (table[table["teacher"] == teacher] for table in others)
        perplexity = mine[mine["metric"] == "generative_perplexity"]
        _print_sentences(lead_sentences(perplexity, frontier), width)
        for headline in headlines(perplexity)[:1]:
            for title, text in median_texts(headline, results):
                _print_text(title, text, width)
        print()
        _print_sentences(teacher_sentences(mine, tables, results), width)
        if len(speed):
            verdict = speed_verdict(speed, mine, frontier)
            _print_sentences([f"{teacher}: {verdict.summary}", *verdict.details], width)


def read_pooled(file: Path) -> DataFrame:
    """Our own rows of a table, with one row for all trainings of a model; none without the file."""
    from pandas import DataFrame

    from halfstep.report.published import without_published
    from halfstep.report.rows import read_table, tidy
    from halfstep.report.trainings import pool_trainings

    if not file.is_file() or file.stat().st_size < 2:  # a table without rows is a line feed
        return tidy(DataFrame())
    return pool_trainings(without_published(read_table(file)))


def read_headlines(tables: Path) -> dict[str, tuple[list[str], list[Headline]]]:
    """For each teacher the first sentence on each of its runs, and their headlines."""
    from halfstep.report.sentences import headlines, leads_by_teacher

    steps, frontier = (read_pooled(tables / f"{name}.csv") for name in ("steps", "temperatures"))
    perplexity = steps[steps["metric"] == "generative_perplexity"]
    return {
        teacher: (leads, headlines(perplexity[perplexity["teacher"] == teacher]))
        for teacher, leads in leads_by_teacher(steps, frontier).items()
    }


def teacher_sentences(steps: DataFrame, tables: Path, results: Path) -> list[str]:
    """All sentences on one teacher: equal entropy, headlines, every step count, last words.

    Args:
        steps: its rows of the table `steps`, pooled
        tables: the folder of the tables `temperatures` and `lambada`
        results: the folder with the models
    """
    from halfstep.report import sentences
    from halfstep.report.rows import sampled_rows

    perplexity = steps[steps["metric"] == "generative_perplexity"]
    trainings = steps["trainings"].max() if "trainings" in steps else 1
    over = "trainings, comparisons in pairs of one training" if trainings > 1 else "texts"
    others = [read_pooled(tables / f"{name}.csv") for name in ("temperatures", "lambada")]
    teacher = steps["teacher"].iloc[0]
    frontier, lambada = (table[table["teacher"] == teacher] for table in others)
    temperatures = sampled_rows(perplexity)["temperature"].fillna(1)
    return [
        f"Number of trainings: {trainings:g}; 95% intervals over {over}.",
        *(sentences.equal_entropy(frontier, temperatures.iloc[0]) if len(temperatures) else []),
        *map(sentences.headline_sentence, sentences.headlines(perplexity)),
        *sentences.gains(perplexity, steps[steps["metric"] == "entropy"]),
        *sentences.own_steps(perplexity, results),
        *sentences.story_shares(steps),
        *sentences.last_word_verdicts(lambada),
    ]


def median_texts(headline: Headline, results: Path) -> list[tuple[str, str]]:
    """The median text by the judge of each of the three: teacher, student, teacher at its best.

    As (title, text), each once; a text that is not there is left out.
    """
    rows = (headline.same_steps, headline.student, headline.best)
    found = {
        f"{row['teacher']}, {name_model(row['run'], row['round'])}, {row['steps']} steps, the "
        "median text by perplexity": median_text(row, results)
        for row in rows
    }
    return [(title, text) for title, text in found.items() if text]


def median_text(row: Series, results: Path) -> str | None:
    """The text of a row of perplexity that is the median of its samples, or None."""
    import pandas

    from halfstep.report.sentences import sample_text

    if pandas.isna(row["median_text"]) or pandas.isna(row["steps"]):
        return None
    file = results / "samples" / row["model"] / f"steps-{row['steps']}" / "samples.txt"
    return sample_text(file, int(row["median_text"]))


def _print_text(title: str, text: str, width: int) -> None:
    lines = [line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]]
    print(f"\n{title}:")
    print(textwrap.indent("\n".join(lines), "  "))


def _print_sentences(sentences: Iterable[str], width: int) -> None:
    """Print sentences; a terminal gets lines that fit, a file or a pipe one line for each."""
    for line in "\n".join(sentences).splitlines():
        if sys.stdout.isatty():
            columns = min(width, shutil.get_terminal_size().columns)
            inner = " " * (len(line) - len(line.lstrip()) + 4)
            line = textwrap.fill(line, columns, subsequent_indent=inner, break_on_hyphens=False)
        print(line)


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
    if (page := results / "index.html").exists():
        print(f"open    {page}")

"""`halfstep tabulate`, `plot` and `summary`: from metric rows to tables, from tables to figures, and the last page of `make demo`."""

from __future__ import annotations

import difflib
import re
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_atomic
from halfstep.records import provenance


def tabulate(table: str, metrics: list[Path], output: Path, published: bool = False) -> None:
    """Gather metric rows into one table: {output}.csv (long, complete) and .md (to read).

    Rows that were not measured alike are refused. Rows of more than one commit are not: a warning says so, and so does the table.

    Args:
        table: steps, lambada, speed or continuations
        metrics: files of metric rows, or folders of such files
        output: path of the table; an ending .csv or .md is dropped
        published: add published values, in rows and grids of their own that name their source
    """
    import pandas

    from halfstep.report import published as others
    from halfstep.report.tables import TABLES, mixed_commits, row_files, rows

    select, markdown, titles = TABLES[known("table", table, TABLES)]
    chosen = select(rows(metrics))
    parts = [markdown(chosen)] if len(chosen) else [f"No rows of {table} yet.\n"]
    if warning := mixed_commits(chosen):
        print(f"halfstep tabulate: warning: {table}: {warning}", file=sys.stderr)
        parts.append(f"**Mind:** {warning}\n")
    theirs = others.published(titles) if published else chosen[:0]
    if len(theirs):
        parts.append(others.published_markdown(theirs, titles) + "\n")
        chosen = pandas.concat(
            [frame.dropna(axis="columns", how="all") for frame in (chosen, theirs) if len(frame)],
            ignore_index=True,
        )
    stem = output.with_suffix("") if output.suffix in (".csv", ".md") else output
    write_atomic(
        stem.with_name(stem.name + ".csv"),
        chosen.dropna(axis="columns", how="all").to_csv(index=False),
    )
    write_atomic(stem.with_name(stem.name + ".md"), "\n".join(parts))
    made = [stem.with_name(stem.name + suffix) for suffix in (".csv", ".md")]
    provenance.write_record(
        stem.with_name(f"{stem.name}.{provenance.NAME}"),
        made,
        [*row_files(metrics), *([others.FILE] if published else [])],
    )


def known(flag: str, name: str, registry: Collection[str]) -> str:
    """`name`, or HalfstepError when the registry has no such entry."""
    if name not in registry:
        near = difflib.get_close_matches(name, registry, 1, 0.4)
        raise HalfstepError(
            f"--{flag} {name}: no such {flag}; known are {', '.join(registry)}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return name


def plot(figure: str, tables: list[Path], output: Path, published: bool = False) -> None:
    """Draw one figure as {output}.pdf and .svg, with its points in .csv and its origin in .provenance.json.

    Args:
        figure: ppl_vs_steps, entropy_vs_steps, ppl_vs_latency, lambada_vs_round, latency_vs_length or loss_curves
        tables: the .csv tables it needs (steps.csv, lambada.csv, speed.csv); for loss_curves folders that hold journals
        output: path of the figure; an ending .pdf, .svg or .csv is dropped
        published: lay published values under ppl_vs_steps, entropy_vs_steps, lambada_vs_round and latency_vs_length, thin and grey
    """
    from halfstep.report import published as others
    from halfstep.report import style
    from halfstep.report.figures import FIGURES, journals
    from halfstep.report.tables import read_csv

    draw, needs = FIGURES[known("figure", figure, FIGURES)]
    given = {path.stem: path for path in tables if path.suffix == ".csv"}
    if missing := [name for name in needs if name not in given and name != "journals"]:
        raise HalfstepError(
            f"--tables: {figure} needs {', '.join(f'{name}.csv' for name in needs)}; found no {', '.join(f'{name}.csv' for name in missing)}"
        )
    inputs = [given[name] for name in needs if name in given]
    frames = {name: others.without(read_csv(given[name])) for name in needs if name in given}
    if "journals" in needs:
        inputs = sorted(
            file
            for path in tables
            for file in ([path] if path.is_file() else path.rglob("journal.jsonl"))
        )
        frames["journals"] = journals(tables)
    if empty := [name for name, frame in frames.items() if frame.empty]:
        raise HalfstepError(f"{figure}: no rows in {', '.join(empty)}; measure something first")
    drawn, points = draw(frames | ({"published": others.published()} if published else {}))
    stem = output.with_suffix("") if output.suffix in (".pdf", ".svg", ".csv") else output
    for suffix in (".pdf", ".svg"):
        write_atomic(
            stem.with_name(stem.name + suffix),
            lambda part, suffix=suffix: style.save_figure(drawn, part, suffix),
        )
    write_atomic(stem.with_name(stem.name + ".csv"), points.to_csv(index=False))
    made = [stem.with_name(stem.name + suffix) for suffix in (".pdf", ".svg", ".csv")]
    provenance.write_record(
        stem.with_name(f"{stem.name}.{provenance.NAME}"),
        made,
        [*inputs, *([others.FILE] if published else [])],
    )


def summary(results: Path = Path("results"), width: int = 100) -> None:
    """Print the tables, two texts, and where figure, report and runs are.

    Args:
        results: the folder with tables, samples and figures
        width: of the texts, in characters
    """
    from halfstep.commands.track import how_to_look
    from halfstep.report import published, tables

    table = published.without(tables.read_csv(results / "tables" / "steps.csv"))
    print(tables.steps_markdown(table, ("generative_perplexity", "entropy")))
    for name in ("lambada", "speed"):
        print((results / "tables" / f"{name}.md").read_text())
    for teacher, mine in table[table["metric"] == "generative_perplexity"].groupby(
        "teacher", sort=False
    ):
        lines = verdicts(
            mine, table[(table["metric"] == "entropy") & (table["teacher"] == teacher)]
        )
        print(
            *lines, *own_steps(mine, results), *shares(table[table["teacher"] == teacher]), sep="\n"
        )
        diffusion = mine[~mine["run"].isin(tables.LEVELS)]
        few = diffusion["steps"].min()
        for row in (
            diffusion[diffusion["run"] == "teacher"].head(1),
            diffusion[diffusion["round"] == diffusion["round"].max()].head(1),
        ):
            for model in row["model"]:
                text = first_sample(results / "samples" / model / f"steps-{few}" / "samples.txt")
                if text:
                    print(f"\n{model}, {few} steps, first sample:")
                    print(
                        textwrap.indent(
                            "\n".join(
                                line
                                for part in text.splitlines()
                                for line in textwrap.wrap(part, width) or [""]
                            ),
                            "  ",
                        )
                    )
    print()
    for name, path in (
        ("figure", results / "figures" / "ppl_vs_steps.pdf"),
        ("report", results / "report.html"),
        ("tables", results / "tables"),
    ):
        if path.exists():
            print(f"{name}  {path}")
    if (results / "mlflow.db").exists():
        print(f"runs    {how_to_look(f'sqlite:///{results}/mlflow.db')}")


def verdicts(perplexity, entropy) -> list[str]:
    """For each run: the last round against the teacher at the fewest steps, with intervals, and the entropy beside it."""
    lines = []
    for few, teacher, run, last in _last_rounds(perplexity):
        text = f"{last['teacher']}, {few} steps: teacher {_span(teacher)}, {run} round {last['round']} {_span(last)}"
        text += (
            f" ({teacher['value'] / last['value']:.2g} times lower)"
            if last["high"] < teacher["low"]
            else " (no clear gain)"
        )
        mine = entropy[(entropy["model"] == last["model"]) & (entropy["steps"] == few)]
        if "vs_data_percent" in mine and mine["vs_data_percent"].notna().any():
            text += f"; entropy {mine['vs_data_percent'].iloc[0]:+.1f}% against held-out text"
        lines.append(text)
    return lines


def own_steps(perplexity, results: Path) -> list[str]:
    """For each run: every round against its own teacher at the step count that the round was made for, where both were sampled there."""
    rows = _first_protocol(perplexity)
    at = {(row["model"], row["steps"]): row for _, row in rows.iterrows()}
    lines = []
    for (base, run), group in rows[rows["round"] > 0].groupby(["teacher", "run"], sort=False):
        found = []
        for model, round_ in (
            group.drop_duplicates("model").sort_values("round")[["model", "round"]].values
        ):
            made_for = read_json(results / "models" / model / "meta.json").get("student_steps")
            before = f"{base}/{run}/round-{round_ - 1}" if round_ > 1 else f"{base}/teacher"
            teacher, student = at.get((before, made_for)), at.get((model, made_for))
            if teacher is not None and student is not None:
                word = (
                    "worse"
                    if student["low"] > teacher["high"]
                    else "better"
                    if student["high"] < teacher["low"]
                    else "intervals overlap"
                )
                found.append(f"{made_for}: {_span(teacher)} -> {_span(student)} ({word})")
        if found:
            lines.append(
                f"{base}, {run}: every round at its own step count, its teacher -> the round:"
                + "".join(f"\n  {line}" for line in found)
            )
    return lines


def shares(table) -> list[str]:
    """The same of a corpus of stories: the share of whole stories that the grammar accepts, and of those in which all references agree too."""
    lines = []
    for metric, what in (
        ("accepted_share", "stories that the grammar accepts"),
        ("consistent_share", "consistent stories"),
    ):
        for few, teacher, run, last in _last_rounds(table[table["metric"] == metric]):
            clear = (
                "more"
                if last["low"] > teacher["high"]
                else "fewer"
                if last["high"] < teacher["low"]
                else "intervals overlap"
            )
            lines.append(
                f"{last['teacher']}, {few} steps, {what}: teacher {_span(teacher, 100)}, {run} round {last['round']} {_span(last, 100)} ({clear})"
            )
    return lines


def _last_rounds(rows):
    """(fewest steps, the teacher's row there, run, its last round's row there) of each run, by the first protocol and judge."""
    if rows.empty:
        return
    rows = _first_protocol(rows)
    few = rows.loc[rows["run"] == "teacher", "steps"].min()
    at = rows[rows["steps"] == few]
    for run, group in at[at["round"] > 0].groupby("run", sort=False):
        yield (
            few,
            at[at["run"] == "teacher"].iloc[0],
            run,
            group.loc[group["round"].astype(int).idxmax()],
        )


def _first_protocol(rows):
    """The rows of the first protocol and judge among them."""
    key = rows["protocol"] + " " + rows["judge"].astype(object).fillna("")
    return rows[key == key.iloc[0]]


def _span(row, unit: float = 1) -> str:
    """The value and its interval; with unit 100 in percent."""
    from halfstep.report.tables import number

    value, low, high = (
        number(unit * row[key]) + "%" * (unit == 100) for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def first_sample(file: Path, characters: int = 900) -> str | None:
    """The first text of samples.txt, where a line `=== i` (or `=== sample i`) stands before each."""
    if not file.exists():
        return None
    parts = re.split(r"^=== .*\n", file.read_text(), flags=re.MULTILINE)
    text = (parts[1] if len(parts) > 1 else parts[0]).strip()
    return text if len(text) <= characters else text[:characters].rsplit(" ", 1)[0] + " …"

"""`halfstep tabulate`, `plot` and `summary`: from metric rows to tables, from tables to figures, and the last page of `make demo`."""

from __future__ import annotations

import difflib
import re
import shlex
import textwrap
from collections.abc import Collection
from pathlib import Path

from halfstep.errors import HalfstepError
from halfstep.files import sha256, write_atomic, write_json
from halfstep.tracking import commit


def tabulate(table: str, metrics: list[Path], output: Path) -> None:
    """Gather metric rows into one table: {output}.csv (long, complete) and .md (to read).

    Args:
        table: steps, lambada or speed
        metrics: files of metric rows, or folders of such files
        output: path of the table; an ending .csv or .md is dropped
    """
    from halfstep.report.tables import TABLES, rows

    select, markdown = TABLES[known("table", table, TABLES)]
    chosen = select(rows(metrics))
    stem = output.with_suffix("") if output.suffix in (".csv", ".md") else output
    write_atomic(stem.with_name(stem.name + ".csv"), chosen.dropna(axis="columns", how="all").to_csv(index=False))
    write_atomic(stem.with_name(stem.name + ".md"), markdown(chosen) if len(chosen) else f"No rows of {table} yet.\n")


def known(flag: str, name: str, registry: Collection[str]) -> str:
    """`name`, or HalfstepError when the registry has no such entry."""
    if name not in registry:
        near = difflib.get_close_matches(name, registry, 1, 0.4)
        raise HalfstepError(f"--{flag} {name}: no such {flag}; known are {', '.join(registry)}" + (f"; did you mean {near[0]}?" if near else ""))
    return name


def plot(figure: str, tables: list[Path], output: Path) -> None:
    """Draw one figure as {output}.pdf and .svg, with its points in .csv and its origin in .json.

    Args:
        figure: ppl_vs_steps, entropy_vs_steps, ppl_vs_latency, lambada_vs_round, latency_vs_length or loss_curves
        tables: the .csv tables it needs (steps.csv, lambada.csv, speed.csv); for loss_curves folders that hold journals
        output: path of the figure; an ending .pdf, .svg, .csv or .json is dropped
    """
    import matplotlib

    from halfstep.report import style
    from halfstep.report.figures import FIGURES, journals
    from halfstep.report.tables import read_csv

    draw, needs = FIGURES[known("figure", figure, FIGURES)]
    given = {path.stem: path for path in tables if path.suffix == ".csv"}
    if missing := [name for name in needs if name not in given and name != "journals"]:
        raise HalfstepError(f"--tables: {figure} needs {', '.join(f'{name}.csv' for name in needs)}; found no {', '.join(f'{name}.csv' for name in missing)}")
    inputs = [given[name] for name in needs if name in given]
    frames = {name: read_csv(given[name]) for name in needs if name in given}
    if "journals" in needs:
        inputs = sorted(file for path in tables for file in ([path] if path.is_file() else path.rglob("journal.jsonl")))
        frames["journals"] = journals(tables)
    if empty := [name for name, frame in frames.items() if frame.empty]:
        raise HalfstepError(f"{figure}: no rows in {', '.join(empty)}; measure something first")
    drawn, points = draw(frames)
    stem = output.with_suffix("") if output.suffix in (".pdf", ".svg", ".csv", ".json") else output
    for suffix in (".pdf", ".svg"):
        write_atomic(stem.with_name(stem.name + suffix), lambda part, suffix=suffix: style.save(drawn, part, suffix))
    write_atomic(stem.with_name(stem.name + ".csv"), points.to_csv(index=False))
    origin = {
        "figure": figure, "drawn_by": f"halfstep.report.figures.{figure}", "commit": commit(), "matplotlib": matplotlib.__version__,
        "command": shlex.join(["halfstep", "plot", "--figure", figure, "--tables", *map(str, tables), "--output", str(output)]),
        "inputs": {str(path): sha256(path) for path in inputs},
    }  # fmt: skip
    write_json(stem.with_name(stem.name + ".json"), origin)


def summary(results: Path = Path("results"), width: int = 100) -> None:
    """Print the tables, two texts, and where figure, report and runs are.

    Args:
        results: the folder with tables, samples and figures
        width: of the texts, in characters
    """
    from halfstep.commands.track import how_to_look
    from halfstep.report import tables

    table = tables.read_csv(results / "tables" / "steps.csv")
    print(tables.steps_markdown(table, ("generative_perplexity", "entropy")))
    for name in ("lambada", "speed"):
        print((results / "tables" / f"{name}.md").read_text())
    for teacher, mine in table[table["metric"] == "generative_perplexity"].groupby("teacher", sort=False):
        for line in verdicts(mine, table[(table["metric"] == "entropy") & (table["teacher"] == teacher)]):
            print(line)
        diffusion = mine[~mine["run"].isin(tables.LEVELS)]
        few = diffusion["steps"].min()
        for row in (diffusion[diffusion["run"] == "teacher"].head(1), diffusion[diffusion["round"] == diffusion["round"].max()].head(1)):
            for model in row["model"]:
                text = first_sample(results / "samples" / model / f"steps-{few}" / "samples.txt")
                if text:
                    print(f"\n{model}, {few} steps, first sample:")
                    print(textwrap.indent("\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, width) or [""]), "  "))
    print()
    for name, path in (("figure", results / "figures" / "ppl_vs_steps.pdf"), ("report", results / "report.html"), ("tables", results / "tables")):
        if path.exists():
            print(f"{name}  {path}")
    if (results / "mlflow.db").exists():
        print(f"runs    {how_to_look(f'sqlite:///{results}/mlflow.db')}")


def verdicts(perplexity, entropy) -> list[str]:
    """For each run: the last round against the teacher at the fewest steps, with intervals, and the entropy beside it."""
    few, lines = perplexity.loc[perplexity["run"] == "teacher", "steps"].min(), []
    at = perplexity[perplexity["steps"] == few]
    teacher = at[at["run"] == "teacher"].iloc[0] if (at["run"] == "teacher").any() else None
    for run, group in at[at["round"] > 0].groupby("run", sort=False):
        last = group.loc[group["round"].astype(int).idxmax()]
        text = f"{last['teacher']}, {few} steps: teacher {_span(teacher)}, {run} round {last['round']} {_span(last)}"
        text += f" ({teacher['value'] / last['value']:.2g} times lower)" if last["high"] < teacher["low"] else " (no clear gain)"
        mine = entropy[(entropy["model"] == last["model"]) & (entropy["steps"] == few)]
        if "vs_data_percent" in mine and mine["vs_data_percent"].notna().any():
            text += f"; entropy {mine['vs_data_percent'].iloc[0]:+.1f}% against held-out text"
        lines.append(text)
    return lines


def _span(row) -> str:
    from halfstep.report.tables import number

    return f"{number(row['value'])} [{number(row['low'])}, {number(row['high'])}]"


def first_sample(file: Path, characters: int = 900) -> str | None:
    """The first text of samples.txt, where a line `=== i` (or `=== sample i`) stands before each."""
    if not file.exists():
        return None
    parts = re.split(r"^=== .*\n", file.read_text(), flags=re.MULTILINE)
    text = (parts[1] if len(parts) > 1 else parts[0]).strip()
    return text if len(text) <= characters else text[:characters].rsplit(" ", 1)[0] + " …"

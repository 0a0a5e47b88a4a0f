"""`halfstep start-page`: the page that opens first, and a page of texts; both need no network."""

from __future__ import annotations

import base64
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import AwareDatetime, BaseModel, Field

from halfstep.commands.report import median_text, median_texts, read_pooled, teacher_sentences
from halfstep.config import Word
from halfstep.errors import HalfstepError
from halfstep.files import MAKE_AGAIN, write_atomic
from halfstep.records import provenance
from halfstep.records.journal import read_run
from halfstep.report.catalogue import FIGURES, TABLES
from halfstep.resolve import check_fields
from halfstep.workflow.packaged import caller
from halfstep.workflow.prices import clock

if TYPE_CHECKING:
    from pandas import DataFrame

KEY_FIGURES = ("frontier", "ppl_vs_steps")  # the first one that is there is shown
METRICS = ("generative_perplexity", "entropy")  # of the table over steps, by their first protocol
READ = ("steps", "temperatures", "speed", "lambada")  # tables
MOST = 4  # sentences of a kind that are shown at once; more are a click away
TRAININGS = ("pretrain", "train-baseline", "distill-round", "import", "import-baseline")
PAGE = """
{%- macro lines(sentence) %}
{% set parts = sentence | split %}
<p>{{ parts[0] }}</p>
{% if parts[1:] %}<ul>{% for part in parts[1:] %}<li>{{ part }}</li>{% endfor %}</ul>{% endif %}
{% endmacro -%}
{%- macro some(sentences) %}
{% for sentence in sentences[:MOST] %}{{ lines(sentence) }}{% endfor %}
{% if sentences[MOST:] %}<details><summary>{{ sentences[MOST:] | length }} more</summary>
{% for sentence in sentences[MOST:] %}{{ lines(sentence) }}{% endfor %}</details>{% endif %}
{% endmacro -%}
<p class="soft">halfstep{% if preset %}, preset {{ preset }}{% endif %}</p>
<h1>{{ leads[0] if leads else "No model has been compared with its teacher yet" }}</h1>
{{ some(leads[1:]) }}
<p class="soft">Perplexity is measured by another model, lower is better. Entropy is variety, which
a model that repeats itself loses. A round halves the steps. Brackets and ± are 95% intervals.</p>
{% if figure %}
<h2>{{ figure.title[0] | upper }}{{ figure.title[1:] }}</h2>
<a class="wide" href="{{ figure.name }}"><img alt="{{ figure.title }}" src="{{ figure.data }}"></a>
<p class="soft">{{ figure.caption }}</p>
{% endif %}
{% if grids %}
{{ grids }}
{% for teacher in teachers %}
<details><summary>All comparisons of {{ teacher.name }}, as <code>halfstep summary</code> prints
them</summary>{% for sentence in teacher.sentences %}{{ lines(sentence) }}{% endfor %}</details>
{% endfor %}
{% endif %}
{% if has_texts %}
<h2>Texts</h2>
{% for teacher in teachers %}
<div class="texts">{% for title, text in teacher.texts %}
<figure><figcaption>{{ title }}</figcaption><p>{{ text }}</p></figure>
{% endfor %}</div>
{% endfor %}
<p><a href="texts.html">The median text of every model at every step count</a></p>
{% endif %}
{% if teachers | selectattr("speed") | list %}
<h2>Speed at equal quality</h2>
{% for teacher in teachers if teacher.speed %}
<p><strong>{{ teacher.name }}: {{ teacher.speed.summary }}</strong></p>
{{ some(teacher.speed.details) }}
{% endfor %}
{% endif %}
<h2>What was run</h2>
<dl>
{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}
</dl>
{% if costs %}
<div class="wide"><table><thead><tr>{% for name in costs[0] %}<th scope="col">{{ name }}</th>
{% endfor %}</tr></thead><tbody>{% for cells in costs[1:] %}
<tr>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody></table></div>
<p class="soft">Jobs run next to one another. One that was resumed counts with its last call.</p>
{% endif %}
{% if commands %}
<details><summary>The configuration of every model, as the command that made it</summary>
<ul>{% for command in commands %}<li><code>{{ command }}</code></li>{% endfor %}</ul></details>
{% endif %}
<h2>Files</h2>
<ul>{% for file in files %}
<li>{% for name, place in file.links %}<a href="{{ place | urlencode }}">{{ name }}</a>
{{- ", " if not loop.last }}{% endfor %}{{ file.about }}
{%- if file.command %}: <code>{{ file.command }}</code>{% endif %}</li>
{% endfor %}</ul>
{% if missing %}
<h2>Not here yet</h2>
<ul>{% for what, command in missing %}<li>{{ what }}: <code>{{ command }}</code></li>
{% endfor %}</ul>
{% endif %}
"""


class Linked(NamedTuple):
    """A line of the list of files: links as (name, path), what they are, and a command."""

    links: list[tuple[str, str]]
    about: str = ""
    command: str = ""


def start_page(results: Path = Path("results"), preset: Word | None = None) -> None:
    """Write {results}/index.html, the page to open first, and {results}/texts.html.

    The page shows what the tables say, the frontier, texts, what was run, and links to the other
    files. What is not there (yet) is left out, or named with the command that makes it.

    Args:
        results: the folder with tables, figures, samples and records
        preset: the preset that made it
    """
    import pandas

    from halfstep.report.markdown import steps_markdown
    from halfstep.report.pages import as_markup, fill, make_page, rows_markup
    from halfstep.report.sentences import leads_by_teacher

    if not results.is_dir():
        raise HalfstepError(
            f"--results {results}: no such folder; run snakemake, or name another --results"
        )
    tables = {name: read_pooled(_table(results, name)) for name in READ}
    steps = tables["steps"]
    shown = pandas.concat([_main_rows(steps, metric) for metric in METRICS])
    figure, source = _key_figure(results)
    jobs = _jobs(results)
    texts = _all_texts(steps, results)
    options = f" --config preset={preset}" if preset else ""
    body = fill(
        PAGE,
        MOST=MOST,
        has_texts=len(texts) > 0,
        preset=preset,
        leads=[*chain(*leads_by_teacher(steps, tables["temperatures"]).values())],
        figure=figure,
        grids=as_markup(steps_markdown(shown, METRICS)) if len(shown) else None,
        teachers=[_about_teacher(mine, tables, results) for mine in _by_teacher(shown)],
        facts=_facts(jobs, tables, results),
        costs=_costs(jobs),
        commands=_commands(jobs),
        files=_files(results, options),
        missing=_missing(tables, figure, options),
    )
    page, other = results / "index.html", results / "texts.html"
    write_atomic(page, make_page("halfstep: results", body))
    top = as_markup("# The median text of every model at every step count")
    below = rows_markup(texts) if len(texts) else as_markup("There are no texts yet.")
    write_atomic(other, make_page("halfstep: texts", top + below))
    inputs = [file for name in READ if (file := _table(results, name)).is_file()]
    record = results / f"index.{provenance.NAME}"
    provenance.write_record(record, [page, other], [*inputs, *source])


def _table(results: Path, name: str) -> Path:
    return results / "tables" / f"{name}.csv"


def _by_teacher(table: DataFrame) -> Iterable[DataFrame]:
    return (mine for _, mine in table.groupby("teacher", sort=False))


def _main_rows(steps: DataFrame, metric: str) -> DataFrame:
    """The rows of a metric by each teacher's first protocol and judge."""
    import pandas

    from halfstep.report.sentences import first_protocol

    rows = steps[steps["metric"] == metric]
    return pandas.concat([rows[:0], *map(first_protocol, _by_teacher(rows))])


def _same_teacher(table: DataFrame, rows: DataFrame) -> DataFrame:
    return table[table["teacher"] == rows["teacher"].iloc[0]]


def _about_teacher(steps: DataFrame, tables: dict[str, DataFrame], results: Path) -> dict[str, Any]:
    """What the page says of a teacher and its students. steps: its rows of that table."""
    from halfstep.report.equal_quality import speed_verdict
    from halfstep.report.sentences import headlines

    everything = _same_teacher(tables["steps"], steps)
    found = headlines(steps[steps["metric"] == "generative_perplexity"])
    speed = _same_teacher(tables["speed"], steps)
    frontier = _same_teacher(tables["temperatures"], steps)
    return {
        "name": steps["teacher"].iloc[0],
        "sentences": teacher_sentences(everything, results / "tables", results),
        "texts": median_texts(found[0], results) if found else [],
        "speed": speed_verdict(speed, steps, frontier) if len(speed) else None,
    }


def _key_figure(results: Path) -> tuple[dict[str, str] | None, list[Path]]:
    """The figure of the page, as an image within it, and its file; or None."""
    for name in KEY_FIGURES:
        file = results / "figures" / f"{name}.svg"
        if file.is_file():
            image = base64.b64encode(file.read_bytes()).decode()
            about = {
                "name": f"figures/{name}.svg",
                "title": FIGURES[name].title,
                "caption": FIGURES[name].caption.replace("``", ""),
                "data": f"data:image/svg+xml;base64,{image}",
            }
            return about, [file]
    return None, []


def _all_texts(steps: DataFrame, results: Path) -> DataFrame:
    """A row with the median text of each model and step count."""
    from halfstep.report.grids import value_cell

    rows = _main_rows(steps, "generative_perplexity")
    texts = [median_text(row, results) for _, row in rows.iterrows()]
    perplexity = [value_cell(row) for row in rows.itertuples()]
    table = rows[["model", "steps"]].assign(perplexity=perplexity, text=texts)
    return table.dropna(subset="text")


class _Job(BaseModel):
    """What the page shows of a record of provenance."""

    command: Annotated[list[str], Field(min_length=1)]
    started: AwareDatetime
    ended: AwareDatetime
    commit: str = ""
    versions: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The command of halfstep; of a call from Python, the program."""
        return self.command[:2][-1]

    @property
    def seconds(self) -> float:
        return (self.ended - self.started).total_seconds()


def _jobs(results: Path) -> list[_Job]:
    """The jobs of all records but the page's own, which would change it with each call."""
    if not any(results.rglob(f"*{provenance.NAME}")):
        return []
    found = provenance.merge_records(results)["records"]
    found.pop(f"index.{provenance.NAME}", None)
    for name, record in found.items():
        check_fields(record, _Job, results / name, MAKE_AGAIN)
    return sorted(map(_Job.model_validate, found.values()), key=lambda job: job.ended)


def _facts(jobs: list[_Job], tables: dict[str, DataFrame], results: Path) -> list[tuple[str, str]]:
    """Names and values: commit, machine, versions and time."""
    from halfstep.report.conditions import join_values

    runs = [read_run(file.parent) for file in sorted((results / "models").rglob("run.json"))]
    hosts = join_values(str(run["tags"]["host"]) for run in runs if "host" in run.get("tags", {}))
    devices = join_values(tables["speed"]["device"])
    versions = defaultdict(list)
    for job in jobs:
        for package, version in job.versions.items():
            if version != "unknown":
                versions[package].append(version)
    found = {
        "Commit": join_values(job.commit for job in jobs if job.commit),
        "Machine": "; ".join(filter(None, [hosts and f"host {hosts}", devices])),
        "Versions": ", ".join(f"{name} {join_values(mine)}" for name, mine in versions.items()),
    }
    if jobs:
        first, last = min(job.started for job in jobs), jobs[-1].ended
        found["Time"] = f"{first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M %Z}"
    return [(name, value) for name, value in found.items() if value]


def _costs(jobs: list[_Job]) -> list[list[str]]:
    """Jobs and their time by command, with a header and a last line for all; or nothing."""
    if not jobs:
        return []
    names = dict.fromkeys(job.name for job in jobs)
    parts = {name: [job for job in jobs if job.name == name] for name in names}
    lines = [
        [name, str(len(mine)), clock(sum(job.seconds for job in mine))]
        for name, mine in [*parts.items(), ("all", jobs)]
    ]
    return [["command", "jobs", "time, summed over jobs"], *lines]


def _commands(jobs: list[_Job]) -> list[str]:
    """The commands that made the models, in the order in which they ended."""
    return [shlex.join(job.command) for job in jobs if job.name in TRAININGS]


def _files(results: Path, options: str) -> list[Linked]:
    """The other files: those that are there, and those that a later command makes."""
    from halfstep.commands.track import how_to_look

    found = [
        Linked(
            [("report.html", "report.html")],
            ", Snakemake's report: the graph, every table, figure and text; made by",
            f"{caller()} --report results/report.html{options}",
        )
    ]
    tables, figures = (".html", ".md", ".csv"), (".svg", ".pdf", ".csv")
    for folder, rows, endings in (("tables", TABLES, tables), ("figures", FIGURES, figures)):
        for name, row in rows.items():
            paths = [f"{folder}/{name}{ending}" for ending in endings]
            links = [(path, path) for path in paths if (results / path).is_file()]
            if links:
                found.append(Linked(links, f": {row.title}"))
    if (results / "paper/report.html").is_file():
        about = ": published numbers next to ours"
        found.append(Linked([("paper/report.html", "paper/report.html")], about))
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results}/mlflow.db"
    look = how_to_look(store).splitlines()[0]
    return [
        *found,
        Linked(
            [(provenance.NAME, provenance.NAME)],
            ": the origin of every file; to check all of them",
            f"halfstep verify {shlex.quote(str(results))}",
        ),
        Linked([], "Curves of the trainings in MLflow", look),
    ]


def _missing(
    tables: dict[str, DataFrame], figure: dict[str, str] | None, options: str
) -> list[tuple[str, str]]:
    """What the page would show and cannot, each with the command that makes it."""
    found = []
    for name in ("steps", "temperatures", "speed"):
        if tables[name].empty:
            section = TABLES[name].section
            needs = f" (needs {section} in config.yaml)" if section else ""
            command = f"{caller()} results/tables/{name}.csv{options}"
            found.append((f"{TABLES[name].title}{needs}", command))
    if figure is None:
        name = KEY_FIGURES[-1]
        found.append((FIGURES[name].title, f"{caller()} results/figures/{name}.svg{options}"))
    return found

"""Hooks of mkdocs: pages that are made from the source at build time, and links out of docs/."""

import contextlib
import importlib
import inspect
import io
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from mkdocs.structure.files import File, Files

from halfstep.cli import load_command, parse_arguments
from halfstep.commands import COMMANDS
from halfstep.metrics.protocols import PROTOCOLS
from halfstep.report.catalogue import FIGURES, JOURNALS, TABLES
from halfstep.report.paper import ITEMS
from halfstep.resolve import schema

ROOT = Path(__file__).parents[1]
PAGES_OF_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
MADE_FROM = {  # a link names the source, which a clone has; on the site it opens the page
    "config.yaml": "reference/configuration.md",
    "src/halfstep/commands/__init__.py": "reference/commands.md",
    "src/halfstep/metrics/protocols.py": "reference/metrics.md",
    "src/halfstep/report/catalogue.py": "reference/figures.md",
}
LARGE = 1_000_000_000  # a bound that no reader wants to know
COLUMNS = 80  # of the help of a command
NOTEBOOK = "notebooks/denoising.ipynb"
LOSSES = "--config preset=laptop-losses -- "
MORE = {  # figures whose picture is not of `make demo`, and the options of the run that made it
    "ppl_by_variant": "--configfile docs/results/released-noise.yaml -- ",
    "decoders": "--configfile docs/results/three-seeds.yaml -- ",
    "task_accuracy_vs_steps": "--configfile docs/results/written-answers.yaml -- ",
    "accuracy_vs_parallelism": "--configfile docs/results/three-seeds.yaml -- ",
    "mauve_vs_steps": LOSSES,
    "mauve_by_round": LOSSES,
    "continuation_ppl_vs_steps": LOSSES,
    "quality_vs_self_bleu": LOSSES,
    "ppl_by_size": "--config preset=sdtt-scaling -- ",
    "lambada_by_size": "--config preset=sdtt-scaling -- ",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages, and those at the root of the repository."""
    made = {
        "reference/configuration.md": configuration_page(),
        "reference/commands.md": commands_page(),
        "reference/metrics.md": metrics_page(),
        "reference/figures.md": figures_page(),
        "reference/presets.md": presets_page(),
        NOTEBOOK.replace(".ipynb", ".md"): notebook_page(ROOT / "docs" / NOTEBOOK),
    }
    for name in PAGES_OF_ROOT:
        text = (ROOT / name).read_text().replace("](docs/", "](../")
        made[f"project/{name.lower()}"] = text
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite what GitHub shows and mkdocs does not: words after a fence, links out of docs/."""
    markdown = re.sub(r"^```diff (\S+)$", r'```diff title="\1"', markdown, flags=re.MULTILINE)
    markdown = re.sub(r"^```sh (test|plan)$", "```sh", markdown, flags=re.MULTILINE)
    if page.file.src_uri == "results/gallery.md":
        markdown = gallery(markdown)
    markdown = markdown.replace("denoising.ipynb)", "denoising.md)")
    depth = page.file.src_uri.count("/")
    out = "../" * (depth + 1)
    pages = MADE_FROM | {name: f"project/{name.lower()}" for name in PAGES_OF_ROOT}
    for name, inside in pages.items():
        markdown = markdown.replace(f"]({out}{name}", f"]({'../' * depth}{inside}")
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Put our diagrams into the page, so that they take its colors."""

    def inline(image: re.Match) -> str:
        drawing = (ROOT / "docs" / "diagrams" / image[2]).read_text()
        return drawing.replace("<svg ", f'<svg role="img" aria-label="{image[1]}" ', 1)

    return re.sub(r'<img alt="([^"]*)" src="[^"]*diagrams/([\w-]+\.svg)" ?/?>', inline, html)


def configuration_page() -> str:
    """Every key of config.yaml, from the JSON schema that editors use."""
    tree = schema()
    lines = [
        "# Configuration",
        "",
        "Every key of `config.yaml`, from the JSON schema in `workflow/schemas`. `config.yaml` "
        "itself lists the keys as comments, in the form in which you write them. `<name>` is a "
        "name of your choice. A preset overrides these defaults, and `config.yaml` overrides the "
        "preset.",
        "",
    ]
    seen: set[str] = set()

    def section(path: str, model: dict) -> None:
        lines.extend([f"## `{path}`" if path else "## Top level", "", model["description"], ""])
        title, nested = model["title"], []
        if title in seen:
            lines.extend([f"The keys are those of the section that describes `{title}`.", ""])
            return
        seen.add(title)
        lines.extend(["| key | meaning | default | values |", "|---|---|---|---|"])
        for key, about in model["properties"].items():
            if about.get("deprecated"):
                continue
            below, repeated = model_of(about, tree)
            full = f"{path}.{key}" if path else key
            if below:
                nested.append((f"{full}.<name>" if repeated else full, below))
            kind = f"section{'s' * repeated}" if below else values_of(about)
            default = "" if below or "default" not in about else f"`{json.dumps(about['default'])}`"
            meaning = about.get("description") or (below or {}).get("description", "")
            lines.append(f"| `{key}` | {cell(meaning)} | {default} | {kind} |")
        lines.append("")
        for place, below in nested:
            section(place, below)

    section("", tree)
    return "\n".join(lines)


def model_of(about: dict, tree: dict) -> tuple[dict | None, bool]:
    """The section that a key holds, if it does, and whether it holds several by name."""
    repeated = "patternProperties" in about
    found = [*about.get("patternProperties", {}).values(), about, *about.get("anyOf", [])]
    names = [part["$ref"].split("/")[-1] for part in found if "$ref" in part]
    return (tree["$defs"][names[0]] if names else None), repeated


def values_of(about: dict) -> str:
    """The values that a key takes, in words."""
    if "enum" in about or "const" in about:
        return ", ".join(f"`{json.dumps(v)}`" for v in about.get("enum", [about.get("const")]))
    if "anyOf" in about:
        return " or ".join(dict.fromkeys(values_of(part) for part in about["anyOf"]))
    if about.get("type") == "array":
        return f"list of {values_of(about['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {about[name]:,}" for name, sign in bounds.items() if about.get(name, LARGE) < LARGE
    ]
    kind = about.get("type", "anything")
    words = {"integer": "whole number", "string": "text", "boolean": "`true`, `false`"}
    return " ".join([words.get(kind, kind), *limits])


def cell(text: str) -> str:
    """A text in a cell of a Markdown table: one line, nothing read as HTML or as a column."""
    text = " ".join(text.replace("``", "`").split())
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def commands_page() -> str:
    """The help of every command, from its parser."""
    lines = [
        "# Command line",
        "",
        "The help of each command, as `halfstep <command> --help` prints it. A rule of the graph "
        "calls one command, and `snakemake -np` prints the calls with all their flags.",
        "",
        "| command | what it does |",
        "|---|---|",
        *(f"| [`{name}`](#{name}) | {what} |" for name, (_, what) in COMMANDS.items()),
        "",
    ]
    os.environ["COLUMNS"] = str(COLUMNS)
    for name, (_, what) in COMMANDS.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            parse_arguments(load_command(name), name, ["--help"])
        text = re.sub(r"[╭╰│]|[─-]{9,}|[╮╯]", "", printed.getvalue())
        text = "\n".join(textwrap.fill(line, COLUMNS) for line in text.splitlines())
        text = re.sub(r"\n{3,}", "\n\n", text)
        what = what[0].upper() + what[1:]
        lines += [f"## {name}", "", f"{what}.", "", f"```text\n{text}\n```", ""]
    return "\n".join(lines)


def metrics_page() -> str:
    """The protocols of every metric with their versions, and what the module says of them."""
    module = importlib.import_module("halfstep.metrics.protocols")
    title, why, _ = inspect.getdoc(module).split("\n\n", 2)
    titles = {
        metric: (cell(text), f"[`{name}`](figures.md#{name})")
        for name, table in reversed(TABLES.items())
        for metric, text in table.metrics.items()
    }
    lines = [
        "# Metrics and protocols",
        "",
        title,
        "",
        why.replace("\n", " "),
        "",
        "| metric | what it is | table | protocols (version) |",
        "|---|---|---|---|",
    ]
    for metric, versions in PROTOCOLS.items():
        protocols = ", ".join(f"`{name}` ({version})" for name, version in versions.items())
        text, table = titles[metric]
        lines.append(f"| `{metric}` | {text} | {table} | {protocols} |")
    lines += ["", "## Definitions", "", "From the docstrings of these modules.", ""]
    names = "perplexity diversity mauve lambada elbo tasks answers frontier"
    for name in names.split():
        path = f"halfstep.metrics.{name}"
        lines += [f"### {path}", "", *quoted(importlib.import_module(path)), ""]
    return "\n".join(lines)


def quoted(module: Any) -> list[str]:
    """The docstring of a module as lines of text, as it stands in the source."""
    return ["```text", inspect.getdoc(module), "```"]


def figures_page() -> str:
    """Every table and figure of the catalogue with its caption and its command."""
    lines = [
        "# Tables and figures",
        "",
        "From the catalogue (`src/halfstep/report/catalogue.py`). `snakemake` makes all that your "
        "configuration asks for. Each of them can be made alone, with whatever it needs.",
        "",
        "## Tables",
        "",
    ]
    for name, table in TABLES.items():
        lines += [f"### {name}", "", cell(table.caption), ""]
        if table.section:
            lines += [f"It exists where the configuration has `{table.section}`.", ""]
        lines += [f"- `{metric}`: {cell(text)}" for metric, text in table.metrics.items()]
        lines += ["", "```sh", f"snakemake results/tables/{name}.md", "```", ""]
    lines += ["## Figures", ""]
    for name, figure in FIGURES.items():
        lines += [f"### {name}", "", *about_figure(name, figure)]
    return "\n".join(lines)


def about_figure(name: str, figure: Any) -> list[str]:
    """Caption, needs and command of a figure."""
    needs = " and ".join("the journals" if n == JOURNALS else f"`{n}`" for n in figure.needs)
    lines = [cell(figure.caption), "", f"Drawn from {needs}."]
    target = f"figures/{name}"
    if figure.only_in_paper:
        lines.append("Only [figures of the paper](../paper.md) show it; this is one of them.")
        target = "paper/" + next(name_ for name_, item in ITEMS.items() if item.shows == name)
    command = f"snakemake {MORE.get(name, '')}results/{target}.svg"
    return [*lines, "", "```sh", command, "```", ""]


def presets_page() -> str:
    """The comment at the top of every preset, and its text."""
    lines = [
        "# Presets",
        "",
        "`preset:` in `config.yaml`, or `--config preset=<name>`, chooses one of these files of "
        "`workflow/presets`. The sources of values that the paper or its code gives are in the "
        "comments.",
        "",
    ]
    for file in sorted((ROOT / "workflow" / "presets").glob("*.yaml")):
        _, *rows = file.read_text().splitlines()
        comment = [row[2:] for row in rows[: [r[:1] == "#" for r in rows].index(False)]]
        keys = ", ".join(f"`{key}`" for key in yaml.safe_load(file.read_text()))
        lines += [f"## {file.stem}", "", cell(" ".join(comment)), "", f"It sets {keys}.", ""]
        body = "\n".join(rows[len(comment) :])
        block = ["```yaml", *body.splitlines(), "```"]
        lines += ['??? note "The file"', "", *("    " + line for line in block), ""]
    return "\n".join(lines)


def gallery(page: str) -> str:
    """The gallery, with the caption of each figure and the command that makes it."""
    head, *sections = re.split(r"(?m)^(?=## )", page)
    for section in sections:
        name = section.split()[1]
        head += "\n".join([section.rstrip(), "", *about_figure(name, FIGURES[name]), ""])
    return head


def notebook_page(path: Path) -> str:
    """A notebook as a page: its text, its code, and the text and pictures that it printed."""
    lines = []
    for block in json.loads(path.read_text())["cells"]:
        source = "".join(block["source"])
        if block["cell_type"] == "markdown":
            lines += [source, ""]
            continue
        lines += ["```python", source, "```", ""]
        for output in block["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).strip()
                lines += [f"![what the cell above draws](data:image/png;base64,{picture})", ""]
            elif output.get("name") != "stderr":
                text = "".join(output.get("text") or data.get("text/plain", ""))
                lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines)

"""Pages of HTML that need no network: sortable tables, light and dark, every text escaped.

Texts of models, names and paths enter a page through jinja2, which escapes them, or through
`as_markup`, whose Markdown knows no HTML, links or images. Secrets are masked. The page's security
policy forbids a browser to load anything, and to run any script but SORT.
"""

from __future__ import annotations

import hashlib
import math
from base64 import b64encode
from functools import cache
from typing import Any

import pandas
from jinja2 import Environment, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup
from pandas import DataFrame

from halfstep.report.grids import round_number
from halfstep.sanitize import escape_controls, mask_secrets

FOREIGN = ("autolink", "html_inline", "html_block", "image", "link", "reference")
"""Rules of Markdown that a page must not know, because names and texts come from anywhere."""

STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #5a6372; --line: #dfe3ea;
  --back: #fff; --card: #f5f7fa; --mark: #1f5fae }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ec; --soft: #a1a9b6; --line: #343b47; --back: #14171c; --card: #1e232b;
    --mark: #84b6f4 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 3rem;
  background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: clamp(1.3rem, 3vw, 1.75rem); line-height: 1.35; margin: .3rem 0 1rem;
  text-wrap: pretty }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .8rem; padding-top: 1rem;
  border-top: 1px solid var(--line) }
h3, h4 { font-size: 1rem; margin: 1.4rem 0 .5rem }
p, ul { margin: .5rem 0; max-width: 68rem }
li { margin: .2rem 0 }
a, summary { color: var(--mark) }
summary { cursor: pointer; margin: .6rem 0 }
code { font: .875em ui-monospace, monospace; background: var(--card); padding: .1em .3em;
  border-radius: 3px }
.soft { color: var(--soft); font-size: .875rem }
.wide { display: block; overflow-x: auto; margin: .6rem 0 }
.wide img { display: block; min-width: 34rem; max-width: 100% }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .8rem .35rem 0; text-align: left;
  vertical-align: top }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back) }
td { white-space: nowrap }
td.text { white-space: pre-wrap; min-width: 22rem }
thead th { cursor: pointer; color: var(--soft); font-weight: 600 }
thead th[aria-sort]::after { content: " \\2191" }
thead th[aria-sort=descending]::after { content: " \\2193" }
.texts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; margin: .8rem 0 }
figure { margin: 0; padding: .9rem 1rem; background: var(--card); border-radius: 6px }
figure p { white-space: pre-wrap; font-family: ui-serif, Georgia, serif }
figcaption { font-weight: 600; font-size: .875rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem }
dt { color: var(--soft) }
dd { margin: 0 }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr }
  dd { margin-bottom: .4rem }
  th:first-child, td:first-child { min-width: 7rem; max-width: 9rem; white-space: normal;
    overflow-wrap: break-word }
}
"""

SORT = """
const number = text => /^-?[\\d.]/.test(text) ? parseFloat(text.replaceAll(",", "")) : NaN;
function sort(head) {
  const body = head.closest("table").tBodies[0], column = head.cellIndex;
  const sign = head.ariaSort === "ascending" ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.ariaSort = sign > 0 ? "ascending" : "descending";
  const rows = [...body.rows].map(row => ({ row, text: row.cells[column].textContent.trim() }));
  rows.sort((a, b) => !a.text - !b.text || sign * (number(a.text) - number(b.text)
    || a.text.localeCompare(b.text, "en", { numeric: true })));
  body.append(...rows.map(({ row }) => row));
}
for (const head of document.querySelectorAll("thead th")) {
  head.tabIndex = 0;
  head.title = "sort";
  head.onclick = () => sort(head);
  head.onkeydown = event => { if (event.key === "Enter") sort(head); };
}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style></head>
<body>
{{ body }}
<script>{{ script }}</script>
</body></html>
"""

ROWS = """
{%- if same %}<p class="soft">The same in all rows:
{%- for name, value in same %} {{ name }} {{ value }}{{ ";" if not loop.last else "." }}
{%- endfor %}</p>{% endif %}
<div class="wide"><table><thead><tr>
{%- for name in names %}<th scope="col">{{ name }}</th>{% endfor -%}
</tr></thead><tbody>
{%- for cells in rows %}
<tr>{% for name, cell in cells %}<td{% if name == "text" %} class="text"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}
</tbody></table></div>
"""


def make_page(title: str, body: Markup) -> str:
    """A whole page: the body with the style, the script that sorts tables, and the policy."""
    digest = b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    about = {"style": Markup(STYLE), "script": Markup(SORT), "policy": Markup(policy)}
    return str(fill(PAGE, title=title, body=body, **about)) + "\n"


def fill(template: str, **values: Any) -> Markup:
    """A template with these values: a text is masked and escaped, Markup stays as it is."""
    return Markup(_environment().from_string(template).render(values))


@cache
def _environment() -> Environment:
    environment = Environment(
        autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["split"] = lambda sentence: sentence.split("\n  ")
    return environment


def _shown(value: object) -> object:
    if isinstance(value, Markup):
        return value
    return escape_controls(mask_secrets(str(value)))


def as_markup(markdown: str) -> Markup:
    """Markdown of markdown.py as HTML, with tables that scroll in a narrow window."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable(list(FOREIGN))
    html = reader.render(escape_controls(mask_secrets(markdown)))
    html = html.replace("<table>", '<div class="wide"><table>')
    return Markup(html.replace("</table>", "</table></div>"))


def rows_markup(table: DataFrame) -> Markup:
    """All rows of a table as HTML; columns with one value for all rows are named above it."""
    table = table.dropna(axis="columns", how="all")
    distinct = table.nunique(dropna=False)
    same = [name for name in table if distinct[name] == 1 and len(table) > 1]
    names = [name for name in table if name not in same]
    rows = [
        [(name, _cell(value)) for name, value in zip(names, values, strict=True)]
        for values in table[names].itertuples(index=False)
    ]
    shared = [(name, _cell(table[name].iloc[0])) for name in same]
    return fill(ROWS, same=shared, names=names, rows=rows)


def _cell(value: Any) -> str:
    """A value of a table as text: floats with four digits, and nothing for what is missing."""
    if pandas.isna(value):
        return ""
    if isinstance(value, float) and not value.is_integer() and math.isfinite(value):
        return round_number(value, 4)
    return f"{value:g}" if isinstance(value, float) else str(value)

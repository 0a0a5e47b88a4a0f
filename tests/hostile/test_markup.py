"""Markup in names and in texts of models: a page of HTML shows it, and nothing more."""

from dataclasses import dataclass

import pandas
import pytest
from reading import Reading

from halfstep.report.pages import as_markup, fill, make_page, rows_markup


@dataclass(frozen=True)
class Text:
    """A text that would become markup, or that would load something."""

    name: str
    text: str
    kind: str = "markup in a page"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


CASES = [
    Text("a script", "<script>alert(1)</script>"),
    Text("an attribute that ends", "\"'><img src=x onerror=alert(1)>"),
    Text("tags that end", "</td></table></p></style></script><svg onload=alert(1)>"),
    Text("an image in Markdown", "![a](http://evil.example/x.png)"),
    Text("links in Markdown", "[a](javascript:alert(1)) <http://evil.example>"),
    Text("a reference in Markdown", "[a]: http://evil.example\n\n[a]"),
    Text("an expression of a template", "{{ 7 * 7 }}{% raw %}"),
    Text("an escaped script", "&lt;script&gt;"),
]
OF_MARKDOWN = "html head meta title style body h2 p div table thead tbody tr th td script em strong"


def read(tmp_path, body):
    (tmp_path / "page.html").write_text(make_page("a", body))
    return Reading(tmp_path / "page.html")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_text_is_shown_as_it_is(tmp_path, case):
    page = read(tmp_path, fill("<p title='{{ text }}'>{{ text }}</p>", text=case.text))
    assert [tag for tag, _ in page.tags[-2:]] == ["p", "script"]
    assert page.tags[-2][1] == {"title": case.text} and case.text in page.text


@pytest.mark.parametrize("case", CASES, ids=str)
def test_markdown_loads_and_links_nothing(tmp_path, case):
    """Names of models stand in headings, in sentences and in cells."""
    text = case.text
    page = read(tmp_path, as_markup(f"## {text}\n\n{text}\n\n| a |\n|---|\n| {text} |\n"))
    assert page.addresses() == []
    tags = [tag for tag, _ in page.tags]
    assert set(tags) <= {*OF_MARKDOWN.split()} and tags.count("script") == 1
    assert not any(key.startswith("on") for _, words in page.tags for key in words)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_rows_of_a_table_are_shown_as_they_are(tmp_path, case):
    columns = {"model": [case.text, "b"], "value": [1.23456, 1234.5], "data": [case.text] * 2}
    page = read(tmp_path, rows_markup(pandas.DataFrame(columns)))
    assert page.tables == [[["model", "value"], [case.text, "1.235"], ["b", "1,234"]]]
    assert f"data {case.text}." in page.text  # the same in all rows

"""Pages of HTML: nothing that they are given becomes markup, and nothing is loaded."""

import hashlib
import json
import re
import shutil
import subprocess
from base64 import b64encode

import pandas
import pytest
from reading import Reading

from halfstep.report.pages import SORT, as_markup, fill, make_page, rows_markup

BAD = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></table></style><svg onload=alert(1)>",
    "![a](http://evil.example/x.png)",
    "[a](javascript:alert(1)) <http://evil.example>",
    "[a]: http://evil.example\n\n[a]",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;script&gt;",
]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def read(tmp_path, body):
    (tmp_path / "page.html").write_text(make_page("a", body))
    return Reading(tmp_path / "page.html")


@pytest.mark.parametrize("text", BAD)
def test_a_text_is_shown_as_it_is(tmp_path, text):
    page = read(tmp_path, fill("<p title='{{ text }}'>{{ text }}</p>", text=text))
    assert [tag for tag, _ in page.tags[-2:]] == ["p", "script"]
    assert page.tags[-2][1] == {"title": text} and text in page.text


@pytest.mark.parametrize("text", BAD)
def test_markdown_loads_and_links_nothing(tmp_path, text):
    page = read(tmp_path, as_markup(f"## {text}\n\n{text}\n\n| a |\n|---|\n| {text} |\n"))
    assert page.addresses() == []
    allowed = "html head meta title style body h2 p div table thead tbody tr th td script em strong"
    assert {tag for tag, _ in page.tags} <= {*allowed.split()}
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any(key.startswith("on") for _, words in page.tags for key in words)


@pytest.mark.parametrize("text", BAD)
def test_all_rows_of_a_table_are_shown_as_they_are(tmp_path, text):
    frame = pandas.DataFrame({"model": [text, "b"], "value": [1.23456, 1234.5], "data": [text] * 2})
    page = read(tmp_path, rows_markup(frame))
    assert page.tables == [[["model", "value"], [text, "1.235"], ["b", "1,234"]]]
    assert f"data {text}." in page.text  # the same in all rows


def test_a_column_that_is_missing_in_some_rows_stays():
    frame = pandas.DataFrame({"model": ["a", "b"], "steps": [None, 8.0], "none": [None, None]})
    markup = rows_markup(frame)
    assert "<td></td>" in markup and "<td>8</td>" in markup and "none" not in markup


def test_secrets_and_control_characters_do_not_enter_a_page(tmp_path):
    text = "http://me:s3cr3t@host \x1b[31m\u202e"
    for body in (fill("{{ text }}", text=text), as_markup(text)):
        page = read(tmp_path, body)
        assert r"http://***@host \x1b[31m\u202e" in page.text and "s3cr3t" not in page.text


def test_the_policy_allows_the_one_script_and_no_address():
    page = make_page("a", fill("<p></p>"))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    digest = b64encode(hashlib.sha256(SORT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert f"<script>{SORT}</script>" in page and page.count("<script") == 1
    assert (
        "http:" not in page
        and "https:" not in page
        and "url(" not in page
        and "@import" not in page
    )


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_a_click_sorts_numbers_as_numbers_and_empty_cells_last(tmp_path):
    cells = ["12.5 ±0.3", "2.30 ±0.1", "", "1,800", "-4", "round 10", "round 9"]
    frame = pandas.DataFrame({"model": list("abcdefg"), "value": cells})
    click = """
    const found = [], head = document.querySelectorAll("thead th")[1];
    for (let i = 0; i < 2; i++) {
      head.click();
      const rows = [...document.querySelectorAll("tbody tr")];
      found.push(rows.map(row => row.cells[1].textContent));
    }
    document.title = JSON.stringify(found);"""
    text = make_page("a", rows_markup(frame))
    text = re.sub("<meta http-equiv[^>]*>", "", text)  # the policy would stop the script of a test
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}/browser", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    up, down = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert up == ["-4", "2.30 ±0.1", "12.5 ±0.3", "1,800", "round 9", "round 10", ""]
    assert down == [*up[-2::-1], ""]

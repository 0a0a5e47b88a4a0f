"""Pages of HTML: they load nothing, hide secrets, and sort their tables."""

import hashlib
import json
import re
import shutil
import subprocess
from base64 import b64encode

import pandas
import pytest

from halfstep.report.pages import SORT, as_markup, fill, make_page, rows_markup

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def test_a_column_that_is_missing_in_some_rows_stays():
    frame = pandas.DataFrame({"model": ["a", "b"], "steps": [None, 8.0], "none": [None, None]})
    markup = rows_markup(frame)
    assert "<td></td>" in markup and "<td>8</td>" in markup and "none" not in markup


def test_secrets_and_control_characters_do_not_enter_a_page():
    text = "http://me:s3cr3t@host \x1b[31m\u202e"
    for body in (fill("{{ text }}", text=text), as_markup(text)):
        assert r"http://***@host \x1b[31m\u202e" in body and "s3cr3t" not in body


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


def seen(file, text):
    """The page as a browser leaves it after its scripts."""
    file.write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={file.parent}/browser", f"file://{file}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs a browser")
def test_the_policy_runs_the_script_of_the_page_and_no_other(tmp_path):
    """The script makes every header of a table reachable with the keyboard."""
    page = make_page("a", rows_markup(pandas.DataFrame({"model": ["a", "b"]})))
    other = "<script>document.title = 'run'</script></body>"
    found = seen(tmp_path / "page.html", page.replace("</body>", other))
    assert '<th scope="col" tabindex="0"' in found and "<title>a</title>" in found


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
    text = make_page("a", rows_markup(frame)).replace("</body>", f"<script>{click}</script></body>")
    text = re.sub("<meta http-equiv[^>]*>", "", text)  # the policy would stop the script of a test
    found = seen(tmp_path / "page.html", text)
    up, down = json.loads(re.search("<title>(.*)</title>", found)[1])
    assert up == ["-4", "2.30 ±0.1", "12.5 ±0.3", "1,800", "round 9", "round 10", ""]
    assert down == [*up[-2::-1], ""]

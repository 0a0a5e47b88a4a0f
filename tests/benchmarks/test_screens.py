"""`python benchmarks/screens.py`: pictures of the pages of a results folder."""

import shutil
import subprocess
import sys

import pytest
from dryrun import REPOSITORY
from PIL import Image

SCRIPT = REPOSITORY / "benchmarks/screens.py"
PAGE = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
* { margin: 0 }
body { background: #ffffff }
div { height: 700px; background: #0000ff }
@media (max-width: 400px) { div { height: 1000px; background: #ff0000 } }
</style><div></div>
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium, to take pictures")
@pytest.mark.parametrize("width, color, height", [(1280, "blue", 700), (390, "red", 1000)])
def test_a_page_has_the_width_of_the_picture(tmp_path, width, color, height):
    """Also one that is narrower than any window of Chromium; its empty end is cut."""
    (tmp_path / "page.html").write_text(PAGE)
    code = "import sys; from pathlib import Path; from screens import take;"
    code += f"take(sys.argv[1], Path(sys.argv[2]), {width}, 1500, shortens=True)"
    call = [sys.executable, "-c", code, (tmp_path / "page.html").as_uri(), tmp_path / "page.png"]
    subprocess.run(call, cwd=SCRIPT.parent, check=True, timeout=300)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (width, height + 24)
        colors = {color for _, color in picture.convert("RGB").getcolors()}
    assert colors == {{"blue": (0, 0, 255), "red": (255, 0, 0)}[color], (255, 255, 255)}


def test_a_folder_without_pages_is_a_sentence(tmp_path):
    call = [sys.executable, SCRIPT, tmp_path, tmp_path]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert ran.stderr == f"screens.py: {tmp_path} has no index.html; `snakemake` makes it\n"

"""Pictures of the pages of a finished results folder, as docs/results keeps them; needs Chromium.

    python benchmarks/screens.py results docs/results

start-page-wide.png and start-page-narrow.png: results/index.html at two widths. mlflow-runs.png and
mlflow-compare.png: the runs in MLflow, and the loss curves at which `halfstep ui` opens.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

WIDE, NARROW = 1280, 390  # pixels: a laptop, a phone
MLFLOW = (1900, 1000)  # with room for its assistant, which is open at first
NAMES = ("chromium", "google-chrome", "chrome")
FRAME = '<style>* {{margin: 0; border: 0}}</style><iframe src="{}" width={} height={}></iframe>'


def take(page: str, target: Path, width: int, height: int, shortens: bool = False) -> None:
    """A picture of a page, without the empty end of the page if it `shortens`."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        raise SystemExit(f"screens.py: none of {', '.join(NAMES)} is installed; install one")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        if width < 500:  # Chromium has no smaller window
            frame = Path(folder) / "frame.html"
            frame.write_text(FRAME.format(page, width, height))
            page = frame.as_uri()
        call = [program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        call += [f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500)},{height}"]
        call += ["--virtual-time-budget=60000", f"--screenshot={folder}/page.png", page]
        subprocess.run(call, check=True, capture_output=True, timeout=600)
        with Image.open(f"{folder}/page.png") as image:
            picture = image.convert("RGB").crop((0, 0, width, height))
    if shortens:
        empty = Image.new("RGB", picture.size, picture.getpixel((0, height - 1)))
        _, _, _, end = ImageChops.difference(picture, empty).getbbox()
        picture = picture.crop((0, 0, width, min(height, end + 24)))
    picture.quantize(256).save(target, optimize=True)


def screens(results: Path, target: Path) -> None:
    """Take all pictures; `results` must hold index.html and mlflow.db."""
    if not (results / "index.html").exists():
        raise SystemExit(f"screens.py: {results} has no index.html; `snakemake` makes it")
    start = (results / "index.html").resolve().as_uri()
    take(start, target / "start-page-wide.png", WIDE, 6000, shortens=True)
    take(start, target / "start-page-narrow.png", NARROW, 9000, shortens=True)
    call = [sys.executable, "-m", "halfstep.cli", "ui", "--no-browser", "--results", str(results)]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as pages:
        try:
            shown = {}
            for line in pages.stdout:
                name, _, page = line.strip().partition(": ")
                shown[name.partition(" ")[0]] = page
                if line.startswith("Ctrl-C"):
                    break
            curves = shown.get("loss") or sys.exit(f"screens.py: halfstep ui printed {shown}")
            all_runs = curves.partition("?")[0] + "?workflowType=machine_learning"
            take(all_runs, target / "mlflow-runs.png", *MLFLOW)
            take(curves, target / "mlflow-compare.png", *MLFLOW)
        finally:
            pages.terminate()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    screens(given.results, given.target)

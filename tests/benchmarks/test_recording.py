"""`python benchmarks/recording.py`: a command on a terminal, recorded and drawn as an SVG."""

import json
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from dryrun import REPOSITORY

SCRIPT = REPOSITORY / "benchmarks/recording.py"
SVG = "{http://www.w3.org/2000/svg}"
WRITES = r"""
import sys, time
print("a first line of more than twenty columns")
again = "\r\x1b[2K\x1b[1A\x1b[2K\x1b[1mone\x1b[0m\r\n\x1b[38;2;1;2;3mthree\x1b[0m"
for text in ("one\r\ntwo", again):
    sys.stdout.write(text); sys.stdout.flush(); time.sleep(0.2)
print()
sys.exit(3)
"""


def call(*arguments, code=0):
    ran = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


class Picture:
    """A drawn recording: its lines, and when each is seen."""

    def __init__(self, path):
        root = ElementTree.parse(path).getroot()
        style = root.find(f"{SVG}style").text
        self.end = float(re.search(r"\.film \{animation: film ([\d.]+)s", style)[1])
        self.lines = [
            (float(line.get("y")), "".join(line.itertext()).replace("\xa0", " "), line)
            for line in root.iter(f"{SVG}text")
        ]
        self.frames = {
            name: re.findall(r"([\d.]+)% \{visibility: (\w+)\}", frames)
            for name, frames in re.findall(r"@keyframes (v\d+) \{(.*)\}\n", style)
        }

    def at(self, share: float) -> list[str]:
        """The lines that are seen after a share of the time, from above."""
        seen = []
        for y, text, line in self.lines:
            frames = self.frames.get(line.get("class", "").split(" ")[0], [("0", "visible")])
            if [value for when, value in frames if float(when) <= 100 * share][-1] == "visible":
                seen.append((y, text))
        assert len({y for y, _ in seen}) == len(seen), "two versions of a line at once"
        return [text for _, text in sorted(seen) if text]

    def without_animation(self) -> list[str]:
        lines = [(y, text) for y, text, line in self.lines if "gone" not in line.get("class", "")]
        return [text for _, text in sorted(lines) if text]


def test_a_picture_shows_what_the_terminal_showed(tmp_path):
    """Lines that wrap, a line that is drawn again in color, and the exit code of the command."""
    (tmp_path / "writes.py").write_text(WRITES)
    cast, svg = tmp_path / "a.cast", tmp_path / "a.svg"
    command = [sys.executable, tmp_path / "writes.py"]
    ran = call("record", cast, "--width", 20, "--", *command, code=3)
    assert "three" in ran.stdout
    call("draw", cast, svg)
    head, *events = map(json.loads, cast.read_text().splitlines())
    assert head["width"] == 20 and all(kind == "o" for _, kind, _ in events)
    picture = Picture(svg)
    wrapped = ["a first line of more", " than twenty columns"]
    shown = [text for text in picture.at(1) if text not in wrapped]
    assert shown[-2:] == ["one", "three"] and "".join(shown[:-2]).startswith("$ ")
    assert picture.at(1) == picture.without_animation()
    states = {tuple(picture.at(step / 200)) for step in range(201)}
    assert {state[-2:] for state in states if len(state) > 2} >= {("one", "two"), ("one", "three")}
    text = svg.read_text()
    assert '<tspan fill="#010203">three</tspan>' in text
    assert '<tspan font-weight="bold">one</tspan>' in text


def test_no_pause_is_longer_than_allowed(tmp_path):
    cast, svg = tmp_path / "a.cast", tmp_path / "a.svg"
    head = {"version": 2, "width": 20, "height": 2, "command": "sleep"}
    events = [[second, "o", f"{second}\r\n"] for second in (1, 100, 101.5, 5000)]
    cast.write_text("\n".join(map(json.dumps, [head, *events])))
    call("draw", cast, svg, "--longest-gap", 2)
    picture = Picture(svg)
    assert picture.end == 1 + 2 + 1.5 + 2 + 4
    assert picture.at(2.9 / picture.end)[-1] == "1" and picture.at(3.1 / picture.end)[-1] == "100"
    tops = re.findall(r"% \{transform: translateY\(-?(\d+)px\)\}", svg.read_text())
    assert list(dict.fromkeys(map(int, tops))) == [0, 18, 36, 54]  # a line each, two are in view


def test_an_unknown_sequence_is_a_sentence(tmp_path):
    cast = tmp_path / "a.cast"
    head = {"version": 2, "width": 20, "height": 2, "command": "top"}
    cast.write_text(json.dumps(head) + "\n" + json.dumps([0.1, "o", "\x1b[5;5H"]))
    ran = call("draw", cast, tmp_path / "a.svg", code=1)
    assert ran.stderr.strip() == r"recording.py: no meaning is known for '\x1b[5;5H'"
    assert os.listdir(tmp_path) == ["a.cast"]


def test_a_text_is_seen_after_each_of_its_steps(pipeline, tmp_path):
    """Of `generate --watch`, as docs/results shows it."""
    cast, svg = tmp_path / "a.cast", tmp_path / "a.svg"
    command = [sys.executable, "-m", "halfstep.cli", "generate", "--watch"]
    command += ["--checkpoint", pipeline.student, "--prompt", "Tom<|mask|> was"]
    call("record", cast, "--", *command)
    call("draw", cast, svg)
    picture = Picture(svg)
    masked = []
    for step in range(1001):
        text = "".join(picture.at(step / 1000))
        if "bold: given" in text and text.count("░░░") not in masked:
            masked.append(text.count("░░░"))
    assert masked == sorted(masked, reverse=True) and masked[-1] == 0
    assert 6 <= len(masked) <= 9, masked


@pytest.mark.parametrize("name", ["demo", "denoising"])
def test_a_kept_picture_is_whole(name):
    picture = Picture(REPOSITORY / f"docs/results/{name}.svg")
    assert picture.at(1) == picture.without_animation()
    assert len({tuple(picture.at(step / 100)) for step in range(101)}) > 8

"""Records a command on a terminal, and draws the recording as an SVG that plays.

    python benchmarks/recording.py record demo.cast -- make demo
    python benchmarks/recording.py draw demo.cast docs/results/demo.svg --longest-gap 0.2

A recording is an asciicast (version 2), which `asciinema play` shows too. The picture needs no
script. Where animations are off it is the last screen.
"""

import argparse
import codecs
import fcntl
import itertools
import json
import os
import pty
import re
import shlex
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from rich.ansi import AnsiDecoder
from rich.style import Style
from rich.terminal_theme import SVG_EXPORT_THEME as THEME

CODE = re.compile(r"(\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x1f\x7f])")
IGNORED = ("\x07", "\x1b[?25l", "\x1b[?25h")  # the bell; hide and show the cursor
ONE_FRAME_S = 0.03  # output that follows so closely is one picture
END_S = 4.0  # of the last screen, before the picture starts again
CELL, LINE, SIZE, EDGE, HEAD = 7.8, 18, 13, 14, 34  # pixels
STYLE = """
text { font: %dpx ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.gone { visibility: hidden }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } }
"""

Cell = tuple[str, Style]


def record(target: Path, command: list[str], width: int, height: int) -> int:
    """Run a command on a new terminal, and write what it prints with its times."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        time.sleep(0.2)  # until the size is set
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    about = {"version": 2, "width": width, "height": height, "command": shlex.join(command)}
    started = time.monotonic()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with target.open("w") as file:
        print(json.dumps(about), file=file)
        while data := _read(terminal):
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            event = [round(time.monotonic() - started, 3), "o", decoder.decode(data)]
            print(json.dumps(event), file=file, flush=True)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # what Linux says when the command has ended
        return b""


class Screen:
    """The lines of a terminal, after the control sequences that halfstep and rich use."""

    def __init__(self, width: int):
        self.width = width
        self.lines: list[list[Cell]] = [[]]
        self.row = self.column = 0
        self.decoder = AnsiDecoder()

    def write(self, text: str) -> None:
        """Show further output; a sequence that is not known is an error."""
        for part in CODE.split(text):
            if part == "\n":
                self._next_line()
            elif part == "\r":
                self.column = 0
            elif part.startswith("\x1b[") and part.endswith("m"):
                self.decoder.decode_line(part)
            elif part == "\x1b[2K":
                self.lines[self.row] = []
            elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
                self.row = max(0, self.row - int(up[1]))
            elif part and CODE.fullmatch(part) and part not in IGNORED:
                raise SystemExit(f"recording.py: no meaning is known for {part!r}")
            elif part not in IGNORED:
                self._put(part)

    def _next_line(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append([])

    def _put(self, text: str) -> None:
        for char in text:
            if self.column == self.width:
                self._next_line()
                self.column = 0
            line = self.lines[self.row]
            line += [(" ", Style())] * (self.column - len(line))
            line[self.column : self.column + 1] = [(char, self.decoder.style)]
            self.column += 1


@dataclass
class Version:
    """What a line shows for some time; end is None for what stays."""

    row: int
    cells: tuple[Cell, ...]
    start: float
    end: float | None = None


@dataclass
class Film:
    """All that a terminal shows: versions of lines, and how far it has scrolled, by time."""

    versions: list[Version] = field(default_factory=list)
    scrolls: list[tuple[float, int]] = field(default_factory=lambda: [(0.0, 0)])
    end: float = 0.0


def develop(recording: Path, longest_gap: float) -> tuple[dict, Film]:
    """The header of a recording and its film, in which no pause is longer than `longest_gap` s."""
    head, *events = map(json.loads, recording.read_text().splitlines())
    screen, film, shown = Screen(head["width"]), Film(), {}
    screen.write(f"$ {head['command']}\r\n")
    for now, text in itertools.chain([(0.0, "")], _frames(events, longest_gap)):
        screen.write(text)
        film.end = now
        for row, line in enumerate(screen.lines):
            old = shown.get(row)
            if old and old.cells == tuple(line):
                continue
            if old:
                old.end = now
            shown[row] = Version(row, tuple(line), now)
            film.versions.append(shown[row])
        last = len(screen.lines) - (not screen.lines[-1])
        if (top := max(0, last - head["height"])) != film.scrolls[-1][1]:
            film.scrolls.append((now, top))
    film.end += END_S
    return head, film


def _frames(events: list[list], longest_gap: float) -> Iterator[tuple[float, str]]:
    """(time in the film, output) of pictures, each of which may be several events."""
    now = before = 0.0
    for start, text in _together(events):
        now += min(start - before, longest_gap)
        before = start
        yield now, text


def _together(events: list[list]) -> Iterator[tuple[float, str]]:
    start = last = None
    texts: list[str] = []
    for when, _, text in events:
        if start is not None and when - last > ONE_FRAME_S:
            yield start, "".join(texts)
            start, texts = None, []
        start = when if start is None else start
        last = when
        texts.append(text)
    if texts:
        yield start, "".join(texts)


def draw(recording: Path, target: Path, longest_gap: float) -> None:
    """Draw a recording as an SVG."""
    head, film = develop(recording, longest_gap)
    rows = min(head["height"], 1 + max(version.row for version in film.versions if version.cells))
    width, height = head["width"] * CELL + 2 * EDGE, rows * LINE + HEAD + EDGE
    spans: dict[tuple[float, float | None], str] = {(0.0, None): ""}  # a class for each time
    lines = []
    for version in film.versions:
        name = spans.setdefault((version.start, version.end), f"v{len(spans)}")
        lines.append(_line(version, f"{name} gone" if version.end is not None else name))
    styles = [STYLE % SIZE]
    for (start, end), name in spans.items():
        times = [(0.0, "hidden"), (start, "visible"), (end, "hidden")]
        known = [(when, value) for when, value in times if when is not None]
        if name:
            styles.append(_keyframes(name, known[not start :], "visibility", film.end))
    slides = [(when, f"translateY({-LINE * top}px)") for when, top in film.scrolls]
    styles.append(_keyframes("film", slides, "transform", film.end))
    size = f'width="{width:g}" height="{height:g}"'
    window = f'y="{HEAD}" width="{width:g}" height="{rows * LINE}"'
    dots = "".join(
        f'<circle cx="{EDGE + 5 + 18 * i}" cy="17" r="5" fill="{color}"/>'
        for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    last = f"translate(0 {-LINE * film.scrolls[-1][1]})"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" {size}>',
        f"<title>{escape(head['command'])}</title>",
        f"<style>{''.join(styles)}</style>",
        f'<rect {size} rx="8" fill="{THEME.background_color.hex}"/>{dots}',
        f'<clipPath id="window"><rect {window}/></clipPath>',
        f'<g clip-path="url(#window)"><g transform="translate({EDGE} {HEAD})">',
        f'<g class="film" transform="{last}" fill="{THEME.foreground_color.hex}">',
        *lines,
        "</g></g></g></svg>",
    ]
    target.write_text("\n".join(parts) + "\n")


def _keyframes(name: str, times: list[tuple[float, str]], what: str, end: float) -> str:
    """A CSS class whose property `what` jumps from value to value, and starts again at `end`."""
    frames = " ".join(f"{100 * when / end:.3f}% {{{what}: {value}}}" for when, value in times)
    return (
        f"@keyframes {name} {{{frames} 100% {{{what}: {times[-1][1]}}}}}\n"
        f".{name} {{animation: {name} {end:.2f}s step-end infinite}}\n"
    )


def _line(version: Version, names: str) -> str:
    """A line as SVG, one tspan for each style; its width does not depend on the font."""
    spans = []
    for style, cells in itertools.groupby(version.cells, key=lambda cell: cell[1]):
        text = escape("".join(char for char, _ in cells)).replace(" ", "&#160;")
        looks = []
        if style.color:
            looks.append(f'fill="{style.color.get_truecolor(THEME).hex}"')
        if style.bold:
            looks.append('font-weight="bold"')
        if style.dim:
            looks.append('opacity="0.6"')
        spans.append(f"<tspan {' '.join(looks)}>{text}</tspan>" if looks else text)
    width = f'textLength="{len(version.cells) * CELL:g}" lengthAdjust="spacingAndGlyphs"'
    chosen = f' class="{names}"' if names else ""
    place = f'y="{version.row * LINE + SIZE:g}"'
    return f"<text {place} {width}{chosen}>{''.join(spans)}</text>"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("record", help="run a command and record what it prints")
    first.add_argument("recording", type=Path)
    first.add_argument("command", nargs="+")
    first.add_argument("--width", type=int, default=100, help="columns of the terminal")
    first.add_argument("--height", type=int, default=36, help="lines of the terminal")
    second = parts.add_parser("draw", help="draw a recording as an SVG")
    second.add_argument("recording", type=Path)
    second.add_argument("output", type=Path)
    second.add_argument("--longest-gap", type=float, default=1.0, help="seconds without output")
    given = parser.parse_args()
    if given.part == "record":
        sys.exit(record(given.recording, given.command, given.width, given.height))
    draw(given.recording, given.output, given.longest_gap)

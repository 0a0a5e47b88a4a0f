"""Progress of a loop: a bar on a terminal, or one line per interval in a log, on rank 0 only."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod

from tqdm import tqdm

BAR = "{percentage:3.0f}%|{bar:16}| {desc}"  # the description is our whole line
WITHOUT_BAR = "{percentage:3.0f}% {desc}"  # on a narrow terminal
NARROW = 110  # columns
MANY = 1000  # columns of a log that nobody watches
LEAST_LABEL = 8  # letters of a label that are always shown


class Progress:
    """Context manager around a loop of `total` units, of which `done` are finished already.

    A log gets a line at most every `interval` seconds, a terminal the same words after a bar. Where
    the program runs in a terminal, no line is wider: the least important words are left out.
    """

    def __init__(
        self, label: str, total: int, unit: str = "step", interval: float = 10.0, done: int = 0
    ):
        self.label, self.total, self.unit = label, total, unit
        self.interval, self.done = interval, done
        self._first, self._bar, self._before = done, None, 0  # columns before our line
        self._silent = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty() and not self._silent:
            shape = WITHOUT_BAR if terminal_columns() < NARROW else BAR
            self._before = len("100% ") if shape == WITHOUT_BAR else len("100%|| ") + 16
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.label,
                bar_format=shape,
                dynamic_ncols=True,
                mininterval=0.5,
                disable=False,  # within `only_our_bars`, too
            )
        return self

    def update(self, n: int = 1, *words: str) -> None:
        """Count n more units; `words` are the latest figures, such as "loss 4.213"."""
        self.done += n
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(self._line(now, words), refresh=self.done >= self.total)
            self._bar.update(n)
            return
        is_due = now - self._last >= self.interval or self.done >= self.total
        if is_due and not self._silent:
            self._last = now
            print(self._line(now, words), file=sys.stderr, flush=True)

    def _line(self, now: float, words: tuple[str, ...]) -> str:
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        count = f"{self.done:,} of {self.total:,}"
        parts = [f"{count} MB" if self.unit == "MB" else f"{self.unit} {count}", *words]
        if rate:
            parts += [format_rate(rate, self.unit), time_left(self.total - self.done, rate)]
        return fit_line(self.label, parts, terminal_columns() - self._before)

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


def terminal_columns() -> int:
    """$COLUMNS, or the width of the terminal that this program was started in; without one, many.

    Its output may go to `tee` and so come to the terminal all the same.
    """
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"]) or MANY
    try:
        with open("/dev/tty", "rb", buffering=0) as terminal:
            return os.get_terminal_size(terminal.fileno()).columns or MANY
    except OSError:
        return MANY


def fit_line(label: str, parts: list[str], columns: int) -> str:
    """`label | part | ...` in fewer than `columns` columns, which no terminal wraps.

    What is left out, until the line fits: the parts between the second and the last one, from the
    right; then the beginning of the label, and the second part.
    """
    parts, least = list(parts), min(len(label), LEAST_LABEL)
    while len(parts) > 2 and least + len(" | ".join(["", *parts])) >= columns:
        del parts[-2]
    rest = " | ".join(["", *parts])
    room = max(1, columns - 1 - len(rest))
    if len(label) > room:
        label = "…" + label[len(label) - room + 1 :]
    return (label + rest)[: columns - 1]


@contextmanager
def only_our_bars() -> Iterator[None]:
    """Around calls of a library that shows bars of tqdm: they are switched off, by `disable`."""
    before = tqdm.__init__
    tqdm.__init__ = partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before


@contextmanager
def waiting(label: str, interval: float = 10.0) -> Iterator[None]:
    """Around work that cannot be counted: a line every `interval` seconds says that it goes on."""
    start, done = time.monotonic(), threading.Event()

    def report() -> None:
        while not done.wait(interval):
            print(f"{label} | {_clock(time.monotonic() - start)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def format_number(value: float) -> str:
    """A number in at most three digits and a letter: 0.0123, 7.1, 950, 13.7k, 2.4M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 0.9995 * size <= abs(value) < math.inf:
            return f"{_three_digits(value / size)}{letter}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    """The value rounded to three digits, without an exponent and without zeros at its end."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_rate(per_s: float, unit: str) -> str:
    """A speed: 13.7k tokens/s; slow ones as 2.5 s/step, or 1h02m/step."""
    if per_s >= 1:
        number = format_number(per_s)
        plural = "" if number == "1" or unit == "MB" else "s"
        return f"{number} {unit}{plural}/s"
    seconds = 1 / per_s
    return f"{format_number(seconds) + ' s' if seconds < 60 else _clock(seconds)}/{unit}"


def time_left(units: int, per_s: float) -> str:
    """The time that the rest takes at a speed in units per second: 3m20s left."""
    return f"{_clock(units / per_s)} left"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s"

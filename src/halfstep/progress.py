"""Progress of a loop: a bar on a terminal, or one line per interval in a log, on rank 0 only."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Context manager around a loop of `total` units, of which `done` are finished already.

    A log gets a line at most every `interval` seconds.
    """

    def __init__(
        self, label: str, total: int, unit: str = "step", interval: float = 10.0, done: int = 0
    ):
        self.label, self.total, self.unit = label, total, unit
        self.interval, self.done = interval, done
        self._first, self._bar = done, None
        self._silent = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if sys.stderr.isatty() and not self._silent:
            self._bar = tqdm(
                total=self.total,
                initial=self.done,
                desc=self.label,
                unit=self.unit,
                dynamic_ncols=True,
                mininterval=0.5,
            )
        return self

    def update(self, n: int = 1, **figures: float) -> None:
        """Count n more units, and show the latest figures."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
            if figures:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
            return
        now = time.monotonic()
        is_due = now - self._last >= self.interval or self.done >= self.total
        if is_due and not self._silent:
            self._last = now
            print(self._line(now, figures), file=sys.stderr, flush=True)

    def _line(self, now: float, figures: dict[str, float]) -> str:
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        shown = [f"{key.replace('_per_', '/')} {value:.4g}" for key, value in figures.items()]
        count = f"{self.unit} {self.done}/{self.total}"
        speed = f"{rate:.3g} {self.unit}s/s"
        return " | ".join([self.label, count, *shown, speed, f"{_clock(left)} left"])

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()


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


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"

"""Progress of a loop: a bar on a terminal, one line per interval in a log; of several processes the first alone shows it."""

import os
import sys
import time

from tqdm import tqdm


class Progress:
    """Context manager around a loop of `total` units; `update` takes the latest figures to show."""

    def __init__(
        self, label: str, total: int, unit: str = "step", interval: float = 10.0, done: int = 0
    ):
        self.label, self.total, self.unit, self.interval, self.done = (
            label,
            total,
            unit,
            interval,
            done,
        )
        self._first, self._bar = done, None
        self._silent = os.environ.get("RANK", "0") != "0"

    def __enter__(self) -> "Progress":
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
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
            if figures:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in figures.items()}, refresh=False)
            return
        now = time.monotonic()
        if not self._silent and (now - self._last >= self.interval or self.done >= self.total):
            self._last = now
            rate = (self.done - self._first) / max(now - self._start, 1e-9)
            left = (self.total - self.done) / rate if rate else 0.0
            shown = "".join(f" | {k.replace('_per_', '/')} {v:.4g}" for k, v in figures.items())
            print(
                f"{self.label} | {self.unit} {self.done}/{self.total}{shown} | {rate:.3g} {self.unit}s/s | {_clock(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exc) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"

"""Progress of loops and of work that cannot be counted: lines of a log, and bars."""

import io
import re
import time

import pytest

from halfstep.progress import Progress, format_number, format_rate, waiting


def test_waiting_says_that_work_goes_on_until_it_ends(capsys):
    with waiting("train the BPE", interval=0.05):
        time.sleep(0.4)
    lines = capsys.readouterr().err.splitlines()
    assert lines and set(lines) == {"train the BPE | 0m00s"}
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_short_work_says_nothing(capsys):
    with waiting("train the BPE"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.001234, "0.00123"),
        (0.1, "0.1"),
        (7.06, "7.06"),
        (12.349, "12.3"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_490, "12.5k"),
        (13_742, "13.7k"),
        (2_000_000, "2M"),
        (3.456e9, "3.46G"),
        (-1_500, "-1.5k"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_numbers_have_three_digits_and_no_exponent(value, text):
    assert format_number(value) == text


def test_a_number_is_within_half_a_percent_of_its_text():
    sizes = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    for exponent in range(-30, 70):
        value = 1.3**exponent
        digits, letter = re.fullmatch(r"([\d.]+)([kMGT]?)", format_number(value)).groups()
        assert float(digits) * sizes[letter] == pytest.approx(value, rel=5.1e-3)


@pytest.mark.parametrize(
    ("per_s", "unit", "text"),
    [
        (13_742, "token", "13.7k tokens/s"),
        (1, "step", "1 step/s"),
        (0.4, "step", "2.5 s/step"),
        (1 / 90, "text", "1m30s/text"),
        (250, "MB", "250 MB/s"),
    ],
)
def test_rates_are_words(per_s, unit, text):
    assert format_rate(per_s, unit) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_one_line_and_a_terminal_the_same_words_after_a_bar(capsys, monkeypatch):
    """The speed and the time left differ between the two runs, so they are compared by pattern."""
    words = ("loss 4.213", "13.7k tokens/s")
    line = (
        r"pretrain x \| step 1,200 of 1,200 \| loss 4\.213 \| 13\.7k tokens/s \| "
        r"[\d.]+[kM]? steps/s \| 0m00s left"
    )
    with Progress("pretrain x", 1200, done=200) as progress:
        for _ in range(10):
            progress.update(100, *words)
    (printed,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, printed)
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "200")
    with Progress("pretrain x", 1200, done=200) as progress:
        for _ in range(10):
            progress.update(100, *words)
    last = terminal.getvalue().split("\r")[-1].strip()
    assert re.fullmatch(r"100%\|[█#]+\| " + line, last)


def test_only_the_first_rank_shows_progress(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress("pretrain x", 3) as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""

"""Progress of loops and of work that cannot be counted: lines of a log, and bars."""

import io
import re
import time

import pytest
from pseudo import Terminal, without_escapes
from tqdm import tqdm

from halfstep.progress import (
    Progress,
    fit_line,
    format_number,
    format_rate,
    only_our_bars,
    waiting,
)


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


class TextTerminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_one_line_and_a_terminal_the_same_words_after_a_bar(capsys, monkeypatch):
    """The speed and the time left differ between the two runs, so they are compared by pattern."""
    words = ("loss 4.213", "13.7k tokens/s")
    line = (
        r"pretrain x \| step 1,200 of 1,200 \| loss 4\.213 \| 13\.7k tokens/s \| "
        r"[\d.]+[kM]? steps/s \| 0m00s left"
    )
    monkeypatch.setenv("COLUMNS", "200")
    with Progress("pretrain x", 1200, done=200) as progress:
        for _ in range(10):
            progress.update(100, *words)
    (printed,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(line, printed)
    terminal = TextTerminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("pretrain x", 1200, done=200) as progress:
        for _ in range(10):
            progress.update(100, *words)
    last = terminal.getvalue().split("\r")[-1].strip()
    assert re.fullmatch(r"100%\|[█#]+\| " + line, last)


LABEL = "distill-round stories-tiny/kl_backward/round-2"
TRAINING = f"""
import time
from halfstep.progress import Progress
with Progress({LABEL!r}, 1400, interval=0.1) as progress:
    for _ in range(14):
        time.sleep(0.05)
        progress.update(100, "loss 0.03373", "held-out loss 5.169", "epoch 0.0948 of 0.121",
                        "2.92k tokens/s")
"""
PIPED = f"""
import os, sys
os.execvp("sh", ["sh", "-c", '"$0" -c "$1" 2>&1 | cat', sys.executable, {TRAINING!r}])
"""


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("program", [TRAINING, PIPED], ids=["bar", "piped"])
def test_no_line_is_wider_than_the_terminal(columns, program):
    """Of a bar, and of lines that go through a pipe; steps, time left and, at 80, the loss stay."""
    with Terminal(columns=columns, program=("-c", program)) as terminal:
        assert terminal.end() == 0
    lines = [line.strip() for line in re.split(r"[\r\n]+", without_escapes(terminal.printed))]
    assert max(map(len, lines)) < columns
    last = [line for line in lines if line][-1]
    assert re.search(r"ound-2 \| step 1,400 of 1,400 \|.* 0m00s left$", last)
    assert "| loss 0.03373 |" in last or columns == 60
    assert ("2.92k tokens/s | " in last and LABEL in last) == (columns == 200)


def test_parts_are_left_out_from_the_right_and_then_the_label_is_cut():
    parts = ["step 1 of 9", "loss 4.2", "1 step/s", "8s left"]
    whole = "train a-model | step 1 of 9 | loss 4.2 | 1 step/s | 8s left"
    assert fit_line("train a-model", parts, len(whole) + 1) == whole
    assert fit_line("train a-model", parts, 46) == "…n a-model | step 1 of 9 | loss 4.2 | 8s left"
    assert fit_line("train a-model", parts, 36) == "…in a-model | step 1 of 9 | 8s left"
    for columns in range(2, 80):
        assert len(fit_line("train a-model", parts, columns)) < columns


def test_bars_of_a_library_are_switched_off_and_ours_are_not(monkeypatch):
    terminal = TextTerminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with only_our_bars():
        list(tqdm(range(3), desc="theirs", file=terminal))
        with Progress("ours", 3) as progress:
            progress.update(3)
    list(tqdm(range(3), desc="later", file=terminal))
    shown = terminal.getvalue()
    assert "theirs" not in shown and "ours" in shown and "later" in shown


def test_a_unit_stands_behind_its_number(capsys):
    with Progress("verify", 202, "MB") as progress:
        progress.update(202)
    assert capsys.readouterr().err.startswith("verify | 202 of 202 MB | ")


def test_only_the_first_rank_shows_progress(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with Progress("pretrain x", 3) as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""

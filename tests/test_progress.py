"""Progress of work that cannot be counted."""

import time

from halfstep.progress import waiting


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

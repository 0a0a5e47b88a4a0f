"""One process at a time, with locks and on a file system without them."""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import time

import pytest
import synthetic

from halfstep.commands.track import track
from halfstep.errors import HalfstepError
from halfstep.records.exclusive import exclusive


@pytest.fixture(params=["locks", errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def without(request, monkeypatch):
    """False, or True where flock fails, as on Lustre without -o flock (ENOSYS)."""
    if request.param == "locks":
        return False

    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)
    return True


def test_processes_take_turns(tmp_path, without):
    """Four processes add one to a number, each ten times."""
    number = tmp_path / "number"
    number.write_text("0")
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for _ in range(10):
                    with exclusive(tmp_path / "lock", 100) as warning:
                        found = int(number.read_text())
                        time.sleep(0.003)
                        number.write_text(str(found + 1))
                assert bool(warning) == without
                os._exit(0)
            os._exit(1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 4
    assert number.read_text() == "40"


def test_what_a_killed_process_held_is_free(tmp_path, without):
    child = os.fork()
    if child == 0:
        with exclusive(tmp_path / "lock", 10):
            time.sleep(100)
    while not (tmp_path / ("lock.held" if without else "lock")).exists():
        time.sleep(0.01)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with exclusive(tmp_path / "lock", 30):
        pass


def test_a_process_that_holds_it_too_long_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_flock)
    with (
        exclusive(tmp_path / "lock", 1),
        pytest.raises(HalfstepError, match=r"lock.held: another process holds it.*delete the file"),
        exclusive(tmp_path / "lock", 0.3),
    ):
        pass


def no_flock(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_track_sends_all_and_warns_where_there_are_no_locks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow")
    results = tmp_path / "results"
    synthetic.write(results, runs=(), rounds=0, steps=[8], points=3, benchmark=False)
    shutil.rmtree(results / "samples")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # mlflow.set_tracking_uri sets it
    monkeypatch.setattr(fcntl, "flock", no_flock)
    marker = results / "mlflow.synced"
    track(results, output=marker)
    said = capsys.readouterr()
    assert "points added" in said.out
    warning = marker.read_text()
    assert warning == said.err
    assert warning.startswith("WARNING: ") and "has no locks (flock)" in warning
    assert warning.count("\n") == 1
    assert not (results / ".track.lock.held").exists()

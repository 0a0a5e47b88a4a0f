"""Files are complete or absent, and what killed writers left is removed, but nobody else's."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfstep import files
from halfstep.errors import HalfstepError
from halfstep.files import (
    ABANDONED_S,
    DEEPEST_JSON,
    LARGEST_JSON,
    open_file,
    read_json,
    scratch_folder,
    sha256,
    write_atomic,
    write_json,
    write_tensors,
)


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def leave(folder: Path, name: str, age: float = 0) -> Path:
    """A part that some process left or is writing, as a folder with a file in it."""
    part = folder / name
    part.mkdir()
    (part / "half").write_text("half of a fi")
    for path in (part / "half", part):
        at = path.stat().st_mtime - age
        os.utime(path, (at, at))
    return part


def test_what_dead_processes_left_is_removed(tmp_path, dead):
    here = files._machine()
    gone = [
        leave(tmp_path, f".train.bin.{dead}@{here}.part"),
        leave(tmp_path, f".meta.json.{dead}@{here}.part"),  # of another output in the folder
        leave(tmp_path, f".train.bin.{dead}@node17.part", ABANDONED_S + 60),
    ]
    former = tmp_path / f".train.bin.{dead}.part"
    former.write_text("a file, as earlier versions left it")
    write_atomic(tmp_path / "train.bin", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["train.bin"], gone


def test_what_living_processes_write_stays(tmp_path, dead):
    """Other processes of this machine, those of other machines, and files of other programs."""
    here, parent = files._machine(), os.getppid()
    kept = [
        leave(tmp_path, f".train.bin.{parent}@{here}.part", 10 * ABANDONED_S),
        leave(tmp_path, f".train.bin.{os.getpid()}.part"),
        leave(tmp_path, f".train.bin.{dead}@node17.part", ABANDONED_S - 60),
        leave(tmp_path, f".train.bin.{dead}@{here}.party"),
        leave(tmp_path, "train.bin.1@node17.part"),
        leave(tmp_path, ".movie.part"),
    ]
    write_atomic(tmp_path / "train.bin", "whole")
    for part in kept:
        assert (part / "half").read_text() == "half of a fi"


def test_a_part_of_another_machine_that_is_still_written_stays(tmp_path, dead):
    """Its folder is old, but a file in it is not."""
    part = leave(tmp_path, f".train.bin.{dead}@node17.part", 2 * ABANDONED_S)
    os.utime(part / "half")
    write_atomic(tmp_path / "train.bin", "whole")
    assert part.exists()


def test_a_link_is_removed_and_not_followed(tmp_path, dead):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    link = tmp_path / f".a.{dead}@{files._machine()}.part"
    link.symlink_to("precious")
    write_atomic(tmp_path / "a", "whole")
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_a_killed_writer_leaves_one_folder_which_the_next_one_removes(tmp_path):
    """kill -9 in the middle of a file, through each of the ways to write one."""
    script = (
        "import os, signal, sys, torch\n"
        "from halfstep import files\n"
        "import safetensors.torch\n"
        "def half(*given):\n"
        "    open(given[1] if len(given) > 1 else given[0], 'wb').write(b'half')\n"
        "    open(os.path.dirname(given[1] if len(given) > 1 else given[0]) + '/.tmpX', 'w')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "safetensors.torch.save_file = half\n"
        "path = files.Path(sys.argv[1])\n"
        "if sys.argv[2] == 'tensors':\n"
        "    files.write_tensors(path, {'a': torch.ones(2)}, {})\n"
        "files.write_atomic(path, half)\n"
    )
    for way in ("tensors", "callable"):
        path = tmp_path / way / "a"
        done = subprocess.run([sys.executable, "-c", script, path, way])
        assert done.returncode == -9
        assert len(os.listdir(path.parent)) == 1 and not path.exists()
        write_json(path, 1)
        assert os.listdir(path.parent) == ["a"]


def test_the_order_of_a_write(tmp_path, monkeypatch):
    """The file is flushed before it gets its name, and the folder after that."""
    seen = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.readlink(f"/proc/self/fd/{fd}")))
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *given: seen.append("rename") or real(*given))
    write_atomic(tmp_path / "a", "whole")
    assert [Path(name).name for name in seen] == ["a", "rename", tmp_path.name]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~files._umask()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch, code):
    real = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.parametrize("what", ["fsync", "replace", "mkdir"])
def test_a_failing_write_names_its_file_and_leaves_the_former_one(tmp_path, monkeypatch, what):
    path = tmp_path / "a"
    write_atomic(path, "former")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, what, fail)
    for content in ("new", lambda part: part.write_text("new")):
        with pytest.raises(OSError, match="No space left on device") as error:
            write_atomic(path, content)
        assert error.value.filename == str(path)
    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, {"a": torch.ones(2)}, {})
    assert path.read_text() == "former" and os.listdir(tmp_path) == ["a"]


def test_tensors_come_back(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.arange(6.0).view(2, 3).T}, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "a")["x"], torch.arange(6.0).view(2, 3).T)


def test_a_scratch_folder_ends_with_its_block(tmp_path):
    with pytest.raises(KeyError), scratch_folder(tmp_path / "documents") as folder:
        (folder / "a").write_text("a")
        raise KeyError
    assert not os.listdir(tmp_path)


JSON = {  # content: words of the message; None: it is read
    b'{"a": [1, 2.5, null, true, "\xc3\xa9"]}': None,
    b'\xef\xbb\xbf{"a": 1}': None,  # with a byte order mark, as some editors write it
    b"": "not valid JSON",
    b'{"a": 1': "not valid JSON",
    b'{"a": 1}{"a": 2}': "Extra data",
    b'{"a": NaN}': "nan is not a finite number",
    b'{"a": [-Infinity]}': "inf is not a finite number",
    b'{"a": 1e999}': "inf is not a finite number",
    b'{"a": 1' + b"0" * 30 + b"}": "a whole number above 2",
    b'{"a": 1' + b"0" * 5000 + b"}": "not valid JSON",
    b'{"a": 1, "b": 2, "a": 3}': "the key 'a' is given twice",
    b'{"a": "\\ud800"}': "surrogates not allowed",
    b'{"\\ud800": 1}': "surrogates not allowed",
    b'{"a": "\xff"}': "can't decode byte 0xff",
    '{"a": 1}'.encode("utf-16"): "not valid JSON",
    b"[" * 100_000 + b"]" * 100_000: "too deeply nested",
    b"[" * (DEEPEST_JSON + 2) + b"]" * (DEEPEST_JSON + 2): "too deeply nested",
    b'{"a":' * 100_000: "too deeply nested",
}


@pytest.mark.parametrize("content", JSON, ids=lambda content: repr(content[:30]))
def test_json(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    if JSON[content] is None:
        assert read_json(tmp_path / "a.json") == json.loads(content)
        return
    with pytest.raises(HalfstepError, match=JSON[content]) as error:
        read_json(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path}/a.json: ") and len(str(error.value)) < 500
    assert "delete it and run the step that makes it again" in str(error.value)


def test_a_huge_json_is_not_read(tmp_path):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(HalfstepError, match=f"at most {LARGEST_JSON:,}"):
        read_json(tmp_path / "a.json")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for read in (read_json, sha256, open_file):
        with pytest.raises(HalfstepError, match="pipe: found a pipe or a device, expected a file"):
            read(tmp_path / "pipe")
        with pytest.raises(HalfstepError, match="found a folder, expected a file"):
            read(tmp_path)
        with pytest.raises(HalfstepError, match="found a pipe or a device"):
            read(Path("/dev/zero"))
        with pytest.raises(OSError, match="symbolic links"):
            read(tmp_path / "loop")

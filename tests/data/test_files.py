"""Corpus kind `files`: all formats give the same documents; errors name file, line and remedy."""

import gzip
import json
import random
from pathlib import Path

import pytest

from halfstep.data.files import find_files, read_documents
from halfstep.errors import HalfstepError

DOCUMENTS = ["Once upon a time\nthere was é 🙂.", "Two.", "Three\tx"]
ROWS = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in DOCUMENTS).encode()
WINDOWS_LINES = "\r\n\r\n".join(text.replace("\n", "\r\n") for text in DOCUMENTS)


def contents(path, field="text"):
    return [text for text, _ in read_documents(path, field)]


def write(path, raw):
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize(
    "name, raw",
    [
        ("a.txt", "\n\n\n".join(DOCUMENTS).encode()),
        ("windows.txt", b"\xef\xbb\xbf" + WINDOWS_LINES.encode()),
        ("a.txt.gz", "\n\n".join(DOCUMENTS).encode() + b"\n"),
        ("marked.txt", "\n<|endoftext|>\n".join(DOCUMENTS).encode() + b"\n<|endoftext|>\n"),
        ("a.jsonl", ROWS),
        ("a.jsonl.gz", ROWS.replace(b"\n", b"\n\n") + b'{"text": " \\n"}'),
    ],
)
def test_all_formats_give_the_same_documents(tmp_path, name, raw):
    assert contents(write(tmp_path / name, raw)) == DOCUMENTS


def test_a_marked_txt_keeps_its_blank_lines(tmp_path):
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n<|endoftext|>\nthree\n")
    assert contents(path) == ["one\n\ntwo", "three"]


def test_a_long_txt_is_cut_at_the_end_of_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr("halfstep.data.files.LONGEST_DOCUMENT", 10)
    path = write(tmp_path / "a.txt", b"seven..\nseven..\nrest\n")
    assert contents(path) == ["seven..\nseven..", "rest"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "body": DOCUMENTS}), path)
    assert contents(path, "body") == DOCUMENTS
    with pytest.raises(HalfstepError, match="found the columns n, body, expected 'text'"):
        contents(path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(HalfstepError, match="row 2: column 'text' holds a NoneType"):
        contents(path)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(HalfstepError, match="not a readable parquet file"):
        contents(path)


@pytest.mark.parametrize(
    "name, raw, sentence",
    [
        ("a.txt", b"", r"a.txt: holds no text \(0 bytes\)"),
        ("a.jsonl", b"\n\n", r"holds no text"),
        ("a.txt", b"fine\n\nabc\xff\n", r"a.txt, line 3: byte 0xff at position 4 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"line 2: byte 0xe9"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "n": 1}\n',
            r"line 2: found an object with body, n, expected a field 'text'",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"line 1: field 'text' holds a int"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"line 2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not valid JSON"),
        ("a.jsonl", b'["a"]', r"line 1: found a JSON list"),
        ("a.jsonl.gz", gzip.compress(ROWS * 50, mtime=0)[:60], r"a.jsonl.gz: cannot be read"),
    ],
)
def test_errors_name_the_line(tmp_path, name, raw, sentence):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(HalfstepError, match=sentence):
        contents(path)


def test_an_endless_line_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("halfstep.data.files.LONGEST_LINE", 1 << 20)
    with pytest.raises(HalfstepError, match="line 2: longer than 1 MB"):
        contents(write(tmp_path / "a.txt", b"x\n" + b"y" * (1 << 20) + b"yy"))


def test_globs_are_sorted_and_each_file_is_found_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.jsonl", "odd[1].txt"):
        write(tmp_path / name, b"x")
    found = find_files(["b.txt", "[ab].txt", "**/*.jsonl", "odd[1].txt"])
    assert [str(path) for path in found] == ["b.txt", "a.txt", "deep/c.jsonl", "odd[1].txt"]


def test_one_file_under_several_names_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.txt", b"x")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert find_files(["./a.txt", "~/a.txt", "?.txt", str(tmp_path / "a.txt")]) == [Path("a.txt")]
    assert find_files(["~/b.txt"]) == [tmp_path / "b.txt"]


def test_a_file_is_not_refused_for_how_well_it_is_packed(tmp_path):
    """Text is packed to a third; even lines that repeat one word are read."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(["the", "cat", "sat"], k=200)) for _ in range(3000)]
    path = write(tmp_path / "a.txt.gz", "\n".join(lines).encode())
    assert path.stat().st_size < 1 << 20
    assert sum(map(len, contents(path))) > 2 << 20


@pytest.mark.parametrize(
    "pattern, sentence",
    [
        ("*.md", "matches nothing"),
        ("deep", "deep is a folder"),
        ("x.csv", "unknown suffix; expected one of .txt"),
    ],
)
def test_a_pattern_without_usable_files_is_an_error(tmp_path, monkeypatch, pattern, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "x.csv", b"x")
    with pytest.raises(HalfstepError, match=sentence):
        find_files([pattern])

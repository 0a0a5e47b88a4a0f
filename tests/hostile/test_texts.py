"""Hostile text files of a corpus, and files of LAMBADA items."""

import gzip
import json
import os
import shutil
import socket
import tempfile
from functools import cache
from pathlib import Path

import pytest
from hostile import Hostile, answer
from known import write_checkpoint

from halfstep.data.tokenizer import EOS, train_bpe

WORDS = [
    f"The {name} sat on the {place}." for name in ("cat", "dog", "fox") for place in "abcdefgh"
]
TEXT = "\n\n".join(WORDS)
ROWS = "".join(json.dumps({"text": text}) + "\n" for text in WORDS)
PREPARE = ["prepare-corpus", "--output", "out", "--kind", "files", "--length", "8"]
PREPARE += ["--vocab-size", "260", "--validation-documents", "2", "--workers", "1"]


def refused_text(name, file, content, pattern):
    """A file of bytes, or a function that makes something else, which is refused."""
    return Hostile("text files", name, writer(file, content), [*PREPARE, "--files", file], pattern)


def accepted_text(name, file, content, documents, check=lambda folder: None, files=None):
    """A file that is read; `documents` are all its documents."""

    def check_documents(folder):
        facts = json.loads((folder / "out/manifest.json").read_text())["splits"]
        count = facts["train"]["documents"] + facts["validation"]["documents"]
        assert count == len(documents), count
        lines = (folder / "out/validation.jsonl").read_text().splitlines()
        assert [json.loads(line)["text"] for line in lines] == documents[-2:]
        check(folder)

    arguments = [*PREPARE, "--files", *(files or [file])]
    return Hostile("text files", name, writer(file, content), arguments, None, check_documents)


def writer(file, content):
    def make(folder):
        if callable(content):
            content(folder / file)
        else:
            (folder / file).write_bytes(content)

    return make


def members(unpacked, count):
    """A .gz of `count` members, each of the same bytes."""
    return gzip.compress(unpacked) * count


def parquet(**columns):
    def make(path):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table(list(columns.values()), names=list(columns))
        pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)

    return make


def parquet_with_one_name_twice(path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([WORDS, WORDS], names=["text", "text"])
    pyarrow.parquet.write_table(table, path)


def cut_parquet(path):
    parquet(text=WORDS)(path)
    path.write_bytes(path.read_bytes()[:-20])


def listening_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the path of a socket has at most 108 bytes
        server.bind(path.name)
        os.chdir(here)


def no_document_ends_inside(folder):
    """Every EOS of the joined stream ends a document: none comes from the text."""
    import numpy as np

    tokens = np.fromfile(folder / "out/train.bin", np.uint16).reshape(-1, 8)[:, 1:-1]
    facts = json.loads((folder / "out/manifest.json").read_text())["splits"]["train"]
    assert (tokens == 0).sum() <= facts["documents"]


JSONL = "a.jsonl"
NOT_JSON = "line 1: not valid JSON"
TEXTS = [
    refused_text("UTF-16", "a.txt", TEXT.encode("utf-16"), "is UTF-16; .*iconv -f utf-16 -t"),
    refused_text(
        "UTF-16 of a .jsonl", JSONL, ROWS.encode("utf-16"), "is UTF-16; .*iconv -f utf-16"
    ),
    refused_text("UTF-16LE without mark", "a.txt", TEXT.encode("utf-16le"), "iconv -f utf-16le"),
    refused_text("UTF-16BE without mark", "a.txt", TEXT.encode("utf-16be"), "iconv -f utf-16be"),
    refused_text("UTF-32", "a.txt", TEXT.encode("utf-32"), "is UTF-32; .*iconv -f utf-32 -t"),
    refused_text("UTF-32BE without mark", "a.txt", TEXT.encode("utf-32be"), "iconv -f utf-32be"),
    refused_text(
        "Latin-1", "a.txt", "naïve".encode("latin1"), "line 1: byte 0xef .*iconv -f latin1"
    ),
    refused_text("a cut character", "a.txt", TEXT.encode() + b"\xe2\x82", "line 47: byte 0xe2"),
    refused_text(
        "lines that end in CR", "a.txt", TEXT.replace("\n", "\r").encode(), "CR alone.*tr '"
    ),
    refused_text(
        "a .jsonl whose lines end in CR", JSONL, ROWS.replace("\n", "\r").encode(), "CR alone"
    ),
    refused_text(
        "CR and one LF at the end", "a.txt", TEXT.replace("\n", "\r").encode() + b"\n", "CR alone"
    ),
    refused_text("NUL bytes", "a.txt", b"fine\n\nbad\0bad\n", "line 3: holds NUL bytes"),
    refused_text("a program", "a.txt", b"\x7fELF\2\1\1" + bytes(9), "line 1: holds NUL bytes"),
    refused_text("gzip data in .txt", "a.txt", gzip.compress(TEXT.encode()), "gzip data.*add .gz"),
    refused_text("text in .gz", "a.txt.gz", TEXT.encode(), "cannot be read .*[Nn]ot a gzip"),
    refused_text("gzip twice", "a.txt.gz", gzip.compress(gzip.compress(b"a")), "holds gzip data"),
    refused_text("a zip archive in .txt", "a.txt", b"PK\3\4" + bytes(40), "a zip archive"),
    refused_text("a PDF in .txt", "a.txt", b"%PDF-1.7\n%\xe2\xe3", "a PDF, expected UTF-8"),
    refused_text(
        "parquet in .jsonl", JSONL, parquet(text=WORDS), "a parquet file.*suffix .parquet"
    ),
    refused_text("text in .parquet", "a.parquet", TEXT.encode(), "not a readable parquet file"),
    refused_text("a cut .parquet", "a.parquet", cut_parquet, "not a readable parquet file"),
    refused_text(
        "another column", "a.parquet", parquet(body=WORDS), "columns body, expected 'text'"
    ),
    refused_text("numbers in a column", "a.parquet", parquet(text=[1, 2]), "row 1: .* holds a int"),
    refused_text("nulls in a column", "a.parquet", parquet(text=["a", None]), "row 2: .*NoneType"),
    refused_text("one name twice", "a.parquet", parquet_with_one_name_twice, "'text', once"),
    refused_text(
        "a packed column", "a.parquet", parquet(text=["a" * (1 << 20)] * 64), "more than 200 times"
    ),
    refused_text(
        "a cut .gz", "a.jsonl.gz", gzip.compress(ROWS.encode())[:-20], "cannot be read .*ended"
    ),
    refused_text(
        "a damaged .gz",
        "a.jsonl.gz",
        gzip.compress(ROWS.encode())[:30] + bytes(99),
        "cannot be read",
    ),
    refused_text(
        "4 GB in one packed line", "a.txt.gz", members(b"a" * (32 << 20), 128), "longer than 64 MB"
    ),
    refused_text(
        "4 GB of short packed lines",
        "a.txt.gz",
        members(b"to be\n\n" * (1 << 20), 600),
        "more than 200 times its size",
    ),
    refused_text(
        "4 GB of packed JSON",
        "a.jsonl.gz",
        members(b'{"text": "to be"}\n' * (1 << 20), 200),
        "more than 200 times its size",
    ),
    refused_text("a line of 100 MB", "a.txt", b"a" * (100 << 20), "line 1: longer than 64 MB"),
    refused_text(
        "a JSON line of 100 MB",
        JSONL,
        b'{"text": "' + b"a" * (100 << 20) + b'"}',
        "line 1: longer than 64 MB",
    ),
    refused_text("an empty file", "a.txt", b"", r"holds no text \(0 bytes\)"),
    refused_text("blank lines only", "a.txt", b" \n\t\n\r\n" * 1000, "holds no text"),
    refused_text("blank documents only", JSONL, b'{"text": " "}\n' * 9, "holds no text"),
    refused_text(
        "no field text", JSONL, b'{"body": "a"}\n', "an object with body, expected a field"
    ),
    refused_text("a number as text", JSONL, b'{"text": 3}\n', "field 'text' holds a int"),
    refused_text("null as text", JSONL, b'{"text": null}\n', "field 'text' holds a NoneType"),
    refused_text("a list as text", JSONL, b'{"text": ["a"]}\n', "field 'text' holds a list"),
    refused_text(
        "the field twice", JSONL, b'{"text": "a", "text": "b"}\n', "gives the field 'text' twice"
    ),
    refused_text("deep JSON", JSONL, b"[" * 200_000 + b"]" * 200_000, NOT_JSON),
    refused_text("deep objects", JSONL, b'{"text":' * 200_000, NOT_JSON),
    refused_text("a number of 5,000 digits", JSONL, b'{"text": ' + b"1" * 5000 + b"}", NOT_JSON),
    refused_text("a JSON array", JSONL, b'["a", "b"]\n', "found a JSON list, expected a field"),
    refused_text(
        "JSON on several lines", JSONL, json.dumps([{"text": "a"}], indent=1).encode(), NOT_JSON
    ),
    refused_text(
        "escapes in a field's name",
        JSONL,
        json.dumps({"\x1b[31m\n" * 99: 1}).encode(),
        r"an object with '\\x1b\[31m\\n",
    ),
    refused_text(
        "100,000 fields",
        JSONL,
        json.dumps({f"field {i}": i for i in range(100_000)}).encode(),
        r"field 4, \.\.\., expected a field 'text'",
    ),
    refused_text("a pipe", "a.txt", os.mkfifo, "a.txt is a pipe, device or socket; name a file"),
    refused_text("a socket", "a.txt", listening_socket, "is a pipe, device or socket"),
    refused_text(
        "a link to a device",
        "a.txt",
        lambda path: path.symlink_to("/dev/zero"),
        "is a pipe, device",
    ),
    refused_text(
        "a link to itself",
        "a.txt",
        lambda path: path.symlink_to(path),
        "a.txt cannot be read .*link",
    ),
    refused_text(
        "a link to nothing",
        "a.txt",
        lambda path: path.symlink_to("gone"),
        "cannot be read .No such",
    ),
    refused_text("a folder", "a.txt", Path.mkdir, "a.txt is a folder; name its files"),
    refused_text("a suffix in capitals", "a.TXT", TEXT.encode(), "unknown suffix; expected one of"),
    refused_text("no such suffix", "a.json", ROWS.encode(), "unknown suffix; expected one of"),
    Hostile(
        "text files",
        "a pattern that matches nothing",
        writer("a.txt", b"a"),
        [*PREPARE, "--files", "*.jsonl"],
        "files: '[*].jsonl' matches nothing; check the path",
    ),
    Hostile(
        "text files",
        "braces",
        writer("a.txt", b"a"),
        [*PREPARE, "--files", "{a,b}.txt"],
        "braces are not expanded",
    ),
    Hostile(
        "text files",
        "a pattern of 5,000 letters",
        writer("a.txt", b"a"),
        [*PREPARE, "--files", "a" * 5000],
        "matches nothing",
    ),
    refused_text("one document", "a.txt", b"a b c", "has 1 documents .*nothing is left"),
    accepted_text("a name like a pattern", "a[1].txt", TEXT.encode(), WORDS),
    accepted_text(
        "one file under three names",
        "a.txt",
        TEXT.encode(),
        WORDS,
        files=["a.txt", "./a.txt", "../input/*.txt"],
    ),
    accepted_text("a byte order mark", JSONL, b"\xef\xbb\xbf" + ROWS.encode(), WORDS),
    accepted_text(
        "a mark in the middle",
        JSONL,
        ROWS.encode() + b"\xef\xbb\xbf" + ROWS.encode(),
        [*WORDS, *WORDS],
    ),
    accepted_text("CR LF", "a.txt", TEXT.replace("\n", "\r\n").encode(), WORDS),
    accepted_text(
        "lone surrogates",
        JSONL,
        ROWS.encode() + b'{"text": "a \\ud800 b"}\n',
        [*WORDS, "a ? b"],
    ),
    accepted_text(
        "an escaped NUL", JSONL, ROWS.encode() + b'{"text": "a \\u0000 b"}\n', [*WORDS, "a \0 b"]
    ),
    accepted_text(
        "the text of EOS",
        JSONL,
        "".join(json.dumps({"text": f"{EOS} {text} {EOS}"}) + "\n" for text in WORDS).encode(),
        [f"{EOS} {text} {EOS}" for text in WORDS],
        no_document_ends_inside,
    ),
    accepted_text(
        "a run of a million letters",
        "a.txt",
        f"{'a' * 1_000_000}\n\n{TEXT}".encode(),
        ["a" * 1_000_000, *WORDS],
    ),
    accepted_text(
        "a run of a million blanks",
        JSONL,
        json.dumps({"text": "a" + " " * 1_000_000 + "b"}).encode() + b"\n" + ROWS.encode(),
        ["a" + " " * 1_000_000 + "b", *WORDS],
    ),
    accepted_text(
        "a run of a million signs",
        "a.txt",
        f"{'=-' * 500_000}\n\n{TEXT}".encode(),
        ["=-" * 500_000, *WORDS],
    ),
]


@cache
def checkpoint() -> Path:
    """An untrained denoiser with a BPE of WORDS and windows of 32 tokens."""
    folder = Path(tempfile.mkdtemp(prefix="halfstep-lambada-"))
    return write_checkpoint(folder / "model", train_bpe(WORDS, 300))


SCORE = ["score-lambada", "--checkpoint", "model", "--corpus", "none", "--output", "out/rows.json"]
SCORE += ["--device", "cpu", "--micro-batch", "8", "--bootstrap", "100"]


def items(name, file, content, pattern, count=None):
    """A file of LAMBADA items: refused, or `count` items are scored."""

    def make(folder):
        shutil.copytree(checkpoint(), folder / "model")
        writer(file, content)(folder)

    def check(folder):
        rows = json.loads((folder / "out/rows.json").read_text())
        assert {row["num_samples"] for row in rows} == {count}

    return Hostile("LAMBADA files", name, make, [*SCORE, "--lambada", file], pattern, check)


THREE = [text.removesuffix(".") for text in WORDS[:3]]
ITEMS = "".join(json.dumps({"text": text}) + "\n" for text in THREE)
NO_ITEM = "items.jsonl:2 is not .* with a word after the last space; correct the line"


def second(line):
    return ITEMS.splitlines()[0].encode() + b"\n" + line + b"\n"


LAMBADA = [
    items("a byte order mark", "items.jsonl", b"\xef\xbb\xbf" + ITEMS.encode(), None, 3),
    items("blank lines", "items.jsonl", ITEMS.replace("\n", "\n \n\n").encode(), None, 3),
    items("blanks after the object", "items.jsonl", ITEMS.replace("\n", " \t\n").encode(), None, 3),
    items("CR LF", "items.jsonl", ITEMS.replace("\n", "\r\n").encode(), None, 3),
    items("no LF at the end", "items.jsonl", ITEMS.rstrip().encode(), None, 3),
    items("packed", "items.jsonl.gz", gzip.compress(ITEMS.encode()), None, 3),
    items("a lone surrogate", "items.jsonl", second(b'{"text": "a \\udc00 cat"}'), None, 2),
    items("the text of EOS", "items.jsonl", second(b'{"text": "a <|endoftext|> cat"}'), None, 2),
    items("other fields", "items.jsonl", second(b'{"id": 1, "text": "a cat"}'), None, 2),
    items("a blank at the end", "items.jsonl", second(b'{"text": "the cat "}'), NO_ITEM),
    items("a new line at the end", "items.jsonl", second(b'{"text": "the cat\\n"}'), NO_ITEM),
    items("a blank text", "items.jsonl", second(b'{"text": " "}'), NO_ITEM),
    items("a number", "items.jsonl", second(b'{"text": 3}'), NO_ITEM),
    items("no text", "items.jsonl", second(b'{"story": "a cat"}'), NO_ITEM),
    items("no object", "items.jsonl", second(b'"a cat"'), NO_ITEM),
    items("two texts", "items.jsonl", second(b'{"text": "a b", "text": "a c"}'), NO_ITEM),
    items("deep JSON", "items.jsonl", second(b'{"text":' * 100_000), NO_ITEM),
    items(
        "Latin-1", "items.jsonl", second(b'{"text": "an \xe9clair"}'), "line 2: byte 0xe9 .*latin1"
    ),
    items("UTF-16", "items.jsonl", ITEMS.encode("utf-16"), "is UTF-16; .*iconv -f utf-16"),
    items("NUL bytes", "items.jsonl", second(b"a\0b"), "line 2: holds NUL bytes"),
    items("a line of 100 MB", "items.jsonl", b"a" * (100 << 20), "line 1: longer than 64 MB"),
    items("4 GB of packed lines", "items.jsonl.gz", members(b"\n" * (1 << 24), 256), "200 times"),
    items("nothing", "items.jsonl", b"", "items.jsonl holds no items; expected one"),
    items("blank lines only", "items.jsonl", b"\n \n", "items.jsonl holds no items; expected one"),
    items(
        "a word that fills the window",
        "items.jsonl",
        second(b'{"text": "a ' + b"x" * 99 + b'"}'),
        "has 100 tokens, expected 1 to 30 in windows of 32",
    ),
    items("another suffix", "items.txt", ITEMS.encode(), "items.txt has an unknown suffix"),
    items("a folder", "items.jsonl", Path.mkdir, "items.jsonl is a folder"),
    items("a pipe", "items.jsonl", os.mkfifo, "items.jsonl is a pipe, device or socket"),
]
CASES = TEXTS + LAMBADA


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

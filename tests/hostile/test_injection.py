"""Values of the configuration stay values in commands; foreign names move no cursor."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import printed
import pytest
import synthetic
import yaml
from dryrun import REPOSITORY, copy
from hostile import Hostile, answer
from safetensors.numpy import save_file

from halfstep.errors import ConfigError
from halfstep.resolve import flags, resolve
from halfstep.workflow import messages
from halfstep.workflow.packaged import resume_command
from halfstep.workflow.sources import check_sources

PRESETS = REPOSITORY / "workflow" / "presets"
ESCAPE, TITLE, CSI, OVERRIDE = "\x1b[31m", "\x1b]0;title\x07", "\x9b2J", "\u202e"
SHOWN = r"\\x1b\[31m"  # a pattern


def configuration(key: str, value: object) -> dict:
    """The preset `ci` with one value at a key such as `evaluation.judge`.

    `files` is the key of a corpus of files.
    """
    own = {"kind": "files", "files": ["text/*.txt"], "num_documents": None}
    if key in ("files", "text_field", "tokenizer"):
        own |= {"vocab_size": 8192} if key == "tokenizer" else {"vocab_size": 300}
        tree = {"corpora": {"stories-ci": own | {key: value}}}
        return {"preset": "ci", "evaluation": {"lambada": "words.jsonl"}} | tree
    for name in reversed(key.split(".")):
        value = {name: value}
    return {"preset": "ci"} | value


@dataclass(frozen=True)
class Injected:
    """A value of the configuration that would become a flag, a wildcard or a secret in a log."""

    name: str
    key: str
    value: object
    refused: str
    kind: str = "option injection"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}".encode("ascii", "backslashreplace").decode()


FLAG, BRACES = "a command would read it as a flag; write ./-", "braces are not expanded"
SOURCE = "teachers.stories-ci.from"
INJECTED = [
    Injected("a file that is a flag", "files", ["a.txt", "--output=elsewhere"], FLAG),
    Injected("a file that is a short flag", "files", ["-h"], FLAG),
    Injected("a file that ends the flags", "files", ["--", "a.txt"], FLAG),
    Injected("a judge that is a flag", "evaluation.judge", "--output=elsewhere", FLAG),
    Injected(
        "a second judge that is a flag", "evaluation.judge", ["gpt2", "--micro-batch=1"], FLAG
    ),
    Injected("words that are a flag", "evaluation.lambada", "--corpus=elsewhere.jsonl", FLAG),
    Injected("a tokenizer that is a flag", "tokenizer", "--files=/etc/passwd", FLAG),
    Injected("weights that are a flag", SOURCE, "--output=elsewhere", FLAG),
    Injected("a field that is a flag", "text_field", "-text", FLAG),
    Injected("a file with a wildcard", "files", ["{corpus}.txt"], BRACES),
    Injected("a file with an attribute", "files", ["{workflow.__class__}.txt"], BRACES),
    Injected("a file with one brace", "files", ["a{.txt"], BRACES),
    Injected("a judge with a wildcard", "evaluation.judge", "{model}/gpt2", BRACES),
    Injected("words with a wildcard", "evaluation.lambada", "{teacher}.jsonl", BRACES),
    Injected("a tokenizer with a wildcard", "tokenizer", "{output.manifest}", BRACES),
    Injected("weights with a wildcard", SOURCE, "{input}", BRACES),
    Injected("a file with a line feed", "files", ["a.txt\n--output=x"], "control character"),
    Injected("a judge with an escape", "evaluation.judge", f"gpt2{ESCAPE}", "control character"),
    Injected("a file that runs backwards", "files", [f"a{OVERRIDE}txt.exe"], "control character"),
    Injected("weights with a password", SOURCE, "https://me:s3cr3t@h/x", "holds a password"),
    Injected("a file without a name", "files", [" "], "expected a name or a path"),
]


@pytest.mark.parametrize("case", INJECTED, ids=str)
def test_a_value_that_is_more_than_a_value_is_refused(case):
    with pytest.raises(ConfigError) as caught:
        resolve(configuration(case.key, case.value), PRESETS)
    said = str(caught.value)
    assert case.refused in said
    assert said.count("\n") == 0 and len(said) < 400
    assert printed.control_characters(said) == []
    assert "s3cr3t" not in said


ODD = [
    "with spaces.txt",
    'it\'s "quoted".txt',
    "$HOME `id` $(touch pwned) $IFS.txt",
    "a;touch pwned;#&|<>!.txt",
    "back\\slash\\n.txt",
    "comma, %s %d [1]*?.txt",
    "ünïcödé 文本.txt",
    "./-dash.txt",
    "~/home.txt",
]


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["files", "evaluation.judge", "evaluation.lambada", SOURCE])
def test_an_odd_value_reaches_the_command_as_one_word(key, value):
    """A real shell splits the flags of a section into the words of the configuration."""
    given = [value, "b.txt"] if key in ("files", "evaluation.judge") else value
    config = resolve(configuration(key, given), PRESETS)
    if key == SOURCE:
        assert config.teachers["stories-ci"].source == value
        return
    section = config.corpora["stories-ci"] if key == "files" else config.evaluation
    name = key.rpartition(".")[2]
    call = f"printf '%s\\0' {flags(section, name)}"
    said = subprocess.run(["bash", "-c", call], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[1:-1] == (given if isinstance(given, list) else [given])


def test_a_file_of_text_that_snakemake_would_rename_is_refused(tmp_path, monkeypatch):
    """The pattern is harmless; a file that it matches is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "words.jsonl").write_text('{"text": "one word"}\n')
    config = resolve(configuration("files", ["text/*.txt"]), PRESETS)
    for name, fault in (("{x}.txt", "braces"), (f"{ESCAPE}.txt", "control character")):
        (tmp_path / "text" / name).write_text("one")
        with pytest.raises(
            ConfigError, match=f"^corpora.stories-ci.files: found .*{fault}"
        ) as said:
            check_sources(config)
        assert printed.control_characters(str(said.value)) == []
        (tmp_path / "text" / name).unlink()
    (tmp_path / "text" / "plain.txt").write_text("one")
    check_sources(config)


def test_snakemake_takes_odd_names_as_they_are(tmp_path):
    """A dry run refuses a flag in one line; a real run reads files with odd names, and no other."""
    workflow = copy(tmp_path)
    text = "\n\n".join(f"The {i} foxes tell the same old story to each other." for i in range(99))
    (tmp_path / "my text").mkdir()
    for name in ODD:
        if "/" not in name:
            (tmp_path / "my text" / name).write_text(text)
    (tmp_path / "words.jsonl").write_text('{"text": "one two"}\n')
    target = "results/data/stories-ci/manifest.json"

    def snakemake(files: list[str], *options: str) -> subprocess.CompletedProcess:
        config = configuration("files", files)
        config["corpora"]["stories-ci"] |= {"length": 128, "validation_documents": 40}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        return workflow.run(target, "--cores", "1", "-p", *options)

    refused = snakemake(["my text/*.txt", "--output=elsewhere"], "-n")
    assert refused.returncode != 0
    assert "configuration: corpora.stories-ci.files.1: found '--output=elsewhere'" in refused.stderr

    patterns = ["my text/with*", "my text/it's*", "my text/$HOME `id` *", "my text/a;touch pwned;*"]
    done = snakemake([*patterns, "my text/back*", "my text/comma, %s*", "my text/ü*"])
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / target).with_name("provenance.json").read_text())
    names = {os.path.basename(path) for path in record["inputs"]}
    assert names == {name for name in ODD if "/" not in name}
    assert not list(tmp_path.rglob("pwned*")) and not (tmp_path / "elsewhere").exists()


# -- terminal escapes --------------------------------------------------------------------------


def folder_named(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).mkdir()


def foreign_keys(folder: Path) -> None:
    save_file({f"{ESCAPE}key{OVERRIDE}": np.zeros(2, np.float32)}, folder / "w.safetensors")


def foreign_files(folder: Path) -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / f"{ESCAPE}model.bin").write_text("x")


def binary_text(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(b"\xff\xfe\x00broken\x00")


def undecodable(folder: Path) -> None:
    with open(os.fsencode(folder) + b"/\xff\xfe.jsonl", "w") as file:
        file.write("{broken\n")


def foreign_row(folder: Path) -> None:
    rows = [{"metric": ESCAPE, "model": f"a/{TITLE}", "value": 1.0}]
    (folder / "rows.json").write_text(json.dumps(rows))


def foreign_record(folder: Path) -> None:
    record = {"format": 1, "outputs": {f"{ESCAPE}.bin": "0" * 64}, "inputs": {}, "command": []}
    (folder / "provenance.json").write_text(json.dumps(record))


CORPUS = ["prepare-corpus", "--kind", "files", "--output", "out/corpus"]
HOSTILE = [
    Hostile(
        "option injection",
        "a flag in the place of a file",
        lambda folder: (folder / "a.txt").write_text("one"),
        [*CORPUS, "--files", "a.txt", "--files=--output=elsewhere"],
        "found '--output=elsewhere': a command would read it as a flag",
    ),
    Hostile(
        "option injection",
        "a flag in the place of a tokenizer",
        lambda folder: (folder / "a.txt").write_text("one"),
        [*CORPUS, "--files", "a.txt", "--tokenizer=--output"],
        "found '--output': a command would read it as a flag",
    ),
    *(
        Hostile("terminal escapes", name, make, arguments, refused)
        for name, make, arguments, refused in [
            ("a command", lambda folder: None, [f"{ESCAPE}verify"], SHOWN),
            ("a flag", lambda folder: None, ["verify", f"--{ESCAPE}x"], SHOWN),
            ("a folder that is not there", lambda folder: None,
             ["export", "--checkpoint", f"{ESCAPE}model", "--output", "out/x"], SHOWN),
            ("the title of the window", lambda folder: None,
             ["verify", TITLE], r"\\x1b\]0;title\\x07"),
            ("an 8-bit escape", lambda folder: None, ["verify", CSI], r"\\x9b2J"),
            ("an overriding direction", folder_named(f"{OVERRIDE}gnp.exe"),
             ["verify", f"{OVERRIDE}gnp.exe"], r"\\u202egnp.exe"),
            ("a line feed in a folder's name", folder_named("two\nlines"),
             ["verify", "two\nlines"], r"two\\nlines"),
            ("a carriage return", lambda folder: None,
             ["verify", "bad\rgood"], r"bad\\x0dgood"),
            ("a backspace and a bell", lambda folder: None,
             ["summary", "--results", "a\x08\x07"], r"a\\x08\\x07"),
            ("a separator of lines", folder_named("a\u2028b"),
             ["verify", "a\u2028b"], r"a\\u2028b"),
            ("the name of a tensor", foreign_keys,
             ["import", "--source", "w.safetensors", "--corpus", "out", "--output", "out/model"],
             rf"(?s){SHOWN}|no such|manifest"),
            ("the name of a file of weights", foreign_files,
             ["import", "--source", "weights", "--corpus", "out", "--output", "out/model"],
             rf"{SHOWN}|manifest"),
            ("the name of a text", binary_text(f"{ESCAPE}.txt"),
             [*CORPUS, "--files", "*.txt"], SHOWN),
            ("the name of a text in a flag", binary_text(f"{ESCAPE}.txt"),
             [*CORPUS, "--files", f"{ESCAPE}.txt"], "has a control character"),
            ("a file whose name is not UTF-8", undecodable,
             [*CORPUS, "--files", "*.jsonl"], r"\\udcff\\udcfe.jsonl"),
            ("a row of a table", foreign_row,
             ["tabulate", "--table", "steps", "--metrics", "rows.json", "--output", "out/x.csv"],
             None),
            ("a repository", lambda folder: None,
             ["fetch", "--repositories", f"{ESCAPE}:x", "--output", "out/hub.json"], SHOWN),
            ("a server", lambda folder: None, ["track", "--results", f"{ESCAPE}out"], SHOWN),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)


@dataclass(frozen=True)
class Shown:
    """A command that shows foreign text to people; `shown` is how it must look."""

    name: str
    make: Callable[[Path], object]
    arguments: list[str]
    shown: str
    kind: str = "terminal escapes"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def hostile_sample(folder: Path) -> None:
    """A results folder with escapes in a sample, in a table and in a name."""
    results = synthetic.write(folder / "results", rounds=1, runs=("kl_backward",), steps=[8])
    sample = results / "samples/stories-tiny/teacher/steps-8/samples.txt"
    sample.write_text(
        f"=== 0\nAnother.\n=== 1\nMira {ESCAPE}found{TITLE} a {OVERRIDE}kite{CSI}.\r\n"
    )
    tables = results / "tables"
    tables.mkdir()
    for name in ("lambada", "speed"):
        (tables / f"{name}.md").write_text(f"| {ESCAPE}{name} |\n")
    arguments = ["tabulate", "--table", "steps", "--metrics", str(results / "metrics")]
    code, text = printed.output_of([*arguments, "--output", str(tables / "steps.csv")], folder)
    assert code == 0, text


def hostile_table(folder: Path) -> None:
    """The same folder before the table of steps is made: the other tables are printed."""
    hostile_sample(folder)
    (folder / "results/tables/steps.csv").unlink()


def hostile_hub(folder: Path) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "hub.json").write_text(
        json.dumps({f"model:{ESCAPE}x": {"version": "1", "files": {}}})
    )


SHOWS = [
    Shown("a sample in summary", hostile_sample, ["summary"], r"Mira \x1b[31mfound\x1b]0;title"),
    Shown("a table in summary", hostile_table, ["summary"], r"| \x1b[31mspeed |"),
    Shown("a file in verify", foreign_record, ["verify", "."], r"\x1b[31m.bin"),
    Shown("a repository in doctor", hostile_hub, ["doctor"], r"model:\x1b[31mx"),
    Shown(
        "a folder in doctor",
        folder_named(f"{ESCAPE}r"),
        ["doctor", "--results", f"{ESCAPE}r"],
        r"\x1b[31mr",
    ),
]
CASES = [*INJECTED, *HOSTILE, *SHOWS]


@pytest.mark.parametrize("case", SHOWS, ids=str)
def test_what_is_shown_to_people_has_no_control_characters(case, tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    case.make(folder)
    _, text = printed.output_of(case.arguments, folder)
    assert case.shown in text
    assert printed.control_characters(text) == []
    assert "Traceback" not in text


def test_banners_show_the_log_of_a_failed_job_without_escapes(tmp_path, capsys):
    own, log = tmp_path / "own.log", tmp_path / "snakemake.log"
    own.write_text(f"halfstep import: key {ESCAPE}{OVERRIDE} http://me:s3cr3t@h\n")
    log.write_text(f"Error in rule import_teacher:\n    log: {own} (check log)\n")
    messages.banner(*messages.failures(log), resume_command(["--config", f"a={ESCAPE}"]))
    said = capsys.readouterr().err
    assert printed.control_characters(said) == []
    assert r"key \x1b[31m\u202e http://***@h" in said
    assert said.count("\n") == 6

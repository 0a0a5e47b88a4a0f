"""The command line: help for everybody, one sentence per fault, and former names of flags."""

import errno
import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from pseudo import Terminal
from small import MACHINE, call

import halfstep
from halfstep import cli, renamed
from halfstep.config import GenerateOptions, Training
from halfstep.distributed import launch
from halfstep.renamed import Renamed, rename_flags


def test_the_help_lists_every_command(capsys):
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["-h"]) == 0
    printed = capsys.readouterr().out
    lines = printed[: len(printed) // 3].splitlines()
    commands = [line.split()[0] for line in lines[2:] if line.startswith("  ")]
    assert commands == list(cli.COMMANDS)
    assert all(len(line) <= 100 for line in lines)


def test_the_help_is_in_groups_and_what_a_person_needs_comes_first(capsys):
    """Every command is in one group; those of the rules are in the groups below the first."""
    cli.main(["--help"])
    titles = re.findall(r"^(\w.*):$", capsys.readouterr().out, re.MULTILINE)
    assert titles == list(cli.GROUPS)
    names = [name for group in cli.GROUPS.values() for name in group]
    assert len(names) == len(set(names)) == len(cli.COMMANDS)
    assert {"doctor", "generate", "write", "summary", "plan"} <= set(cli.GROUPS[titles[0]])
    assert "write-schema" in cli.GROUPS[titles[-1]]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_function_with_a_docstring(name):
    module, function = cli.COMMANDS[name][0].split(":")
    command = getattr(importlib.import_module(module), function)
    assert command.__doc__ and command.__annotations__["return"] in (None, "None")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("scoresamples", "did you mean score-samples?"), ("xyz", "see halfstep --help")],
)
def test_an_unknown_command(capsys, word, hint):
    assert cli.main([word]) == 2
    assert capsys.readouterr().err == f"halfstep: unknown command {word!r}; {hint}\n"


@pytest.mark.parametrize("number", cli.ADVICE)
def test_the_file_system_refuses(capsys, monkeypatch, number):
    """The file, the system's words, and what to do."""

    def write_schema() -> None:
        raise OSError(number, os.strerror(number), "a/file")

    monkeypatch.setattr("halfstep.commands.config.write_schema", write_schema)
    assert cli.main(["write-schema"]) == 1
    line = f"halfstep write-schema: a/file: {os.strerror(number)}; {cli.ADVICE[number]}\n"
    assert capsys.readouterr().err == line
    assert number != errno.ENOSPC or "free some space" in line


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    def write_schema() -> None:
        raise OSError("no number: not from the file system")

    monkeypatch.setattr("halfstep.commands.config.write_schema", write_schema)
    with pytest.raises(OSError, match="no number"):
        cli.main(["write-schema"])


NOTICE = "--draw-dtype is the former name of --sampler and works for one release only; "


def test_a_former_flag_works_with_one_warning(pipeline, capsys, tmp_path):
    """It writes the same tokens as the new flag, and --help lists only the new one."""
    write = f"generate --checkpoint {pipeline.student} --steps 4 --num-samples 3 {MACHINE}"
    assert call(f"{write} --output {tmp_path}/old --draw-dtype float32-released") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "draw" in line]
    assert warnings == [f"halfstep generate: {NOTICE}write --sampler ancestral_float32"]
    assert call(f"{write} --output {tmp_path}/new --sampler ancestral_float32") == 0
    assert "draw" not in capsys.readouterr().err
    old, new = ((tmp_path / name / "samples.npy").read_bytes() for name in ("old", "new"))
    assert old == new
    facts = json.loads((tmp_path / "old" / "samples.json").read_text())
    assert (facts["sampler"], facts["draw_dtype"]) == ("ancestral_float32", "float32-released")
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    printed = capsys.readouterr().out
    assert "--sampler" in printed and "draw-dtype" not in printed and "draw_dtype" not in printed


def test_a_value_that_a_former_flag_refused_is_refused(pipeline, capsys, tmp_path):
    write = f"generate --checkpoint {pipeline.student} --output {tmp_path}/out --steps 4 {MACHINE}"
    for flags, sentence in (
        (
            "--sampler block --draw-dtype float32-released",
            "draw_dtype float32-released is the noise of sampler ancestral, "
            "found sampler block; change one of the two",
        ),
        (
            "--draw-dtype float16",
            "draw_dtype: found 'float16', allowed are float64 and float32-released",
        ),
    ):
        assert call(f"{write} {flags}") == 1
        assert capsys.readouterr().err == f"halfstep generate: {sentence}\n"
    assert not (tmp_path / "out").exists()


def test_the_ranks_of_a_job_warn_once(pipeline, capsys, tmp_path, monkeypatch):
    """Every rank parses the same flags; they share the launcher's folder."""
    monkeypatch.setenv(launch.PRINTED, str(tmp_path))
    for rank in range(3):
        call(
            f"generate --checkpoint none --output {tmp_path}/{rank} --draw-dtype float64 --steps 2"
        )
    printed = capsys.readouterr().err
    assert printed.count(f"{NOTICE}leave it out") == 1


def function_of(section):
    def command(options: section, prompt: str = "") -> None: ...

    return command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--steps 8 --draw-dtype float32-released", "--steps 8 --sampler ancestral_float32"),
        ("--draw_dtype=float32-released --steps 8", "--steps 8 --sampler ancestral_float32"),
        ("--draw-dtype float64 --sampler block", "--sampler block"),
        ("--sampler block --prompt --draw-dtypes", "--sampler block --prompt --draw-dtypes"),
    ],
)
def test_words_with_a_function(words, expected):
    found, notices = rename_flags(words.split(), function_of(GenerateOptions))
    assert " ".join(found) == expected
    assert len(notices) == (words != expected)
    assert rename_flags(words.split(), function_of(Training)) == (words.split(), [])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--old-name 3 --lr 1", "--new-name 3 --lr 1"),
        ("--old_name=3", "--new-name=3"),
        ("--old-name 3 4 5 --lr 1", "--new-name 3 4 5 --lr 1"),
        ("--no-old-name", "--no-new-name"),
        ("--old-names 3", "--old-names 3"),
    ],
)
def test_words_without_a_function(monkeypatch, words, expected):
    """The next renaming is one row: values, lists and switches move as they are."""
    monkeypatch.setattr(renamed, "RENAMED", [Renamed(Training, "old_name", "new_name")])
    found, notices = rename_flags(words.split(), function_of(Training))
    assert " ".join(found) == expected
    notice = "--old-name is the former name of --new-name and works for one release only; "
    assert notices == [f"{notice}write --new-name"] * (words != expected)


def test_the_version(capsys):
    assert cli.main(["--version"]) == cli.main(["-V"]) == 0
    assert capsys.readouterr().out == f"halfstep {halfstep.__version__}\n" * 2


def completed(script, *words):
    """What bash offers for the last of these words of a command line."""
    array = " ".join(f"'{word}'" for word in ("halfstep", *words))
    call = f"COMP_WORDS=({array}); COMP_CWORD={len(words)}; _tyro_halfstep"
    lines = f'{script}\n{call}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash"], input=lines, capture_output=True, text=True, timeout=60)
    return {line.split("\t")[0] for line in done.stdout.splitlines()}


def test_bash_completes_commands_and_flags(capsys):
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "") >= set(cli.COMMANDS)
    assert completed(script, "score-s") == {"score-samples"}
    assert {"--num-steps", "--batch-size", "--corpus"} <= completed(script, "pretrain", "--")
    assert completed(script, "generate", "--sampler", "ancest") == {
        "ancestral",
        "ancestral_float32",
    }


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "zsh"]])
def test_completion_for_other_shells(capsys, words):
    assert cli.main(["--print-completion", *words]) == 2
    assert "name one of bash, zsh, fish" in capsys.readouterr().err


@pytest.fixture
def unread(monkeypatch):
    """Standard output is a pipe whose reader has left."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr("sys.stdout", stream)
        yield
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_a_reader_that_leaves_is_no_error(unread, capsys, name):
    """As in `halfstep --help | head -1`."""
    try:
        code = cli.main([name, "--help"] if name else ["--help"])
    except SystemExit as stopped:
        code = stopped.code
    assert code in (0, None)


def test_a_command_ends_its_work_after_its_reader_has_left(unread, tmp_path):
    assert cli.main(["write-schema", "--output", f"{tmp_path}/schema.json"]) == 0
    assert json.loads((tmp_path / "schema.json").read_text())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_fits_a_terminal_of_80_columns(monkeypatch, capsys, name):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_has_plain_types_and_no_empty_defaults(capsys, name):
    """No `{None}|INT`, no `(default: )`, and no indentation of the source in a description."""
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    printed = capsys.readouterr().out
    assert not re.search(r"None|\{\[|(\w+) \[\1 \.\.\.\]|default:\s*\)|\S {8,}\S.* {8,}", printed)


def test_the_checkpoint_may_come_first_without_its_flag(pipeline, capsys):
    options = f"--steps 2 {MACHINE}"
    assert call(f"generate --checkpoint {pipeline.student} {options}") == 0
    named = capsys.readouterr().out
    assert call(f"generate {pipeline.student} {options}") == 0
    assert capsys.readouterr().out == named
    with pytest.raises(SystemExit):
        call(f"summary {pipeline.student}")  # has no checkpoint
    assert "Unrecognized options" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["init", "generate"])
def test_help_on_a_terminal_has_no_colors(monkeypatch, name):
    """They are control characters, which would be printed as words."""
    monkeypatch.delenv("PYTHON_TYRO_ANSI_CODES", raising=False)
    with Terminal(name, "--help") as terminal:
        assert terminal.end() == 0
    assert f"usage: halfstep {name} " in terminal.printed and "x1b" not in repr(terminal.printed)


def test_head_reads_what_a_shell_pipes(tmp_path):
    line = f"set -o pipefail; {sys.executable} -m halfstep.cli --help | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: halfstep")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_full_disk_behind_standard_output_is_one_line(tmp_path):
    line = f"{sys.executable} -m halfstep.cli write-schema --output {tmp_path}/a >/dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"halfstep write-schema: No space left on device; {cli.SPACE}\n"


@pytest.mark.parametrize(
    ("text", "number"), [("1e3", 1000), ("1_000", 1000), ("1.0e3", 1000), ("1000.0", 1000)]
)
def test_whole_numbers_of_flags(text, number):
    words = ["--num-samples", text, "--prompt", text]
    found = cli.parse_arguments(function_of(GenerateOptions), "test", words)
    assert found["options"].num_samples == number and found["prompt"] == text


@pytest.mark.parametrize("text", ["1e-3", "1.5", "ten", "1e400", "nan", ""])
def test_other_numbers_are_explained(capsys, text):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["summary", "--width", text])
    assert stopped.value.code == 2
    line = f"halfstep summary: Error parsing --width: found {text}, expected a whole number"
    assert capsys.readouterr().err.startswith(line)


def test_an_option_without_effect_is_said(pipeline, capsys, tmp_path):
    write = f"generate --num-samples 2 {MACHINE}"
    options = "--steps 4 --top-p 0.9"
    assert call(f"{write} --checkpoint {pipeline.student} --output {tmp_path}/a {options}") == 0
    assert "note: --top-p 0.9 has no effect on a diffusion model\n" in capsys.readouterr().err
    options = "--steps 8 --sampler block"
    assert call(f"{write} --checkpoint {pipeline.baseline} --output {tmp_path}/b {options}") == 0
    printed = capsys.readouterr().err
    assert "note: --steps 8 has no effect: this model takes one step per token\n" in printed
    assert "note: --sampler block has no effect on an autoregressive model\n" in printed
    options = "--steps 24 --top-p 0.9"
    assert call(f"{write} --checkpoint {pipeline.baseline} --output {tmp_path}/c {options}") == 0
    assert "note" not in capsys.readouterr().err

"""Hostile arguments of the command line."""

import os

import pytest
from hostile import Hostile, answer

LONG = "p" * 5000
CORPUS = "--corpus gone --output out"


def nothing(folder):
    """No file is needed."""


def speed_alone(folder):
    (folder / "results/tables").mkdir(parents=True)
    (folder / "results/tables/speed.md").write_text("fast\n")


def case(name, line, refused, make=nothing, last=()):
    """The arguments are the words of a line, and `last`, which may hold blanks."""
    return Hostile("command line", name, make, [*line.split(), *last], refused)


WRITE = "generate --checkpoint gone --output out"
CASES = [
    case("an unknown command", "frobnicate", "unknown command 'frobnicate'"),
    case("a command of 5,000 letters", LONG, "unknown command 'ppp.*see halfstep --help"),
    case("a command that is empty", "", "unknown command ''", last=[""]),
    case("a command of escape codes", "", r"unknown command '\\x1b\[31m", last=["\x1b[31mred"]),
    case("a command that is no text", "", r"command '\\udcff'", last=[os.fsdecode(b"\xff")]),
    case("a flag in place of a command", "--versoin", "unknown command '--versoin'"),
    case("no command", "", None),
    case("the version", "--version", None),
    case("completion without a shell", "--print-completion", "name one of bash, zsh, fish"),
    case("completion of another shell", "--print-completion ksh", "name one of bash, zsh, fish"),
    case("an unknown flag", "summary --widht 3", "Unrecognized options: --widht"),
    case("an unknown flag of 5,000 letters", f"summary --{LONG} 3", "Unrecognized options"),
    case("escape codes as a flag", "summary", "Unrecognized options", last=["--\x1b[31m"]),
    case("a flag without its value", f"{WRITE} --steps", r"--steps: found \[\]: list should"),
    case("a required flag left out", "generate --steps 8", "generate: missing: --checkpoint"),
    case("a word that is left out", "write --steps 8", "write: missing: --checkpoint PATH;"),
    case("a folder that is no model", "write gone", "gone: not a finished checkpoint"),
    case("texts that are watched and written", f"{WRITE} --watch", "--watch: found --output out t"),
    case("a project without configuration", "run all", "config.yaml: not found.*halfstep init"),
    case("a text that is not there", "init --text gone", "files: 'gone' matches nothing"),
    case("a name that is no text", "init --text", "'bad.*udcff'.*: value error, has a control char",
         last=[os.fsdecode(b"bad\xff")]),
    case("a word too many", "summary results", "Unrecognized options: results"),
    case("an unknown sampler", f"{WRITE} --steps 8 --sampler fast", "invalid choice 'fast'"),
    case("a word for a number", "summary --width wide", "found wide, expected a whole number"),
    case("a fraction for a number", "summary --width 7.5", "found 7.5, expected a whole number"),
    case("a number of 5,000 digits", f"summary --width {'9' * 5000}", "expected a whole number"),
    case("an empty number", "summary --width", "expected a whole number", last=[""]),
    case("a width of zero", "summary --width 0", "--width: found 0: input should be greater"),
    case("a width of 1e9", "summary --width 1e9", "--width: found 1000000000: input should be le"),
    case("10^12 steps", f"{WRITE} --steps 1000000000000", r"found \[1000000000000\]: input"),
    case("1e12 steps", f"{WRITE} --steps 1e12", r"found \[1000000000000\]: input"),
    case("zero steps", f"{WRITE} --steps 0", r"--steps: found \[0\]: input should be great"),
    case("minus eight steps", f"{WRITE} --steps -8", r"--steps: found \[-8\]: input should be"),
    case("1e15 samples", f"{WRITE} --steps 8 --num-samples 1e15", "num_samples: found 1000000"),
    case("a seed of 128 bits", f"{WRITE} --steps 8 --sampling-seed {2**127}", "sampling_seed: f"),
    case("a negative seed", f"pretrain {CORPUS} --seed -1", "--seed: found -1: input should be"),
    case("a seed of 64 bits", f"train-baseline {CORPUS} --seed {2**64}", "--seed: found 184467"),
    case("10^11 rounds", f"distill-round {CORPUS} --teacher gone --round 1 --rounds 100000000000",
         "rounds: found 100000000000: input should be less than or equal to 20"),
    case("10^12 steps of a teacher",
         f"distill-round {CORPUS} --teacher gone --round 1 --teacher-steps 1e12",
         "teacher_steps: found 1000000000000: input should be less"),
    case("10^11 processes", f"pretrain {CORPUS} --processes 100000000000", "processes: found 1000"),
    case("no processes", f"pretrain {CORPUS} --processes 0", "processes: found 0: input should be"),
    case("10^12 threads", f"pretrain {CORPUS} --threads 1e12", "threads: found 1000000000000"),
    case("a micro-batch of zero", f"pretrain {CORPUS} --micro-batch 0", "micro_batch: found 0"),
    case("a learning rate that is no number", f"pretrain {CORPUS} --lr nan", "lr: found nan"),
    case("a negative learning rate", f"pretrain {CORPUS} --lr -1", "lr: found -1.0: input should"),
    case("a warm-up longer than the training", f"pretrain {CORPUS} --num-steps 5 --warmup-steps 9",
         r"warmup_steps \(9\) must be below num_steps \(5\)"),
    case("a temperature of zero", f"{WRITE} --steps 8 --temperature 0", "temperature: found 0.0"),
    case("a nucleus above one", f"{WRITE} --steps 8 --top-p 1.5", "top_p: found 1.5: input should"),
    case("a checkpoint of 5,000 letters", f"generate --checkpoint {LONG} --output out --steps 8",
         "File name too long"),
    case("escape codes in a path", "generate --output out --steps 8 --checkpoint",
         r"\\x1b\[31m: not a finished", last=["\x1b[31m"]),
    case("a device that does not exist", f"{WRITE} --steps 8 --device nowhere", "nowhere"),
    case("an unknown table", "tabulate --metrics gone --output out/a --table nonsense",
         "--table nonsense: no such table; known are steps"),
    case("an unknown figure of escape codes", "plot --tables gone --output out/a --figure",
         r"--figure \\x1b\[31m: no such figure", last=["\x1b[31m"]),
    case("a summary of nothing", "summary", "results/tables: holds no tables; run snakemake"),
    case("a summary of one table", "summary", None, make=speed_alone),
    case("a summary of a file", "summary --results a", "a/tables: holds no tables",
         make=lambda folder: (folder / "a").write_text("")),
    case("no data set for last words",
         "score-lambada --checkpoint gone --corpus gone --output out/a --lambada",
         "lambada: found '': expected a name or a path", last=[""]),
    case("a former flag with a wrong value", f"{WRITE} --steps 8 --draw-dtype float16",
         "draw_dtype: found 'float16', allowed are"),
    case("a folder where a file is written", "write-schema --output a", "Is a directory",
         make=lambda folder: (folder / "a").mkdir()),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_answered(case, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    answer(case, folder)

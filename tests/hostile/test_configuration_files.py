"""Hostile config.yaml: Snakemake ends with one line of ours, or plans what is meant."""

import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import forked
import pytest
from dryrun import REPOSITORY
from hostile import MEMORY, SECONDS, _peak_bytes

TARGET = "results/data/stories-ci/manifest.json"
KIND = "configuration file"


@dataclass(frozen=True)
class Configuration:
    """A config.yaml, and arguments of snakemake besides -n.

    `write` is the file's content, or a function that makes something else in its place.
    `refused` is a pattern that the line on stderr must match; None: the graph is planned.
    """

    name: str
    write: object
    refused: str | None
    arguments: list[str] = field(default_factory=lambda: [TARGET])
    kind: str = KIND

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def nested(levels, opening, closing=""):
    return "a: " + opening * levels + closing * levels + "\n"


def bomb(start, step):
    """Nine aliases of nine aliases ..., nine levels deep: 10**9 values in 500 bytes."""
    lines = [start]
    for level in range(1, 10):
        inner = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(step.format(level=level, inner=inner))
    return "\n".join(lines) + "\n"


def of_run(options):
    return f"preset: ci\nteachers: {{stories-ci: {{distillation: {{{options}}}}}}}\n"


def of_sampling(options):
    return f"preset: ci\nsampling: {{{options}}}\n"


def link(target):
    return lambda file: file.symlink_to(target)


def too_large(file):
    file.write_text("# nothing\n" * 200_000)


WRITTEN = {  # name: (content of config.yaml, pattern of the line)
    "empty": ("", "config.yaml: holds no key"),
    "comments alone": ("# preset: ci\n", "config.yaml: holds no key"),
    "a list": ("- preset\n", r"config.yaml: found \['preset'\], expected lines such as"),
    "a text": ("preset\n", "config.yaml: found 'preset', expected lines such as"),
    "a number": ("42\n", "config.yaml: found 42, expected lines such as"),
    "a key twice": ("preset: ci\npreset: laptop\n", "key preset is given on line 1 and .* line 2"),
    "a key twice, with quotes": ('seed: 1\n"seed": 2\n', "key seed is given on line 1"),
    "a key twice in one line": (of_sampling("steps: [8], steps: [9]"), "key steps is given"),
    "a key twice below a name": (
        "corpora:\n  a:\n    length: 64\n    kind: docs\n    length: 32\n",
        "key length is given on line 3 and again on line 5",
    ),
    "tabs": ("sampling:\n\tsteps: [8]\n", r"is not YAML: line 2: found character '\\t'"),
    "a NUL byte": ("preset: ci\0\n", "is not YAML: unacceptable character #x0000"),
    "an escape byte": ("preset: \x1b[31mci\n", "is not YAML: unacceptable character #x001b"),
    "an unfinished quote": ("preset: 'ci\n", "is not YAML: line"),
    "an unfinished list": ("sampling: {steps: [8\n", "is not YAML: line"),
    "two documents": ("preset: ci\n---\nseed: 2\n", "is not YAML: line 2: but found another doc"),
    "code of Python": ("a: !!python/object/apply:os.system [id]\n", "could not determine a con"),
    "an unknown tag": ("seed: !secret 5\n", "is not YAML: line 1: could not determine"),
    "a list as a key": ("? [a, b]\n: 5\n", "is not YAML: line 1: found unhashable key"),
    "an impossible date": ("seed: 2026-13-45\n", "is not YAML: month must be in 1..12"),
    "a number of 5,000 digits": (f"seed: {'9' * 5000}\n", "line 1: a number of 5000 digits"),
    "a hexadecimal number of 5,000 digits": (f"seed: 0x{'f' * 5000}\n", "a number of 5002"),
    "an alias bomb": (bomb("a0: &a0 [b]", "a{level}: &a{level} [{inner}]"), "e.* values with its"),
    "a bomb of merges": (
        bomb("a0: &a0 {b: c}", "a{level}: &a{level} {{<<: [{inner}]}}"),
        "values with its aliases",
    ),
    "an alias of itself": ("a: &a [*a]\n", "an alias contains itself"),
    "an unknown alias": ("a: *b\n", "is not YAML: line 1: found undefined alias"),
    "100,000 brackets": (nested(100_000, "["), "more than 100 levels deep"),
    "100,000 braces": (nested(100_000, "{a: "), "more than 100 levels deep"),
    "150 levels": (nested(150, "[", "]"), "more than 100 levels deep"),
    "10^11 rounds": (of_run("rounds: 100000000000"), "rounds: found 100000000000: .*equal to 20"),
    "1e11 rounds": (of_run("rounds: 1e11"), "rounds: found 1000000.*equal to 20"),
    "15 rounds of 1,024 steps": (of_run("rounds: 15, teacher_steps: 1024"), "at most 10 rounds do"),
    "10^12 sampling steps": (of_sampling("steps: [1000000000000]"), "at most 1048576 steps"),
    "1e12 sampling steps": (of_sampling("steps: [1e12]"), "found 1000000.*: expected at most 1048"),
    "minus one step": (of_sampling("steps: [-1]"), r"steps\.0: found -1: expected a whole number"),
    "no steps at all": (of_sampling("steps: []"), r"steps: found \[\]: list should have at least"),
    "half a step": (of_sampling("steps: [0.5]"), "found 0.5: expected a whole number above zero"),
    "steps as a word": (of_sampling("steps: [10^12]"), r"found '10\^12': expected a whole number"),
    "10^30 samples": (of_sampling("num_samples: 1e30"), "num_samples: found 1e.30: input should"),
    "not a number of samples": (of_sampling("num_samples: .nan"), "num_samples: found nan"),
    "a negative seed": ("preset: ci\nseed: -1\n", "seed: found -1: input should be greater"),
    "a seed of 128 bits": (f"preset: ci\nseed: {2**127}\n", "seed: found 1701411834.*: input"),
    "10^18 substeps": (of_run("substeps: 1000000000000000000"), "substeps: found 10000.*: input"),
    "a window of 10^12 tokens": (
        "preset: ci\ncorpora: {stories-ci: {length: 1e12}}\n",
        r"stories-ci\.length: found 10000.*: input should be less",
    ),
    "an infinite learning rate": (of_run("lr: .inf"), "lr: found inf: input should be a finite"),
    "a learning rate of 1e400": (of_run("lr: 1e400"), "lr: found inf: input should be a finite"),
    "a preset of 5,000 letters": (f"preset: {'p' * 5000}\n", r"found 'ppp.*\.\.\.ppp.*: no such"),
    "a preset elsewhere": ("preset: ../presets/ci\n", "found '../presets/ci': no such file"),
    "a list of presets": ("preset: [ci]\n", r"preset: found \['ci'\]: no such file"),
    "a NUL in a preset": ('preset: "ci\\0"\n', r"preset: found 'ci\\x00': no such file"),
    "escape codes in a key": ('preset: ci\n"\\e[31mred": 5\n', r"\\x1b\[31mred: found 5: unknown"),
    "escape codes in a value": (of_sampling('sampler: "\\e[2J"'), r"found '\\x1b\[2J'"),
    "a name that is a path": ("preset: ci\ncorpora: {../../x: {kind: docs}}\n", "x.*should match"),
    "a word for a truth value": (
        "preset: ci\nteachers: {stories-ci: {runs: {yes: {}}}}\n",
        r"runs.*: found True: input should be a valid string",
    ),
    "a reserved name of a run": (
        "preset: ci\nteachers: {stories-ci: {runs: {teacher: {}}}}\n",
        "a run cannot be called teacher",
    ),
    "a list for a section": ("preset: ci\nsampling: [8]\n", r"sampling: found \[8\]: input should"),
    "a text for the corpora": ("preset: ci\ncorpora: mine\n", "corpora: found 'mine': input"),
    "no corpora": ("preset: ci\ncorpora: null\n", "corpora: .*"),
    "a key of 100,000 letters": (f"preset: ci\n? {'k' * 100_000}\n: 5\n", r"k \.\.\. k+: found 5"),
}  # fmt: skip
BYTES = {
    "a byte that is not UTF-8": (b"preset: ci\nseed: \xff\n", "line 2 has a byte that is not UTF"),
    "UTF-16": ("preset: ci\n".encode("utf-16"), "is UTF-16; save the file as UTF-8"),
}
PLANNED = {
    "a byte order mark": b"\xef\xbb\xbfpreset: ci\n",
    "lines of Windows": b"preset: ci\r\nseed: 2\r\n",
    "lines of old Macs": b"preset: ci\rseed: 2\r",
    "JSON": b'{"preset": "ci", "seed": 2}',
    "1e1 for ten": of_sampling("steps: [1e1], num_samples: 1_0").encode(),
    "no runs": of_run("num_steps: 5").replace("distill", "runs: null, distill").encode(),
    "lambada: null": b"preset: ci\nevaluation: {lambada: null}\n",
}
OTHERS = {  # what is no file of text
    "a named pipe": (os.mkfifo, "is no regular file"),
    "a folder": (os.mkdir, "is no regular file"),
    "a device without an end": (link("/dev/zero"), "is no regular file"),
    "a link to nothing": (link("gone"), "No such file"),
    "a link to itself": (link("config.yaml"), "symbolic links"),
    "two megabytes": (too_large, "has 2,000,000 bytes, expected at most 1,000,000"),
}
FLAGS = {  # values of snakemake's --config
    "a preset of 5,000 letters": (["preset=" + "p" * 5000], r"found 'ppp.*: no such file"),
    "an unknown preset": (["preset=c\x1b[31m"], r"found 'c\\x1b\[31m': no such file"),
    "10^12 steps": (['sampling={"steps": [1000000000000]}'], "at most 1048576 steps"),
    "10^11 rounds": (
        ['teachers={"stories-ci": {"runs": {"kl_backward": {"rounds": 100000000000}}}}'],
        "rounds: found 100000000000: input should be less than or equal to 20",
    ),
    "an alias bomb": (
        ["sampling={" + bomb("a0: &a0 [b]", ", a{level}: &a{level} [{inner}]") + "}"],
        "values with its aliases written out",
    ),
}  # fmt: skip
CASES = [
    *(Configuration(name, text.encode(), line) for name, (text, line) in WRITTEN.items()),
    *(Configuration(name, content, line) for name, (content, line) in BYTES.items()),
    *(Configuration(name, content, None) for name, content in PLANNED.items()),
    *(Configuration(name, make, line) for name, (make, line) in OTHERS.items()),
    *(
        Configuration(
            name, b"preset: ci\n", line, [TARGET, "--config", *words], "snakemake --config"
        )
        for name, (words, line) in FLAGS.items()
    ),
]


def plan(arguments, folder, errors):
    """`snakemake -n <arguments>` in this process, in a folder."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT, 0o644), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False, errors="backslashreplace")
    os.chdir(folder)
    from snakemake.cli import main

    words = ["-n", "--quiet", "all", "--snakefile", f"{REPOSITORY}/Snakefile", *arguments]
    sys.argv, held = ["snakemake", *words], _peak_bytes()
    try:
        main(words)
    finally:
        grown = _peak_bytes() - held
        assert grown < MEMORY, f"{grown:,} bytes of memory"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_refused_in_one_line_or_planned(case, tmp_path):
    folder, errors = tmp_path / "input", tmp_path / "errors"
    folder.mkdir()
    if callable(case.write):
        case.write(folder / "config.yaml")
    else:
        (folder / "config.yaml").write_bytes(case.write)
    child = forked._context.Process(target=plan, args=(case.arguments, folder, errors))
    child.start()
    child.join(SECONDS)
    hung = child.exitcode is None
    child.kill()
    child.join()
    text = errors.read_text()
    assert not hung, f"no end after {SECONDS} seconds: {text}"
    assert "Traceback" not in text, text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text), ascii(text)
    assert {path.name for path in Path(folder).iterdir()} <= {"config.yaml", ".snakemake"}
    lines = [line for line in text.splitlines() if line.startswith("configuration: ")]
    if case.refused is None:
        assert child.exitcode == 0 and lines == [], text
        return
    assert child.exitcode == 1 and len(lines) == 1, text
    assert re.search(case.refused, lines[0]) and len(lines[0]) < 400, text

"""A disk that fills up, and a kill, at every single write of every command that writes."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults import try_all
from small import CORPUS, MACHINE, ROUND, TRAINING, done

from halfstep.commands import fetch
from halfstep.training import loop

EVALUATION = f"--bootstrap 100 {MACHINE}"
TRAIN = f"--size tiny {TRAINING} {MACHINE}"
LINES = {
    "prepare-corpus": f"{CORPUS} --workers 1",
    "pretrain": f"--corpus {{corpus}} {TRAIN}",
    "train-baseline": f"--corpus {{corpus}} {TRAIN}",
    "distill-round": f"--teacher {{teacher}} --corpus {{corpus}} {ROUND}",
    "generate": "--checkpoint {teacher} --steps 4 --temperatures 0.7 --num-samples 2 " + MACHINE,
    "draw-naive": "--corpus {corpus} --num-samples 2",
    "score-samples": "--samples {samples} --corpus {corpus} --judge {baseline}/hf " + EVALUATION,
    "score-corpus": "--corpus {corpus} --judge {baseline}/hf " + EVALUATION,
    "score-frontier": "--samples {samples} --frontier {samples} {cold} "
    "--held-out {metrics}/data.json --corpus {corpus} --judge {baseline}/hf " + EVALUATION,
    "score-lambada": "--checkpoint {teacher} --corpus {corpus} --lambada last_words "
    f"--lambada-items 2 {EVALUATION}",
    "continue-prompts": "--checkpoint {teacher} --corpus {corpus} --steps 4 --num-prompts 2 "
    "--per-prompt 2 --prompt-tokens 6 --continuation-tokens 8 --document-tokens 14 " + MACHINE,
    "score-continuations": "--samples {continued} --corpus {corpus} --judge {baseline}/hf "
    + EVALUATION,
    "latency": "--checkpoint {teacher} --baseline {baseline} --lengths 8 --batch-sizes 1 "
    f"--benchmark-steps 2 --baselines halfstep --repeats 3 {MACHINE}",
    "fetch": "--repositories model:a/b",
    "export": "--checkpoint {teacher}",
    "import": "--source {exported} --corpus {corpus}",
    "tabulate": "--table steps --metrics {metrics}",
    "plot": "--figure ppl_vs_steps --tables {results}/tables/steps.csv",
    "merge-provenance": "",
    "start-page": "",
    "write-schema": "",
}
FILES = {  # outputs that are files in the folder
    "score-samples": "rows.json",
    "score-corpus": "rows.json",
    "score-lambada": "rows.json",
    "score-continuations": "rows.json",
    "latency": "seconds.json",
    "fetch": "hub.json",
    "tabulate": "steps.csv",
    "plot": "ppl_vs_steps.pdf",
    "write-schema": "schema.json",
}


@dataclass(frozen=True)
class Fault:
    """A command, and what happens at each of its writes."""

    command: str
    fault: str
    kind: str = "failing disk"

    @property
    def name(self) -> str:
        return f"{self.command}: {self.fault}"


CASES = [
    Fault(command, fault)
    for command in LINES
    for fault in ("no space left, at each write", "kill -9, before each write")
]


def save_always() -> None:
    """Before a command: every step saves its state, and the hub holds one file."""
    loop.SAVE_EVERY_S = 0
    fetch._download = lambda repository: ("1", [Path(__file__).parent])


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads the names of open files")
@pytest.mark.parametrize("command", LINES)
def test_nothing_is_torn_and_the_next_run_is_right(pipeline, tmp_path, command):
    """Every file is whole or absent, the disk's fault is one sentence, and no part is left."""
    out = tmp_path / "t" / "out"
    output = out / FILES[command] if command in FILES else out
    inputs = {name: tmp_path / name for name in ("exported", "continued", "cold")}
    places = vars(pipeline) | inputs
    line = f"{command} --output {output} {LINES[command].format_map(places)}"
    if command == "import":
        done(f"export --checkpoint {pipeline.teacher} --output {tmp_path}/exported")
    if command == "score-continuations":
        first = LINES["continue-prompts"].format_map(places)
        done(f"continue-prompts --output {places['continued']} {first}")
    if command == "score-frontier":
        write = f"--steps 8 --temperature 0.7 --num-samples 4 {MACHINE}"
        done(f"generate --checkpoint {pipeline.teacher} --output {places['cold']} {write}")
    if command in ("merge-provenance", "start-page"):
        folder = "metrics" if command == "merge-provenance" else "tables"
        shutil.copytree(pipeline.results / folder, out / folder)
        line = f"{command} --results {out}"
    writes, left, problems = try_all(line, out, tmp_path / "log", save_always)
    print(f"{command}: {writes} writes, {left} different sets of files were left")
    assert writes >= 5 and left >= 1
    assert not problems, "\n".join(problems)

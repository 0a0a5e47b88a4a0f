"""A small finished results/ folder, made by the real commands, from the corpus to a table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from halfstep.cli import main

MACHINE = "--device cpu --threads 1 --micro-batch 8"
TRAINING = "--num-steps 2 --batch-size 8 --warmup-steps 1 --precision float32 --validate-every 2"
ROUND = f"--round 1 --rounds 2 --teacher-steps 16 --seed 3 {TRAINING} {MACHINE}"
CORPUS = "--kind stories --length 24 --vocab-size 300 --num-documents 40 --validation-documents 4"


def call(line: str) -> int:
    """The exit code of `halfstep <line>`; words are separated by spaces."""
    return main(line.split())


def done(line: str) -> None:
    """Run `halfstep <line>`, which must succeed."""
    assert call(line) == 0, line


def trainings(pipeline, options: str) -> dict[str, str]:
    """The command line of each kind of training, without its --output."""
    rounds = f"--corpus {pipeline.corpus} --rounds 2 --teacher-steps 16 {options}"
    return {
        "pretrain": f"pretrain --corpus {pipeline.corpus} --size tiny {options}",
        "train-baseline": f"train-baseline --corpus {pipeline.corpus} --size tiny {options}",
        "round-1": f"distill-round --round 1 --teacher {pipeline.teacher} {rounds}",
        "round-2": f"distill-round --round 2 --teacher {pipeline.student} {rounds}",
    }


def pipeline(root: Path) -> SimpleNamespace:
    """Fill results/ below `root`; return the folders in it."""
    results = root / "results"
    corpus, models = results / "data/stories", results / "models/stories-tiny"
    metrics = results / "metrics/stories-tiny"
    teacher, baseline, student = (
        models / name for name in ("teacher", "baseline", "kl_backward/round-1")
    )
    samples = results / "samples/stories-tiny/teacher/steps-8"
    tables = results / "tables"
    train = f"--corpus {corpus} --size tiny {TRAINING} {MACHINE}"
    score = f"--corpus {corpus} --judge {baseline}/hf --bootstrap 100 {MACHINE}"
    write = f"--steps 8 --num-samples 4 {MACHINE}"
    done(f"prepare-corpus --output {corpus} {CORPUS} --workers 1")
    done(f"pretrain --output {teacher} {train}")
    done(f"train-baseline --output {baseline} {train}")
    done(f"distill-round --teacher {teacher} --corpus {corpus} --output {student} {ROUND}")
    done(f"generate --checkpoint {teacher} --output {samples} {write}")
    done(f"score-samples --samples {samples} --output {metrics}/teacher/samples.json {score}")
    done(f"score-corpus --output {metrics}/data.json {score}")
    done(f"tabulate --table steps --metrics {results}/metrics --output {tables}/steps.csv")
    return SimpleNamespace(
        root=root,
        results=results,
        corpus=corpus,
        models=models,
        teacher=teacher,
        baseline=baseline,
        student=student,
        samples=samples,
        metrics=metrics,
    )

"""Several processes (gloo on the CPU, as torchrun starts them) do what one does: the same batches, losses within 1e-5, the same texts and scores."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import break_down, impatient, launch, note_batches, note_rows
from safetensors.torch import load_file
from small import MACHINE, done, trainings

from halfstep.config import Machine
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError

OPTIONS = f"--num-steps 6 --validate-every 3 --batch-size 8 --warmup-steps 2 --dropout 0 --precision float32 --seed 4 --lr 1e-3 {MACHINE}"


def losses(folder: Path) -> dict[tuple[int, str], float]:
    points = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {
        (p["step"], k): v
        for p in points
        for k, v in p["metrics"].items()
        if k in ("train/loss", "train/grad_norm", "val/nelbo", "val/nll")
    }


@pytest.fixture(scope="module")
def alone(pipeline, tmp_path_factory):
    """Both kinds of training in one process."""
    root = tmp_path_factory.mktemp("alone")
    for name in ("pretrain", "round-1"):
        line = trainings(pipeline, OPTIONS)[name]
        ((code, err),) = launch(
            f"{line} --output {root}/{name}/t/out", 1, root / name, note_batches, root / name, False
        )
        assert code == 0, err
    return root


@pytest.mark.parametrize(
    ("name", "size", "sharded"),
    [("pretrain", 4, False), ("round-1", 4, False), ("round-1", 2, True)],
)
def test_the_losses_and_batches_are_those_of_one_process(
    pipeline, alone, tmp_path, name, size, sharded
):
    line = trainings(pipeline, OPTIONS)[name].replace("--micro-batch 8", "--micro-batch 2")
    done = launch(
        f"{line} --processes {size} --output {tmp_path}/t/out",
        size,
        tmp_path,
        note_batches,
        tmp_path,
        sharded,
    )
    assert [code for code, _ in done] == [0] * size, done
    one, many = losses(alone / name / "t/out"), losses(tmp_path / "t/out")
    assert one.keys() == many.keys() and len(one) == 2 * 6 + 2
    for key in one:
        assert many[key] == pytest.approx(one[key], rel=1e-5), key
    batches = (alone / name / "batches-0").read_text()
    assert len(set(batches.splitlines())) == 6
    assert all((tmp_path / f"batches-{rank}").read_text() == batches for rank in range(size))
    rows = [int((tmp_path / f"rows-{rank}").read_text()) for rank in range(size)]
    assert rows == [6 * 8 // size] * size  # each its own part of every batch
    for file in ("model", "ema", "best"):
        a, b = (
            load_file(folder / "t/out" / f"{file}.safetensors")
            for folder in (alone / name, tmp_path)
        )
        assert a.keys() == b.keys() and all(
            torch.allclose(a[k], b[k], atol=2e-3) for k in a
        )  # Adam divides by small moments
    assert sum("step 6/6" in err for _, err in done) == 1  # one process speaks and writes
    assert not list((tmp_path / "t/out").glob(".*")) and not (tmp_path / "t/out/state").exists()


def test_texts_are_drawn_once_and_come_in_order(pipeline, tmp_path):
    """Seven texts on three processes: the bits of one process."""
    line = f"generate --checkpoint {pipeline.student} --steps 8 --num-samples 7 {MACHINE}"
    for size in (1, 3):
        done = launch(f"{line} --output {tmp_path}/{size}", size, tmp_path / f"log-{size}")
        assert [code for code, _ in done] == [0] * size, done
    one, three = (np.load(tmp_path / size / "samples.npy") for size in "13")
    assert np.array_equal(one, three) and len({tuple(row) for row in three}) == 7
    about = [json.loads((tmp_path / size / "samples.json").read_text()) for size in "13"]
    assert (
        about[0]["network_evaluations"] == about[1]["network_evaluations"]
        and about[1]["num_samples"] == 7
    )


SCORING = "--bootstrap 100 --lambada last_words --lambada-items 14 --device cpu --threads 1 --micro-batch 4"
NUMBERS = "value", "low", "high"
PROMPTS = (
    "--num-prompts 3 --per-prompt 4 --prompt-tokens 4 --continuation-tokens 8 --document-tokens 12"
)


def scoring(pipeline, samples: Path, root: Path) -> dict[str, str]:
    """Commands that write below `root`, by the file that each writes."""
    judged = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf {SCORING}"
    examined = f"--corpus {pipeline.corpus} {SCORING}"
    written = f"--checkpoint {pipeline.student} --corpus {pipeline.corpus} --steps 4 {PROMPTS} --device cpu --threads 1 --micro-batch 4"
    return {
        "samples.json": f"score-samples --samples {samples} --output {root}/samples.json {judged}",
        "tiny/data.json": f"score-corpus --output {root}/tiny/data.json {judged}",
        "student.json": f"score-lambada --checkpoint {pipeline.student} --output {root}/student.json {examined}",
        "baseline.json": f"score-lambada --checkpoint {pipeline.baseline} --output {root}/baseline.json {examined}",
        "texts/samples.json": f"continue-prompts --output {root}/texts {written}",
        "continuations.json": f"score-continuations --samples {root}/texts --output {root}/continuations.json {judged}",
    }


@pytest.fixture(scope="module")
def samples(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "samples"
    done(
        f"generate --checkpoint {pipeline.student} --output {folder} --steps 8 --num-samples 12 {MACHINE}"
    )
    return folder


@pytest.fixture(scope="module")
def scored(pipeline, samples, tmp_path_factory):
    """What one process writes and reads."""
    root = tmp_path_factory.mktemp("scored")
    ((code, err),) = launch(
        " && ".join(scoring(pipeline, samples, root).values()), 1, root, note_rows, root
    )
    assert code == 0, err
    return root


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_scored_or_written_twice_and_scores_are_those_of_one_process(
    pipeline, samples, scored, tmp_path, size
):
    """To the bit where three processes' batches of four are one's, to float32 rounding where batches differ (a text is padded to another length)."""
    lines = scoring(pipeline, samples, tmp_path)
    done = launch(" && ".join(lines.values()), size, tmp_path, note_rows, tmp_path)
    assert [code for code, _ in done] == [0] * size, done
    rows = [(tmp_path / f"rows-{rank}").read_text().splitlines() for rank in range(size)]
    whole = (scored / "rows-0").read_text().splitlines()
    assert {f"file {name}" for name in lines} < {*rows[0]} and sum(
        map(Counter, rows), Counter()
    ) == Counter(whole)
    assert (
        not any(line.startswith("file") for line in sum(rows[1:], []))
        and min(map(len, rows)) > len(whole) / size / 2
    )
    assert np.array_equal(*(np.load(root / "texts/samples.npy") for root in (scored, tmp_path)))
    for name in lines:
        one, many = (json.loads((root / name).read_text()) for root in (scored, tmp_path))
        if name == "texts/samples.json":
            assert one | {"elapsed_s": 0} == many | {"elapsed_s": 0}
            continue
        same_batches = size == 3 and name in ("samples.json", "continuations.json")
        for a, b in zip(one, many, strict=True):
            rounding = 0 if same_batches and a["protocol"] != "retokenized" else 2e-6
            assert {key: b[key] for key in a if key not in NUMBERS} == {
                key: a[key] for key in a if key not in NUMBERS
            }
            assert [b[key] for key in NUMBERS] == pytest.approx(
                [a[key] for key in NUMBERS], rel=rounding, abs=0
            ), (a, b)
        assert (tmp_path / name).with_suffix(".provenance.json").is_file()
    assert (
        "judge, ids | text" in done[0][1]
        and "likelihood | item" in done[0][1]
        and not any(err for _, err in done[1:])
    )  # one process speaks


@pytest.mark.parametrize(("name", "rank", "how"), [
    ("samples.json", 1, "broke"), ("student.json", 0, "broke"), ("student.json", 1, "killed"), ("texts/samples.json", 2, "killed"),
])  # fmt: skip
def test_an_error_of_one_process_ends_all(pipeline, samples, tmp_path, name, rank, how):
    done = launch(
        scoring(pipeline, samples, tmp_path)[name], 3, tmp_path, break_down, rank, how, timeout=60
    )
    code, said = done.pop(rank)
    assert code == -9 if how == "killed" else (code, said.count("the network broke down")) == (1, 1)
    for code, said in done:
        assert (
            code == 1
            and "another process of this job has ended" in said
            and "Traceback" not in said
        )
    assert not (tmp_path / name).exists()


def test_one_that_never_comes(pipeline, tmp_path):
    """Two of three processes: a sentence when the time is over, no traceback."""
    line = f"generate --checkpoint {pipeline.student} --output {tmp_path}/texts --steps 2 --num-samples 3 {MACHINE}"
    (_, absent), *done = launch(line, 3, tmp_path, impatient, 0)
    assert not absent
    for code, said in done:
        assert (
            code == 1
            and "processes: 3 were to meet, but not all did within 0.05 minutes" in said
            and "Traceback" not in said
        )


def test_fewer_texts_than_processes(pipeline, tmp_path):
    """Who has no text waits for the others."""
    line = f"generate --checkpoint {pipeline.student} --output {tmp_path}/texts --steps 2 --num-samples 1 {MACHINE}"
    line += f" && score-samples --samples {tmp_path}/texts --output {tmp_path}/rows.json --corpus {pipeline.corpus} --judge {pipeline.baseline}/hf {MACHINE}"
    assert [code for code, _ in launch(line, 3, tmp_path)] == [0] * 3
    assert {
        row["num_samples"]
        for row in json.loads((tmp_path / "rows.json").read_text())
        if row["protocol"] == "ids"
    } == {1}


@pytest.mark.parametrize("n", [1, 5, 8, 12])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_shares_are_every_row_once_in_order(n, size):
    shares = [list(range(n))[Group(rank, size).share(n)] for rank in range(size)]
    assert sum(shares, []) == list(range(n)) and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_another_number_of_processes_than_asked_for(monkeypatch):
    """What a Slurm job without torchrun would do: run once, alone, and seem to work."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group(Machine()) == join_group(Machine(processes=1)) == Group(0, 1)
    with pytest.raises(
        HalfstepError,
        match="processes: 4 were asked for, but torchrun started 1; let it start as many, or leave it away: `halfstep <command> ... --processes 4",
    ):
        join_group(Machine(processes=4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HalfstepError, match="processes: 1 were asked for, but torchrun started 2"):
        join_group(Machine(processes=1))


def test_a_batch_smaller_than_the_processes(pipeline, tmp_path):
    line = f"{trainings(pipeline, OPTIONS)['pretrain'].replace('--batch-size 8', '--batch-size 2')} --output {tmp_path}/t/out"
    done = launch(line, 3, tmp_path)
    assert all(
        code == 1 and "batch_size: found 2, but 3 processes share it" in err for code, err in done
    ), done

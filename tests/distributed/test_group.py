"""Several ranks give the results of one process: batches, losses within 1e-5, texts and scores.

The ranks run on the CPU with gloo, and have the variables that torchrun sets.
"""

import gc
import json
import socket
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import break_down, impatient, launch, note_batches, note_rows, start
from published import build_family, masked_tokenizer
from questions import write_generation, write_task
from safetensors.torch import load_file
from small import MACHINE, done, trainings

from halfstep.config import Machine
from halfstep.distributed import group as distributed
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError

OPTIONS = (
    "--num-steps 6 --validate-every 3 --batch-size 8 --warmup-steps 2 --dropout 0 "
    f"--precision float32 --seed 4 --lr 1e-3 {MACHINE}"
)
COMPARED = "train/loss", "train/grad_norm", "val/nelbo", "val/nll"


def losses(folder: Path) -> dict[tuple[int, str], float]:
    points = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return {
        (point["step"], name): value
        for point in points
        for name, value in point["metrics"].items()
        if name in COMPARED
    }


def codes(done: list[tuple[int, str]]) -> list[int]:
    return [code for code, _ in done]


@pytest.fixture(scope="module")
def alone(pipeline, tmp_path_factory):
    """A pretraining and a round in one process."""
    root = tmp_path_factory.mktemp("alone")
    for name in ("pretrain", "round-1"):
        line = f"{trainings(pipeline, OPTIONS)[name]} --output {root}/{name}/t/out"
        ((code, err),) = launch(line, 1, root / name, note_batches, root / name, False)
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
    line += f" --processes {size} --output {tmp_path}/t/out"
    done = launch(line, size, tmp_path, note_batches, tmp_path, sharded)
    assert codes(done) == [0] * size, done
    one, many = losses(alone / name / "t/out"), losses(tmp_path / "t/out")
    assert one.keys() == many.keys() and len(one) == 2 * 6 + 2
    for key in one:
        assert many[key] == pytest.approx(one[key], rel=1e-5), key
    batches = (alone / name / "batches-0").read_text()
    assert len(set(batches.splitlines())) == 6
    assert all((tmp_path / f"batches-{rank}").read_text() == batches for rank in range(size))
    rows = [int((tmp_path / f"rows-{rank}").read_text()) for rank in range(size)]
    assert rows == [6 * 8 // size] * size  # each rank its own part of every batch
    for file in ("model", "ema", "best"):
        a, b = (
            load_file(folder / "t/out" / f"{file}.safetensors")
            for folder in (alone / name, tmp_path)
        )
        assert a.keys() == b.keys()
        # Adam divides by the root of small second moments.
        assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in a)
    assert sum("step 6 of 6" in err for _, err in done) == 1  # only rank 0 prints and writes
    assert not list((tmp_path / "t/out").glob(".*")) and not (tmp_path / "t/out/state").exists()


def import_family(family: str, corpus: Path, folder: Path, said: str = "") -> Path:
    """The checkpoint of a small random model of a family of transformers."""
    build_family(family, 312, 24, folder / "hub")
    masked_tokenizer(corpus, 103).save_pretrained(folder / "hub")
    teacher = folder / "t/teacher"
    done(f"import --source hf:{folder}/hub --corpus {corpus} --output {teacher} {said}")
    return teacher


@pytest.mark.parametrize(
    ("family", "options", "sharded"),
    [
        ("modernbert", "", True),
        ("qwen2", "--logits same", True),
        ("modernbert", "lora", False),
        ("modernbert", "lora", True),
        ("gpt2", "lora", True),
    ],
)
def test_a_round_of_a_model_of_transformers_has_the_losses_of_one_process(
    pipeline, tmp_path, family, options, sharded
):
    """With adapters too: each rank has all of the network, or a shard (FSDP2)."""
    said, lora = ("", "--lora-rank 4") if options == "lora" else (options, "")
    teacher = import_family(family, pipeline.corpus, tmp_path, said)
    line = f"distill-round --round 1 --teacher {teacher} --corpus {pipeline.corpus} --rounds 2 "
    line += f"--teacher-steps 16 {OPTIONS} {lora}".replace("--micro-batch 8", "--micro-batch 2")
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        ended = launch(
            f"{line} --processes {size} --output {folder}/t/out",
            size, folder, note_batches, folder, sharded,
        )  # fmt: skip
        assert codes(ended) == [0] * size, ended
        found.append(losses(folder / "t/out"))
    one, two = found
    assert one.keys() == two.keys() and len(one) == 2 * 6 + 2
    assert all(two[key] == pytest.approx(one[key], rel=1e-5) for key in one), (one, two)
    weights = [load_file(tmp_path / str(size) / "t/out/model.safetensors") for size in (1, 2)]
    assert all(torch.allclose(value, weights[1][name], atol=2e-3)
               for name, value in weights[0].items())  # fmt: skip


def test_frozen_matrices_in_bfloat16_are_sharded_too(pipeline, tmp_path):
    """A second round, which goes on with adapters and computes its activations again, has about the
    losses of one process."""
    teacher = import_family("modernbert", pipeline.corpus, tmp_path)
    line = f"distill-round --corpus {pipeline.corpus} --rounds 2 --teacher-steps 16 --lora-rank 4 "
    line += OPTIONS.replace("float32", "bfloat16") + " --recompute"
    done(f"{line} --round 1 --teacher {teacher} --output {tmp_path}/t/kl/round-1")
    found = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        ended = launch(
            f"{line} --round 2 --teacher {tmp_path}/t/kl/round-1 --processes {size} "
            f"--output {folder}/t/out",
            size, folder, note_batches, folder, True,
        )  # fmt: skip
        assert codes(ended) == [0] * size, ended
        found.append(losses(folder / "t/out"))
    one, two = found
    assert all(two[key] == pytest.approx(one[key], rel=0.05) for key in one), (one, two)


def test_texts_are_drawn_once_and_come_in_order(pipeline, tmp_path):
    """Seven texts on three ranks have the bits of one process."""
    line = f"generate --checkpoint {pipeline.student} --steps 8 --num-samples 7 {MACHINE}"
    for size in (1, 3):
        done = launch(f"{line} --output {tmp_path}/{size}", size, tmp_path / f"log-{size}")
        assert codes(done) == [0] * size, done
    one, three = (np.load(tmp_path / size / "samples.npy") for size in "13")
    assert np.array_equal(one, three) and len({tuple(row) for row in three}) == 7
    about = [json.loads((tmp_path / size / "samples.json").read_text()) for size in "13"]
    assert about[0]["network_evaluations"] == about[1]["network_evaluations"]
    assert about[1]["num_samples"] == 7


CPU = "--device cpu --threads 1 --micro-batch 4"
SCORING = f"--bootstrap 100 --lambada last_words --lambada-items 14 {CPU}"
NUMBERS = "value", "low", "high"
PROMPTS = (
    "--num-prompts 3 --per-prompt 4 --prompt-tokens 4 --continuation-tokens 8 --document-tokens 12"
)


def scoring(pipeline, samples: Path, root: Path) -> dict[str, str]:
    """Commands that write below `root`, by the file that each writes."""
    judged = f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf {SCORING}"
    lambada = f"score-lambada --checkpoint {pipeline.student} {pipeline.baseline}"
    lambada += f" --corpus {pipeline.corpus} {SCORING}"
    written = f"--checkpoint {pipeline.student} --corpus {pipeline.corpus} --steps 4 {PROMPTS}"
    scored = f"--samples {root}/texts {judged}"
    return {
        "samples.json": f"score-samples --samples {samples} --output {root}/samples.json {judged}",
        "tiny/data.json": f"score-corpus --output {root}/tiny/data.json {judged}",
        "words.json": f"{lambada} --output {root}/words.json",
        "texts/samples.json": f"continue-prompts --output {root}/texts {written} {CPU}",
        "continuations.json": f"score-continuations --output {root}/continuations.json {scored}",
    }


@pytest.fixture(scope="module")
def samples(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "samples"
    options = f"--steps 8 --num-samples 12 {MACHINE}"
    done(f"generate --checkpoint {pipeline.student} --output {folder} {options}")
    return folder


@pytest.fixture(scope="module")
def scored(pipeline, samples, tmp_path_factory):
    """What one process writes and reads."""
    root = tmp_path_factory.mktemp("scored")
    line = " && ".join(scoring(pipeline, samples, root).values())
    ((code, err),) = launch(line, 1, root, note_rows, root)
    assert code == 0, err
    return root


@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_scored_or_written_twice_and_scores_are_those_of_one_process(
    pipeline, samples, scored, tmp_path, size
):
    """To the bit where the batches are those of one process, else to float32 rounding.

    Three ranks have batches of four as one process has. Other batches pad a text to another length.
    """
    lines = scoring(pipeline, samples, tmp_path)
    done = launch(" && ".join(lines.values()), size, tmp_path, note_rows, tmp_path)
    assert codes(done) == [0] * size, done
    rows = [(tmp_path / f"rows-{rank}").read_text().splitlines() for rank in range(size)]
    whole = (scored / "rows-0").read_text().splitlines()
    assert {f"file {name}" for name in lines} < {*rows[0]}
    assert sum(map(Counter, rows), Counter()) == Counter(whole)
    assert not any(line.startswith("file") for line in chain(*rows[1:]))
    assert min(map(len, rows)) > len(whole) / size / 2
    assert np.array_equal(*(np.load(root / "texts/samples.npy") for root in (scored, tmp_path)))
    for name in lines:
        one, many = (json.loads((root / name).read_text()) for root in (scored, tmp_path))
        if name == "texts/samples.json":
            assert one | {"elapsed_s": 0} == many | {"elapsed_s": 0}
            continue
        same_batches = size == 3 and name in ("samples.json", "continuations.json")
        for a, b in zip(one, many, strict=True):
            rounding = 0 if same_batches and a["protocol"] != "retokenized" else 2e-6
            facts = [{k: row[k] for k in a if k not in NUMBERS} for row in (a, b)]
            assert facts[0] == facts[1]
            expected = pytest.approx([a[key] for key in NUMBERS], rel=rounding, abs=0)
            assert [b[key] for key in NUMBERS] == expected, (a, b)
        assert (tmp_path / name).with_suffix(".provenance.json").is_file()
    assert "judge, ids | text" in done[0][1] and "likelihood | item" in done[0][1]
    assert not any(err for _, err in done[1:])  # only rank 0 prints


def test_tasks_and_texts_are_shared_by_the_ranks(pipeline, tmp_path):
    """The same rows as those of one process, but for float32 rounding."""
    rows = [{"question": "Tom had a red", "choices": ["kite", "fox"], "label": 0}] * 3
    task, text = write_task(tmp_path, "mine", rows), tmp_path / "text.txt"
    asked = [{"question": "Tom had a red" + i * " kite", "answer": "kite"} for i in range(5)]
    written = write_generation(tmp_path, "written", asked)
    text.write_text("Anna saw the fox. " * 40)
    for size in (1, 2):
        model = f"--checkpoint {pipeline.student} --output {tmp_path}/{size}"
        lines = (
            f"score-tasks {model}/tasks.json --tasks {task} {written} --steps 2 4 --task-draws 3 "
            f"{CPU}",
            f"score-perplexity {model}/texts.json --perplexity {text} --bootstrap 100 {CPU}",
        )
        done = launch(" && ".join(lines), size, tmp_path)
        assert codes(done) == [0] * size, done
        assert not any(err for _, err in done[1:])
    for name in ("tasks.json", "texts.json"):
        one, two = (json.loads((tmp_path / size / name).read_text()) for size in "12")
        for a, b in zip(one, two, strict=True):
            for key in NUMBERS:
                assert b.pop(key) == pytest.approx(a.pop(key), rel=2e-6)
            assert a == b


@pytest.mark.parametrize(
    ("name", "rank", "how"),
    [
        ("samples.json", 1, "broke"),
        ("words.json", 0, "broke"),
        ("words.json", 1, "killed"),
        ("texts/samples.json", 2, "killed"),
    ],
)
def test_an_error_of_one_rank_ends_all(pipeline, samples, tmp_path, name, rank, how):
    line = scoring(pipeline, samples, tmp_path)[name]
    done = launch(line, 3, tmp_path, break_down, rank, how)
    code, err = done.pop(rank)
    if how == "killed":
        assert code == -9
    else:
        assert code == 1 and err.count("the network broke down") == 1
    for code, err in done:
        assert code == 1 and "Traceback" not in err
        assert "another process of this job has ended" in err
    assert not (tmp_path / name).exists()


def test_a_rank_that_never_comes(pipeline, tmp_path):
    """Two of three ranks: one sentence when the time is over, no traceback."""
    line = f"generate --checkpoint {pipeline.student} --steps 2 --num-samples 3 {MACHINE}"
    (_, absent), *done = launch(f"{line} --output {tmp_path}/texts", 3, tmp_path, impatient, 0)
    assert not absent
    for code, err in done:
        assert code == 1 and "Traceback" not in err
        assert "processes: not all 3 joined the group within 0.05 minutes" in err


def test_a_port_that_another_program_has(pipeline, tmp_path):
    """Rank 0 of a launcher that is not ours."""
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}
        line = f"generate --checkpoint {pipeline.student} --steps 2 --num-samples 3 {MACHINE}"
        errors = tmp_path / "errors"
        env = variables | {"MASTER_PORT": port}
        child = start(f"{line} --output {tmp_path}/texts", errors, env=env)
        child.join(60)
    message = f"halfstep generate: MASTER_PORT: another program has port {port} of this machine"
    assert child.exitcode == 1 and message in errors.read_text()
    assert "Traceback" not in errors.read_text()


def test_fewer_texts_than_ranks(pipeline, tmp_path):
    """A rank without a text waits for the others."""
    texts, rows = tmp_path / "texts", tmp_path / "rows.json"
    line = (
        f"generate --checkpoint {pipeline.student} --output {texts} --steps 2 --num-samples 1 "
        f"{MACHINE} && score-samples --samples {texts} --output {rows} "
        f"--corpus {pipeline.corpus} --judge {pipeline.baseline}/hf {MACHINE}"
    )
    assert codes(launch(line, 3, tmp_path)) == [0] * 3
    found = [row for row in json.loads(rows.read_text()) if row["protocol"] == "ids"]
    assert {row["num_samples"] for row in found} == {1}


def forbid_pickles() -> None:
    """torch's exchange of Python objects, which pickles them, is an error."""

    def refused(*_):
        raise AssertionError("a pickle for the network")

    torch.distributed.distributed_c10d._object_to_tensor = refused
    torch.distributed.distributed_c10d._tensor_to_object = refused
    distributed.REPLICATED = 0


def test_no_pickle_crosses_the_network(pipeline, samples, tmp_path):
    """In a sharded training and round, in texts and in scores, a likelihood and MAUVE's."""
    lines = [
        f"{line} --num-steps 3 --output {tmp_path}/{name}/t/out"
        for name, line in trainings(pipeline, OPTIONS).items()
        if name in ("pretrain", "round-1")
    ]
    line = " && ".join([*lines, *scoring(pipeline, samples, tmp_path).values()])
    assert codes(launch(line, 2, tmp_path, forbid_pickles)) == [0, 0]


def exchange(log: Path) -> None:
    """Broadcast and gather odd values; the results of each rank go to a file."""
    ranks = join_group(Machine())
    value = {"é": [1, 2.5, None, "x" * 100_000], "nested": [[], {}]}
    assert ranks.broadcast(value if ranks.is_main else "ignored") == value
    assert ranks.broadcast() is None
    rows = None if ranks.rank == 1 else np.full((ranks.rank, 2, 3), 0.5, np.float16)
    found = [ranks.gather_rows(rows), ranks.map_rows(2, lambda rows: np.arange(2)[rows])]
    facts = [None if one is None else (str(one.dtype), one.shape, one.sum()) for one in found]
    (log / f"found-{ranks.rank}").write_text(repr(facts))


def test_values_and_rows_arrive_as_they_were_sent(tmp_path):
    """Rank 1 has no rows, rank 0 an empty array, rank 2 two rows."""
    launch("none", 3, tmp_path, exchange, tmp_path)
    found = [eval((tmp_path / f"found-{rank}").read_text(), {"np": np}) for rank in range(3)]
    assert found[0] == [("float16", (2, 2, 3), 6.0), ("int64", (2,), 1)]
    assert found[1:] == [[None, None]] * 2


def leave_before_ddp_is_freed(log: Path) -> None:
    ranks = join_group(Machine())
    network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    network(torch.ones(1, 2)).sum().backward()
    distributed.leave_group()
    del network
    gc.collect()
    tasks = Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    (log / f"threads-{ranks.rank}").write_text(" ".join(names))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ddp_never_frees_the_group(tmp_path):
    """It would wait for gloo's threads while it holds Python's lock, which they may wait for."""
    launch("none", 2, tmp_path, leave_before_ddp_is_freed, tmp_path)
    for rank in range(2):
        assert "pt_gloo_runloop" in (tmp_path / f"threads-{rank}").read_text()


@pytest.mark.parametrize("n", [1, 5, 8, 12])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_local_slices_partition_the_rows_in_order(n, size):
    slices = [list(range(n))[Group(rank, size).local_slice(n)] for rank in range(size)]
    assert list(chain(*slices)) == list(range(n))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_another_world_size_than_asked_for(monkeypatch):
    """A Slurm job without torchrun would otherwise run once, alone, and seem to work."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join_group(Machine()) == join_group(Machine(processes=1)) == Group(0, 1)
    message = (
        "processes: found a world size of 1, expected 4; let torchrun start 4 processes, "
        "or leave torchrun out: `halfstep <command> ... --processes 4` starts them"
    )
    with pytest.raises(HalfstepError, match=message):
        join_group(Machine(processes=4))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HalfstepError, match="found a world size of 2, expected 1;"):
        join_group(Machine(processes=1))


def test_a_batch_smaller_than_the_world_size(pipeline, tmp_path):
    line = trainings(pipeline, OPTIONS)["pretrain"].replace("--batch-size 8", "--batch-size 2")
    done = launch(f"{line} --output {tmp_path}/t/out", 3, tmp_path)
    message = "batch_size: found 2, but 3 processes share it"
    assert all(code == 1 and message in err for code, err in done), done

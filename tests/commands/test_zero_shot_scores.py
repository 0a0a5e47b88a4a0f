"""score-tasks and score-perplexity on small checkpoints, offline, alone and on two ranks."""

import json

import numpy as np
import pytest
import torch
from questions import write_generation, write_rolling, write_task

from halfstep.checkpoint import load_checkpoint
from halfstep.cli import main
from halfstep.files import read_json
from halfstep.metrics.intervals import wilson

MACHINE = "--device cpu --threads 1 --micro-batch 4"
ROWS = [
    {"question": "One day Tom had a red", "choices": ["kite", "fox and more of it"], "label": 0},
    {"question": "In the garden Anna saw", "choices": ["the fox", "kite the"], "label": 0},
    {"question": "Then it was that a cat", "choices": ["sat", "had a red kite"], "label": 1},
]  # fmt: skip


def call(command, checkpoint, output, *words):
    line = f"{command} --checkpoint {checkpoint} --output {output} {MACHINE}"
    return main([*line.split(), *map(str, words)])


@pytest.mark.parametrize("name, protocols", [
    ("teacher", ["elbo", "elbo", "elbo-per-token"]),
    ("baseline", ["ar", "ar"]),
])  # fmt: skip
def test_rows_of_tasks(world, tmp_path, name, protocols):
    task, output = write_task(tmp_path, "mine", ROWS), tmp_path / "rows.json"
    words = ("--tasks", task, "--task-draws", 4)
    assert call("score-tasks", world.models / name, output, *words) == 0
    rows = read_json(output)
    assert [row["protocol"] for row in rows] == protocols
    assert [row["measure"] for row in rows] == ["acc", "acc_norm", "acc"][: len(rows)]
    for row in rows:
        assert row["metric"] == "task_score" and row["task"] == "mine"
        assert row["num_samples"] == 3 and row["data"].startswith("mine[3]@")
        assert (row["low"], row["high"]) == wilson(round(3 * row["value"]), 3)
        assert row["model"] == f"stories-tiny/{name}"
        assert row["network_evaluations"] == (4 if name == "teacher" else 1)
    record = read_json(tmp_path / "rows.provenance.json")
    assert "mine.yaml" in json.dumps(record)


def test_the_table_of_tasks_and_texts(world, tmp_path):
    task, text = write_task(tmp_path, "mine", ROWS), tmp_path / "text.txt"
    text.write_text("Tom had a red kite.\n\nAnna saw the fox.\n")
    for name in ("teacher", "baseline"):
        folder = tmp_path / "metrics" / name
        checkpoint = world.models / name
        words = ("--tasks", task, "--task-draws", 2)
        assert call("score-tasks", checkpoint, folder / "tasks.json", *words) == 0
        words = ("--perplexity", text, "--perplexity-draws", 2, "--bootstrap", 100)
        assert call("score-perplexity", checkpoint, folder / "zero_shot.json", *words) == 0
    for table in ("tasks", "zero_shot"):
        line = f"tabulate --table {table} --metrics {tmp_path}/metrics --output {tmp_path}/{table}"
        assert main([*line.split(), "--published"]) == 0
    tasks, texts = ((tmp_path / f"{name}.md").read_text() for name in ("tasks", "zero_shot"))
    assert "### acc (protocol elbo-per-token), ± 95% interval" in tasks
    assert "ELBO of a text is estimated from 2 masks" in tasks and "[SDTT Table 1]" in tasks
    assert "text.txt[1]@" in texts and "[MDLM Table 3" in texts
    assert texts.count("| teacher ") == texts.count("| baseline ") == 1


ANSWERS = [
    {"question": "One day Tom had a red", "answer": "kite"},
    {"question": "In the garden", "answer": "Anna"},
    {"question": "Then it was that a cat", "answer": "sat"},
    {"question": "Anna saw the", "answer": "fox"},
    {"question": "In the park", "answer": "Tom"},
]


def greedy_answers(model, questions, tokens) -> list[str]:
    """What an autoregressive network writes by its largest logits, without a cache."""
    found = []
    for question in questions:
        ids = [0, *model.tokenizer.encode(question).ids]
        start = len(ids)
        for _ in range(tokens):
            with torch.no_grad():
                log_p = model.network.log_p(model.network(torch.tensor([ids]))[0, -1:])
            ids.append(int(log_p.argmax()))
        answer = ids[start:]
        answer = answer[: answer.index(0)] if 0 in answer else answer
        found.append(model.tokenizer.decode(answer))
    return found


def test_a_baseline_writes_the_likeliest_tokens(world, tmp_path):
    """Its cached decoder in batches, against single passes over whole texts."""
    baseline, output = world.models / "baseline", tmp_path / "rows.json"
    questions = [row["question"] for row in ANSWERS]
    written = greedy_answers(load_checkpoint(baseline), questions, 6)
    rows = [{"question": q, "answer": a} for q, a in zip(questions, written, strict=True)]
    rows[1]["answer"] += " or not"
    task = write_generation(tmp_path, "written", rows, max_gen_toks=6, until=[])
    assert call("score-tasks", baseline, output, "--tasks", task) == 0
    (row,) = read_json(output)
    assert (row["value"], row["num_samples"], row["protocol"]) == (0.8, 5, "written")
    assert (row["low"], row["high"]) == wilson(4, 5)
    assert row["steps"] is None and row["sampler"] == "autoregressive"
    assert row["network_evaluations"] == 6 and row["temperature"] == 0


def test_answers_do_not_depend_on_the_batches(world, tmp_path, monkeypatch):
    """Greedy and drawn answers at two step counts, one text at a time and several at once."""
    import halfstep.metrics.tasks as module

    teacher, seen = world.models / "teacher", []
    drawn = write_generation(tmp_path, "drawn", ANSWERS, do_sample=True, temperature=0.9, until=[])
    greedy = write_generation(tmp_path, "greedy", ANSWERS, max_gen_toks=9, until=["Tom"])
    monkeypatch.setattr(module, "cut_at", lambda text, until: seen.append(text) or text)
    words = ("--tasks", drawn, greedy, "--steps", 4, 2, "--sampling-seed", 5)
    found = []
    for micro_batch in (1, 4):
        output = tmp_path / f"{micro_batch}.json"
        more = (*words, "--micro-batch", micro_batch)
        assert call("score-tasks", teacher, output, *more) == 0
        found.append((read_json(output), list(seen)))
        seen.clear()
    assert found[0] == found[1] and len(set(found[0][1])) > 5
    rows = {(row["task"], row["steps"]): row for row in found[0][0]}
    assert rows.keys() == {(task, steps) for task in ("drawn", "greedy") for steps in (2, 4)}
    one = rows["drawn", 2]
    assert (one["temperature"], one["tokens_per_step"], one["seed"]) == (0.9, 2, 5)
    assert one["sampler"] == "ancestral" and one["network_evaluations"] <= 2
    assert rows["greedy", 4]["temperature"] == 0


def test_perplexity_of_a_baseline_is_exact(world, tmp_path):
    """By the softmax of its network over the same windows, with an interval over windows."""
    texts = [" ".join(["Tom had a red kite."] * 60), " ".join(["Anna saw the fox."] * 60)]
    rolling = write_rolling(tmp_path, "rolled", texts)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    output, values = tmp_path / "rows.json", []
    baseline = world.models / "baseline"
    for name in (rolling, lines):
        assert call("score-perplexity", baseline, output, "--perplexity", name) == 0
        values += read_json(output)
    one, two = values
    assert one["value"] == two["value"] and one["protocol"] == "ar" and one["length"] == 128
    model = load_checkpoint(baseline)
    stream = [id_ for text in texts for id_ in [*model.tokenizer.encode(text).ids, 0]]
    windows = [[0, *stream[at : at + 126], 0] for at in range(0, len(stream) - 125, 126)]
    x = torch.tensor(windows)
    with torch.no_grad():
        log_p = model.network.log_p(model.network(x)[:, :-1])
    nll = -log_p.gather(-1, x[:, 1:, None]).double().mean().item()
    assert one["value"] == pytest.approx(np.exp(nll), rel=1e-5)
    assert one["num_samples"] == len(windows) > 2
    assert one["low"] < one["value"] < one["high"]
    words = ("--perplexity", lines, "--task-items", 2)
    assert call("score-perplexity", baseline, output, *words) == 0
    assert read_json(output)[0]["num_samples"] == 2


def test_a_bound_needs_no_more_than_its_draws(world, tmp_path):
    """The bound of an untrained denoiser: more draws, other noise, about the same value."""
    text, found = tmp_path / "text.txt", []
    text.write_text(" ".join(["Tom had a red kite. Anna saw the fox."] * 80))
    for draws in (1, 8, 8):
        words = ("--perplexity", text, "--perplexity-draws", draws)
        output = tmp_path / f"{len(found)}.json"
        assert call("score-perplexity", world.models / "teacher", output, *words) == 0
        found += read_json(output)
    one, eight, again = found
    assert eight["value"] == again["value"] != one["value"]
    assert one["network_evaluations"] == 1 and eight["network_evaluations"] == 8
    assert abs(np.log(one["value"]) - np.log(eight["value"])) < 0.2 * np.log(eight["value"])


@pytest.mark.parametrize("command, words, message", [
    ("score-tasks", "", "--tasks: found none"),
    ("score-tasks", "--tasks piqa --temperature 0.5", "--temperature: found 0.5, but each task"),
    ("score-perplexity", "", "--perplexity: found none"),
    ("score-perplexity", "--perplexity {tmp}/gone.txt", "gone.txt: cannot be read"),
    ("score-perplexity", "--perplexity {tmp}/blank.txt", "blank.txt: holds no text"),
    ("score-perplexity", "--perplexity owner/absent", "cannot read default/test of owner/absent"),
    ("score-tasks", "--tasks {tmp}/gone.yaml", "gone.yaml cannot be read"),
])  # fmt: skip
def test_bad_input_is_one_sentence(world, tmp_path, capsys, monkeypatch, command, words, message):
    import huggingface_hub

    def offline(*args, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    (tmp_path / "blank.txt").write_text("\n \n")
    words = words.format(tmp=tmp_path).split()
    assert call(command, world.models / "teacher", tmp_path / "rows.json", *words) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and not (tmp_path / "rows.json").exists()

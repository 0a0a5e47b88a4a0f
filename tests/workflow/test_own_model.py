"""The preset own-model with a small ModernBert: text, training, three rounds, judge, frontier.

Rounds train the whole network or adapters, and another teacher learns to answer.
"""

import json

import numpy as np
import pytest
from dryrun import copy
from published import build_family, masked_tokenizer, save_causal_lm
from small import done
from whole_graph import run_graph

import halfstep
from halfstep.data.stories import sample_stories
from halfstep.data.windows import Windows
from halfstep.records.journal import read_journal
from halfstep.report.rows import read_table

LENGTH, V, MASK, SOURCE = 32, 300, 103, "hf:models/modernbert"
ROUND = {"num_steps": 4, "warmup_steps": 1, "validate_every": 4, "entropy_band": None}
TRAINING = {"batch_size": 8, "lr": 3e-3, "precision": "float32", "ema_decay": 0.9}
CONFIG = {
    "preset": "own-model",
    "corpora": {
        "own-text": {
            "files": ["text/*.txt"],
            "tokenizer": SOURCE,
            "length": LENGTH,
            "validation_documents": 20,
        },
        "pairs": {
            "kind": "pairs",
            "files": ["pairs/*.jsonl"],
            "tokenizer": SOURCE,
            "length": LENGTH,
            "validation_documents": 20,
        },
    },
    "teachers": {
        "own-model": {
            "from": SOURCE,
            "network": {"size": "2x32x2"},
            "pretraining": TRAINING | {"num_steps": 60, "warmup_steps": 5, "validate_every": 20},
            "baseline": {"from": "models/modernbert-decoder"},
            "distillation": TRAINING | ROUND,
            "runs": {"kl_backward": {}, "lora": {"lora_rank": 2}},
        },
        "answers": {
            "corpus": "pairs",
            "from": SOURCE,
            "fine_tune": True,
            "network": {"size": "2x32x2"},
            "pretraining": TRAINING | {"num_steps": 20, "warmup_steps": 5, "validate_every": 20},
            "baseline": {"from": "models/modernbert-decoder"},
            "distillation": TRAINING | ROUND | {"teacher_steps": "length", "rounds": 1},
        },
    },
    "sampling": {
        "steps": [4, "own"],
        "num_samples": 8,
        "precision": "float32",
        "frontier_steps": [4],
        "temperatures": [0.8],
    },
    "evaluation": {"judge": "baseline", "infilling_items": 4, "bootstrap": 100},
    "benchmark": {"lengths": [16], "batch_sizes": [1], "benchmark_steps": [4], "repeats": 3},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of the graph; model and judge have one tokenizer, with a mask in its middle."""
    tree = copy(tmp_path_factory.mktemp("own"))
    models, text = tree.folder / "models", tree.folder / "text/one.txt"
    text.parent.mkdir()
    stories = list(sample_stories(300, 1))
    text.write_text("\n\n".join(stories))
    pairs = tree.folder / "pairs/one.jsonl"
    pairs.parent.mkdir()
    cut = (story.replace(".", "", 1).split() for story in stories)
    lines = ({"prompt": " ".join(words[:4]), "response": " ".join(words[4:12])} for words in cut)
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = f"--output {models}/corpus --kind files --files {text} --validation-documents 20"
    done(f"prepare-corpus {place} --length {LENGTH} --vocab-size {V} --workers 1")
    encoder, decoder = models / "modernbert", models / "modernbert-decoder"
    build_family("modernbert", V + 1, LENGTH, encoder)
    save_causal_lm(decoder.name, decoder, V + 1, LENGTH, models / "corpus/tokenizer.json")
    for folder in (encoder, decoder):
        masked_tokenizer(models / "corpus", MASK).save_pretrained(folder)
    return run_graph(tree, CONFIG, "all")


def test_the_model_is_trained_and_its_students_are_the_same_kind(results):
    models = results / "models/own-model"
    _, points = read_journal(models / "teacher")
    losses = [point["metrics"]["val/nelbo"] for point in points if "val/nelbo" in point["metrics"]]
    assert len(losses) == 3 and losses[-1] < losses[0]
    teacher, student = (
        halfstep.load(models / name, "cpu") for name in ("teacher", "kl_backward/round-3")
    )
    assert teacher.meta["transformers"]["config"]["model_type"] == "modernbert"
    assert (teacher.meta["transformers"]["mask_id"], teacher.mask_id) == (MASK, V)
    kept = ("transformers", "framing", "adapted", "network")
    assert {key: student.meta[key] for key in kept} == {key: teacher.meta[key] for key in kept}
    assert (student.meta["student_steps"], teacher.meta["adapted"]["from"]) == (4, SOURCE)


def test_rounds_with_adapters_end_in_whole_networks_that_are_scored(results):
    models = results / "models/own-model"
    last, teacher = (halfstep.load(models / name, "cpu") for name in ("lora/round-3", "teacher"))
    assert last.meta["lora"]["rank"] == 2 and last.meta["student_steps"] == 4
    assert last.network.state_dict().keys() == teacher.network.state_dict().keys()
    frontier = read_table(results / "tables/temperatures.csv")
    assert "own-model/lora/round-3" in set(frontier["model"])


def test_a_model_of_pairs_answers_held_out_prompts(results):
    windows = Windows(results / "data/pairs", "validation")
    rows = np.arange(8) % len(windows)
    asked, given = windows.asked(rows).numpy(), windows[rows].numpy()
    for model in ("teacher", "kl_backward/round-1"):
        ids = np.load(results / f"samples/answers/{model}/steps-4/samples.npy")
        assert np.array_equal(ids[~asked], given[~asked])
        assert not (ids == V).any()  # the mask
    steps = read_table(results / "tables/steps.csv")
    empty = steps[steps["metric"] == "only_end_of_text"]
    assert {"answers/teacher", "answers/kl_backward/round-1"} <= set(empty["model"])


def test_judge_and_frontier_know_teacher_students_and_baseline(results):
    frontier = read_table(results / "tables/temperatures.csv")
    names = ("teacher", "kl_backward/round-3", "baseline")
    assert {f"own-model/{name}" for name in names} <= set(frontier["model"])
    perplexity = frontier[frontier["metric"] == "frontier_perplexity"]
    of_student = perplexity[perplexity["model"] == "own-model/kl_backward/round-3"]
    assert set(of_student["temperature"].fillna(1)) == {0.8, 1.0}  # empty where it changes nothing
    assert {"ids", "retokenized"} == set(perplexity["protocol"])
    assert "perplexity_ratio_at_equal_entropy" in set(frontier["metric"])
    steps = read_table(results / "tables/steps.csv")
    scored = steps[steps["metric"] == "generative_perplexity"].groupby("model")["steps"].unique()
    assert sorted(scored["own-model/teacher"]) == [4, LENGTH // 2, LENGTH]
    assert (results / "figures/frontier.svg").stat().st_size > 1000
    assert (results / "mlflow.synced").exists()

"""score-samples, score-corpus and score-lambada on a tiny finished workflow."""

import json
import shutil

import numpy as np
import pytest
from known import write_samples
from tokenizers import Tokenizer

from halfstep.cli import main
from halfstep.commands import evaluate
from halfstep.commands.evaluate import score_corpus, score_lambada, score_samples
from halfstep.config import Evaluation, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json, write_json
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.perplexity import ids_nll, load_judge, retokenized_nll

MACHINE = Machine(device="cpu", threads=1)


def scoring(world, **more) -> Evaluation:
    return Evaluation(judge=str(world.models / "baseline" / "hf"), lambada="last_words", lambada_items=12, bootstrap=100, **more)


def by_name(file) -> dict:
    rows = read_json(file)
    return {(row["metric"], row["protocol"], row["steps"]): row for row in rows}


def test_samples_of_all_step_counts_under_one_judge(world, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(evaluate, "load_judge", lambda *args: loads.append(args) or load_judge(*args))
    folders = [world.samples / "steps-8", world.samples / "steps-16"]
    score_samples(folders, world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    rows, ids = by_name(tmp_path / "rows.json"), np.load(folders[1] / "samples.npy")
    assert len(loads) == 1 and len(rows) == 12
    assert {name for name, _, steps in rows if steps == 8} == {
        "generative_perplexity",
        "entropy",
        "distinct_2",
        "accepted_share",
        "consistent_share",
    }
    perplexity = rows["generative_perplexity", "ids", 16]
    judge = load_judge(str(world.models / "baseline" / "hf"))
    assert perplexity["value"] == pytest.approx(np.exp(ids_nll(judge, ids, 5).mean()), rel=1e-5)
    sums = retokenized_nll(judge, ids, Tokenizer.from_file(str(world.corpus / "tokenizer.json")), world.facts["eos_id"], 5)
    assert rows["generative_perplexity", "retokenized", 16]["value"] == pytest.approx(np.exp(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5)
    assert rows["entropy", None, 16]["value"] == pytest.approx(unigram_entropy(ids).mean())
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert perplexity | {"value": 0, "low": 0, "high": 0, "commit": ""} == {
        "metric": "generative_perplexity", "protocol": "ids", "value": 0, "low": 0, "high": 0, "model": "stories-tiny/teacher", "teacher": "stories-tiny",
        "run": "teacher", "round": 0, "steps": 16, "sampler": "ancestral", "network_evaluations": 16.0, "num_samples": 12, "seed": 1, "weights": "ema",
        "draw_dtype": "float64", "judge": str(world.models / "baseline" / "hf"), "checkpoint": "ab" * 8, "commit": "",
    }  # fmt: skip


def test_held_out_text_is_a_line_of_its_own_and_the_grammar_accepts_it(world, tmp_path):
    score_corpus(world.corpus, tmp_path / "stories-tiny" / "data.json", scoring(world), MACHINE)
    rows = by_name(tmp_path / "stories-tiny" / "data.json")
    assert rows["consistent_share", None, None]["value"] == rows["accepted_share", None, None]["value"] == 1
    assert 0.5 < rows["accepted_share", None, None]["low"] < 1
    assert {(row["model"], row["teacher"], row["run"], row["num_samples"]) for row in rows.values()} == {
        ("data", "stories-tiny", "data", len(world.held_out))
    }
    shuffled = tmp_path / "samples"
    write_samples(shuffled, np.random.default_rng(0).permuted(world.held_out, axis=1).astype(np.int32), 8)
    score_samples([shuffled], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    assert by_name(tmp_path / "rows.json")["accepted_share", None, 8]["value"] == 0


def test_samples_without_a_whole_story_say_that_nothing_is_known(world, tmp_path):
    write_samples(tmp_path / "samples", np.full((3, 128), 5, np.int32), 8)
    score_samples([tmp_path / "samples"], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    row = by_name(tmp_path / "rows.json")["consistent_share", None, 8]
    assert (row["value"], row["low"], row["high"]) == (0, 0, 1)


def test_a_judge_with_other_tokens_scores_retokenized_only(world, tmp_path):
    other = shutil.copytree(world.models / "baseline" / "hf", tmp_path / "judge")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word, i in vocabulary.items() if i in (20, 21)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    evaluation = scoring(world).model_copy(update={"judge": str(other)})
    score_samples([world.samples / "steps-8"], world.corpus, tmp_path / "rows.json", evaluation, MACHINE)
    assert [row["protocol"] for row in read_json(tmp_path / "rows.json") if row["metric"] == "generative_perplexity"] == ["retokenized"]


def test_the_baselines_samples_have_no_step_count(world, tmp_path):
    write_samples(tmp_path / "samples", world.held_out[:4].astype(np.int32), 128, "autoregressive", "stories-tiny/baseline")
    score_samples([tmp_path / "samples"], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    assert {(row["steps"], row["network_evaluations"], row["run"]) for row in read_json(tmp_path / "rows.json")} == {
        (None, 128.0, "baseline")
    }


def test_a_changed_sample_file_and_foreign_tokens_are_named(world, tmp_path, capsys):
    folder = shutil.copytree(world.samples / "steps-8", tmp_path / "steps-8")
    content = bytearray((folder / "samples.npy").read_bytes())
    content[-1] ^= 1
    (folder / "samples.npy").write_bytes(content)
    command = ["score-samples", "--samples", str(folder), "--judge", str(world.models / "baseline" / "hf"), "--corpus", str(world.corpus)]
    assert main([*command, "--output", str(tmp_path / "rows.json"), "--device", "cpu"]) == 1
    assert "samples.npy: sha256" in capsys.readouterr().err and not (tmp_path / "rows.json").exists()
    (folder / "samples.npy").unlink()
    with pytest.raises(HalfstepError, match="no such file, though samples.json is there"):
        score_samples([folder], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    write_samples(folder, np.full((2, 128), world.facts["vocab_size"], np.int32), 8)
    with pytest.raises(HalfstepError, match=f"token ids from {world.facts['vocab_size']}.*a mask was left"):
        score_samples([folder], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    with pytest.raises(HalfstepError, match="'baseline', which only the workflow can resolve"):
        score_corpus(world.corpus, tmp_path / "rows.json", Evaluation(judge="baseline"), MACHINE)


def test_last_words_of_both_kinds_of_model(world, tmp_path):
    for name, accuracies, perplexity in (("teacher", ["parallel", "confidence"], "elbo-exact"), ("baseline", ["ar"], "ar")):
        score_lambada(world.models / name, world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
        rows = read_json(tmp_path / "rows.json")
        assert [(row["metric"], row["protocol"]) for row in rows] == [("lambada_accuracy", a) for a in accuracies] + [
            ("lambada_perplexity", perplexity)
        ]
        assert all(row["low"] <= row["value"] <= row["high"] and row["num_samples"] == 12 and row["run"] == name for row in rows)
        assert {row["checkpoint"] for row in rows} == {read_json(world.models / name / "meta.json")["sha256"]["ema.safetensors"][:16]}
        assert rows[-1]["value"] > 10  # random networks know no last word


def test_a_local_file_of_items_can_be_named(world, tmp_path):
    items = tmp_path / "mine.jsonl"
    items.write_text('{"text": "Once upon a time"}\n{"text": "The little fox"}\n')
    evaluation = scoring(world).model_copy(update={"lambada": str(items), "lambada_items": None})
    score_lambada(world.models / "teacher", world.corpus, tmp_path / "rows.json", evaluation, MACHINE)
    assert read_json(tmp_path / "rows.json")[0]["num_samples"] == 2
    write_json(tmp_path / "none.json", [])
    with pytest.raises(HalfstepError, match="no file .*gone.jsonl"):
        score_lambada(
            world.models / "teacher",
            world.corpus,
            tmp_path / "rows.json",
            evaluation.model_copy(update={"lambada": str(tmp_path / "gone.jsonl")}),
            MACHINE,
        )

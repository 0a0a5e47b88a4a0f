"""score-samples, score-corpus and score-lambada on a tiny finished workflow."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from known import write_samples
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from halfstep import checkpoint
from halfstep.cli import main
from halfstep.commands import evaluate
from halfstep.commands.evaluate import score_corpus, score_lambada, score_samples
from halfstep.commands.report import tabulate
from halfstep.config import Evaluation, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.perplexity import ids_nll, load_judge, retokenized_nll

MACHINE = Machine(device="cpu", threads=1)


def scoring(world, **more) -> Evaluation:
    return Evaluation(
        judge=str(world.models / "baseline" / "hf"),
        lambada="last_words",
        lambada_items=12,
        bootstrap=100,
        **more,
    )


def named(folder) -> str:
    where = (
        str(folder).rpartition("/models/")[2] if "/models/" in str(folder) else folder.name
    )  # wherever it lies
    return f"{where}@{sha256(folder / 'model.safetensors')[:12]}"


def by_name(file) -> dict:
    rows = read_json(file)
    return {(row["metric"], row["protocol"], row["steps"]): row for row in rows}


def test_samples_of_all_step_counts_under_one_judge(world, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(
        evaluate, "load_judge", lambda *args: loads.append(args) or load_judge(*args)
    )
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
    sums = retokenized_nll(
        judge,
        ids,
        Tokenizer.from_file(str(world.corpus / "tokenizer.json")),
        world.facts["eos_id"],
        5,
    )
    assert rows["generative_perplexity", "retokenized", 16]["value"] == pytest.approx(
        np.exp(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5
    )
    assert rows["entropy", "unigram", 16]["value"] == pytest.approx(unigram_entropy(ids).mean())
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    assert perplexity | {"value": 0, "low": 0, "high": 0, "commit": ""} == {
        "metric": "generative_perplexity", "protocol": "ids", "version": 1, "value": 0, "low": 0, "high": 0, "model": "stories-tiny/teacher", "teacher": "stories-tiny",
        "run": "teacher", "round": 0, "steps": 16, "sampler": "ancestral", "network_evaluations": 16.0, "num_samples": 12, "seed": 1, "weights": "ema",
        "draw_dtype": "float64", "temperature": None, "top_p": None, "judge": named(world.models / "baseline" / "hf"), "judge_dtype": "float32",
        "data": f"stories@{world.facts['splits']['validation']['sha256'][:12]}", "checkpoint": "ab" * 8, "commit": "",
    }  # fmt: skip


def test_held_out_text_is_a_line_of_its_own_and_the_grammar_accepts_it(world, tmp_path):
    score_corpus(world.corpus, tmp_path / "stories-tiny" / "data.json", scoring(world), MACHINE)
    rows = by_name(tmp_path / "stories-tiny" / "data.json")
    assert (
        rows["consistent_share", "grammar", None]["value"]
        == rows["accepted_share", "grammar", None]["value"]
        == 1
    )
    assert 0.5 < rows["accepted_share", "grammar", None]["low"] < 1
    whole = sum(
        max(0, (window[1:-1] == window[0]).sum() - 1) for window in world.held_out
    )  # stories between two EOS
    assert {(row["model"], row["teacher"], row["run"], row["num_samples"]) for row in rows.values()} == {
        ("data", "stories-tiny", "data", len(world.held_out)), ("data", "stories-tiny", "data", whole),
    }  # fmt: skip
    assert (
        rows["accepted_share", "grammar", None]["num_samples"]
        == rows["consistent_share", "grammar", None]["num_samples"]
        == whole
        != len(world.held_out)
    )
    shuffled = tmp_path / "samples"
    write_samples(
        shuffled, np.random.default_rng(0).permuted(world.held_out, axis=1).astype(np.int32), 8
    )
    score_samples([shuffled], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    assert by_name(tmp_path / "rows.json")["accepted_share", "grammar", 8]["value"] == 0


def test_the_number_of_resamples_is_the_configurations(world, tmp_path):
    """Other resamples, another interval of the same number: of the judge's perplexity and of the last words'."""
    found = []
    for resamples in (100, 150):
        how = scoring(world).model_copy(update={"bootstrap": resamples})
        score_samples(
            [world.samples / "steps-8"], world.corpus, tmp_path / "samples.json", how, MACHINE
        )
        score_lambada(
            world.models / "teacher", world.corpus, tmp_path / "lambada.json", how, MACHINE
        )
        found.append(by_name(tmp_path / "samples.json") | by_name(tmp_path / "lambada.json"))
    for key in (("generative_perplexity", "ids", 8), ("lambada_perplexity", "elbo-exact", None)):
        one, two = (rows[key] for rows in found)
        assert one["value"] == two["value"] and (one["low"], one["high"]) != (
            two["low"],
            two["high"],
        ), key


def test_samples_without_a_whole_story_say_that_nothing_is_known(world, tmp_path):
    write_samples(tmp_path / "samples", np.full((3, 128), 5, np.int32), 8)
    score_samples(
        [tmp_path / "samples"], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE
    )
    row = by_name(tmp_path / "rows.json")["consistent_share", "grammar", 8]
    assert (row["value"], row["low"], row["high"]) == (0, 0, 1)


def test_a_judge_with_other_tokens_scores_retokenized_only(world, tmp_path):
    other = shutil.copytree(world.models / "baseline" / "hf", tmp_path / "judge")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [word for word, i in vocabulary.items() if i in (20, 21)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    evaluation = scoring(world).model_copy(update={"judge": [str(other)]})
    score_samples(
        [world.samples / "steps-8"], world.corpus, tmp_path / "rows.json", evaluation, MACHINE
    )
    assert [
        row["protocol"]
        for row in read_json(tmp_path / "rows.json")
        if row["metric"] == "generative_perplexity"
    ] == ["retokenized"]
    both = [
        str(world.models / "baseline" / "hf"),
        str(other),
    ]  # side by side, as gpt2-large and Llama-3-8B are
    folders = [world.samples / "steps-8", world.samples / "steps-16"]
    score_samples(
        folders,
        world.corpus,
        tmp_path / "both.json",
        evaluation.model_copy(update={"judge": both}),
        MACHINE,
    )
    rows = read_json(tmp_path / "both.json")
    scored = [
        (row["judge"], row["protocol"], row["steps"])
        for row in rows
        if row["metric"] == "generative_perplexity"
    ]
    one, two = named(world.models / "baseline" / "hf"), named(other)
    assert scored == [(one, p, n) for n in (8, 16) for p in ("ids", "retokenized")] + [
        (two, "retokenized", n) for n in (8, 16)
    ]
    assert (
        len([row for row in rows if row["metric"] == "entropy"]) == 2
    )  # what no judge decides is measured once
    alone = next(
        row["value"]
        for row in read_json(tmp_path / "rows.json")
        if row["metric"] == "generative_perplexity"
    )
    assert alone == next(row["value"] for row in rows if row["judge"] == two and row["steps"] == 8)
    tabulate("steps", [tmp_path / "both.json"], tmp_path / "steps")
    text = (tmp_path / "steps.md").read_text()
    assert [
        f"(protocol {p}), judge {j}, " in text for p in ("ids", "retokenized") for j in (one, two)
    ] == [True, False, True, True]


def test_the_judge_is_its_weights_not_its_folder(world, tmp_path):
    """The same path, other weights: another name; and a judge kept in bfloat16 reads in bfloat16, one in float16 in float32."""
    folder = shutil.copytree(world.models / "baseline" / "hf", tmp_path / "judge")
    names = {load_judge(str(folder)).name}
    for dtype, read_in in (("bfloat16", "bfloat16"), ("float16", "float32")):
        network = AutoModelForCausalLM.from_pretrained(
            world.models / "baseline" / "hf", dtype=dtype
        )
        network.save_pretrained(folder)
        judge = load_judge(str(folder))
        assert judge.about == {"judge": named(folder), "judge_dtype": read_in}
        names.add(judge.name)
    assert len(names) == 3


def test_temperature_and_nucleus_are_named_where_they_are_not_1(world, tmp_path):
    folder = shutil.copytree(world.samples / "steps-8", tmp_path / "steps-8")
    facts = read_json(folder / "samples.json")
    write_json(folder / "samples.json", facts | {"temperature": 0.9, "top_p": 1.0})
    score_samples([folder], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    assert {(row["temperature"], row["top_p"]) for row in read_json(tmp_path / "rows.json")} == {
        (0.9, None)
    }


def test_samples_that_hold_no_text_are_named(world, tmp_path):
    for ids in (np.zeros((0, 128), np.int32), np.zeros(128, np.int32)):
        write_samples(tmp_path / "samples", ids, 8)
        with pytest.raises(
            HalfstepError,
            match=r"stories-tiny/teacher 8 steps: an array of shape .*expected \[texts, tokens\]",
        ):
            score_samples(
                [tmp_path / "samples"],
                world.corpus,
                tmp_path / "rows.json",
                scoring(world),
                MACHINE,
            )


def test_the_baselines_samples_have_no_step_count(world, tmp_path):
    write_samples(
        tmp_path / "samples",
        world.held_out[:4].astype(np.int32),
        128,
        "autoregressive",
        "stories-tiny/baseline",
    )
    score_samples(
        [tmp_path / "samples"], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE
    )
    assert {
        (row["steps"], row["network_evaluations"], row["run"])
        for row in read_json(tmp_path / "rows.json")
    } == {(None, 128.0, "baseline")}


def test_a_changed_sample_file_and_foreign_tokens_are_named(world, tmp_path, capsys):
    folder = shutil.copytree(world.samples / "steps-8", tmp_path / "steps-8")
    content = bytearray((folder / "samples.npy").read_bytes())
    content[-1] ^= 1
    (folder / "samples.npy").write_bytes(content)
    command = [
        "score-samples",
        "--samples",
        str(folder),
        "--judge",
        str(world.models / "baseline" / "hf"),
        "--corpus",
        str(world.corpus),
    ]
    assert main([*command, "--output", str(tmp_path / "rows.json"), "--device", "cpu"]) == 1
    assert (
        "samples.npy: sha256" in capsys.readouterr().err and not (tmp_path / "rows.json").exists()
    )
    (folder / "samples.npy").unlink()
    with pytest.raises(HalfstepError, match="no such file, though samples.json is there"):
        score_samples([folder], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    write_samples(folder, np.full((2, 128), world.facts["vocab_size"], np.int32), 8)
    with pytest.raises(
        HalfstepError, match=f"token ids from {world.facts['vocab_size']}.*a mask was left"
    ):
        score_samples([folder], world.corpus, tmp_path / "rows.json", scoring(world), MACHINE)
    with pytest.raises(HalfstepError, match="'baseline', which only the workflow can resolve"):
        score_corpus(world.corpus, tmp_path / "rows.json", Evaluation(judge="baseline"), MACHINE)


def test_last_words_of_both_kinds_of_model(world, tmp_path):
    for name, accuracies, perplexities in (
        ("teacher", ["parallel", "confidence"], ["elbo-exact", "elbo-mc"]),
        ("baseline", ["ar"], ["ar"]),
    ):
        score_lambada(
            world.models / name, world.corpus, tmp_path / "rows.json", scoring(world), MACHINE
        )
        rows = read_json(tmp_path / "rows.json")
        assert [(row["metric"], row["protocol"]) for row in rows] == [
            *(("lambada_accuracy", a) for a in accuracies), *(("lambada_perplexity", p) for p in perplexities)
        ]  # fmt: skip
        assert all(
            row["low"] <= row["value"] <= row["high"]
            and row["num_samples"] == 12
            and row["run"] == name
            for row in rows
        )
        assert {row["checkpoint"] for row in rows} == {
            read_json(world.models / name / "meta.json")["sha256"]["ema.safetensors"][:16]
        }
        assert rows[-1]["value"] > 10  # random networks know no last word
        items = [
            json.loads(line)["text"]
            for line in (world.corpus / "last_words.jsonl").read_text().splitlines()[:12]
        ]
        checksum = hashlib.sha256("\0".join(items).encode()).hexdigest()[:12]
        assert {(row["data"], row["weights"]) for row in rows} == {
            (f"last_words.jsonl[12]@{checksum}", "ema")
        }
    assert rows[0]["network_evaluations"] == 1


def test_the_weights_that_are_examined_are_chosen_and_named(world, tmp_path):
    """Raw weights that prefer token i by its number: common words, which have small numbers, are next to impossible."""
    folder = shutil.copytree(world.models / "teacher", tmp_path / "models" / "t" / "teacher")
    model = checkpoint.load_checkpoint(folder)
    state = model.network.state_dict()
    raw = state | {
        "output_layer.linear.weight": 0 * state["output_layer.linear.weight"],
        "output_layer.linear.bias": torch.arange(model.vocab_size + 1) * 1.0,
    }
    checkpoint.save_checkpoint(
        folder,
        {"model.safetensors": raw, "ema.safetensors": state},
        {k: v for k, v in model.meta.items() if k != "sha256"},
        folder / "tokenizer.json",
    )
    values = {}
    for weights in ("raw", "ema"):
        score_lambada(
            folder, world.corpus, tmp_path / "rows.json", scoring(world), MACHINE, weights
        )
        rows = read_json(tmp_path / "rows.json")
        values[weights] = {row["protocol"]: row["value"] for row in rows}
        file = {"raw": "model.safetensors", "ema": "ema.safetensors"}[weights]
        assert {(row["weights"], row["checkpoint"]) for row in rows} == {
            (weights, sha256(folder / file)[:16])
        }
    assert values["raw"]["elbo-exact"] > 10 * values["ema"]["elbo-exact"]


def test_a_local_file_of_items_can_be_named(world, tmp_path):
    items = tmp_path / "mine.jsonl"
    items.write_text('{"text": "Once upon a time"}\n{"text": "The little fox"}\n')
    evaluation = scoring(world).model_copy(update={"lambada": str(items), "lambada_items": None})
    score_lambada(
        world.models / "teacher", world.corpus, tmp_path / "rows.json", evaluation, MACHINE
    )
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

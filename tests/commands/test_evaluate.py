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
from halfstep.commands.variety import DATA_WINDOWS, held_out_texts
from halfstep.config import Evaluation, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics import lambada
from halfstep.metrics.diversity import unigram_entropy
from halfstep.metrics.lambada import evaluate_lambada
from halfstep.metrics.perplexity import ids_nll, load_judge, retokenized_nll
from halfstep.report.rows import read_rows

MACHINE = Machine(device="cpu", threads=1)


def judge_folder(world):
    return world.models / "baseline" / "hf"


def scoring(world, **keys) -> Evaluation:
    keys = {"judge": str(judge_folder(world)), "lambada": "last_words"} | keys
    return Evaluation(**{"lambada_items": 12, "bootstrap": 100} | keys)


def score(world, samples, output, **keys) -> list[dict]:
    """The rows of folders of samples."""
    score_samples(samples, world.corpus, output, scoring(world, **keys), MACHINE)
    return read_json(output)


def judge_name(folder) -> str:
    """Independent of the folder that holds models/."""
    _, below, name = str(folder).rpartition("/models/")
    name = name if below else folder.name
    return f"{name}@{sha256(folder / 'model.safetensors')[:12]}"


def by_name(rows) -> dict:
    return {(row["metric"], row["protocol"], row["steps"]): row for row in rows}


def test_samples_of_all_step_counts_under_one_judge(world, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(
        evaluate, "load_judge", lambda *args: loads.append(args) or load_judge(*args)
    )
    folders = [world.samples / "steps-8", world.samples / "steps-16"]
    rows = by_name(score(world, folders, tmp_path / "rows.json"))
    ids = np.load(folders[1] / "samples.npy")
    assert len(loads) == 1 and len(rows) == 18
    assert {name for name, _, steps in rows if steps == 8} == {
        "generative_perplexity",
        "entropy",
        "distinct_2",
        "repetition",
        "sample_self_bleu",
        "sentence_share",
        "accepted_share",
        "consistent_share",
    }
    judge = load_judge(str(judge_folder(world)))
    tokenizer = Tokenizer.from_file(str(world.corpus / "tokenizer.json"))
    sums = retokenized_nll(judge, ids, tokenizer, world.facts["eos_id"], 5)
    expected = {
        "ids": np.exp(ids_nll(judge, ids, 5).mean()),
        "retokenized": np.exp(sums[:, 0].sum() / sums[:, 1].sum()),
    }
    for protocol, value in expected.items():
        row = rows["generative_perplexity", protocol, 16]
        assert row["value"] == pytest.approx(value, rel=1e-5)
    assert rows["entropy", "unigram", 16]["value"] == pytest.approx(unigram_entropy(ids).mean())
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())
    numbers = {"value": 0, "low": 0, "high": 0, "median_text": 0, "commit": ""}
    assert rows["generative_perplexity", "ids", 16] | numbers == {
        "metric": "generative_perplexity",
        "protocol": "ids",
        "version": 1,
        "model": "stories-tiny/teacher",
        "teacher": "stories-tiny",
        "run": "teacher",
        "round": 0,
        "steps": 16,
        "tokens_per_step": 8.0,
        "sampler": "ancestral",
        "network_evaluations": 16.0,
        "num_samples": 12,
        "seed": 1,
        "weights": "ema",
        "draw_dtype": "float64",
        "precision": "float32",
        "temperature": None,
        "top_p": None,
        "judge": judge_name(judge_folder(world)),
        "judge_dtype": "float32",
        "data": f"stories@{world.facts['splits']['validation']['sha256'][:12]}",
        "checkpoint": "ab" * 8,
        **numbers,
    }


def test_held_out_text_has_its_own_rows_and_the_grammar_accepts_it(world, tmp_path):
    output = tmp_path / "stories-tiny" / "data.json"
    score_corpus(world.corpus, output, scoring(world), MACHINE)
    rows = by_name(read_json(output))
    sentences = rows["sentence_share", "grammar", None]
    accepted = rows["accepted_share", "grammar", None]
    consistent = rows["consistent_share", "grammar", None]
    assert consistent["value"] == accepted["value"] == sentences["value"] == 1
    assert 0.5 < accepted["low"] < sentences["low"] < 1
    windows = held_out_texts(world.corpus, DATA_WINDOWS).ids
    whole = sum(max(0, (window[1:-1] == window[0]).sum() - 1) for window in windows)
    assert accepted["num_samples"] == consistent["num_samples"] == whole  # between two EOS
    # Variety is measured on other numbers of texts, which its rows name.
    of_variety = {"distinct_stories", "fact_divergence", "sample_self_bleu", "sentence_share"}
    found = {
        (row["model"], row["teacher"], row["run"], row["num_samples"])
        for row in rows.values()
        if row["metric"] not in of_variety
    }
    names = ("data", "stories-tiny", "data")
    assert found == {(*names, len(windows)), (*names, whole)}


def test_the_grammar_does_not_accept_shuffled_tokens(world, tmp_path):
    shuffled = np.random.default_rng(0).permuted(world.held_out, axis=1).astype(np.int32)
    write_samples(tmp_path / "samples", shuffled, 8)
    rows = by_name(score(world, [tmp_path / "samples"], tmp_path / "rows.json"))
    assert rows["accepted_share", "grammar", 8]["value"] == 0
    assert rows["sentence_share", "grammar", 8]["value"] == 0


def test_the_configuration_sets_the_number_of_resamples(world, tmp_path):
    """Other resamples give the same value another interval, for a judge and for last words."""
    found = []
    for resamples in (100, 150):
        rows = score(
            world, [world.samples / "steps-8"], tmp_path / "samples.json", bootstrap=resamples
        )
        output, evaluation = tmp_path / "lambada.json", scoring(world, bootstrap=resamples)
        score_lambada([world.models / "teacher"], world.corpus, output, evaluation, MACHINE)
        found.append(by_name([*rows, *read_json(output)]))
    for key in (("generative_perplexity", "ids", 8), ("lambada_perplexity", "elbo-exact", None)):
        one, two = (rows[key] for rows in found)
        assert one["value"] == two["value"], key
        assert (one["low"], one["high"]) != (two["low"], two["high"]), key


def test_without_a_whole_story_the_interval_is_everything(world, tmp_path):
    write_samples(tmp_path / "samples", np.full((3, 128), 5, np.int32), 8)
    rows = by_name(score(world, [tmp_path / "samples"], tmp_path / "rows.json"))
    row = rows["consistent_share", "grammar", 8]
    assert (row["value"], row["low"], row["high"]) == (0, 0, 1)


@pytest.fixture
def other_judge(world, tmp_path):
    """The baseline as a judge in which two tokens have swapped their ids."""
    folder = shutil.copytree(judge_folder(world), tmp_path / "judge")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = [token for token, i in vocabulary.items() if i in (20, 21)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_judge_with_other_tokens_scores_retokenized_only(world, other_judge, tmp_path):
    def perplexities(rows):
        return [row for row in rows if row["metric"] == "generative_perplexity"]

    folders = [world.samples / "steps-8", world.samples / "steps-16"]
    rows = score(world, folders[:1], tmp_path / "rows.json", judge=[str(other_judge)])
    (alone,) = perplexities(rows)
    assert alone["protocol"] == "retokenized"
    # Two judges in one run, as with gpt2-large and Llama-3-8B.
    both = [str(judge_folder(world)), str(other_judge)]
    rows = score(world, folders, tmp_path / "both.json", judge=both)
    scored = [(row["judge"], row["protocol"], row["steps"]) for row in perplexities(rows)]
    one, two = judge_name(judge_folder(world)), judge_name(other_judge)
    assert scored == [
        (one, "ids", 8),
        (one, "retokenized", 8),
        (one, "ids", 16),
        (one, "retokenized", 16),
        (two, "retokenized", 8),
        (two, "retokenized", 16),
    ]
    # A measure without a judge is taken once.
    assert len([row for row in rows if row["metric"] == "entropy"]) == 2
    again = next(row for row in rows if row["judge"] == two and row["steps"] == 8)
    assert again["value"] == alone["value"]
    tabulate("steps", [tmp_path / "both.json"], tmp_path / "steps")
    text = (tmp_path / "steps.md").read_text()
    for protocol, judge, exists in (
        ("ids", one, True),
        ("ids", two, False),
        ("retokenized", one, True),
        ("retokenized", two, True),
    ):
        assert (f"(protocol {protocol}), judge {judge}, " in text) == exists


def test_a_judge_is_named_after_its_weights(world, tmp_path):
    """The same path with other weights gives another name.

    A judge stored in bfloat16 computes in bfloat16, one in float16 in float32.
    """
    folder = shutil.copytree(judge_folder(world), tmp_path / "judge")
    names = {load_judge(str(folder)).name}
    for dtype, computes_in in (("bfloat16", "bfloat16"), ("float16", "float32")):
        network = AutoModelForCausalLM.from_pretrained(judge_folder(world), dtype=dtype)
        network.save_pretrained(folder)
        judge = load_judge(str(folder))
        assert judge.columns == {"judge": judge_name(folder), "judge_dtype": computes_in}
        names.add(judge.name)
    assert len(names) == 3


def test_temperature_and_nucleus_are_null_where_they_are_1(world, tmp_path):
    folder = shutil.copytree(world.samples / "steps-8", tmp_path / "steps-8")
    facts = read_json(folder / "samples.json")
    write_json(folder / "samples.json", facts | {"temperature": 0.9, "top_p": 1.0})
    rows = score(world, [folder], tmp_path / "rows.json")
    assert {(row["temperature"], row["top_p"]) for row in rows} == {(0.9, None)}


def test_rows_have_the_passes_of_a_scorer_where_the_samples_have_them(world, tmp_path):
    folders = [shutil.copytree(world.samples / f"steps-{n}", tmp_path / str(n)) for n in (8, 16)]
    facts = read_json(folders[0] / "samples.json")
    write_json(folders[0] / "samples.json", facts | {"autoregressive_passes": 31.5})
    rows = score(world, folders, tmp_path / "rows.json")
    found = {(row["steps"], row.get("autoregressive_passes", "none")) for row in rows}
    assert found == {(8, 31.5), (16, "none")}
    table = read_rows([tmp_path / "rows.json"])
    assert table["autoregressive_passes"].dropna().unique() == [31.5]


@pytest.mark.parametrize("shape", [(0, 128), (128,)])
def test_samples_without_text_are_an_error(world, tmp_path, shape):
    write_samples(tmp_path / "samples", np.zeros(shape, np.int32), 8)
    message = r"stories-tiny/teacher 8 steps: an array of shape .*expected \[texts, tokens\]"
    with pytest.raises(HalfstepError, match=message):
        score(world, [tmp_path / "samples"], tmp_path / "rows.json")


def test_samples_of_the_baseline_have_no_step_count(world, tmp_path):
    ids = world.held_out[:4].astype(np.int32)
    write_samples(tmp_path / "samples", ids, 128, "autoregressive", "stories-tiny/baseline")
    rows = score(world, [tmp_path / "samples"], tmp_path / "rows.json")
    found = {(row["steps"], row["network_evaluations"], row["run"]) for row in rows}
    assert found == {(None, 128.0, "baseline")}


def test_changed_samples_and_unknown_tokens_are_errors(world, tmp_path, capsys):
    folder = shutil.copytree(world.samples / "steps-8", tmp_path / "steps-8")
    output, vocab_size = tmp_path / "rows.json", world.facts["vocab_size"]
    content = bytearray((folder / "samples.npy").read_bytes())
    content[-1] ^= 1
    (folder / "samples.npy").write_bytes(content)
    flags = {
        "samples": folder,
        "judge": judge_folder(world),
        "corpus": world.corpus,
        "output": output,
        "device": "cpu",
    }
    flags = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    assert main(["score-samples", *flags]) == 1
    assert "samples.npy: sha256" in capsys.readouterr().err and not output.exists()
    (folder / "samples.npy").unlink()
    with pytest.raises(HalfstepError, match="no such file, though samples.json exists"):
        score(world, [folder], output)
    write_samples(folder, np.full((2, 128), vocab_size, np.int32), 8)
    with pytest.raises(HalfstepError, match=f"token ids from {vocab_size}.*a mask was left"):
        score(world, [folder], output)
    with pytest.raises(HalfstepError, match="'baseline', which only the workflow can resolve"):
        score_corpus(world.corpus, output, Evaluation(judge="baseline"), MACHINE)


@pytest.mark.parametrize(
    "name, accuracies, perplexities",
    [
        ("teacher", ["parallel", "confidence"], ["elbo-exact", "elbo-mc"]),
        ("baseline", ["ar"], ["ar"]),
    ],
)
def test_last_words_of_both_kinds_of_model(world, tmp_path, name, accuracies, perplexities):
    folder, output = world.models / name, tmp_path / "rows.json"
    score_lambada([folder], world.corpus, output, scoring(world), MACHINE)
    rows = read_json(output)
    assert [row["protocol"] for row in rows] == [*accuracies, *perplexities]
    metrics = ["lambada_accuracy"] * len(accuracies) + ["lambada_perplexity"] * len(perplexities)
    assert [row["metric"] for row in rows] == metrics
    checkpoint = read_json(folder / "meta.json")["sha256"]["ema.safetensors"][:16]
    lines = (world.corpus / "last_words.jsonl").read_text().splitlines()[:12]
    texts = "\0".join(json.loads(line)["text"] for line in lines)
    data = f"last_words.jsonl[12]@{hashlib.sha256(texts.encode()).hexdigest()[:12]}"
    for row in rows:
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["num_samples"], row["run"], row["weights"]) == (12, name, "ema")
        assert (row["checkpoint"], row["data"]) == (checkpoint, data)
    assert rows[-1]["value"] > 10  # a random network guesses
    assert rows[0]["network_evaluations"] == 1


def last_words(world, output, names=("teacher", "baseline"), **keys) -> list[dict]:
    """The rows of several models in one call."""
    folders = [world.models / name for name in names]
    score_lambada(folders, world.corpus, output, scoring(world, **keys), MACHINE)
    return read_json(output)


def test_several_models_in_one_call_have_the_rows_of_single_calls(world, tmp_path):
    together = last_words(world, tmp_path / "both.json")
    alone = [last_words(world, tmp_path / f"{i}.json", [i]) for i in ("teacher", "baseline")]
    assert together == [row for rows in alone for row in rows]
    inputs = read_json(tmp_path / "both.provenance.json")["inputs"]
    assert {file.split("/")[-2] for file in map(str, inputs)} >= {"teacher", "baseline"}
    with pytest.raises(HalfstepError, match="expected each model once"):
        last_words(world, tmp_path / "twice.json", ["teacher", "teacher"])


def test_a_stopped_call_goes_on_with_the_next_model(world, tmp_path, monkeypatch, capsys):
    expected = last_words(world, tmp_path / "whole.json")
    output, asked = tmp_path / "rows.json", []

    def stopped(model, *args):
        asked.append(model.kind)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return evaluate_lambada(model, *args)

    monkeypatch.setattr(lambada, "evaluate_lambada", stopped)
    with pytest.raises(KeyboardInterrupt):
        last_words(world, output)
    assert (tmp_path / "rows.partial").exists() and not output.exists()
    assert last_words(world, output) == expected
    assert asked == ["diffusion", "autoregressive", "autoregressive"]
    assert "4 rows are finished" in capsys.readouterr().err
    assert not (tmp_path / "rows.partial").exists()


@pytest.mark.parametrize("change", ["lambada_items", "bootstrap", "precision", "items", "weights"])
def test_rows_of_other_items_or_settings_do_not_count(world, tmp_path, change):
    """Without a change they do: their values come back."""
    output, partial = tmp_path / "rows.json", tmp_path / "rows.partial"
    items = tmp_path / "items.jsonl"
    shutil.copyfile(world.corpus / "last_words.jsonl", items)
    keys = {"lambada": str(items)}
    rows = last_words(world, output, **keys)
    settings = evaluate._kept_last_words(output, str(items), scoring(world, **keys)).settings
    marked = {"settings": settings, "rows": [row | {"value": 77.0} for row in rows]}
    write_json(partial, marked)
    assert {row["value"] for row in last_words(world, output, **keys)} == {77.0}
    write_json(partial, marked)
    weights = "ema"
    if change == "items":
        items.write_text('{"text": "Once upon a time"}\n' + items.read_text())
    elif change == "weights":
        weights = "raw"
    else:
        keys |= {"lambada_items": 11, "bootstrap": 150, "precision": "bfloat16"} | keys
        keys = {key: keys[key] for key in ("lambada", change)}
    score_lambada(
        [world.models / "teacher"], world.corpus, output, scoring(world, **keys), MACHINE, weights
    )
    assert 77.0 not in {row["value"] for row in read_json(output)}


def test_the_chosen_weights_are_scored_and_named(world, tmp_path):
    """Raw weights that prefer tokens with large ids make common words nearly impossible."""
    folder = shutil.copytree(world.models / "teacher", tmp_path / "models" / "t" / "teacher")
    model = checkpoint.load_checkpoint(folder)
    state = model.network.state_dict()
    raw = state | {
        "output_layer.linear.weight": 0 * state["output_layer.linear.weight"],
        "output_layer.linear.bias": torch.arange(model.vocab_size + 1) * 1.0,
    }
    files = {"raw": "model.safetensors", "ema": "ema.safetensors"}
    tensors = {files["raw"]: raw, files["ema"]: state}
    meta = {key: value for key, value in model.meta.items() if key != "sha256"}
    checkpoint.save_checkpoint(folder, tensors, meta, folder / "tokenizer.json")
    values = {}
    for weights, file in files.items():
        output = tmp_path / "rows.json"
        score_lambada([folder], world.corpus, output, scoring(world), MACHINE, weights)
        rows = read_json(output)
        values[weights] = {row["protocol"]: row["value"] for row in rows}
        found = {(row["weights"], row["checkpoint"]) for row in rows}
        assert found == {(weights, sha256(folder / file)[:16])}
    assert values["raw"]["elbo-exact"] > 10 * values["ema"]["elbo-exact"]


def test_items_can_come_from_a_local_file(world, tmp_path):
    items, output = tmp_path / "mine.jsonl", tmp_path / "rows.json"
    items.write_text('{"text": "Once upon a time"}\n{"text": "The little fox"}\n')
    evaluation = scoring(world, lambada=str(items), lambada_items=None)
    score_lambada([world.models / "teacher"], world.corpus, output, evaluation, MACHINE)
    assert read_json(output)[0]["num_samples"] == 2
    gone = scoring(world, lambada=str(tmp_path / "gone.jsonl"))
    with pytest.raises(HalfstepError, match="no file .*gone.jsonl"):
        score_lambada([world.models / "teacher"], world.corpus, output, gone, MACHINE)

"""score-samples and score-corpus on a tiny finished workflow."""

import json
import shutil

import numpy as np
import pytest
from known import write_samples
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from halfstep.cli import main
from halfstep.commands import evaluate
from halfstep.commands.evaluate import score_corpus, score_samples
from halfstep.commands.report import tabulate
from halfstep.commands.variety import DATA_WINDOWS, held_out_texts
from halfstep.config import Evaluation, Machine
from halfstep.errors import HalfstepError
from halfstep.files import read_json, sha256, write_json
from halfstep.metrics.diversity import unigram_entropy
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
    """Other resamples give the same value another interval."""
    one, two = (
        by_name(score(world, [world.samples / "steps-8"], tmp_path / "rows.json", bootstrap=number))
        for number in (100, 150)
    )
    one, two = (rows["generative_perplexity", "ids", 8] for rows in (one, two))
    assert one["value"] == two["value"]
    assert (one["low"], one["high"]) != (two["low"], two["high"])


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

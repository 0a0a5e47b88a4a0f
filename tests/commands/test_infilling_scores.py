"""score-infilling on small checkpoints: windows and masks, rows, and two ranks."""

import json

import numpy as np
import pytest
from forked import launch

from halfstep.cli import main
from halfstep.commands import infilling
from halfstep.commands.data import prepare_corpus
from halfstep.commands.infilling import corpus_items, last_word_items
from halfstep.config import Corpus
from halfstep.data.stories import repeated_mentions, sample_stories
from halfstep.data.windows import Windows, corpus_tokenizer, layout_of
from halfstep.files import read_json

MACHINE = "--device cpu --threads 1 --micro-batch 4"


def layout(length, **framing):
    """Of our own corpora, or with a frame of a model of transformers."""
    return layout_of({"length": length, "eos_id": 0} | framing)


def line(checkpoint, corpus, output, *words):
    flags = f"--checkpoint {checkpoint} --corpus {corpus} --output {output} {MACHINE}"
    return " ".join(["score-infilling", flags, "--infilling-items 6", *words])


def call(*words):
    return main(line(*words).split())


@pytest.fixture(scope="module")
def items(world):
    return corpus_items(world.corpus, 6)


def test_all_mentions_of_one_fact_are_masked(world, items):
    """The original is right, and one other token at any masked position makes a story wrong."""
    assert items.task == "infilling" and items.masked.any(1).all()
    assert (items.masked <= (items.windows != world.facts["eos_id"])).all()
    for count in items.count.values():
        right, every = count(items.windows).T
        assert (right == every).all() and (every > 0).all()
    for i, j in np.argwhere(items.masked):
        other = items.windows.copy()
        other[i, j] = (other[i, j] + 7) % world.facts["vocab_size"]
        assert (
            items.count["grammar"](other)[i, 0] == items.count["grammar"](items.windows)[i, 0] - 1
        )


def test_another_fact_is_as_right_as_the_original():
    """Of the mentions of a story's thing, all in another word, as the grammar counts them."""
    found = 0
    for text in sample_stories(40, seed=5):
        places = repeated_mentions(text)
        assert all(len(of_fact) > 1 for of_fact in places)
        for of_fact in places:
            words = {text[a:b].lower() for a, b in of_fact}
            found += len(words) == 1
            pronouns = {"she", "he", "her", "him"}
            assert len(words - pronouns) == 1
    assert found > 40


def test_windows_and_masks_are_a_function_of_the_corpus_alone(world, items):
    again = corpus_items(world.corpus, 6)
    assert np.array_equal(again.windows, items.windows)
    assert np.array_equal(again.masked, items.masked)
    held_out = Windows(world.corpus, "validation")[:].numpy()
    assert {w.tobytes() for w in items.windows} <= {w.tobytes() for w in held_out}


def test_half_of_the_tokens_of_other_corpora_are_masked(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(sample_stories(80, seed=1)))
    how = {"length": 40, "vocab_size": 300, "validation_documents": 20, "files": [str(text)]}
    prepare_corpus(tmp_path / "corpus", Corpus(kind="files", **how), workers=1)
    items = corpus_items(tmp_path / "corpus", 5)
    assert list(items.count) == ["tokens"] and items.windows.shape == (5, 40)
    assert (items.masked.sum(1) == 19).all()
    assert not items.masked[:, [0, -1]].any()  # BOS and EOS stay
    assert len({mask.tobytes() for mask in items.masked}) == 5
    right, every = items.count["tokens"](np.where(items.masked, 0, items.windows)).T
    assert (every == 19).all() and (right < every).all()


def test_windows_of_last_words_hold_whole_items():
    """Context, word, EOS, as documents of a corpus; the rest is the beginning of the next item."""
    texts = [([10 + i] * (3 + i % 2), [50 + i]) for i in range(30)]
    items = last_word_items(texts, layout(16), 4)
    windows, masked = items.windows, items.masked
    assert windows.shape == (4, 16) and (windows[:, [0, -1]] == 0).all()
    seen = np.concatenate([w[m] for w, m in zip(windows, masked, strict=True)])
    assert len(seen) == masked.sum() and (seen >= 50).all()
    shown = windows[~masked]
    assert not np.isin(shown, seen).any()  # no answer is in sight
    first = [0, 10, 10, 10, 50, 0, 11, 11, 11, 11, 51, 0, 12, 12, 12, 0]
    assert windows[0].tolist() == first
    assert masked[0].nonzero()[0].tolist() == [4, 10]
    (right, every), *_ = items.count["exact"](windows)
    assert right == every == 2


def test_the_last_tokens_of_a_long_context_are_kept():
    items = last_word_items([(list(range(1, 40)), [60, 61]), ([1], [62])], layout(12), 3)
    assert items.windows[0].tolist() == [0, *range(32, 40), 60, 61, 0]


def test_items_that_fill_one_window_only_in_part():
    items = last_word_items([([5, 5], [60])], layout(8), 3)
    assert items.windows.tolist() == [[0, 5, 5, 60, 0, 0, 0, 0]]


def test_rows(world, tmp_path, monkeypatch):
    """Tokens per forward are masked positions over passes; by confidence from one to all."""
    written = []

    def noted(*args, **keys):
        written.append(draw(*args, **keys))
        return written[-1]

    draw = infilling.draw_texts
    monkeypatch.setattr(infilling, "draw_texts", noted)
    words = "--lambada last_words --bootstrap 100 --sampler threshold --threshold 1"
    teacher, output = world.models / "teacher", tmp_path / "rows.json"
    assert call(teacher, world.corpus, output, words, "--variant sure") == 0
    rows = read_json(output)
    assert {row["variant"] for row in rows} == {"sure"}
    assert {row["sampler"] for row in rows} == {"threshold(threshold=1.0)"}
    protocols = [("last_words", "exact"), ("infilling", "grammar"), ("infilling", "tokens")]
    for task, protocol in protocols:
        mine = [row for row in rows if (row["task"], row["protocol"]) == (task, protocol)]
        *points, area = mine
        assert area["metric"] == "accuracy_under_parallelism" and area["steps"] is None
        assert area["low"] <= area["value"] <= area["high"]
        found = [row["value"] for row in points]
        assert min(found) - 1e-9 <= area["value"] <= max(found) + 1e-9
        assert points[0]["tokens_per_forward"] == 1 and points[-1]["network_evaluations"] == 1
        masked = points[-1]["tokens_per_forward"]
        for row in points:
            assert row["tokens_per_forward"] == pytest.approx(masked / row["network_evaluations"])
            assert row["low"] <= row["value"] <= row["high"]
    counted = [float(texts.network_evaluations.double().mean()) for texts in written]
    kept = [row for row in rows if row["protocol"] != "tokens" and row["steps"]]
    assert [row["network_evaluations"] for row in kept] == counted


def test_other_draws_and_models_fill_in_the_same_items(world, tmp_path):
    data = []
    for number, words in enumerate(["--sampling-seed 1", "--sampling-seed 2 --sampler remask"]):
        output = tmp_path / f"{number}.json"
        args = (world.models / "teacher", world.corpus, output, words, "--bootstrap 100")
        assert call(*args) == 0
        data.append({row["data"] for row in read_json(output)})
    assert data[0] == data[1] and len(data[0]) == 1


def test_two_ranks_write_the_same_rows(world, tmp_path):
    words = "--lambada last_words --bootstrap 100"
    teacher = world.models / "teacher"
    alone, both = tmp_path / "alone.json", tmp_path / "both.json"
    assert call(teacher, world.corpus, alone, words) == 0
    codes = launch(line(teacher, world.corpus, both, words), 2, tmp_path / "ranks")
    assert {code for code, _ in codes} == {0}
    assert read_json(both) == read_json(alone)


def test_a_sampler_from_left_to_right_has_no_rows(world, tmp_path, capsys):
    output, words = tmp_path / "rows.json", "--sampler speculative --scorer nowhere"
    assert call(world.models / "teacher", world.corpus, output, words) == 0
    assert read_json(output) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sampler speculative writes from left to right" in said


def test_energy_asks_its_scorer(world, tmp_path):
    output = tmp_path / "rows.json"
    words = f"--sampler energy --candidates 2 --scorer {world.models}/baseline --bootstrap 100"
    assert call(world.models / "teacher", world.corpus, output, words) == 0
    points = [row for row in read_json(output) if row["steps"]]
    assert points
    for row in points:
        assert row["autoregressive_passes"] == pytest.approx(2 * row["network_evaluations"])


@pytest.mark.parametrize(
    ("model", "corpus", "words", "message"),
    [
        ("baseline", "own", "", "an autoregressive model, which cannot fill in a position"),
        ("teacher", "small", "", "has another vocabulary than the corpus"),
        ("small", "small", "", "infilling_items: found no whole story in"),
        ("teacher", "own", "--lambada {tmp}/gone.jsonl", "lambada: no file"),
        ("small", "small", "--lambada {tmp}/long.jsonl", "lambada: the last word of item 1 has"),
        ("teacher", "own", "--sampler energy", "scorer: found none, but sampler energy asks"),
    ],
)
def test_bad_input_is_one_sentence(
    world, pipeline, tmp_path, capsys, model, corpus, words, message
):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": f"One {'xyzzy' * 40}"}) + "\n")
    checkpoint = pipeline.teacher if model == "small" else world.models / model
    folder = world.corpus if corpus == "own" else pipeline.corpus
    output = tmp_path / "rows.json"
    assert call(checkpoint, folder, output, words.format(tmp=tmp_path)) == 1
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and not output.exists()


def test_the_tables_name_what_is_right(world, tmp_path):
    folder = tmp_path / "metrics"
    words = "--lambada last_words --bootstrap 100"
    teacher = world.models / "teacher"
    assert call(teacher, world.corpus, folder / "a.json", words) == 0
    words += " --sampler threshold --threshold 1 --variant sure"
    assert call(teacher, world.corpus, folder / "b.json", words) == 0
    table = f"tabulate --table infilling --metrics {folder} --output {tmp_path}/infilling"
    assert main(table.split()) == 0
    text = (tmp_path / "infilling.md").read_text()
    assert "finds it consistent, whatever the fact" in text and "| teacher, sure" in text
    assert text.count("\n## ") + text.startswith("## ") == 2
    header = next(row for row in text.splitlines() if row.startswith("| way to draw"))
    assert [cell.strip() for cell in header.split("|")[2:4]] == ["default", "sure"]


def test_words_of_tokenizers_are_masked_whole(world, items):
    """Every masked run decodes to whole words."""
    tokenizer = corpus_tokenizer(world.corpus)
    ids, mask = items.windows[0], items.masked[0]
    edges = np.flatnonzero(np.diff(mask.astype(int))) + 1
    for part in np.split(ids, edges)[1::2]:
        word = tokenizer.decode(part.tolist())
        after = tokenizer.decode(ids[: np.flatnonzero(mask)[0]].tolist())
        assert word.strip().isalpha() and (word[0] == " " or not after[-1:].isalpha())

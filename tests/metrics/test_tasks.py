"""Tasks of lm-eval by the ELBO of whole texts, offline: against enumerated masks and by hand."""

import math
import os
from itertools import pairwise
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from known import UNFRAMED, Language, Stubborn, words_tokenizer
from lm_eval.tasks import TaskManager
from questions import write_rolling, write_task
from test_elbo import by_enumeration

from halfstep.errors import HalfstepError
from halfstep.metrics.tasks import NO_FORK, TaskLM, evaluate_tasks, load_tasks, task_texts

WORDS = "who sat ran mat rug door on to"
ROWS = [
    {"question": "who sat", "choices": ["on mat", "to door", "rug"], "label": 0},
    {"question": "who ran", "choices": ["to door", "on", "mat"], "label": 2},
    {"question": "mat", "choices": ["rug", "on rug", "who"], "label": 1},
]


def diffusion(denoiser=None, length=16) -> SimpleNamespace:
    tokenizer = words_tokenizer(WORDS)
    denoiser = denoiser or Stubborn(tokenizer.get_vocab_size())
    return SimpleNamespace(
        device=torch.device("cpu"),
        precision="float32",
        kind="diffusion",
        denoiser=denoiser,
        tokenizer=tokenizer,
        length=length,
        eos_id=0,
        **UNFRAMED,
    )


class Bigrams:
    """A network whose next token depends on the last one alone."""

    def __init__(self, table):
        self.table = table.log_softmax(-1)

    def __call__(self, x):
        return torch.nn.functional.one_hot(x, len(self.table)).double()

    def log_p(self, h):
        return h @ self.table


def autoregressive(table=None, length=16) -> SimpleNamespace:
    tokenizer = words_tokenizer(WORDS)
    if table is None:
        size = tokenizer.get_vocab_size()
        table = torch.randn(size, size, generator=torch.manual_seed(0), dtype=torch.float64)
    return SimpleNamespace(
        device=torch.device("cpu"),
        precision="float32",
        kind="autoregressive",
        network=Bigrams(table),
        tokenizer=tokenizer,
        length=length,
        eos_id=0,
        **UNFRAMED,
    )


def scores(model, names, items=None, draws=16) -> dict:
    found = evaluate_tasks(TaskLM(model, draws, micro_batch=2), names, items)
    return {(score.task, score.measure, score.protocol): score for score in found}


def ids_of(model, row, choice) -> list[int]:
    return [0, *model.tokenizer.encode(f"{row['question']} {choice}").ids, 0]


def test_answers_are_ranked_by_the_elbo_of_the_whole_text(tmp_path):
    """Every text has seven tokens at most, so the exact ELBO is that over all masks."""
    model = diffusion()
    found = scores(model, [write_task(tmp_path, "mine", ROWS)])
    right = {"elbo": 0, "elbo-per-token": 0, "acc_norm": 0}
    for row in ROWS:
        texts = [ids_of(model, row, choice) for choice in row["choices"]]
        elbo = -np.array([by_enumeration(model.denoiser, ids) for ids in texts])
        right["elbo"] += elbo.argmax() == row["label"]
        right["elbo-per-token"] += (elbo / [len(ids) for ids in texts]).argmax() == row["label"]
        size = [len(choice) for choice in row["choices"]]
        right["acc_norm"] += (elbo / size).argmax() == row["label"]
    assert found["mine", "acc", "elbo"].value == right["elbo"] / 3
    assert found["mine", "acc", "elbo-per-token"].value == right["elbo-per-token"] / 3
    assert found["mine", "acc_norm", "elbo"].value == right["acc_norm"] / 3
    assert ("mine", "acc_norm", "elbo-per-token") not in found
    one = found["mine", "acc", "elbo"]
    assert one.count == 3 and one.data.startswith("mine[3]@")
    p = one.value
    assert one.error == pytest.approx(math.sqrt(p * (1 - p) / 2))  # lm-eval's: n - 1


def test_elbos_of_single_answers_are_those_of_enumeration(tmp_path):
    model = diffusion()
    lm = TaskLM(model, draws=4)
    lm.choices = {"mine"}
    asked = [
        SimpleNamespace(args=(row["question"], f" {choice}"), task_name="mine", doc_id=i)
        for i, row in enumerate(ROWS)
        for choice in row["choices"]
    ]
    expected = [
        -by_enumeration(model.denoiser, ids_of(model, row, choice))
        for row in ROWS
        for choice in row["choices"]
    ]
    np.testing.assert_allclose([value for value, _ in lm.loglikelihood(asked)], expected)


def test_a_baseline_answers_by_log_likelihoods(tmp_path):
    model = autoregressive()
    found = scores(model, [write_task(tmp_path, "mine", ROWS)])
    right = 0
    for row in ROWS:
        start = 1 + len(model.tokenizer.encode(row["question"]).ids)
        nats = []
        for choice in row["choices"]:
            ids = ids_of(model, row, choice)[:-1]
            steps = range(start, len(ids))
            nats.append(sum(model.network.table[ids[i - 1], ids[i]].item() for i in steps))
        right += np.argmax(nats) == row["label"]
    assert found["mine", "acc", "ar"].value == right / 3
    assert found["mine", "acc", "ar"].passes == 1
    assert {protocol for _, _, protocol in found} == {"ar"}


def test_a_model_that_knows_the_answers_beats_chance(tmp_path):
    tokenizer = words_tokenizer(WORDS)
    windows = {}
    for row in ROWS:
        for i, choice in enumerate(row["choices"]):
            ids = tokenizer.encode(f"{row['question']} {choice}").ids
            windows[0, *ids, 0] = 0.9 if i == row["label"] else 0.1
    known = Language(windows, tokenizer.get_vocab_size())
    known.vocab_size = known.vocabulary
    task = write_task(tmp_path, "mine", ROWS)
    # The ELBO of a language that is known is log p up to the windows of other lengths.
    assert scores(diffusion(known), [task])["mine", "acc", "elbo"].value > 1 / 3
    table = torch.zeros(tokenizer.get_vocab_size(), tokenizer.get_vocab_size(), dtype=torch.float64)
    for row in ROWS:
        before = tokenizer.encode(row["question"]).ids[-1]
        for token in tokenizer.encode(row["choices"][row["label"]]).ids:
            table[before, token] = 9
            before = token
    assert scores(autoregressive(table), [task])["mine", "acc", "ar"].value == 1


def test_more_draws_change_nothing_where_masks_are_enumerated(tmp_path):
    model, task = diffusion(), write_task(tmp_path, "mine", ROWS)
    few, many = (scores(model, [task], draws=draws) for draws in (1, 64))
    assert {key: score.value for key, score in few.items()} == {
        key: score.value for key, score in many.items()
    }


def test_the_number_of_questions_can_be_limited_and_names_the_data(tmp_path, capsys):
    task = write_task(tmp_path, "mine", ROWS)
    all_of_them, two = scores(diffusion(), [task]), scores(diffusion(), [task], items=2)
    key = ("mine", "acc", "elbo")
    assert (all_of_them[key].count, two[key].count) == (3, 2)
    assert all_of_them[key].data.split("@")[1] != two[key].data.split("@")[1]
    assert "it/s" not in capsys.readouterr().err  # a bar of lm-eval


def test_whole_texts_and_last_words_are_answered_too(tmp_path, monkeypatch):
    """In one process: lm-eval's bootstrap would fork, which hung next to torch's threads."""
    monkeypatch.setattr("multiprocessing.Pool", None)
    monkeypatch.delenv(NO_FORK, raising=False)
    model = autoregressive()
    rolling = write_rolling(tmp_path, "rolled", ["who sat on mat", "rug"])
    changes = {
        "output_type": "loglikelihood",
        "doc_to_choice": None,
        "doc_to_target": "{{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    }
    last = write_task(tmp_path, "last", ROWS, **changes)
    found = scores(model, [rolling, last])
    table = model.network.table

    def nats(text):
        ids = [0, *model.tokenizer.encode(text).ids]
        return -sum(table[a, b].item() for a, b in pairwise(ids))

    texts = ["who sat on mat", "rug"]
    words = np.exp(sum(map(nats, texts)) / 5)
    assert found["rolled", "word_perplexity", "ar"].value == pytest.approx(words)
    suffix = [nats(f"{r['question']} {r['choices'][0]}") - nats(r["question"]) for r in ROWS]
    assert found["last", "perplexity", "ar"].value == pytest.approx(np.exp(np.mean(suffix)))
    by_diffusion = scores(diffusion(), [rolling, last])
    assert ("rolled", "word_perplexity", "elbo") in by_diffusion
    assert not any(protocol == "elbo-per-token" for _, _, protocol in by_diffusion)
    assert list(task_texts(rolling)) == texts and NO_FORK not in os.environ


def test_a_group_has_the_mean_of_its_tasks(tmp_path, monkeypatch):
    """As groups of lm-eval, which have names; a file of a group is refused."""
    write_task(tmp_path, "one", ROWS[:1])
    write_task(tmp_path, "two", ROWS[1:])
    metrics = [{"metric": "acc", "weight_by_size": True}]
    group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(group))
    loaded = TaskManager(include_path=tmp_path, include_defaults=False).load(["both"])
    found = loaded["tasks"], loaded["groups"]
    monkeypatch.setattr("halfstep.metrics.tasks.load_tasks", lambda names: found)
    found = scores(autoregressive(), ["both"])
    monkeypatch.undo()
    with pytest.raises(HalfstepError, match="both.yaml defines a group"):
        evaluate_tasks(TaskLM(autoregressive(), 1), [str(tmp_path / "both.yaml")])
    leaves = [score for (task, measure, _), score in found.items() if measure == "acc"]
    both = found["both", "acc", "ar"]
    parts = [score for score in leaves if score.task != "both"]
    assert both.count == sum(score.count for score in parts) == 3
    assert both.value == pytest.approx(sum(score.value * score.count for score in parts) / 3)


def test_a_text_longer_than_the_model_keeps_bos_and_its_last_tokens(tmp_path, capsys):
    model = diffusion(length=5)
    lm = TaskLM(model, draws=4)
    ids = model.tokenizer.encode("who sat on mat").ids
    window = lm.question("who sat", " on mat")
    assert window.ids == (0, *ids[1:], 0) and (window.start, window.end) == (2, 4)
    window = lm.question("rug", " who sat on mat")
    assert window.ids == (0, *ids[1:], 0) and (window.start, window.end) == (1, 4)
    scores(model, [write_task(tmp_path, "mine", ROWS)])
    line = "tasks: 3 texts of mine are longer than 5 tokens; BOS and their last tokens were kept"
    assert line in capsys.readouterr().err


def test_what_cannot_be_answered_is_one_sentence(tmp_path, monkeypatch):
    lm = TaskLM(diffusion(), draws=4)
    with pytest.raises(HalfstepError, match=r"tasks: .*gone.yaml cannot be read"):
        evaluate_tasks(lm, [str(tmp_path / "gone.yaml")])
    hollow = {"question": "who", "choices": ["", "sat"], "label": 0}
    empty = write_task(tmp_path, "empty", [ROWS[0], hollow])
    with pytest.raises(HalfstepError, match="tasks: the answer .* to 'who' has no tokens"):
        evaluate_tasks(lm, [empty])
    (tmp_path / "broken.yaml").write_text("task: [")
    with pytest.raises(HalfstepError, match="tasks: cannot load .*broken.yaml"):
        evaluate_tasks(lm, [str(tmp_path / "broken.yaml")])
    with pytest.raises(HalfstepError, match="is of type multiple_choice, expected loglikelihood_r"):
        list(task_texts(write_task(tmp_path, "mine", ROWS)))

    def no_route(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", no_route)
    with pytest.raises(HalfstepError, match="cannot load .*no route to the hub.*halfstep fetch"):
        load_tasks([empty])


def test_a_name_of_lm_eval_is_known_or_has_a_hint(monkeypatch):
    """The index of all its tasks takes seconds, so one test asks for it."""

    def offline(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(HalfstepError, match="no task 'arc_eazy'; did you mean arc_easy"):
        load_tasks(["arc_eazy"])
    with pytest.raises(HalfstepError, match="cannot load piqa .*offline"):
        load_tasks(["piqa"])


def test_weights_with_nan_are_named(tmp_path):
    model = diffusion()
    model.denoiser.log_p = lambda h: h * torch.nan
    with pytest.raises(HalfstepError, match="not a number"):
        scores(model, [write_task(tmp_path, "mine", ROWS)])

"""Written answers to tasks of lm-eval, offline: against enumerated languages and by hand."""

from pathlib import Path
from types import SimpleNamespace

import lm_eval
import numpy as np
import oracle
import pytest
import torch
import yaml
from known import UNFRAMED, Stubborn, words_tokenizer
from questions import write_generation, write_task

from halfstep.commands.zero_shot import make_answering
from halfstep.config import DrawOptions
from halfstep.diffusion.samplers import SAMPLERS
from halfstep.errors import HalfstepError
from halfstep.metrics.answers import AnswerOptions, before_token, cut_at
from halfstep.metrics.tasks import TaskLM, evaluate_tasks

WORDS = "cat dog fox"
FACTS = [(0, 1, 2, 3, 0), (0, 2, 1, 1, 0), (0, 3, 3, 2, 0)]  # BOS, question, answer of two, EOS
NAMES = ["", *WORDS.split()]
ROWS = [{"question": NAMES[q], "answer": f"{NAMES[a]} {NAMES[b]}"} for _, q, a, b, _ in FACTS]


def model_of(denoiser, length=5, words=WORDS) -> SimpleNamespace:
    tokenizer = words_tokenizer(words)
    denoiser.inference_copy = denoiser
    return SimpleNamespace(
        device=torch.device("cpu"),
        precision="float32",
        kind="diffusion",
        denoiser=denoiser,
        tokenizer=tokenizer,
        mask_id=tokenizer.get_vocab_size(),
        **UNFRAMED,
        length=length,
        eos_id=0,
        meta={},
    )


def answers(model, tasks, steps=(2,), micro_batch=2, items=None, **drawing) -> dict:
    answering = make_answering(model, list(steps), DrawOptions(**drawing))
    lm = TaskLM(model, 4, micro_batch, answering=answering)
    found = evaluate_tasks(lm, tasks, items)
    return {(score.measure, score.steps): score for score in found}


@pytest.mark.parametrize(
    "sampler", [n for n, row in SAMPLERS.items() if "scorer" not in row.options]
)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_whoever_knows_the_answers_gives_them(tmp_path, sampler, steps):
    """A perfect denoiser of a language in which a question has one answer, by every sampler."""
    language = oracle.Language(4, 5, only=FACTS)
    task = write_generation(tmp_path, "facts", ROWS, max_gen_toks=2)
    found = answers(model_of(oracle.Perfect(language)), [task], (steps,), sampler=sampler)
    one = found["exact_match", steps]
    assert one.value == 1 and one.count == 3 and one.protocol == "written"
    assert one.costs.tokens == 2 and one.costs.temperature == 0
    assert 0 < one.passes <= steps


def test_a_greedy_answer_has_the_likeliest_tokens(tmp_path):
    """In one step: the likeliest token at each position, by the posteriors of all states."""
    language = oracle.Language(4, 5, seed=3)
    rows = []
    for question in (1, 2, 3):
        state = torch.tensor([0, question, 4, 4, 0])
        ids = language.posterior[language.index(state)][2:4].argmax(-1).numpy()
        answer = " ".join(NAMES[i] for i in before_token(ids, 0))
        rows.append({"question": NAMES[question], "answer": answer})
    assert len({row["answer"] for row in rows}) > 1
    task = write_generation(tmp_path, "likely", rows, max_gen_toks=2)
    for seed in (1, 2):
        model = model_of(oracle.Perfect(language))
        found = answers(model, [task], (1,), sampling_seed=seed)
        assert found["exact_match", 1].value == 1


def test_a_sampled_answer_has_the_law_of_the_language(tmp_path):
    """One token: its frequencies over repeated questions against the posterior."""
    language = oracle.Language(4, 3, seed=1, sharpness=1)
    p = language.posterior[language.index(torch.tensor([0, 4, 0]))][1]
    rows = [{"question": "", "answer": "dog"}] * 3000
    task = write_generation(
        tmp_path, "drawn", rows, max_gen_toks=1, do_sample=True, temperature=1.0, until=[]
    )
    model = model_of(oracle.Perfect(language), length=4)
    share = answers(model, [task], (1,), micro_batch=500)["exact_match", 1]
    assert share.value == pytest.approx(
        p[2].item(), abs=4 * (p[2] * (1 - p[2]) / 3000).sqrt().item()
    )
    assert share.costs.temperature == 1


def test_exact_match_is_what_one_counts_by_hand(tmp_path):
    """A denoiser that is wrong in a known way, and questions of several lengths."""
    words = "who sat ran mat rug door on to"
    questions = ["who sat on", "mat", "rug to door", "who ran", "sat", "to", "on mat rug door"]
    expected = []
    for question in questions:
        model = model_of(Stubborn(9), 16, words)
        ids = model.tokenizer.encode(question).ids
        frame = torch.tensor([[0, *ids, *[9] * 3, 0]])
        p = model.denoiser.features(frame, torch.ones(1))[0, 1 + len(ids) : 4 + len(ids)]
        expected.append(model.tokenizer.decode(before_token(p.argmax(-1).numpy(), 0)))
    rows = [
        {"question": question, "answer": answer if i % 3 else "nobody"}
        for i, (question, answer) in enumerate(zip(questions, expected, strict=True))
    ]
    task = write_generation(tmp_path, "mine", rows, max_gen_toks=3)
    stubborn = Stubborn(9)
    stubborn.schedule = oracle.ScheduleOf(oracle.loglinear)
    stubborn.logits = lambda h, chunk=slice(None): h.log_softmax(-1)[:, chunk].float()
    stubborn.logits_at = lambda h, tokens: h.log_softmax(-1).gather(-1, tokens).float()
    for micro_batch in (1, 4):
        found = answers(model_of(stubborn, 16, words), [task], (1,), micro_batch)
        assert found["exact_match", 1].value == 4 / 7


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_ends_before_the_first_stop(seed):
    """The shortest part at whose end a stop begins, found letter by letter."""
    rng = np.random.default_rng(seed)

    def draw(most):
        return "".join(rng.choice(list("ab\n"), rng.integers(0, most)))

    text, until = draw(9), [draw(4) for _ in range(rng.integers(0, 4))]
    stops = [stop for stop in until if stop]
    naive = next(
        (text[:i] for i in range(len(text)) if any(text.startswith(s, i) for s in stops)), text
    )
    assert cut_at(text, until) == naive


def test_an_answer_ends_with_the_text():
    assert before_token(np.array([3.0, 2.0, 0.0, 1.0, -1.0]), 0) == [3, 2]
    assert before_token(np.array([3.0, 2.0, -1.0]), 0) == [3, 2]
    assert before_token(np.array([], float), 0) == []


def test_a_long_question_keeps_its_last_tokens(tmp_path, capsys):
    language = oracle.Language(4, 5, only=FACTS)
    rows = [row | {"question": f"dog cat {row['question']}"} for row in ROWS[:2]] + ROWS[2:]
    task = write_generation(tmp_path, "long", rows, max_gen_toks=2)
    found = answers(model_of(oracle.Perfect(language)), [task], (1, 2))
    assert all(score.value == 1 for score in found.values())
    line = "tasks: 2 questions of long leave no room for an answer in 5 tokens; BOS and"
    assert capsys.readouterr().err.count(line) == 1


def test_written_and_chosen_answers_in_one_call(tmp_path):
    language = oracle.Language(4, 5, only=FACTS)
    written = write_generation(tmp_path, "written", ROWS, max_gen_toks=2)
    choices = [{"question": "cat", "choices": ["dog fox", "cat dog"], "label": 0}]
    chosen = write_task(tmp_path, "chosen", choices)
    model = model_of(oracle.Perfect(language))
    answering = make_answering(model, [1, 2], DrawOptions())
    found = evaluate_tasks(TaskLM(model, 4, answering=answering), [written, chosen])
    kinds = {(score.task, score.protocol, score.steps) for score in found}
    expected = {("chosen", "elbo", None), ("chosen", "elbo-per-token", None)}
    assert kinds == expected | {("written", "written", 1), ("written", "written", 2)}
    assert all(score.value == 1 for score in found)


def test_the_stock_gsm8k_is_read_as_lm_eval_means_it(tmp_path):
    """Its file with questions of this machine: its filters, its stops, and greedy draws."""
    stock = Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml"
    kwargs = yaml.safe_load(stock.read_text())["generation_kwargs"]
    options = AnswerOptions.of("gsm8k", kwargs, model_of(Stubborn(4), 1024))
    assert options == AnswerOptions(256, 0, ("Question:", "</s>", "<|im_end|>"))
    language = oracle.Language(4, 5, only=FACTS)
    model = model_of(oracle.Perfect(language), words="Answer: #### 18")
    own = write_task(tmp_path, "mine", [{"question": "", "answer": "so #### 18"}])
    changes = yaml.safe_load(Path(own).read_text())
    kept = ("task", "dataset_path", "dataset_kwargs", "test_split")
    local = {key: changes[key] for key in kept}
    local |= {
        "include": str(stock),
        "dataset_name": None,
        "num_fewshot": 0,
        "doc_to_text": "Answer:",
    }
    local |= {"training_split": None, "fewshot_split": None}
    local["generation_kwargs"] = kwargs | {"max_gen_toks": 2}
    Path(own).write_text(yaml.safe_dump(local))
    found = answers(model, [own], (1,))
    assert {measure for measure, _ in found} == {
        "exact_match, strict-match",
        "exact_match, flexible-extract",
    }
    assert all(score.value == 1 for score in found.values())


@pytest.mark.parametrize("kwargs, temperature", [
    ({}, 0), ({"do_sample": False, "temperature": 0.7}, 0), ({"temperature": 0.7}, 0.7),
    ({"do_sample": True}, 1), ({"do_sample": True, "temperature": 0.0}, 0),
])  # fmt: skip
def test_the_temperature_is_that_of_the_task(kwargs, temperature):
    options = AnswerOptions.of("mine", kwargs | {"max_new_tokens": 3}, model_of(Stubborn(4), 9))
    assert options.temperature == temperature and options.tokens == 3


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    language = oracle.Language(4, 5, only=FACTS)
    model = model_of(oracle.Perfect(language))
    right = write_generation(tmp_path, "right", ROWS, max_gen_toks=2)
    with pytest.raises(HalfstepError, match=r"tasks: right asks .* no step counts .*--steps"):
        answers(model, [right], ())
    chosen = write_task(tmp_path, "chosen", [{"question": "cat", "choices": ["dog"], "label": 0}])
    with pytest.raises(HalfstepError, match="--steps: found step counts, but no task asks"):
        answers(model, [chosen])
    endless = write_generation(tmp_path, "endless", ROWS)
    tree = yaml.safe_load(Path(endless).read_text())
    tree["generation_kwargs"].pop("until")
    Path(endless).write_text(yaml.safe_dump(tree))
    with pytest.raises(HalfstepError, match="endless.yaml: generation_kwargs.until: found none"):
        answers(model, [endless])
    for kwargs, message in (
        ({"max_gen_toks": 3}, "mine: max_gen_toks: found 3, expected 1 to 2, because a text of"),
        ({"max_gen_toks": 0}, "mine: max_gen_toks: found 0, expected 1 to 2"),
        ({"max_gen_toks": "many"}, "mine: its generation_kwargs cannot be read"),
        (
            {"max_gen_toks": 2, "temperature": -1.0, "do_sample": True},
            "mine: temperature: found -1",
        ),
    ):
        with pytest.raises(HalfstepError, match=message):
            answers(model, [write_generation(tmp_path, "mine", ROWS, **kwargs)])
    with pytest.raises(HalfstepError, match="steps: found 9, but sampler first_hitting takes at"):
        answers(model, [right], (9,), sampler="first_hitting")

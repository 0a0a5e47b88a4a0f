"""Last words through lm-eval, offline: a model that is known exactly, by hand; and the released form of the task."""

import hashlib
import json
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from known import Language, words_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.metrics.lambada import (
    HalfstepLM,
    Request,
    check_items,
    context_of,
    examine,
    task,
    word_of,
)
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.dit import DiT
from halfstep.models.gpt import GPT

LAMBADA = Path("/work/shared/data/lambada/lambada_openai_2000.jsonl")
GPT2 = Path("/work/shared/data/gpt2_bpe")
STORIES = {
    "the cat sat on the mat": 0.3,
    "the cat sat on the rug": 0.2,
    "a cat ran to the door": 0.4,
    "a cat ran to": 0.1,
}


def known_model(length=16) -> SimpleNamespace:
    tokenizer = words_tokenizer(" ".join(STORIES))
    windows = {(0, *tokenizer.encode(text).ids, 0): p for text, p in STORIES.items()}
    language = Language(windows, tokenizer.get_vocab_size())
    return SimpleNamespace(
        kind="diffusion", denoiser=language, tokenizer=tokenizer, length=length, eos_id=0
    )


def write_items(path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_lm_eval_end_to_end_by_hand(tmp_path):
    """EOS on the right is visible, so `a cat ran to` is no rival of `a cat ran to the door`: only mat and rug are in doubt."""
    found = examine(
        known_model(), str(write_items(tmp_path / "items.jsonl", STORIES)), micro_batch=2
    )
    np.testing.assert_allclose(np.exp(-found["nll"]["elbo-exact"]), [0.6, 0.4, 1, 1], rtol=1e-9)
    assert (
        found["hits"]["parallel"].tolist()
        == found["hits"]["confidence"].tolist()
        == [True, False, True, True]
    )
    assert found["lm_eval"]["acc,none"] == 0.75
    assert found["lm_eval"]["perplexity,none"] == pytest.approx(exp(-(log(0.6) + log(0.4)) / 4))


def test_the_first_items_only_and_every_item_once(tmp_path):
    items = write_items(tmp_path / "items.jsonl", list(STORIES) + [next(iter(STORIES))])
    two, five = (examine(known_model(), str(items), items=items_) for items_ in (2, 99))
    assert {len(nll) for nll in two["nll"].values()} == {2} and {
        len(nll) for nll in five["nll"].values()
    } == {5}
    texts = list(STORIES)
    assert (
        two["data"]
        == f"items.jsonl[2]@{hashlib.sha256(chr(0).join(texts[:2]).encode()).hexdigest()[:12]}"
    )
    assert (
        five["data"]
        == f"items.jsonl[5]@{hashlib.sha256(chr(0).join([*texts, texts[0]]).encode()).hexdigest()[:12]}"
    )


def test_the_task_is_the_stock_one():
    import lm_eval
    from lm_eval.utils import apply_template

    stock = yaml.safe_load(
        (Path(lm_eval.__file__).parent / "tasks/lambada/lambada_openai.yaml").read_text()
    )
    ours = task("EleutherAI/lambada_openai", Path("."))
    assert {k: v for k, v in ours.items() if not k.startswith("doc_to_t")} == {
        k: v for k, v in stock.items() if k not in ("tag", "doc_to_text", "doc_to_target")
    }
    for text in (
        "one two three",
        "two  spaces  here",
        "line\nbreak end",
        "word",
        " leading",
        'quote" she said',
        "a tab\tb c\nd",
    ):
        assert apply_template(stock["doc_to_text"], {"text": text}) == context_of({"text": text})
        assert apply_template(stock["doc_to_target"], {"text": text}) == word_of({"text": text})


def test_windows_hold_bos_context_word_eos_and_lose_the_oldest_tokens():
    model = known_model(length=7)
    ids = model.tokenizer.encode("the cat sat on the mat").ids
    q = HalfstepLM(model, "parallel").question("the cat sat on the", " mat")
    assert q.ids == (0, *ids[1:], 0) and q.ids[q.start : q.end] == (ids[-1],)
    model.length = 99
    q = HalfstepLM(model, "parallel").question("", " mat")
    assert q.ids == (0, ids[-1], 0) and (q.start, q.end) == (1, 2)
    model.length = 2
    with pytest.raises(HalfstepError, match="expected 1 to 0 in windows of 2"):
        HalfstepLM(model, "parallel").question("the", " mat")


def test_answers_are_kept_and_protocols_share_the_likelihood():
    model = known_model()
    lm = HalfstepLM(model, "parallel")
    requests = [
        Request(("the cat sat on the", " mat")),
        Request(("the cat sat on the", " rug")),
        Request(("the cat sat on the", " mat")),
    ]
    first = lm.loglikelihood(requests)
    asked = model.denoiser.asked
    assert lm.loglikelihood(requests) == first and model.denoiser.asked == asked
    lm.accuracy = "confidence"
    assert lm.loglikelihood(requests) == first and model.denoiser.asked == asked + 2
    assert [hit for _, hit in first] == [True, False, True]


def test_monte_carlo_stands_beside_what_lm_eval_computes(tmp_path):
    """Protocol elbo-mc is by item and seed, whatever the batch, and leaves lm-eval's own numbers as they were."""
    items = str(write_items(tmp_path / "items.jsonl", STORIES))
    one, two, other = (
        examine(known_model(), items, micro_batch=batch, seed=seed)
        for batch, seed in ((1, 0), (9, 0), (9, 1))
    )
    np.testing.assert_allclose(one["nll"]["elbo-mc"], two["nll"]["elbo-mc"], rtol=1e-12)
    assert (one["nll"]["elbo-mc"][:2] != other["nll"]["elbo-mc"][:2]).all()  # of the items in doubt
    assert (
        one["lm_eval"] == other["lm_eval"]
        and (one["nll"]["elbo-exact"] == other["nll"]["elbo-exact"]).all()
    )
    assert one["passes"] == {"parallel": 1, "confidence": 1, "elbo-exact": 1, "elbo-mc": 32}


def test_whole_texts_are_scored_window_by_window():
    model = known_model(length=8)
    requests = [Request(("the cat sat on the mat",)), Request((" ".join(STORIES),))]
    whole, long = HalfstepLM(model, "parallel").loglikelihood_rolling(requests)
    assert whole == pytest.approx(
        log(0.3 / 0.9)
    )  # of three texts of this length, EOS on the right known
    parts = [
        Request((" ".join(words),))
        for words in np.split(np.array(" ".join(STORIES).split()), [6, 12, 18])
    ]
    assert long == pytest.approx(sum(HalfstepLM(model, "parallel").loglikelihood_rolling(parts)))


@pytest.mark.parametrize("lines, fault", [
    ('{"text": "a b"}\n{"text": 3}\n', ":2 is not"), ('{"text": "a b"}\nnonsense\n', ":2 is not"), ('{"text": "ends in space "}\n', ":1 is not"),
    ('{"story": "a b"}\n', ":1 is not"), ("", "holds no items"),
])  # fmt: skip
def test_bad_items_are_named(tmp_path, lines, fault):
    path = tmp_path / "items.jsonl"
    path.write_text(lines)
    with pytest.raises(HalfstepError, match=fault):
        examine(known_model(), str(path))


def test_missing_data_and_wrong_requests_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(HalfstepError, match="no file"):
        check_items(tmp_path / "nowhere.jsonl")
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route to the hub")),
    )
    with pytest.raises(
        HalfstepError, match="cannot load 'EleutherAI/lambada_openai'.*no route.*jsonl"
    ):
        examine(known_model(), "EleutherAI/lambada_openai")
    with pytest.raises(HalfstepError, match="likelihood tasks"):
        HalfstepLM(known_model(), "parallel").generate_until([])
    with pytest.raises(HalfstepError, match="parallel, confidence"):
        HalfstepLM(known_model(), "ar")


@pytest.mark.skipif(
    not (LAMBADA.is_file() and GPT2.is_dir()),
    reason="the released LAMBADA form and GPT-2's BPE are not in /work/shared",
)
def test_the_released_form_of_lambada():
    """2,000 items with GPT-2's BPE and random networks: every item is read, and a uniform guess over 50,257 tokens scores like one."""
    tokenizer = Tokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    torch.manual_seed(0)
    gpt, dit = GPT(50257, 16, 1, 2).eval(), DiT(50257, 16, 1, 2).eval()
    torch.nn.init.zeros_(gpt.output_layer.linear.weight)
    model = dict(
        tokenizer=tokenizer,
        length=128,
        eos_id=50256,
        network=gpt,
        denoiser=SubsDenoiser(dit, LogLinear()),
    )
    texts = [json.loads(line)["text"] for line in LAMBADA.read_text().splitlines()]
    tokens = np.array([len(tokenizer.encode(word_of({"text": text})).ids) for text in texts])
    ar = examine(SimpleNamespace(kind="autoregressive", **model), str(LAMBADA), micro_batch=64)
    np.testing.assert_allclose(ar["nll"]["ar"], tokens * log(50257), rtol=1e-5)
    diffusion = examine(
        SimpleNamespace(kind="diffusion", **model), str(LAMBADA), items=100, micro_batch=64
    )
    np.testing.assert_allclose(
        diffusion["nll"]["elbo-exact"], tokens[:100] * log(50257), rtol=1e-5
    )  # DiT's head starts at zero
    assert (
        abs(diffusion["nll"]["elbo-mc"].mean() / diffusion["nll"]["elbo-exact"].mean() - 1) < 0.15
    )
    assert (
        ar["data"]
        == f"{LAMBADA.name}[2000]@{hashlib.sha256(chr(0).join(texts).encode()).hexdigest()[:12]}"
    )
    assert (
        diffusion["data"].startswith(f"{LAMBADA.name}[100]@")
        and diffusion["data"][-12:] != ar["data"][-12:]
    )
    assert (
        diffusion["passes"]["confidence"] == tokens[:100].mean()
        and diffusion["passes"]["elbo-exact"] == (2.0 ** tokens[:100] - 1).mean()
    )
    assert (
        len(ar["nll"]["ar"]) == 2000
        and set(diffusion["hits"]) == {"parallel", "confidence"}
        and set(ar["hits"]) == {"ar"}
    )

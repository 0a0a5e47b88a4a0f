"""LAMBADA through lm-eval, offline: by hand on a known language, and on the released items."""

import gzip
import hashlib
import json
import re
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from known import UNFRAMED, Language, words_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from halfstep.checkpoint import load_checkpoint
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.meta import Framing
from halfstep.metrics.lambada import (
    HalfstepLM,
    Request,
    context_of,
    count_items,
    evaluate_lambada,
    lambada_task,
    last_word_of,
    read_items,
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
        kind="diffusion",
        denoiser=language,
        tokenizer=tokenizer,
        length=length,
        eos_id=0,
        **UNFRAMED,
        device=torch.device("cpu"),
        precision="float32",
    )


def write_items(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def digest(texts) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def test_lm_eval_end_to_end_by_hand(tmp_path, capsys):
    """Only mat and rug are in doubt.

    EOS on the right is visible, so `a cat ran to` does not compete with `a cat ran to the door`.
    """
    items = write_items(tmp_path / "items.jsonl", STORIES)
    found = evaluate_lambada(known_model(), items, micro_batch=2)
    said = capsys.readouterr().err.splitlines()
    assert said and all(re.match(r"[\w-]+ \| item \d+ of \d+ \| ", line) for line in said), said
    np.testing.assert_allclose(np.exp(-found["nll"]["elbo-exact"]), [0.6, 0.4, 1, 1], rtol=1e-9)
    for protocol in ("parallel", "confidence"):
        assert found["hits"][protocol].tolist() == [True, False, True, True]
    assert found["lm_eval"]["acc,none"] == 0.75
    assert found["lm_eval"]["perplexity,none"] == pytest.approx(exp(-(log(0.6) + log(0.4)) / 4))


def test_items_can_be_limited_and_a_repeated_item_counts_twice(tmp_path):
    texts = [*STORIES, next(iter(STORIES))]
    items = write_items(tmp_path / "items.jsonl", texts)
    for limit, count in ((2, 2), (99, 5)):
        found = evaluate_lambada(known_model(), items, items=limit)
        assert {len(nll) for nll in found["nll"].values()} == {count}
        assert found["data"] == f"items.jsonl[{count}]@{digest(texts[:count])}"


def test_the_task_is_the_stock_one():
    import lm_eval
    from lm_eval.utils import apply_template

    path = Path(lm_eval.__file__).parent / "tasks/lambada/lambada_openai.yaml"
    stock = yaml.safe_load(path.read_text())
    ours = lambada_task("EleutherAI/lambada_openai")
    templates = {"doc_to_text": context_of, "doc_to_target": last_word_of}
    assert ours == {key: value for key, value in stock.items() if key != "tag"} | templates
    for text in (
        "one two three",
        "two  spaces  here",
        "line\nbreak end",
        "word",
        " leading",
        'quote" she said',
        "a tab\tb c\nd",
    ):
        for template, function in templates.items():
            assert apply_template(stock[template], {"text": text}) == function({"text": text})


def test_windows_are_bos_context_word_eos_without_the_oldest_tokens():
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


def test_answers_are_cached_and_protocols_share_the_likelihood():
    model = known_model()
    lm = HalfstepLM(model, "parallel")
    words = (" mat", " rug", " mat")
    requests = [Request(("the cat sat on the", word)) for word in words]
    first = lm.loglikelihood(requests)
    asked = model.denoiser.asked
    assert lm.loglikelihood(requests) == first and model.denoiser.asked == asked
    lm.accuracy = "confidence"
    assert lm.loglikelihood(requests) == first and model.denoiser.asked == asked + 2
    assert [hit for _, hit in first] == [True, False, True]


def test_monte_carlo_depends_on_item_and_seed_only(tmp_path):
    """Protocol elbo-mc is the same in any batch and leaves lm-eval's own numbers unchanged."""
    items = write_items(tmp_path / "items.jsonl", STORIES)
    one, two, other = (
        evaluate_lambada(known_model(), items, micro_batch=batch, seed=seed)
        for batch, seed in ((1, 0), (9, 0), (9, 1))
    )
    np.testing.assert_allclose(one["nll"]["elbo-mc"], two["nll"]["elbo-mc"], rtol=1e-12)
    in_doubt = slice(0, 2)
    assert (one["nll"]["elbo-mc"][in_doubt] != other["nll"]["elbo-mc"][in_doubt]).all()
    assert one["lm_eval"] == other["lm_eval"]
    assert (one["nll"]["elbo-exact"] == other["nll"]["elbo-exact"]).all()
    assert one["passes"] == {"parallel": 1, "confidence": 1, "elbo-exact": 1, "elbo-mc": 32}


def test_whole_texts_are_scored_window_by_window():
    model = known_model(length=8)
    text = " ".join(STORIES)
    requests = [Request(("the cat sat on the mat",)), Request((text,))]
    whole, long = HalfstepLM(model, "parallel").loglikelihood_rolling(requests)
    # Three texts have this length, which the EOS on the right reveals.
    assert whole == pytest.approx(log(0.3 / 0.9))
    pieces = np.split(np.array(text.split()), [6, 12, 18])
    parts = [Request((" ".join(piece),)) for piece in pieces]
    assert long == pytest.approx(sum(HalfstepLM(model, "parallel").loglikelihood_rolling(parts)))


@pytest.mark.parametrize(
    "lines, message",
    [
        ('{"text": "a b"}\n{"text": 3}\n', ":2 is not"),
        ('{"text": "a b"}\nnonsense\n', ":2 is not"),
        ('{"text": "ends in space "}\n', ":1 is not"),
        ('{"story": "a b"}\n', ":1 is not"),
        ("", "holds no items"),
    ],
)
def test_a_bad_item_is_named(tmp_path, lines, message):
    path = tmp_path / "items.jsonl"
    path.write_text(lines)
    with pytest.raises(HalfstepError, match=message):
        evaluate_lambada(known_model(), str(path))


def test_missing_data_and_wrong_requests_are_errors_with_a_remedy(tmp_path, monkeypatch):
    with pytest.raises(HalfstepError, match="no file"):
        count_items(tmp_path / "nowhere.jsonl")

    def no_route(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", no_route)
    message = "cannot load 'EleutherAI/lambada_openai'.*no route.*jsonl"
    with pytest.raises(HalfstepError, match=message):
        evaluate_lambada(known_model(), "EleutherAI/lambada_openai")
    with pytest.raises(HalfstepError, match="likelihood tasks"):
        HalfstepLM(known_model(), "parallel").generate_until([])
    with pytest.raises(HalfstepError, match="parallel, confidence"):
        HalfstepLM(known_model(), "ar")


@pytest.mark.skipif(
    not (LAMBADA.is_file() and GPT2.is_dir()),
    reason="the released LAMBADA form and GPT-2's BPE are not in /work/shared",
)
def test_the_released_form_of_lambada():
    """2,000 items with GPT-2's BPE, by networks that guess uniformly over 50,257 tokens."""
    tokenizer = Tokenizer(models.BPE.from_file(str(GPT2 / "encoder.json"), str(GPT2 / "vocab.bpe")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    gpt, dit = GPT(50257, 16, 1, 2).eval(), DiT(50257, 16, 1, 2).eval()
    torch.nn.init.zeros_(gpt.output_layer.linear.weight)  # that of the DiT starts at zero
    model = {
        "tokenizer": tokenizer,
        "length": 128,
        "eos_id": 50256,
        "framing": Framing(begin=[50256], end=[50256]),
        "is_framed": False,
        "device": torch.device("cpu"),
        "precision": "float32",
        "network": gpt,
        "denoiser": SubsDenoiser(dit, LogLinear()),
    }
    texts = [json.loads(line)["text"] for line in LAMBADA.read_text().splitlines()]
    words = [last_word_of({"text": text}) for text in texts]
    tokens = np.array([len(tokenizer.encode(word).ids) for word in words])
    ar = SimpleNamespace(kind="autoregressive", **model)
    ar = evaluate_lambada(ar, str(LAMBADA), micro_batch=64)
    np.testing.assert_allclose(ar["nll"]["ar"], tokens * log(50257), rtol=1e-5)
    assert len(ar["nll"]["ar"]) == 2000 and set(ar["hits"]) == {"ar"}
    assert ar["data"] == f"{LAMBADA.name}[2000]@{digest(texts)}"
    tokens = tokens[:100]
    diffusion = SimpleNamespace(kind="diffusion", **model)
    diffusion = evaluate_lambada(diffusion, str(LAMBADA), items=100, micro_batch=64)
    exact, drawn = diffusion["nll"]["elbo-exact"], diffusion["nll"]["elbo-mc"]
    np.testing.assert_allclose(exact, tokens * log(50257), rtol=1e-5)
    assert abs(drawn.mean() / exact.mean() - 1) < 0.15
    assert set(diffusion["hits"]) == {"parallel", "confidence"}
    assert diffusion["data"] == f"{LAMBADA.name}[100]@{digest(texts[:100])}"
    assert diffusion["passes"]["confidence"] == tokens.mean()
    assert diffusion["passes"]["elbo-exact"] == (2.0**tokens - 1).mean()


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: "\ufeff" + lines,
        lambda lines: "\n" + lines.replace("\n", "\n \n\n"),
        lambda lines: lines.replace("\n", "\t \n"),
        lambda lines: lines.replace("\n", "\r\n"),
        lambda lines: lines.rstrip(),
        lambda lines: lines.replace('{"', '{"id": 7, "'),
        lambda lines: lines.replace("the cat", "\\u0074he c\\u0061t"),
    ],
    ids=["mark", "blank lines", "blanks", "CR LF", "no LF", "fields", "escapes"],
)
def test_items_are_read_as_corpora_are(tmp_path, change):
    path = tmp_path / "items.jsonl"
    lines = Path(write_items(path, STORIES)).read_text()
    path.write_bytes(change(lines).encode())
    assert list(read_items(path)) == list(STORIES) and count_items(path) == len(STORIES)
    assert lambada_task(str(path))["custom_dataset"]()["test"]["text"][:] == list(STORIES)


def test_items_may_be_packed_and_a_lone_surrogate_is_a_question_mark(tmp_path):
    path = tmp_path / "items.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a cat"}\n{"text": "a \\ud800 cat"}\n'))
    assert list(read_items(path)) == ["a cat", "a ? cat"]


def test_bytes_that_are_no_text_are_a_fault_and_no_item(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"text": "an \xe9clair"}\n')
    with pytest.raises(HalfstepError, match="line 1: byte 0xe9 .*not UTF-8"):
        count_items(path)
    for text in ("a cat\n", "a cat ", " ", ""):
        write_items(path, ["a cat", text])
        with pytest.raises(HalfstepError, match=":2 is not .* with a word after the last space"):
            count_items(path)


def test_an_item_that_is_too_long_is_found_before_the_first_question(tmp_path):
    items = write_items(tmp_path / "items.jsonl", ["the cat"])
    model = known_model(length=2)
    with pytest.raises(HalfstepError, match="has 1 tokens, expected 1 to 0 in windows of 2"):
        evaluate_lambada(model, items)
    assert model.denoiser.asked == 0


def test_lm_evals_own_number_of_a_baseline_needs_a_bos(pipeline, tmp_path):
    """lm-eval's model `hf` with add_bos_token=True: the tokens after BOS, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["Tom had a red kite", "Anna saw the fox", "A cat"]
    items = write_items(tmp_path / "items.jsonl", texts)
    found = evaluate_lambada(load_checkpoint(pipeline.baseline), items)["nll"]["ar"]
    folder = pipeline.baseline / "hf"
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    for bos, agrees in ((True, True), (False, False)):
        tokenizer = AutoTokenizer.from_pretrained(folder, add_bos_token=bos)
        for text, nll in zip(texts, found, strict=True):
            left = tokenizer(context_of({"text": text}))["input_ids"]
            right = tokenizer(last_word_of({"text": text}), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                log_p = network(torch.tensor([left + right])).logits[0].double().log_softmax(-1)
            values = log_p[range(len(left) - 1, len(left + right) - 1), right]
            assert (abs(-values.sum().item() - nll) < 1e-4) == agrees

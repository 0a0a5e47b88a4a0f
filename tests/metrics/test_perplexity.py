"""Generative perplexity against direct arithmetic on the judge's logits, and errors of judges."""

import json
import shutil
from math import exp

import numpy as np
import pytest
import torch
from known import words_tokenizer
from tokenizers import Regex, normalizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from halfstep.errors import HalfstepError
from halfstep.metrics import perplexity
from halfstep.metrics.perplexity import ids_nll, load_judge, retokenized_nll, token_nll

WORDS = "the cat sat on a mat and ran to door rug with its red hat"
EOS = "<|endoftext|>"


def save_judge(folder, architecture, words=WORDS, seed=0, eos=EOS):
    tokenizer = words_tokenizer(words)
    torch.manual_seed(seed)
    if architecture == "gpt2":
        config, network = (
            GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=24),
            GPT2LMHeadModel,
        )
    else:
        config, network = (
            GPTNeoXConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=24,
            ),
            GPTNeoXForCausalLM,
        )
    size = {"vocab_size": tokenizer.get_vocab_size(), "bos_token_id": 0, "eos_token_id": 0}
    config.update(size | {"initializer_range": 0.5})
    network(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["gpt2", "gpt_neox"])
def folder(request, tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp(request.param), request.param)


def by_hand(folder, text):
    """-log p of each token but the first: one text alone, float64, logsumexp."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = network(torch.tensor([text])).logits[0, :-1]
    chosen = logits[torch.arange(len(text) - 1), torch.tensor(text[1:])]
    return (logits.logsumexp(-1) - chosen).numpy()


def test_token_nll_is_logsumexp_minus_logit_in_any_batch(folder, monkeypatch):
    judge, rng = load_judge(str(folder)), np.random.default_rng(0)
    texts = [rng.integers(0, 16, n).tolist() for n in (5, 24, 1, 9, 2, 9)] + [[]]
    for micro_batch, budget in ((1, 1 << 25), (4, 1 << 25), (4, 1)):
        monkeypatch.setitem(perplexity.LOGITS, "cpu", budget)
        found = token_nll(judge, texts, micro_batch)
        for text, nll in zip(texts, found, strict=True):
            expected = by_hand(folder, text) if len(text) > 1 else []
            np.testing.assert_allclose(nll, expected, rtol=2e-5)


def test_ids_is_sdtts_mean_of_means(folder):
    ids = np.random.default_rng(1).integers(0, 16, (7, 11))
    nll = ids_nll(load_judge(str(folder)), ids, 3)
    expected = exp(np.mean([by_hand(folder, text).mean() for text in ids.tolist()]))
    assert exp(nll.mean()) == pytest.approx(expected, rel=1e-5)


def test_retokenized_is_mdlms_masked_token_mean(folder):
    """MDLM's own mask, (cumsum of EOS == 1) or not EOS, on texts with no, one and several EOS."""
    tokenizer, judge = words_tokenizer(WORDS), load_judge(str(folder))
    ids = np.array(
        [
            [1, 2, 3, 4, 5, 6],
            [0, 2, 3, 0, 5, 0],
            [1, 0, 3, 0, 0, 6],
            [0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 2, 0],
        ]
    )
    sums = retokenized_nll(judge, ids, tokenizer, 0, 2)
    for text, (total, number) in zip(ids.tolist(), sums, strict=True):
        eos = np.array(text) == 0
        mask = ((eos.cumsum() == 1) | ~eos)[1:]
        assert number == mask.sum()
        assert total == pytest.approx(by_hand(folder, text)[mask].sum(), rel=1e-4)
    assert sums[:, 1].tolist() == [5, 3, 3, 0, 2]


def test_retokenized_uses_the_judges_own_tokens_and_eos(tmp_path):
    """Only the text counts: the judge's words have other ids, and its EOS another name."""
    folder = save_judge(tmp_path, "gpt2", words=" ".join(reversed(WORDS.split())))
    judge, tokenizer = load_judge(str(folder)), words_tokenizer(WORDS)
    ids = np.array([[0, 1, 2, 3, 0], [0, 4, 5, 6, 7]])
    theirs = [
        judge.tokenizer.convert_tokens_to_ids(tokenizer.decode(text, False).split())
        for text in ids.tolist()
    ]
    sums = retokenized_nll(judge, ids, tokenizer, 0, 8)
    assert not judge.shares(tokenizer)
    assert sums[1, 0] == pytest.approx(by_hand(folder, theirs[1]).sum(), rel=1e-4)
    assert sums[:, 1].tolist() == [3, 4]
    judge.tokenizer.add_special_tokens({"eos_token": "hat"})
    sums = retokenized_nll(judge, ids, tokenizer, 0, 8)
    hat = judge.tokenizer.convert_tokens_to_ids("hat")
    expected = by_hand(folder, [hat, *theirs[0][1:4], hat])[:3].sum()
    assert sums[0, 0] == pytest.approx(expected, rel=1e-4)


def test_retokenized_cuts_to_the_length_of_the_samples(folder):
    judge, tokenizer = load_judge(str(folder)), words_tokenizer(WORDS)
    judge.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("mat", "red red hat")
    ids = np.array([[1, 6, 2, 6, 3]])  # nine tokens of the judge, of which it reads five
    assert retokenized_nll(judge, ids, tokenizer, 0, 8)[0, 1] == 4


def test_of_pairs_the_response_and_its_first_eos_count_given_the_prompt(folder):
    """In both protocols; what follows the first EOS changes nothing."""
    tokenizer, judge = words_tokenizer(WORDS), load_judge(str(folder))
    ids = np.array([[1, 2, 3, 4, 5, 0, 0, 0], [4, 1, 0, 0, 0, 0, 0, 0], [2, 3, 4, 5, 6, 7, 1, 2]])
    spans = np.array([[2, 6], [2, 3], [4, 8]])
    nll, sums = ids_nll(judge, ids, 2, spans=spans), retokenized_nll(judge, ids, tokenizer, 0, 2,
                                                                     spans=spans)  # fmt: skip
    for text, (begin, end), mean, (total, number) in zip(
        ids.tolist(), spans.tolist(), nll, sums, strict=True
    ):
        expected = by_hand(folder, text[:end])[begin - 1 :]
        assert mean == pytest.approx(expected.mean(), rel=1e-4)
        assert (total, number) == (pytest.approx(expected.sum(), rel=1e-4), end - begin)
    ids[0, 6:], ids[1, 3:] = 7, 3
    np.testing.assert_array_equal(ids_nll(judge, ids, 2, spans=spans), nll)
    again = retokenized_nll(judge, ids, tokenizer, 0, 2, spans=spans)
    np.testing.assert_array_equal(again, sums)
    long = np.full((1, 30), 3)  # the judge reads 24 tokens
    assert retokenized_nll(judge, long, tokenizer, 0, 2, spans=np.array([[20, 29]]))[0, 1] == 4
    with pytest.raises(HalfstepError, match="texts of 25 tokens.*at most 24"):
        retokenized_nll(judge, long, tokenizer, 0, 2, spans=np.array([[24, 29]]))


def test_texts_of_eos_only_and_a_judge_without_eos_are_errors(folder, tmp_path):
    judge = load_judge(str(folder))
    with pytest.raises(HalfstepError, match="every text is empty or end-of-text alone"):
        retokenized_nll(judge, np.zeros((3, 5), int), words_tokenizer(WORDS), 0, 2)
    judge = load_judge(str(save_judge(tmp_path, "gpt2", eos=None)))
    with pytest.raises(HalfstepError, match="names no eos_token"):
        retokenized_nll(judge, np.ones((3, 5), int), words_tokenizer(WORDS), 0, 2)


def test_a_judge_shares_a_tokenizer_with_the_same_ids(folder):
    judge = load_judge(str(folder))
    for words, shared in (
        (WORDS, True),
        ("the cat sat", True),
        ("cat the sat", False),
        (WORDS + " more", False),
    ):
        assert judge.shares(words_tokenizer(words)) == shared


def test_ids_beyond_the_judges_vocabulary_or_context_are_errors(folder):
    judge = load_judge(str(folder))
    with pytest.raises(HalfstepError, match="token id 16 in the texts.*below 16"):
        ids_nll(judge, np.array([[1, 2, 16]]), 2)
    with pytest.raises(HalfstepError, match="texts of 25 tokens.*at most 24"):
        ids_nll(judge, np.ones((2, 25), int), 2)


def test_a_folder_that_is_no_judge_is_an_error(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(HalfstepError, match="no config.json in .*empty, found nothing there"):
        load_judge(str(tmp_path / "empty"))
    with pytest.raises(HalfstepError, match="no folder .*/missing"):
        load_judge(str(tmp_path / "missing"))
    with pytest.raises(HalfstepError, match="no folder results/models/x/baseline/hf"):
        load_judge("results/models/x/baseline/hf")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        content = file.read_bytes()
        content = content[:100] if file.suffix == ".safetensors" else content
        (broken / file.name).write_bytes(content)
    with pytest.raises(HalfstepError, match="cannot load .*broken.*make the folder again"):
        load_judge(str(broken))


@pytest.mark.parametrize(
    "name, error, message",
    [
        (
            "gpt2-large",
            "We couldn't connect to 'https://huggingface.co' to load the files\nmore",
            r"cannot load 'gpt2-large' \(OSError: We couldn't connect.*files\)"
            ".*without network, download",
        ),
        (
            "meta-llama/Meta-Llama-3-8B@main",
            "You are trying to access a gated repo.\nMake sure to have access to it at "
            "https://huggingface.co/meta-llama/Meta-Llama-3-8B.",
            "accept its license at https://huggingface.co/meta-llama/Meta-Llama-3-8B, then log in",
        ),
    ],
)
def test_a_judge_that_the_hub_does_not_give_is_an_error(monkeypatch, name, error, message):
    def refuse(*args, **options):
        raise OSError(error)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(HalfstepError, match=message) as caught:
        load_judge(name)
    assert "\n" not in str(caught.value)


def test_a_revision_is_passed_on(folder, monkeypatch):
    seen, original = {}, AutoModelForCausalLM.from_pretrained

    def load_network(name, revision, **options):
        seen["network"] = name, revision
        network = original(folder, **options)
        network.config._commit_hash = "0123456789abcdef"
        return network

    def load_tokenizer(name, revision):
        seen["tokenizer"] = name, revision

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_network)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load_tokenizer)
    assert load_judge("openai/judge@v2").name == "openai/judge@0123456789ab"
    assert seen == {"network": ("openai/judge", "v2"), "tokenizer": ("openai/judge", "v2")}


def change_tokenizer(folder, to, **changes):
    """A copy of a judge with other values in its tokenizer.json."""
    shutil.copytree(folder, to)
    about = json.loads((to / "tokenizer.json").read_text())
    (to / "tokenizer.json").write_text(json.dumps(about | changes))
    return load_judge(str(to))


def template(*pieces):
    parts = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in pieces
    ]
    ids = {EOS: 0, "mat": 6}
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in {*pieces} - {"A"}
        },
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"post_processor": template("A", EOS)},
        {"post_processor": template(EOS, "A", EOS)},
        {
            "truncation": {
                "direction": "Left",
                "max_length": 3,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        },
        {
            "padding": {
                "strategy": {"Fixed": 20},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": EOS,
            }
        },
    ],
    ids=["EOS", "BOS and EOS", "truncation", "padding"],
)
def test_settings_of_a_judges_tokenizer_add_and_remove_nothing(folder, tmp_path, changes):
    tokenizer = words_tokenizer(WORDS)
    ids = np.array([[0, *tokenizer.encode("the cat sat on a mat").ids, 0]])
    plain, _ = load_judge(str(folder)).retokenize(ids, tokenizer, 0)
    changed = change_tokenizer(folder, tmp_path / "judge", **changes)
    assert changed.retokenize(ids, tokenizer, 0)[0] == plain == ids.tolist()


def test_a_bos_that_is_not_eos_is_kept(folder, tmp_path):
    """As Llama's tokenizer adds it, and only it; a text is cut to L tokens with it."""
    judge = change_tokenizer(folder, tmp_path / "judge", post_processor=template("mat", "A", EOS))
    judge.tokenizer.bos_token = "mat"
    tokenizer = words_tokenizer(WORDS)
    ids = np.array([tokenizer.encode("the cat sat on").ids])
    bos = tokenizer.token_to_id("mat")
    assert judge.retokenize(ids, tokenizer, 0) == ([[bos, *ids[0, :-1].tolist()]], [0])
    span = np.array([[1, 3]])
    assert judge.retokenize(ids, tokenizer, 0, span) == ([[bos, *ids[0, :3].tolist()]], [2])


def test_a_judge_without_a_vocabulary_is_an_error(folder):
    judge = load_judge(str(folder))
    nothing = normalizers.Replace(Regex(r"[\s\S]"), "")
    judge.tokenizer.backend_tokenizer.normalizer = nothing
    tokenizer = words_tokenizer(WORDS)
    ids = np.array([tokenizer.encode("the cat sat").ids])
    with pytest.raises(HalfstepError, match="has no token for any text; put the tokenizer.json"):
        judge.retokenize(ids, tokenizer, 0)

"""MAUVE: features are those of the judge, and the value is the paper's area where it is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from halfstep.errors import HalfstepError
from halfstep.metrics.mauve import judge_features, mauve
from halfstep.metrics.perplexity import load_judge


@pytest.fixture(scope="module")
def judge(world):
    return load_judge(str(world.models / "baseline" / "hf"))


@pytest.fixture(scope="module")
def tokenizer(world):
    return Tokenizer.from_file(str(world.corpus / "tokenizer.json"))


def test_features_are_the_last_hidden_state_of_the_last_token(world, judge, tokenizer):
    """Each text alone, without padding, by transformers' own hidden_states.

    The texts have different lengths once they are tokenized again.
    """
    eos = world.facts["eos_id"]
    ids = np.random.default_rng(0).permuted(world.held_out[:7, :40], axis=1)
    # Spelled out, letter by letter: the letters merge again.
    letters = tokenizer.decode(world.held_out[0].tolist()).replace(" ", "Ġ")[:40]
    ids[0] = [tokenizer.token_to_id(letter) for letter in letters]
    found = judge_features(judge, ids, tokenizer, eos, 3)
    lengths, means = set(), []
    texts = tokenizer.decode_batch(ids.tolist(), skip_special_tokens=False)
    for text, mine in zip(texts, found, strict=True):
        again = torch.tensor([judge.tokenizer(text)["input_ids"][:40]])
        lengths.add(again.shape[1])
        with torch.no_grad():
            states = judge.network(input_ids=again, output_hidden_states=True).hidden_states[-1]
        assert np.allclose(mine, states[0, -1].numpy(), atol=1e-4)
        means.append(states[0].mean(0).numpy())
    assert len(lengths) > 1 and found.shape == (7, 128) and found.dtype == np.float32
    assert np.allclose(found, judge_features(judge, ids, tokenizer, eos, 7), atol=1e-4)
    assert np.allclose(means, judge_features(judge, ids, tokenizer, eos, 3, mean=True), atol=1e-4)


def test_features_of_a_response_are_the_mean_over_its_tokens_given_its_prompt(
    world, judge, tokenizer
):
    ids, spans = world.held_out[:4, :40], np.array([[5, 9], [1, 40], [20, 21], [9, 33]])
    found = judge_features(judge, ids, tokenizer, 0, 3, mean=True, spans=spans)
    for text, (begin, end), mine in zip(ids, spans, found, strict=True):
        parts = tokenizer.decode(text[:begin], False), tokenizer.decode(text[begin:end], False)
        prompt, response = (judge.tokenizer(part)["input_ids"] for part in parts)
        again = torch.tensor([prompt + response])
        with torch.no_grad():
            states = judge.network(input_ids=again, output_hidden_states=True).hidden_states[-1]
        assert np.allclose(mine, states[0, len(prompt) :].mean(0).numpy(), atol=1e-4)


def test_a_judge_that_reads_less_than_a_text_is_an_error(world, tokenizer):
    short = SimpleNamespace(context=8, name="short")
    with pytest.raises(HalfstepError, match="texts of 40 tokens, but short reads at most 8"):
        judge_features(short, world.held_out[:2, :40], tokenizer, 0, 2)


def test_area_under_the_curve_of_two_bins():
    """Features at two points: histograms (1/2, 1/2) and (3/4, 1/4), so the area is known."""

    def texts(*counts):
        return np.repeat(np.eye(2, 5, dtype=np.float32), counts, axis=0)

    def kl(a, b):
        return (a * np.log(a / b)).sum()

    p, q = np.array([0.5, 0.5]), np.array([0.75, 0.25])
    mixtures = [w * p + (1 - w) * q for w in np.linspace(1e-6, 1 - 1e-6, 25)]
    curve = np.exp(-5 * np.array([[kl(q, r), kl(p, r)] for r in mixtures]))
    x, y = np.vstack([[1, 0], curve[curve[:, 1].argsort()], [0, 1]]).T
    value, interval = mauve(texts(10, 10), texts(15, 5))
    assert value == pytest.approx(abs(np.trapezoid(y, x)), abs=1e-6) and 0.5 < value < 0.95
    assert interval == pytest.approx((value, value))  # every seed finds these two bins


def test_mauve_falls_from_one_for_equal_distributions_to_zero_for_distant_ones():
    rng = np.random.default_rng(1)
    human = rng.normal(size=(200, 16)).astype(np.float32)
    found = [
        mauve(human, (rng.normal(size=(400, 16)) + shift).astype(np.float32))
        for shift in (0, 0.5, 1, 4)
    ]
    values = [value for value, _ in found]
    assert mauve(human, human)[0] > 0.999 and values[0] > 0.95 and values[-1] < 0.01
    assert values == sorted(values, reverse=True)
    assert all(low <= value <= high for value, (low, high) in found)
    low, high = found[0][1]
    assert low < high <= 1
    assert mauve(human, human + 0.3) == mauve(human, human + 0.3)
    with pytest.raises(HalfstepError, match="found 200 references and 1 texts"):
        mauve(human, human[:1])


def test_a_text_without_tokens_is_an_error(judge, tokenizer, monkeypatch):
    """Its features would be those of padding."""
    texts = [[1, 2], [], [3]]
    monkeypatch.setattr(type(judge), "retokenize", lambda *_: (texts, [0] * len(texts)))
    with pytest.raises(HalfstepError, match="text 1 has no token for .*so it has no features"):
        judge_features(judge, np.ones((3, 8), int), tokenizer, 0, 2)


def test_copies_of_the_reference_have_mauve_one():
    """Whatever their number and the bins: two halves of equal size are the hard case."""
    rng = np.random.default_rng(0)
    for texts in (20, 40):
        features = rng.normal(size=(texts, 8)).astype(np.float32)
        features[: texts // 2] += 20
        assert mauve(features, features.repeat(3, 0)) == (1, (1, 1))

"""The ELBO of whole texts: exact on an enumerated language, unbiased on longer texts."""

from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from known import UNFRAMED, Stubborn
from oracle import Language, Perfect

from halfstep.distributed.group import ALONE
from halfstep.metrics.elbo import masks_of, text_nelbo, window_nll
from halfstep.metrics.likelihood import EXACT, Question


def whole(ids, number=0):
    return Question(tuple(ids), 0, len(ids), number)


def by_enumeration(denoiser, ids) -> float:
    """The NELBO of a text: sum over all masks S of -log p(x_S | rest) / (|S| C(n, |S|))."""
    n, total, x0 = len(ids), 0.0, torch.tensor([ids])
    for mask in list(product((False, True), repeat=n))[1:]:
        hidden = torch.tensor([mask])
        k = int(hidden.sum())
        xt = x0.masked_fill(hidden, denoiser.mask_id)
        log_p = denoiser.log_p(denoiser.features(xt, torch.full((1,), k / (n + 1))))
        total -= log_p.gather(-1, x0[..., None])[..., 0][hidden].sum().item() / (k * comb(n, k))
    return total


def test_a_perfect_denoiser_gives_the_probability_of_every_text():
    language = Language(3, 4, seed=1)
    asked = [whole(text) for text in language.texts.tolist()]
    found = text_nelbo(Perfect(language), asked, draws=1, tokens=64)
    bound = language.p.numpy() @ found
    assert bound == pytest.approx(language.entropy, rel=1e-12)  # the mean of -log p


@pytest.mark.parametrize("tokens", [1, 20, 1000])
def test_short_texts_are_exact_in_batches_of_any_size(tokens):
    denoiser = Stubborn(5)
    texts = [[1, 4, 0], [2, 2, 3, 1, 0], [0, 3, 3], [4]]
    found = text_nelbo(denoiser, [whole(text) for text in texts], 1, tokens)
    expected = [by_enumeration(denoiser, text) for text in texts]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_given_tokens_are_never_masked():
    """A question for a part of the window is a question for this part alone."""
    denoiser = Stubborn(5)
    ids = (3, 1, 4, 2, 0)
    (found,) = text_nelbo(denoiser, [Question(ids, 1, 3)], 1, 64)
    x0, expected = torch.tensor([ids]), 0.0
    for mask, weight in (((1,), 1 / 2), ((2,), 1 / 2), ((1, 2), 1 / 2)):
        xt = x0.clone()
        xt[0, list(mask)] = 5
        log_p = denoiser.log_p(denoiser.features(xt, torch.ones(1)))[0]
        expected -= weight * sum(log_p[i, ids[i]].item() for i in mask)
    assert found == pytest.approx(expected, rel=1e-9)


def test_drawn_masks_are_unbiased_and_more_of_them_narrow_the_error():
    denoiser = Stubborn(4)
    ids = np.random.default_rng(0).integers(0, 4, EXACT + 2).tolist()
    exact = by_enumeration(denoiser, ids)
    spread = {}
    for draws, repeats in ((4, 120), (64, 30)):
        asked = [whole(ids, number) for number in range(repeats)]
        found = text_nelbo(denoiser, asked, draws, 512)
        error = found.std(ddof=1) / repeats**0.5
        assert abs(found.mean() - exact) < 4 * error
        spread[draws] = found.std(ddof=1)
    assert spread[64] < spread[4] / 2  # a fourth, if the draws were independent


def test_masks_have_every_size_equally_often():
    masks, weights = masks_of(20, 40, seed=0, number=3)
    assert sorted(masks.sum(1)) == sorted([*range(1, 21)] * 2)
    np.testing.assert_allclose(weights, 20 / (masks.sum(1) * 40))


def test_texts_that_begin_alike_share_their_masks():
    """Common random numbers: the noise of a difference is far below that of its two terms."""
    long, short = masks_of(30, 64, 0, 5)[0], masks_of(29, 64, 0, 5)[0]
    assert (long[:, :29] == short).mean() > 0.9
    assert 0.3 < (masks_of(30, 64, 0, 6)[0] == long).mean() < 0.7
    denoiser = Stubborn(4)
    start = np.random.default_rng(1).integers(0, 4, 12).tolist()
    pairs = [([*start, 0], [*start, 1])] * 40
    shared = [[whole(text, i) for text in pair] for i, pair in enumerate(pairs)]
    apart = [[whole(a, i), whole(b, 100 + i)] for i, (a, b) in enumerate(pairs)]
    noise = []
    for asked in (shared, apart):
        found = text_nelbo(denoiser, [one for pair in asked for one in pair], 8, 512)
        noise.append((found[::2] - found[1::2]).std())
    assert noise[0] < noise[1]


def test_a_text_depends_on_its_number_and_seed_alone():
    denoiser = Stubborn(4)
    ids = [1, 2, 3, 0, 1, 2, 3, 0, 1]
    alone = text_nelbo(denoiser, [whole(ids, 7)], 8, 9)[0]
    among = text_nelbo(denoiser, [whole(ids, i) for i in range(9)], 8, 999)
    assert among[7] == pytest.approx(alone, rel=1e-12) and len(set(among.round(9))) == 9
    assert text_nelbo(denoiser, [whole(ids, 7)], 8, 9, seed=1)[0] != pytest.approx(alone)


def test_a_baseline_is_exact_and_does_not_count_its_first_token():
    from types import SimpleNamespace

    torch.manual_seed(0)
    table = torch.randn(6, 6, dtype=torch.float64).log_softmax(-1)  # bigrams

    class Bigrams:
        def __call__(self, x):
            return torch.nn.functional.one_hot(x, 6).double()

        def log_p(self, h):
            return h @ table

    windows = np.array([[0, 1, 2, 3, 0], [0, 5, 5, 4, 0]], np.int32)
    model = SimpleNamespace(kind="autoregressive", network=Bigrams(), length=5, **UNFRAMED)
    found = window_nll(model, windows, 1, 1, "cpu", ALONE, "text")
    expected = [-table[window[:-1], window[1:]].sum().item() for window in windows]
    np.testing.assert_allclose(found, np.column_stack([expected, [4, 4]]))


def test_windows_have_the_numbers_of_their_places():
    from types import SimpleNamespace

    windows = np.random.default_rng(2).integers(0, 4, (5, 9)).astype(np.int32)
    model = SimpleNamespace(kind="diffusion", denoiser=Stubborn(4), length=9, **UNFRAMED)
    found = window_nll(model, windows, 4, 2, "cpu", ALONE, "text")
    asked = [whole(window, i) for i, window in enumerate(windows.tolist())]
    np.testing.assert_allclose(found[:, 0], text_nelbo(Stubborn(4), asked, 4, 99), rtol=1e-12)
    assert (found[:, 1] == 9).all()

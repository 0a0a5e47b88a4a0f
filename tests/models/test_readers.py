"""Readers of autoregressive networks: any order of reads gives the logits of one pass."""

import random

import pytest
import torch

from halfstep.errors import HalfstepError
from halfstep.kernels.precision import cast_matrices, computing
from halfstep.models.causal_lm import CausalLM
from halfstep.models.gpt import GPT, Decoder
from halfstep.models.readers import autoregressor

VOCABULARY, LENGTH = 23, 30
KINDS = ["ours", "gpt2", "gpt_neox", "llama", "qwen2"]


def weights_that_matter(network):
    """Random weights, with which attention reads far and no position is like another."""
    with torch.no_grad():
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 0.5, 0.3)
    return network.eval().requires_grad_(False)


def published(kind, length=LENGTH, **more):
    """A small random model of transformers; its tables have five rows that are no tokens."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = {"vocab_size": VOCABULARY + 5, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    shape |= {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": length}
    if kind not in ("mamba", "rwkv"):
        shape |= {"num_attention_heads": 4, "intermediate_size": 64}
    if kind in ("llama", "qwen2", "mistral"):
        shape["num_key_value_heads"] = 2
    config = transformers.AutoConfig.for_model(kind, **shape | more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return CausalLM(weights_that_matter(model), VOCABULARY)


def build(kind):
    if kind != "ours":
        return published(kind)
    torch.manual_seed(0)
    return weights_that_matter(GPT(VOCABULARY, 32, 3, 4))


@pytest.fixture(scope="module", params=KINDS)
def network(request):
    return build(request.param)


def dense(network, x):
    """log p of the token after each of x[B, L], from one pass: [B, L, V]."""
    return network.log_p(network(x).flatten(0, 1)).view(*x.shape, VOCABULARY)


def random_tokens(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def read_in_parts(reader, x, seed, alike=False):
    """Read the texts x[B, L] in random parts, and log p [B, L, V] of the last read of each token.

    A part begins at the end of what is right, or earlier. Its last tokens may be wrong ones, as
    rejected drafts are: they are read again later. Once, half of the texts are left out.
    """
    chance, (B, L) = random.Random(seed), x.shape
    found, right, leaves = torch.full((B, L, VOCABULARY), torch.nan), [0] * B, L // 2
    rows = list(range(B))
    while min(right) < L:
        n = chance.choice([1, 1, 2, 3, 5, 8])
        back = 0 if alike else chance.randrange(3)
        starts = [max(0, min(right[row] - back * chance.randrange(3), L - n)) for row in rows]
        good = [n if chance.random() < 0.5 else chance.randint(1, n) for _ in rows]
        if alike:
            starts, good = [min(starts)] * len(rows), [min(good)] * len(rows)
        tokens = torch.stack([x[row, s : s + n] for row, s in zip(rows, starts, strict=True)])
        for i, keep in enumerate(good):
            tokens[i, keep:] = (tokens[i, keep:] + 1) % VOCABULARY
        log_p = reader.read(tokens, torch.tensor(starts)).log_softmax(-1)
        for i, (row, s) in enumerate(zip(rows, starts, strict=True)):
            found[row, s : s + good[i]] = log_p[i, : good[i]]
            right[row] = s + good[i]
        if B > 1 and len(rows) == B and max(right) > leaves:
            kept = torch.randperm(B, generator=torch.Generator().manual_seed(seed))[: B // 2]
            reader.keep(kept)
            rows = kept.tolist()
            for row in set(range(B)) - set(rows):
                right[row] = L
    return found, rows


def distance(found, wanted):
    """Largest difference, as a share of the largest number; tokens that were not read are NaN."""
    there = ~found.isnan()
    assert there.float().mean() > 0.5
    return ((found - wanted)[there].abs().max() / wanted[there].abs().max()).item()


@pytest.mark.parametrize("B", [1, 6])
@pytest.mark.parametrize("alike", [False, True], ids=["apart", "alike"])
def test_any_order_of_reads_gives_the_logits_of_one_pass(network, B, alike):
    model = autoregressor(network)
    for seed in range(4):
        x = random_tokens(B, LENGTH, seed=seed)
        found, rows = read_in_parts(model.reader(B, LENGTH), x, seed, alike)
        assert not found[rows].isnan().any() and len(rows) == max(1, B // 2)
        assert distance(found, dense(network, x)) < 1e-4


def test_a_reader_reads_a_whole_text_at_once(network):
    x = random_tokens(3, LENGTH)
    found = autoregressor(network).reader(3, LENGTH).read(x, torch.zeros(3, dtype=torch.long))
    assert found.shape == (3, LENGTH, VOCABULARY) and found.dtype == torch.float32
    assert distance(found.log_softmax(-1), dense(network, x)) < 1e-4


def test_kept_rows_may_be_repeated(network):
    x, rows = random_tokens(2, 9), torch.tensor([1, 1, 0] * 4)
    reader = autoregressor(network).reader(2, 9)
    reader.read(x[:, :5], torch.tensor([0, 0]))
    reader.keep(rows)
    found = reader.read(x[rows, 5:], torch.full((12,), 5))
    assert distance(found.log_softmax(-1), dense(network, x)[rows, 5:]) < 1e-4


def test_token_log_p_is_the_dense_log_softmax(network, monkeypatch):
    from halfstep.kernels import logits

    x = random_tokens(5, LENGTH)
    wanted = dense(network, x)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    model = autoregressor(network)
    assert model.vocab_size == VOCABULARY
    seen = []

    def counted(h):
        seen.append(len(h))
        return readout(h)

    for numbers in (logits.NUMBERS["cpu"], 40 * VOCABULARY):  # one chunk, and chunks of 32 rows
        monkeypatch.setitem(logits.NUMBERS, "cpu", numbers)
        assert distance(model.token_log_p(x), wanted) < 1e-4
    owner = model if isinstance(network, GPT) else network
    readout = owner.logits
    monkeypatch.setattr(owner, "logits", counted)
    model.token_log_p(x)
    assert seen == [32, 32, 32, 32, 5 * (LENGTH - 1) - 4 * 32]
    assert model.token_log_p(x[:, :1]).shape == (5, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close(kind):
    network = build(kind)
    x = random_tokens(4, LENGTH)
    wanted = dense(network, x)
    cast_matrices(network, torch.bfloat16)
    with computing(torch.device("cpu"), "bfloat16"):
        model = autoregressor(network)
        exact, (found, _) = dense(network, x), read_in_parts(model.reader(4, LENGTH), x, seed=3)
        tokens = x[:, 1:, None]
        scores = model.token_log_p(x) - exact[:, :-1].gather(-1, tokens)[..., 0]
    there = ~found.isnan()
    error, rounding = (found - exact)[there], (exact - wanted)[there]
    assert found.dtype == torch.float32 and found.unique().numel() > 1000  # no rounded logits
    assert 0 < rounding.norm() and error.norm() < 2 * rounding.norm()
    assert scores.norm() / exact.norm() < 0.05


def test_one_token_is_read_as_the_decoder_reads_it():
    network = build("ours")
    decoder, reader = Decoder(network, 3, LENGTH), autoregressor(network).reader(3, LENGTH)
    logits, readout = [], decoder.logits

    def kept(h):
        logits.append(readout(h))
        return logits[-1]

    decoder.logits = kept
    u = torch.rand(3, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = decoder.write(torch.tensor([0]), u)
    for position, wanted in enumerate(logits):
        found = reader.read(x[:, position, None], torch.full((3,), position))
        torch.testing.assert_close(found[:, 0], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape, start, found",
    [
        ((2, 3), [5, 0], "found 5 for 3 tokens of text 0, of which 4 tokens are read"),
        ((2, 3), [4, -1], "found -1 for 3 tokens of text 1"),
        ((2, 7), [4, 4], "found 4 for 7 tokens of text 0.*an end of at most 10"),
        ((3, 2), [0, 0, 0], r"expected \[2, n\] and \[2\] for the 2 texts"),
        ((2, 2), [0], r"found shapes \[2, 2\] and \[1\]"),
        ((2, 0), [0, 0], "n at least 1"),
    ],
)
def test_wrong_reads_are_named(network, shape, start, found):
    reader = autoregressor(network).reader(2, 10)
    reader.read(random_tokens(2, 4), torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=found):
        reader.read(random_tokens(*shape), torch.tensor(start))


def test_a_text_longer_than_the_positions_of_a_model_is_refused():
    model = autoregressor(published("gpt2"))
    for ask in (
        lambda: model.reader(2, LENGTH + 1),
        lambda: model.token_log_p(random_tokens(1, LENGTH + 1)),
    ):
        with pytest.raises(HalfstepError, match=f"{LENGTH + 1} tokens.*use shorter texts"):
            ask()


@pytest.mark.parametrize(
    "kind, more",
    [
        ("mamba", {"state_size": 4, "conv_kernel": 2, "time_step_rank": 4}),
        ("rwkv", {"attention_hidden_size": 32, "context_length": LENGTH}),
        ("bloom", {"n_head": 4, "n_layer": 2}),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8},
        ),
        ("mistral", {"sliding_window": 8}),
    ],
)
def test_a_model_that_cannot_read_in_parts_is_refused(kind, more):
    """Recurrent models, positions that are not asked for, and windows shorter than the text."""
    network = published(kind, **more)
    model, x = autoregressor(network), random_tokens(2, LENGTH)
    with pytest.raises(HalfstepError, match="does not read texts part by part.*use another"):
        model.reader(2, LENGTH)
    wanted = dense(network, x)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    assert distance(model.token_log_p(x), wanted) < 1e-4  # it scores texts


def test_a_window_as_long_as_the_text_is_no_window():
    network, x = published("mistral", sliding_window=LENGTH), random_tokens(3, LENGTH)
    found, _ = read_in_parts(autoregressor(network).reader(3, LENGTH), x, seed=1)
    assert distance(found, dense(network, x)) < 1e-4

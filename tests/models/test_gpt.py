"""The autoregressive baseline: causal, with an exact cache and draws of the right law.

transformers loads the same function.
"""

import pytest
import torch
from oracle import chi_square

from halfstep.data.tokenizer import train_bpe
from halfstep.kernels.categorical import inverse_cdf, uniforms
from halfstep.models import gpt as gpt_module
from halfstep.models.gpt import GPT, Decoder, nucleus, save_gpt_neox


def tiny(vocabulary=13, width=32, blocks=2, heads=4) -> GPT:
    torch.manual_seed(0)
    gpt = GPT(vocabulary, width, blocks, heads).eval()
    for p in gpt.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else torch.nn.init.normal_(p, 1.0, 0.1)
    return gpt.requires_grad_(False)


def decode(gpt, count, length, bos_id, seed, first=0, prompt=None, **how):
    """Texts first, first + 1, ... of the seed, with a new decoder."""
    start = torch.tensor([bos_id]) if prompt is None else prompt
    return Decoder(gpt, count, length, **how).write(start, uniforms(seed, first, count, length))


def test_causal():
    gpt, x = tiny(), torch.randint(0, 13, (2, 10), generator=torch.Generator().manual_seed(1))
    base = gpt(x)
    for changed in range(10):
        other = x.clone()
        other[:, changed] = (x[:, changed] + 1) % 13
        difference = (gpt(other) - base).abs().amax((0, 2))
        assert difference[:changed].max() == 0 if changed else True
        assert (difference[changed:] > 1e-5).all()


@pytest.mark.parametrize("pieces", [[1] * 10, [4] + [1] * 6, [3, 4, 3], [10], [1, 9]], ids=str)
def test_cache_equals_the_full_pass(pieces):
    """Token by token, after a prompt, and in longer pieces: 1e-5."""
    gpt, x = tiny(), torch.randint(0, 13, (2, 10), generator=torch.Generator().manual_seed(2))
    caches, found = gpt.new_caches(2, 10), []
    for piece in x.split(pieces, 1):
        found.append(gpt(piece, caches))
    assert torch.allclose(torch.cat(found, 1), gpt(x), atol=1e-5) and caches[0].end == 10


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"top_p": 0.6},
        {"prompt": torch.tensor([0, 3, 5])},
        {"prompt": torch.arange(36).view(12, 3) % 13},
    ],
    ids=str,
)
def test_generation_equals_the_full_pass(how):
    gpt, N, L = tiny(), 12, 11
    found = decode(gpt, N, L, 0, seed=4, **how)
    u, ids = uniforms(4, 0, N, L), how.get("prompt", torch.tensor([0])).expand(N, -1)
    while ids.shape[1] < L:
        log_p = gpt.log_p(gpt(ids)[:, -1]) / how.get("temperature", 1.0)
        ids = torch.cat(
            [
                ids,
                inverse_cdf(
                    nucleus(log_p.log_softmax(-1), how.get("top_p", 1.0)), u[:, ids.shape[1]]
                )[:, None],
            ],
            1,
        )
    assert torch.equal(found, ids) and found.shape == (N, L)
    assert len({tuple(row) for row in found.tolist()}) > N // 2


def test_the_windows_of_the_graphs_equal_the_exact_ones(monkeypatch):
    """The step that a CUDA graph replays, without the graph.

    It reads more keys than are written, masked, with values of another text in them.
    """
    gpt, u = tiny(), uniforms(4, 0, 5, 30)
    exact, decoder, windows, step = Decoder(gpt, 5, 30), Decoder(gpt, 5, 30), [], Decoder.step
    for cache in decoder.caches:
        cache.k.fill_(1e3), cache.v.fill_(1e3)  # as another text leaves them

    def wider(self, window, masked=False):
        windows.append(min(max(8, 1 << (window - 1).bit_length()), 30))
        step(self, windows[-1], masked=True)

    expected = [exact.write(torch.tensor(start), u) for start in ([0], [0, 3, 5])]
    monkeypatch.setattr(Decoder, "step", wider)
    assert [
        torch.equal(decoder.write(torch.tensor(start), u), whole)
        for start, whole in zip(([0], [0, 3, 5]), expected, strict=True)
    ] == [True, True]
    assert set(windows) == {8, 16, 30}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_write_what_the_cpu_writes():
    gpt, u = tiny(), uniforms(4, 0, 5, 150)
    expected, decoder = (
        Decoder(gpt, 5, 150).write(torch.tensor([0]), u),
        Decoder(gpt.cuda(), 5, 150),
    )
    found = [decoder.write(torch.tensor([0]), u) for _ in range(2)]
    assert (
        torch.equal(*found)
        and (found[0].cpu() == expected).double().mean() > 0.9
        and set(decoder.graphs) == {64, 128, 150}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_readout_multiplies_in_the_dtype_of_the_decoder(monkeypatch, dtype):
    """It is that of autocast around constructor and text.

    Both of its matrices are rounded, and not their product: logits are float32.
    """
    gpt, inputs, logits = tiny(), [], []
    norm = gpt_module._norm

    def keep(x, layer):
        found = norm(x, layer)
        if layer is gpt.output_layer.norm_final:
            inputs.append(found)
        return found

    def draw(found, u):
        logits.append(found)
        return inverse_cdf(found, u)

    monkeypatch.setattr(gpt_module, "_norm", keep)
    monkeypatch.setattr(gpt_module, "inverse_cdf", draw)
    u, low = uniforms(4, 0, 2, 6), dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=low, cache_enabled=False):
        decoder = Decoder(gpt, 2, 6)
        decoder.write(torch.tensor([0]), u)
    assert decoder.caches[0].k.dtype == dtype and len(logits) == 5
    weight = gpt.output_layer.linear.weight.to(dtype).double()
    for h, one in zip(inputs, logits, strict=True):
        expected = h.to(dtype).double() @ weight.T
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-5)


def test_greedy_limit_is_the_argmax_of_the_full_pass():
    gpt = tiny()
    found = decode(gpt, 1, 12, 0, seed=1, temperature=1e-4)
    assert torch.equal(gpt.log_p(gpt(found)[0, :-1]).argmax(-1), found[0, 1:])
    assert torch.equal(decode(gpt, 1, 12, 0, seed=2, top_p=1e-6), found)


def test_same_seed_same_text_whatever_the_batch():
    gpt = tiny()
    whole = decode(gpt, 9, 8, 0, seed=3)
    assert torch.equal(
        whole, torch.cat([decode(gpt, 4, 8, 0, seed=3), decode(gpt, 5, 8, 0, seed=3, first=4)])
    )


def test_law_of_two_tokens():
    gpt = tiny(vocabulary=5)
    found = decode(gpt, 8000, 3, 0, seed=7)[:, 1:]
    p = gpt.log_p(gpt(torch.tensor([[0]]))[:, -1]).exp()[0].double()
    after = gpt.log_p(gpt(torch.tensor([[0, v] for v in range(5)]))[:, -1]).exp().double()
    assert (
        chi_square(
            (5 * found[:, 0] + found[:, 1]).bincount(minlength=25), (p[:, None] * after).flatten()
        )
        > 1e-5
    )


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_mass():
    log_p = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]).log()
    for top_p, kept in (
        (0.4, [{1}, {0}]),
        (0.6, [{1, 3}, {0}]),
        (0.8, [{1, 3, 2}, {0}]),
        (0.95, [{0, 1, 2, 3}, {0}]),
        (1.0, [{0, 1, 2, 3}] * 2),
    ):
        found = nucleus(log_p, top_p)
        assert [set(row.isfinite().nonzero()[:, 0].tolist()) for row in found] == kept
        assert torch.equal(found[found.isfinite()], log_p[found.isfinite()])


def test_transformers_loads_the_same_function_and_tokenizer(tmp_path):
    """transformers loads the folder: log-probabilities within 1e-4, equal ids, equal texts."""
    transformers = pytest.importorskip("transformers")
    text = (
        "Once upon a time Ann lost her red kite. She looked for it in the old barn. <|endoftext|>"
    )
    tokenizer = train_bpe([text] * 3, 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    gpt = tiny(tokenizer.get_vocab_size(), width=48, blocks=3, heads=6)
    save_gpt_neox(gpt, tmp_path / "hf", 24, 0, tmp_path / "tokenizer.json", "<|endoftext|>")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    x = torch.randint(0, gpt.vocabulary, (3, 24), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = theirs(x).logits.log_softmax(-1)
    ours = gpt.log_p(gpt(x).flatten(0, 1)).view_as(found)
    assert theirs.dtype == torch.float32 and (found - ours).abs().max() < 1e-4
    assert ours.std() > 0.5  # not flat
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for words in (text, "kites, barns and Ünïcode"):
        assert (
            loaded(words)["input_ids"] == tokenizer.encode(words).ids
            and loaded.decode(loaded(words)["input_ids"]) == words
        )
    assert (
        loaded.eos_token_id
        == loaded.bos_token_id
        == tokenizer.token_to_id("<|endoftext|>")
        == theirs.config.eos_token_id
    )
    assert loaded.model_max_length == 24

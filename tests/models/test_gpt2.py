"""Our network of GPT-2's architecture against transformers', and its files."""

import json

import pytest
import torch
from published import save_gpt2
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from halfstep.diffusion.readout import cross_entropy as readout_cross_entropy
from halfstep.diffusion.schedules import LogLinear
from halfstep.errors import HalfstepError
from halfstep.models.denoiser import SubsDenoiser
from halfstep.models.gpt2 import GPT2
from halfstep.models.gpt2_weights import read_gpt2

V, L, SHAPE = 19, 12, (32, 2, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpt2")


@pytest.fixture(scope="module")
def theirs(folder):
    return save_gpt2(folder, V, L)


@pytest.fixture
def ours(theirs, folder):
    network = GPT2(V, *SHAPE, length=L).eval()
    read_gpt2(folder).fill(network)
    return network


def texts(rows: int = 3) -> torch.Tensor:
    return torch.randint(0, V, (rows, L), generator=torch.Generator().manual_seed(1))


def logits(network: GPT2, x: torch.Tensor, **options) -> torch.Tensor:
    weight, bias = network.readout
    return network(x, **options) @ weight[:-1].t() + bias


@torch.no_grad()
def test_causal_attention_gives_the_logits_of_transformers(ours, theirs):
    x, causal = texts(), torch.ones(L, L, dtype=torch.bool).tril()
    assert torch.allclose(logits(ours, x, pairs=causal), theirs(x).logits, atol=2e-5)


@torch.no_grad()
def test_full_attention_is_transformers_without_its_mask(ours, theirs):
    x, nothing_hidden = texts(), torch.zeros(3, 1, L, L)
    expected = theirs(x, attention_mask=nothing_hidden).logits
    assert not torch.allclose(expected, theirs(x).logits, atol=0.1)
    assert torch.allclose(logits(ours, x), expected, atol=2e-5)


def test_gradients_are_those_of_transformers(ours, theirs):
    """Also of the table, which is embedding and readout; the mask's row has none."""
    x, causal = texts(), torch.ones(L, L, dtype=torch.bool).tril()
    h, following = ours(x, pairs=causal)[:, :-1].flatten(0, 1), x[:, 1:].flatten()
    readout_cross_entropy(h, ours.readout, following, torch.ones(len(following))).backward()
    cross_entropy(theirs(x).logits[:, :-1].flatten(0, 1), following, reduction="sum").backward()
    block = theirs.transformer.h[0]
    for found, expected in (
        (ours.vocab_embed.embedding.grad[:-1], theirs.transformer.wte.weight.grad),
        (ours.position_embed.embedding.grad, theirs.transformer.wpe.weight.grad),
        (ours.blocks[0].attn_qkv.weight.grad, block.attn.c_attn.weight.grad.t()),
        (ours.blocks[0].attn_out.bias.grad, block.attn.c_proj.bias.grad),
        (ours.blocks[0].norm1.bias.grad, block.ln_1.bias.grad),
    ):
        assert torch.allclose(found, expected, atol=2e-5 * expected.abs().max())
    assert not ours.vocab_embed.embedding.grad[V].any()
    theirs.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("copied", [False, True], ids=["", "inference copy"])
def test_wanted_positions_and_kept_keys_are_those_of_a_whole_pass(ours, copied):
    """The contract of a denoiser: features of some positions, and of a part with kept keys."""
    denoiser = SubsDenoiser(ours, LogLinear(), shifted=True)
    denoiser = denoiser.inference_copy if copied else denoiser
    x, t = texts(), torch.zeros(3)
    x[:, 2:7] = denoiser.mask_id
    whole = denoiser.features(x, t)
    assert torch.allclose(whole, ours(x).roll(1, 1), atol=1e-5)
    for where in (x == V, (torch.tensor([2, 0]), torch.tensor([0, 11]))):
        assert torch.allclose(denoiser.features(x, t, where), whole[where], atol=1e-5)
    _, kv = denoiser.features_and_kv(x, t, torch.arange(4, 8))
    found, _ = denoiser.features_and_kv(x, t, torch.arange(4, 8), kv)
    assert torch.allclose(found, whole[:, 4:8], atol=1e-5)
    places = torch.tensor([4, 0, 8])[:, None] + torch.arange(4)  # of each text others
    found, _ = denoiser.features_and_kv(x, t, places, kv)
    assert torch.allclose(found, whole[torch.arange(3)[:, None], places], atol=1e-5)
    h = whole[x == V]
    expected = (h @ ours.vocab_embed.embedding[:V].t()).log_softmax(-1)
    assert torch.allclose(denoiser.log_p(h), expected, atol=1e-5)
    assert torch.allclose(denoiser.logits(h).log_softmax(-1), expected, atol=1e-5)
    tokens = torch.arange(len(h))[:, None] % V
    at = denoiser.logits_at(h, tokens) - denoiser.logits(h).logsumexp(-1, keepdim=True)
    assert torch.allclose(at, expected.gather(1, tokens), atol=1e-5)


def test_the_mask_is_the_mean_token_and_a_shorter_window_needs_fewer_positions(theirs, folder):
    network = GPT2(V, *SHAPE, length=5)
    read_gpt2(folder).fill(network)
    table = theirs.transformer.wte.weight
    assert torch.equal(network.vocab_embed.embedding[:V], table)
    assert torch.allclose(network.vocab_embed.embedding[V], table.mean(0))
    assert torch.equal(network.position_embed.embedding, theirs.transformer.wpe.weight[:5])
    with pytest.raises(HalfstepError, match="texts of 12 tokens, .* positions of 5"):
        network(texts())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type: found 'gpt_neo', expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function: found 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: found '1e-06'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: found 'False'"),
        ({"n_embd": "wide"}, "n_embd: found 'wide', expected a whole number"),
        ({"n_layer": 3}, "h.2.ln_1.weight: found nothing"),
        ({"n_layer": 1}, "holds h.1.* which GPT-2 does not have"),
        ({"vocab_size": 20}, r"wte.weight: found \[19, 32\], expected \[20, 32\]"),
        ({"n_inner": 64}, "n_inner: found 32, 2, 64"),
    ],
)
def test_what_the_network_does_not_compute_is_refused(theirs, folder, tmp_path, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(HalfstepError, match=message) as caught:
        read_gpt2(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hub", "pickle", "nan", "untied"])
def test_weights_as_they_are_found(theirs, folder, tmp_path, kind):
    """The hub's file has no prefix, and causal masks; no pickle is read; broken numbers neither."""
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    more = {
        "hub": {"h.0.attn.bias": torch.ones(1, 1, L, L).tril()},
        "nan": {"ln_f.bias": torch.full((32,), torch.nan)},
        "untied": {"lm_head.weight": plain["wte.weight"] + 1},
        "pickle": {},
    }[kind]
    if kind == "pickle":
        torch.save(plain, tmp_path / "pytorch_model.bin")
    else:
        save_file(plain | more, tmp_path / "model.safetensors")
    if kind == "hub":
        assert read_gpt2(tmp_path).tensors.keys() >= {"wte.weight", "h.1.mlp.c_proj.bias"}
        return
    sentence = {
        "nan": "ln_f.bias: expected finite",
        "untied": "lm_head.weight, which differs",
        "pickle": "holds no model.safetensors, and no other weights are read",
    }[kind]
    with pytest.raises(HalfstepError, match=sentence):
        read_gpt2(tmp_path)

"""Parity with the released code: networks, readout, moving average.

Float32 on both sides, absolute tolerance 2e-5 unless said.
"""

import torch
from reference import HERE, MASK, arrays, denoiser, dit, subs
from safetensors.torch import load_file

from halfstep.models.gpt import GPT
from halfstep.training.ema import EMA


def test_dit_hidden_states_and_logits():
    fixture, network = arrays("forward_a.npz"), dit("teacher").eval()
    cond = network.sigma_map(torch.zeros(1))
    assert torch.allclose(
        cond.expand(3, -1), torch.nn.functional.silu(fixture["sigma_emb"]), atol=2e-6
    )  # sigma is zero: time is ignored
    angles = network.rotary_emb(torch.arange(64))
    h = network.vocab_embed(fixture["x"])
    for i, block in enumerate(network.blocks):
        h = block(h, angles, cond)
        assert torch.allclose(h, fixture[f"h_block{i}"], atol=2e-5)
    features = network(fixture["x"])
    assert torch.allclose(features, fixture["h_final_modulated"], atol=2e-5)
    assert torch.allclose(network.output_layer.linear(features), fixture["logits"], atol=5e-5)


def test_subs_log_probabilities():
    """Masked positions: normalized over the data tokens.

    Visible positions are carried over by the caller, in the reference by a one-hot row.
    """
    fixture, model = arrays("forward_a.npz"), denoiser("teacher")
    x, found = fixture["x"], subs(model, fixture["x"])
    expected, masked = fixture["log_p_subs"][0], x[0] == MASK
    assert torch.allclose(found[0][masked], expected[masked][:, :MASK], atol=5e-5)
    assert (expected[masked][:, MASK] < -1e5).all() and torch.equal(
        expected[~masked].argmax(-1), x[0][~masked]
    )
    assert torch.allclose(found, fixture["logits"][..., :MASK].log_softmax(-1), atol=5e-5)


def test_time_does_not_matter_to_a_network_that_ignores_it():
    fixture, model = arrays("forward_a.npz"), denoiser("teacher")
    assert torch.equal(
        model.features(fixture["x"], torch.tensor([0.1, 0.5, 1.0])),
        model.features(fixture["x"], torch.zeros(3)),
    )
    network = dit("teacher").eval()
    assert not torch.allclose(
        network(fixture["x"], fixture["sigma"]), network(fixture["x"]), atol=1e-3
    )


def test_autoregressive_network():
    """The head of the reference has a bias and a mask column of -1000; both are added to ours."""
    fixture, state = arrays("ar.npz"), load_file(HERE / "ar.safetensors")
    network = GPT(257, width=48, blocks=2, heads=4).eval()
    bias = state.pop("output_layer.linear.bias")
    assert network.load_state_dict(state).missing_keys == []
    logits = network.output_layer.linear(network(fixture["x"][:, :-1])) + bias
    logits[..., MASK] = -1000.0
    log_p = logits.log_softmax(-1)
    shown = fixture["log_p"] > -900
    assert torch.allclose(log_p[shown], fixture["log_p"][shown], atol=5e-5)
    loss = -log_p.gather(-1, fixture["x"][:, 1:, None])[..., 0]
    assert torch.allclose(loss, fixture["loss"], atol=5e-5)


def test_moving_average():
    """Twelve updates with the ramp (1 + n) / (10 + n)."""
    fixture = arrays("ema.npz")
    module = torch.nn.ParameterList([fixture["p0_init"].clone(), fixture["p1_init"].clone()])
    ema = EMA(module, 0.9999)
    for n in range(12):
        for i in (0, 1):
            module[i].data.copy_(fixture[f"p{i}_{n}"])
        ema.update()
        for i in (0, 1):
            assert torch.allclose(ema.shadow[str(i)], fixture[f"s{i}_{n}"], atol=1e-6)
    assert ema.updates == 12

"""Networks of judges: what their names and their config.json say, against the networks."""

import pytest
import torch

from halfstep.workflow.networks import UnknownWork, known_network


@pytest.mark.parametrize("name, billions", [
    ("gpt2", 0.124),
    ("gpt2-medium", 0.355),
    ("openai-community/gpt2-large@main", 0.774),
    ("gpt2-xl", 1.558),
    ("meta-llama/Llama-2-7b-hf", 6.74),
    ("meta-llama/Meta-Llama-3-8B", 8.03),
])  # fmt: skip
def test_published_numbers_of_parameters(name, billions):
    """A GPT-2 has one table for both ends, a Llama two; positions and norms are a hundredth."""
    shape, precision = known_network(name)
    parameters = shape.weights if "gpt2" in name else shape.parameters
    assert parameters == pytest.approx(billions * 1e9, rel=0.015)
    assert precision == ("float32" if "gpt2" in name else "bfloat16")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox"])
def test_a_folder_is_described_by_its_config(tmp_path, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    wide = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    options = {
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
        "llama": wide | {"num_key_value_heads": 2, "intermediate_size": 48},
        "gpt_neox": wide | {"intermediate_size": 128},
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=50, dtype="bfloat16", **options)
    config.save_pretrained(tmp_path)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    matrices = sum(p.numel() for name, p in network.named_parameters() if p.dim() == 2)
    shape, precision = known_network(str(tmp_path))
    positions = 1024 * 32 if kind == "gpt2" else 0
    assert precision == "bfloat16" and (shape.blocks, shape.width) == (2, 32)
    assert matrices - positions == (shape.weights if kind == "gpt2" else shape.parameters)


@pytest.mark.parametrize("about", [None, "{}", "[1]", '{"hidden_size": "wide"}'])
def test_an_undescribed_network_is_unknown(tmp_path, about):
    if about:
        (tmp_path / "config.json").write_text(about)
    for name in (str(tmp_path), "nobody/knows-this"):
        with pytest.raises(UnknownWork):
            known_network(name)

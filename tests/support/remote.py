"""A small bidirectional transformer that brings its own code, as LLaDA does."""

import json
from pathlib import Path

CONFIGURATION = """
from transformers import PreTrainedConfig


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, width=32, blocks=2, heads=2, vocab_size=64, dropout=0.0, **kwargs):
        self.width, self.blocks, self.heads = width, blocks, heads
        self.vocab_size, self.dropout = vocab_size, dropout
        super().__init__(**kwargs)

    hidden_size = property(lambda self: self.width)
    num_hidden_layers = property(lambda self: self.blocks)
    num_attention_heads = property(lambda self: self.heads)
"""
MODELING = """
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from .configuration_own import OwnConfig


class OwnBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.drop = config.heads, nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, h):
        B, L, D = h.shape
        q, k, v = self.qkv(self.norm(h)).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.drop(self.out(read.transpose(1, 2).reshape(B, L, D)))


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(64, config.width)
        self.layers = nn.ModuleList(OwnBlock(config) for _ in range(config.blocks))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.table

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        h = self.table(input_ids) + self.places.weight[: input_ids.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return MaskedLMOutput(logits=self.head(h))
"""
MARK = """
with open({path!r}, "a") as mark:
    mark.write("{what} ")
"""


def save_remote_model(
    folder: Path, rows: int, marker: Path, auto: str = "AutoModelForMaskedLM"
) -> None:
    """Write a repository with random weights and code that adds to the file `marker` when it runs.

    Nothing of it is run here.
    """
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(7)
    folder.mkdir(parents=True)
    shapes = {"table": (rows, 32), "places": (64, 32), "head": (rows, 32)}
    state = {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    state["head.bias"] = torch.randn(rows) * 0.5
    for block in range(2):
        for name, out in (("qkv", 96), ("out", 32)):
            state[f"layers.{block}.{name}.weight"] = torch.randn(out, 32) * 0.3
            state[f"layers.{block}.{name}.bias"] = torch.randn(out) * 0.1
        state[f"layers.{block}.norm.weight"] = torch.randn(32) * 0.3 + 1
        state[f"layers.{block}.norm.bias"] = torch.randn(32) * 0.1
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig", auto: "modeling_own.OwnModel"},
        "width": 32,
        "blocks": 2,
        "heads": 2,
        "vocab_size": rows,
        "dropout": 0.1,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in (("configuration_own", CONFIGURATION), ("modeling_own", MODELING)):
        mark = MARK.format(path=str(marker), what=name)
        (folder / f"{name}.py").write_text(text + mark)

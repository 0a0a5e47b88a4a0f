"""Published denoisers of size tiny as files, in the formats of MDLM and of SDTT."""

import collections
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfstep.config import SIZES
from halfstep.models.dit import DiT


def networks(vocabulary: int) -> tuple[dict, dict]:
    """Two sets of random weights of size tiny, under our names: raw and average."""
    blocks, width, heads = SIZES["tiny"]
    sets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        network = DiT(vocabulary, width, blocks, heads)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        sets.append({key: value.clone() for key, value in network.state_dict().items()})
    return tuple(sets)


def lightning(path: Path, raw: dict, ema: dict, prefix: str = "backbone.") -> Path:
    """Write a Lightning checkpoint."""
    shadow = [ema[key] for key in raw if key != "rotary_emb.inv_freq"]
    content = {
        "epoch": 1,
        "global_step": 3,
        "state_dict": collections.OrderedDict((prefix + k, v) for k, v in raw.items()),
        "ema": {"decay": 0.99, "num_updates": 3, "shadow_params": shadow},
        "optimizer_states": [{"lr": 1.0}],
    }
    torch.save(content, path)
    return path


def folder(
    path: Path, raw: dict, prefix: str, config: dict, file: str = "model.safetensors"
) -> Path:
    """Write a folder as on the hub."""
    path.mkdir(parents=True)
    state = {prefix + key: value for key, value in raw.items()}
    if file.endswith("safetensors"):
        save_file(state, path / file)
    else:
        torch.save(state, path / file)
    (path / "config.json").write_text(json.dumps(config))
    return path


MDLM = {
    "model_type": "mdlm",
    "hidden_dim": 128,
    "n_blocks": 3,
    "n_heads": 8,
    "cond_dim": 128,
    "model_length": 24,
    "time_conditioning": False,
}
SDTT = {"model": {"length": 24, "hidden_size": 128}, "noise": {"type": "loglinear"}}

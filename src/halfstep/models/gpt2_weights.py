"""Weights of transformers' GPT2LMHeadModel, read into our network of that architecture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import HalfstepError
from halfstep.files import sha256
from halfstep.models.gpt2 import GPT2
from halfstep.models.pickled import RefusedError
from halfstep.models.weight_files import DOWNLOAD_AGAIN, INDEX, read_object, read_weights

WEIGHTS = ("model.safetensors", f"model.safetensors{INDEX}")
ANOTHER = "name a GPT-2 model, such as gpt2"
EXPECTED: dict[str, tuple[Any, ...]] = {  # key of config.json: what the network computes
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
}
SHAPES = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")  # keys with whole numbers
LARGEST = 2**24  # such a number
LAYERS = {  # theirs in a block, whose matrices are [inputs, outputs]: ours
    "ln_1": "norm1",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_out",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
UNUSED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks; the table again


@dataclass(frozen=True)
class PublishedGPT2:
    """A GPT2LMHeadModel from a folder.

    files: config.json, and those of its weights; tensors: by name, without "transformer."
    """

    files: list[Path]
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, width and heads."""
        return self.config["n_layer"], self.config["n_embd"], self.config["n_head"]

    @property
    def sha256(self) -> str:
        """The checksum of the file of weights, or of the index of several."""
        return sha256(self.files[1])

    @torch.no_grad()
    def fill(self, network: GPT2) -> None:
        """Copy the weights into a network of the same shape and vocabulary.

        Positions beyond its length are left out. The mask token's embedding is the mean of the
        table. The outputs predict the next token, so the denoiser must be shifted.
        """
        table, places = self.tensors["wte.weight"].float(), self.tensors["wpe.weight"]
        given = {
            "vocab_embed.embedding": torch.cat([table, table.mean(0, keepdim=True)]),
            "position_embed.embedding": places[: network.length],
            "norm_final.weight": self.tensors["ln_f.weight"],
            "norm_final.bias": self.tensors["ln_f.bias"],
        }
        for i in range(len(network.blocks)):
            for theirs, ours in LAYERS.items():
                given[f"blocks.{i}.{ours}.weight"] = self.tensors[f"h.{i}.{theirs}.weight"].t()
                given[f"blocks.{i}.{ours}.bias"] = self.tensors[f"h.{i}.{theirs}.bias"]
        network.load_state_dict(given)


def read_gpt2(folder: Path) -> PublishedGPT2:
    """Read config.json and the safetensors files of a folder; no pickle is opened.

    HalfstepError if it holds no GPT2LMHeadModel, or if its tensors do not fit its config.json.
    """
    config = read_object(folder / "config.json")
    _check_config(config, folder / "config.json")
    found = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not found:
        raise HalfstepError(
            f"{folder}: holds no {WEIGHTS[0]}, and no other weights are read; save the model with "
            "transformers' save_pretrained"
        )
    try:
        content, files = read_weights(found[0])
    except RefusedError as error:
        raise HalfstepError(f"{found[0]}: {error}; {DOWNLOAD_AGAIN}") from None
    tensors = {name.removeprefix("transformer."): value for name, value in content.items()}
    _check_tensors(tensors, config, found[0])
    return PublishedGPT2([folder / "config.json", *files], config, tensors)


def _check_config(config: dict[str, Any], file: Path) -> None:
    """Raise HalfstepError unless config.json describes a network that `GPT2` computes."""
    for key, allowed in EXPECTED.items():
        found = config.get(key, allowed[0])
        if found not in allowed:
            raise HalfstepError(
                f"{file}: {key}: found {str(found)[:80]!r}, expected {allowed[0]!r}; {ANOTHER}"
            )
    for key in SHAPES:
        found = config.get(key)
        if type(found) is not int or not 0 < found <= LARGEST:
            raise HalfstepError(
                f"{file}: {key}: found {str(found)[:80]!r}, expected a whole number from 1; "
                f"{DOWNLOAD_AGAIN}"
            )
    width, heads = config["n_embd"], config["n_head"]
    inner = config.get("n_inner") or 4 * width
    if width % (2 * heads) or inner != 4 * width:
        raise HalfstepError(
            f"{file}: n_embd, n_head, n_inner: found {width}, {heads}, {str(inner)[:80]}, expected "
            f"a multiple of 2 n_head, and 4 n_embd; {ANOTHER}"
        )


def _check_tensors(tensors: dict[str, Tensor], config: dict[str, Any], file: Path) -> None:
    """Raise HalfstepError unless the tensors are those of the network in config.json."""
    expected = _expected_shapes(config, len(tensors))
    for name, shape in expected.items():
        found = list(tensors[name].shape) if name in tensors else "nothing"
        if found != shape:
            raise HalfstepError(
                f"{file}: {name}: found {found}, expected {shape}; {DOWNLOAD_AGAIN}"
            )
        if not tensors[name].is_floating_point() or not tensors[name].isfinite().all():
            raise HalfstepError(
                f"{file}: {name}: expected finite floating-point numbers; {DOWNLOAD_AGAIN}"
            )
    head = tensors.get("lm_head.weight", tensors["wte.weight"])
    unknown = [name for name in tensors if name not in expected and not name.endswith(UNUSED)]
    if unknown or not torch.equal(head, tensors["wte.weight"]):
        name = unknown[0][:60] if unknown else "lm_head.weight, which differs from wte.weight"
        raise HalfstepError(f"{file}: holds {name}, which GPT-2 does not have; {ANOTHER}")


def _expected_shapes(config: dict[str, Any], most: int) -> dict[str, list[int]]:
    """The shapes of the tensors by name, of at most `most` blocks."""
    V, L, blocks, D, _ = (config[key] for key in SHAPES)
    matrices = {
        "attn.c_attn": [D, 3 * D],
        "attn.c_proj": [D, D],
        "mlp.c_fc": [D, 4 * D],
        "mlp.c_proj": [4 * D, D],
    }
    shapes = {"wte.weight": [V, D], "wpe.weight": [L, D]}
    shapes |= {"ln_f.weight": [D], "ln_f.bias": [D]}
    for i in range(min(blocks, most)):
        for layer in LAYERS:
            shape = matrices.get(layer, [D])
            shapes |= {f"h.{i}.{layer}.weight": shape, f"h.{i}.{layer}.bias": shape[-1:]}
    return shapes

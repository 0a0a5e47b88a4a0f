"""Published denoisers: their tensor names, shapes and files, read as ours.

Known are Lightning .ckpt files of MDLM and SDTT (`state_dict`, an average without names in `ema`), Hugging Face folders of kuleshov-group/mdlm-owt
and jdeschena/sdtt (model.safetensors or pytorch_model.bin, config.json), and what `halfstep export` writes. Their tensors bear our names
once `_orig_mod.` (of torch.compile) and leading `backbone.` are gone.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfstep.errors import HalfstepError, reason

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """The file, its raw weights, their average where the file has one, and what it says of itself (config)."""

    file: Path
    raw: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    config: dict


def read_published(path: Path) -> Published:
    """A .ckpt file, a file of weights, or a folder with one of WEIGHTS and a config.json. HalfstepError when it is none of these, or damaged."""
    path = Path(path)
    file = path
    if path.is_dir():
        file = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if file is None:
            found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise HalfstepError(
                f"--source {path}: holds none of {', '.join(WEIGHTS)}, found {found}; name a .ckpt, or a folder as the hub gives it"
            )
    elif not path.is_file():
        raise HalfstepError(
            f"--source {path}: no such file or folder; name a .ckpt, a folder, or a hub name such as kuleshov-group/mdlm-owt"
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(
                file, map_location="cpu", weights_only=False, pickle_module=Harmless
            )
    except Exception as error:  # safetensors, zipfile, pickle and torch each raise their own
        raise HalfstepError(
            f"--source {file}: cannot be read ({type(error).__name__}: {reason(error)}); fetch it again"
        ) from None
    if not isinstance(content, dict):
        raise HalfstepError(
            f"--source {file}: holds a {type(content).__name__}, expected named tensors or a Lightning checkpoint"
        )
    beside = file.parent / "config.json"
    config = (
        json.loads(beside.read_text())
        if path.is_dir() and beside.is_file()
        else plain(content.get("hyper_parameters", {}).get("config"))
    )
    state = content.get("state_dict", content)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise HalfstepError(
            f"--source {file}: holds no tensors, found the keys {', '.join(map(str, list(state)[:5])) or 'none'}; name a file of weights"
        )
    raw = {bare(key): value for key, value in tensors.items()}
    return Published(
        file,
        raw,
        _average(content.get("ema"), raw, file),
        config if isinstance(config, dict) else {},
    )


def bare(key: str) -> str:
    """Our name of a published tensor."""
    key = key.replace("_orig_mod.", "")
    while key.startswith("backbone."):
        key = key.removeprefix("backbone.")
    return key


def _average(ema: dict | None, raw: dict[str, Tensor], file: Path) -> dict[str, Tensor] | None:
    """Lightning's average is a list in the order of the parameters: that of the state, without the one buffer."""
    if not isinstance(ema, dict) or "shadow_params" not in ema:
        return None
    names = [name for name in raw if name != "rotary_emb.inv_freq"]
    values = ema["shadow_params"]
    wrong = [n for n, v in zip(names, values, strict=False) if v.shape != raw[n].shape]
    if len(values) != len(names) or wrong:
        what = (
            f"{wrong[0]} of another shape"
            if wrong
            else f"{len(values)} tensors for {len(names)} parameters"
        )
        raise HalfstepError(
            f"--source {file}: its average has {what}; import with --weights raw from another file, or fetch it again"
        )
    return dict(zip(names, values, strict=True))


def shape_of(raw: dict[str, Tensor], file: Path) -> tuple[int, int, int, int]:
    """(vocabulary without the mask, blocks, width, heads) that the shapes of a denoiser's tensors tell."""
    for key in (
        "vocab_embed.embedding",
        "sigma_map.mlp.0.weight",
        "rotary_emb.inv_freq",
        "blocks.0.attn_qkv.weight",
    ):
        if key not in raw:
            other = (
                "an autoregressive network"
                if key.startswith("sigma") and "vocab_embed.embedding" in raw
                else "another network"
            )
            raise HalfstepError(
                f"--source {file}: has no {key}, so it holds {other}, expected MDLM's denoiser (first key: {next(iter(raw))})"
            )
    rows, width = raw["vocab_embed.embedding"].shape
    blocks = 1 + max(int(key.split(".")[1]) for key in raw if key.startswith("blocks."))
    return rows - 1, blocks, width, width // (2 * len(raw["rotary_emb.inv_freq"]))


class Inert(dict):
    """Stands for every object of a pickle that is no tensor: it takes any arguments and state, and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.update(state)

    def __call__(self, *args, **kwargs):
        return Inert()

    def append(self, item) -> None:
        pass

    def extend(self, items) -> None:
        pass

    def add(self, item) -> None:
        pass

    def __hash__(self):
        return id(self)


HARMLESS = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("torch", "Size"),
    ("builtins", "dict"), ("builtins", "list"), ("builtins", "set"), ("builtins", "int"), ("builtins", "float"), ("builtins", "str"),
}  # fmt: skip


class Harmless:
    """The part of `pickle` that torch.load asks for, which builds tensors and plain containers and nothing else: no code of the file runs."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            return super().find_class(module, name) if (module, name) in HARMLESS else Inert

    @staticmethod
    def load(file, **options):
        return Harmless.Unpickler(file, **options).load()


def plain(node: object) -> object:
    """An OmegaConf configuration, read inertly, as dicts, lists and values."""
    if isinstance(node, Inert):
        return plain(node["_content"]) if "_content" in node else plain(node.get("_val"))
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items()}
    return [plain(value) for value in node] if isinstance(node, list) else node

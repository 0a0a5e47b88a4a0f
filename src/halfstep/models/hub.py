"""Published denoisers, read into our tensor names.

Three sources are known: Lightning .ckpt files of MDLM and SDTT; Hugging Face folders such as
kuleshov-group/mdlm-owt and jdeschena/sdtt; and the folders that `halfstep export` writes. A .ckpt
holds `state_dict`, and in `ema` an average without names. A folder holds model.safetensors or
pytorch_model.bin, and config.json. Without `_orig_mod.` (added by torch.compile) and leading
`backbone.`, the tensors have our names.
"""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from halfstep.errors import HalfstepError, reason

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    file: the file of weights; raw: the raw weights; ema: their moving average, if the file has one;
    config: the configuration that comes with the weights, {} if none does.
    """

    file: Path
    raw: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    config: dict[str, Any]


def read_published(path: Path) -> Published:
    """Read a .ckpt, a file of weights, or a folder with one of WEIGHT_FILES and a config.json.

    HalfstepError if `path` is none of these, or if the file is damaged.
    """
    path = Path(path)
    file = _weight_file(path)
    content = _load(file)
    state = content.get("state_dict", content)
    raw = {strip_prefixes(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not raw:
        keys = ", ".join(map(str, list(state)[:5])) or "none"
        raise HalfstepError(
            f"--source {file}: has no tensors, found the keys {keys}; name a file of weights"
        )
    config_file = file.parent / "config.json"
    if path.is_dir() and config_file.is_file():
        config = json.loads(config_file.read_text())
    else:
        config = to_plain(content.get("hyper_parameters", {}).get("config"))
    ema = _average(content.get("ema"), raw, file)
    return Published(file, raw, ema, config if isinstance(config, dict) else {})


def _weight_file(path: Path) -> Path:
    """The file of weights that `path` names, or that is in the folder `path`."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise HalfstepError(
            f"--source {path}: no such file or folder; "
            "name a .ckpt, a folder, or a hub name such as kuleshov-group/mdlm-owt"
        )
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    found = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
    raise HalfstepError(
        f"--source {path}: holds none of {', '.join(WEIGHT_FILES)}, found {found}; "
        "name a .ckpt, or a folder as downloaded from the hub"
    )


def _load(file: Path) -> dict[str, Any]:
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(
                file, map_location="cpu", weights_only=False, pickle_module=Harmless
            )
    except Exception as error:  # safetensors, zipfile, pickle and torch raise different types
        raise HalfstepError(
            f"--source {file}: cannot be read ({type(error).__name__}: {reason(error)}); "
            "download it again"
        ) from None
    if not isinstance(content, dict):
        raise HalfstepError(
            f"--source {file}: holds a {type(content).__name__}, "
            "expected named tensors or a Lightning checkpoint"
        )
    return content


def strip_prefixes(key: str) -> str:
    """Our name of a published tensor."""
    key = key.replace("_orig_mod.", "")
    while key.startswith("backbone."):
        key = key.removeprefix("backbone.")
    return key


def _average(ema: Any, raw: dict[str, Tensor], file: Path) -> dict[str, Tensor] | None:
    """Name the tensors of Lightning's average.

    Lightning keeps a list in the order of the parameters: that of the state, without its one
    buffer.
    """
    if not isinstance(ema, dict) or "shadow_params" not in ema:
        return None
    names = [name for name in raw if name != "rotary_emb.inv_freq"]
    values = ema["shadow_params"]
    wrong = [n for n, v in zip(names, values, strict=False) if v.shape != raw[n].shape]
    if len(values) == len(names) and not wrong:
        return dict(zip(names, values, strict=True))
    found = f"{len(values)} tensors for {len(names)} parameters"
    if wrong:
        found = f"{wrong[0]} of another shape"
    raise HalfstepError(
        f"--source {file}: its average has {found}; "
        "import with --weights raw from another file, or download it again"
    )


def shape_of(raw: dict[str, Tensor], file: Path) -> tuple[int, int, int, int]:
    """(vocabulary without the mask, blocks, width, heads), from the shapes of a denoiser's tensors.

    HalfstepError if the tensors are not those of MDLM's denoiser.
    """
    needed = ("vocab_embed.embedding", "sigma_map.mlp.0.weight", "rotary_emb.inv_freq")
    missing = [key for key in (*needed, "blocks.0.attn_qkv.weight") if key not in raw]
    if missing:
        other = "another network"
        if missing[0].startswith("sigma_map"):  # the embedding is there, the time embedding is not
            other = "an autoregressive network"
        raise HalfstepError(
            f"--source {file}: has no {missing[0]}, so it holds {other}, "
            f"expected MDLM's denoiser (first key: {next(iter(raw))})"
        )
    rows, width = raw["vocab_embed.embedding"].shape
    blocks = 1 + max(int(key.split(".")[1]) for key in raw if key.startswith("blocks."))
    return rows - 1, blocks, width, width // (2 * len(raw["rotary_emb.inv_freq"]))


class Inert(dict[Any, Any]):
    """Stand-in for every pickled object that is not a tensor.

    It accepts any arguments and any state, and does nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return Inert()

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


HARMLESS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    *(("builtins", name) for name in ("dict", "list", "set", "int", "float", "str")),
}


class Harmless:
    """The part of the module `pickle` that torch.load uses, restricted so that no code runs.

    It builds tensors and plain containers; every other object becomes Inert.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return super().find_class(module, name) if (module, name) in HARMLESS else Inert

    @staticmethod
    def load(file: BinaryIO, **options: Any) -> Any:
        return Harmless.Unpickler(file, **options).load()


def to_plain(node: object) -> object:
    """An OmegaConf configuration that was unpickled as Inert, as plain dicts, lists and values."""
    if isinstance(node, Inert):
        return to_plain(node["_content"]) if "_content" in node else to_plain(node.get("_val"))
    if isinstance(node, dict):
        return {key: to_plain(value) for key, value in node.items()}
    return [to_plain(value) for value in node] if isinstance(node, list) else node

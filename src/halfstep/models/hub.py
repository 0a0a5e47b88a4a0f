"""Published denoisers, read into our tensor names.

Three sources are known: Lightning .ckpt files of MDLM and SDTT; Hugging Face folders such as
kuleshov-group/mdlm-owt and jdeschena/sdtt; and the folders that `halfstep export` writes. A .ckpt
holds `state_dict`, and in `ema` an average without names. A folder holds the weights in one file or
in several with an index, and config.json. Without the prefixes that wrappers add (WRAPPERS) and
leading names of modules (OUTER), the tensors have our names.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import HalfstepError
from halfstep.models.pickled import Inert, RefusedError
from halfstep.models.weight_files import DOWNLOAD_AGAIN, INDEX, read_object, read_weights
from halfstep.tensors import check_finite

WEIGHT_FILES = (
    "model.safetensors",
    f"model.safetensors{INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{INDEX}",
)
POSITIONS = "position_embed.embedding"  # only in GPT-2's architecture, which has no INV_FREQ
EMBEDDING = "vocab_embed.embedding"  # in every denoiser, so it tells which dict holds the weights
INV_FREQ = "rotary_emb.inv_freq"  # the one buffer; all other tensors are parameters
ROWS = (EMBEDDING, "output_layer.linear.weight", "output_layer.linear.bias")  # one row per token
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# torch.compile, FSDP and activation checkpointing put these anywhere in a name.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
OUTER = ("module.", "model.", "backbone.", "network.", "net.", "denoiser.", "_forward_module.")
NESTED = ("state_dict", "model_state_dict", "model", "module")  # keys of raw weights, best first
AVERAGE = r"(?<![a-z])(ema|average|averaged|shadow)(?![a-z])"  # in the keys above an average
TENSORS_PER_BLOCK = 10
MAX_NODES = 100_000  # dicts of a file, or values of a configuration, that are looked at


@dataclass(frozen=True)
class Published:
    """A published checkpoint.

    files: the file of weights, or the index and its files; raw: the raw weights; ema: their moving
    average, if the file has one; config: the configuration that comes with the weights, {} if none
    does.
    """

    files: list[Path]
    raw: dict[str, Tensor]
    ema: dict[str, Tensor] | None
    config: dict[str, Any]

    @property
    def file(self) -> Path:
        """The file of weights, or the index of several."""
        return self.files[0]


def read_published(path: Path) -> Published:
    """Read a .ckpt, a file of weights, or a folder with one of WEIGHT_FILES and a config.json.

    HalfstepError if `path` is none of these, or if a file is damaged or may not be read.
    """
    path = Path(path)
    file = _weight_file(path)
    try:
        content, files = read_weights(file)
        config = _configuration(content)
        if path.is_dir() and (path / "config.json").is_file():
            config = read_object(path / "config.json")
        raw, ema = _weight_sets(content)
    except RefusedError as error:
        raise HalfstepError(f"--source {file}: {error}; {DOWNLOAD_AGAIN}") from None
    _add_frequencies(raw, config)
    if ema is None:
        ema = _listed_average(content.get("ema"), raw, file)
    return Published(files, raw, ema, config)


def read_tensors_of(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """The tensors in a folder of transformers, under their own names, and their files.

    HalfstepError if they may not be read, or are not finite.
    """
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise HalfstepError(
            f"--source {folder}: holds none of {', '.join(WEIGHT_FILES)}; name a hub name such as "
            "gpt2, or a folder that save_pretrained wrote"
        )
    try:
        content, files = read_weights(found[0])
        if not all(isinstance(value, Tensor) for value in content.values()):
            raise RefusedError("holds more than named tensors")
    except RefusedError as error:
        raise HalfstepError(f"--source {found[0]}: {error}; {DOWNLOAD_AGAIN}") from None
    # Clones, because tied weights of an archive share their memory; masks are no weights.
    tensors = {
        str(name): value.clone() for name, value in content.items() if value.is_floating_point()
    }
    check_finite(tensors, found[0])
    return tensors, files


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
    found = ", ".join(sorted(repr(file.name) for file in path.iterdir())[:5]) or "nothing"
    raise HalfstepError(
        f"--source {path}: holds none of {', '.join(WEIGHT_FILES)}, found {found}; "
        "name a .ckpt, or a folder as downloaded from the hub"
    )


def _configuration(content: dict[Any, Any]) -> dict[str, Any]:
    """The configuration in a Lightning checkpoint, {} if there is none."""
    hyper_parameters = content.get("hyper_parameters")
    if not isinstance(hyper_parameters, dict):
        return {}
    try:
        config = to_plain(hyper_parameters.get("config"), iter(range(MAX_NODES)))
    except RecursionError:
        raise RefusedError("has a configuration that is nested too deeply") from None
    return config if isinstance(config, dict) else {}


def to_plain(node: object, left: Iterator[int]) -> object:
    """An OmegaConf configuration that was read as Inert, as plain dicts, lists and values.

    Each value takes a number from `left`, because a small pickle can describe a huge tree.
    """
    if next(left, None) is None:
        raise RefusedError(f"has a configuration of more than {MAX_NODES:,} values")
    if isinstance(node, Inert):
        return to_plain(node["_content"] if "_content" in node else node.get("_val"), left)
    if isinstance(node, dict):
        return {key: to_plain(value, left) for key, value in node.items()}
    return [to_plain(value, left) for value in node] if isinstance(node, list) else node


def _weight_sets(content: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """The raw weights and the named average of a file, from whichever dicts hold them.

    An average alone counts as the raw weights.
    """
    sets = _dicts_of_weights(content)
    averages = [path for path in sets if re.search(AVERAGE, path.lower())]
    raws = [path for path in sets if path not in averages]
    known = [path for path in NESTED if path in raws]
    if len(raws) > 1 and not known:
        raise RefusedError(f"holds several sets of weights: {', '.join(map(repr, raws[:5]))}")
    if not sets:
        keys = ", ".join(repr(str(key)[:80]) for key in list(content)[:5]) or "none"
        raise RefusedError(
            f"has no tensors of MDLM's denoiser (no {EMBEDDING}), found the keys {keys}"
        )
    chosen = (known or raws or averages)[0]
    average = sets[averages[0]] if averages and chosen != averages[0] else None
    return _named(sets[chosen]), None if average is None else _named(average)


def _dicts_of_weights(content: dict[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """The dicts of a file that hold a denoiser's tensors, by their path of keys."""
    found = {}
    seen: set[int] = set()
    waiting: deque[tuple[str, dict[Any, Any]]] = deque([("", content)])
    while waiting and len(seen) < MAX_NODES:
        path, node = waiting.popleft()
        if id(node) in seen:
            continue
        seen.add(id(node))
        entries = [(key, value) for key, value in node.items() if isinstance(key, str)]
        tensors = {key: value for key, value in entries if isinstance(value, Tensor)}
        if any(strip_prefixes(key) == EMBEDDING for key in tensors):
            found[path] = tensors
        for key, value in entries:
            if isinstance(value, dict):
                waiting.append((f"{path}.{key}"[-200:].removeprefix("."), value))
    return found


def strip_prefixes(key: str) -> str:
    """Our name of a published tensor."""
    for wrapper in WRAPPERS:
        key = key.replace(wrapper, "")
    while outer := [name for name in OUTER if key.startswith(name)]:
        key = key.removeprefix(outer[0])
    return key


def _named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under our names; all are floating-point numbers, and no two have one name."""
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = strip_prefixes(key)
        if name == "n_averaged":  # of torch's AveragedModel
            continue
        if len(name) > 200 or not name.isprintable():
            raise RefusedError(f"names a tensor {name[:80]!r}")
        if name in named:
            raise RefusedError(f"holds {name} twice, under two prefixes")
        if value.dtype not in DTYPES:
            raise RefusedError(
                f"holds {name} as {str(value.dtype).removeprefix('torch.')}, expected weights in "
                "floating point"
            )
        named[name] = value.detach()
    return named


def _add_frequencies(raw: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Add the buffer of the rotary embedding, which a file of parameters alone does not hold."""
    model = config.get("model")
    heads = config.get("n_heads", model.get("n_heads") if isinstance(model, dict) else None)
    width = raw[EMBEDDING].shape[-1] if raw[EMBEDDING].ndim else 0
    if (
        INV_FREQ not in raw
        and POSITIONS not in raw
        and type(heads) is int
        and heads > 0
        and width >= 2 * heads
    ):
        head_width = width // heads
        raw[INV_FREQ] = 1e4 ** -(torch.arange(0, head_width, 2).float() / head_width)


def _listed_average(ema: Any, raw: dict[str, Tensor], file: Path) -> dict[str, Tensor] | None:
    """Name the tensors of Lightning's average.

    Lightning keeps a list in the order of the parameters: that of the state, without its one
    buffer.
    """
    if not isinstance(ema, dict) or "shadow_params" not in ema:
        return None
    names = [name for name in raw if name != INV_FREQ]
    values = ema["shadow_params"]
    if not isinstance(values, list) or not all(isinstance(value, Tensor) for value in values):
        found = "no list of tensors"
    elif len(values) != len(names):
        found = f"{len(values)} tensors for {len(names)} parameters"
    else:
        average = dict(zip(names, values, strict=True))
        wrong = [
            name
            for name, value in average.items()
            if value.shape != raw[name].shape or value.dtype not in DTYPES
        ]
        if not wrong:
            return average
        found = f"{wrong[0]} of another shape or type"
    raise HalfstepError(
        f"--source {file}: its average has {found}; "
        "import with --weights raw from another file, or download it again"
    )


def shape_of(raw: dict[str, Tensor], file: Path, heads: object = None) -> tuple[int, int, int, int]:
    """(vocabulary without the mask, blocks, width, heads), from the shapes of a denoiser's tensors.

    `heads` is the number in the configuration, which the tensors of GPT-2's architecture do not
    tell. HalfstepError if the tensors are not those of a denoiser.
    """
    needed = [EMBEDDING, "sigma_map.mlp.0.weight", INV_FREQ, "blocks.0.attn_qkv.weight"]
    dimensions = [2, 2, 1, 2]
    if POSITIONS in raw:
        needed, dimensions = [EMBEDDING, POSITIONS, "blocks.0.attn_qkv.weight"], [2, 2, 2]
    missing = [key for key in needed if key not in raw]
    if missing:
        other = "another network"
        if missing[0].startswith("sigma_map"):  # the embedding is there, the time embedding is not
            other = "an autoregressive network"
        raise HalfstepError(
            f"--source {file}: has no {missing[0]}, so it holds {other}, "
            f"expected MDLM's denoiser (first key: {next(iter(raw))})"
        )
    for key, ndim in zip(needed, dimensions, strict=True):
        if raw[key].ndim != ndim or raw[key].numel() == 0:
            raise HalfstepError(
                f"--source {file}: {key} has shape {list(raw[key].shape)}, "
                f"expected {ndim} dimensions; download it again, or name other weights"
            )
    rows, width = raw[EMBEDDING].shape
    numbers = {key.split(".")[1] for key in raw if key.startswith("blocks.")}
    blocks = len(numbers)
    head_width = 2 * len(raw[INV_FREQ]) if POSITIONS not in raw else _head_width(width, heads)
    if numbers != set(map(str, range(blocks))) or len(raw) < TENSORS_PER_BLOCK * blocks:
        raise HalfstepError(
            f"--source {file}: lacks tensors of some of its {blocks} blocks; "
            "download it again, or name other weights"
        )
    if rows < 2 or width % head_width:
        raise HalfstepError(
            f"--source {file}: {rows} tokens of width {width} and heads of width {head_width} "
            "fit no denoiser; download it again, or name other weights"
        )
    return rows - 1, blocks, width, width // head_width


def _head_width(width: int, heads: object) -> int:
    """The width of each of `heads` heads; a number that divides nothing if there are none."""
    if isinstance(heads, int) and 0 < heads <= width and width % heads == 0:
        return width // heads
    return width + 1


def is_padded(raw: dict[str, Tensor], tokens: int) -> bool:
    """Are all rows after those of `tokens` tokens and the mask padding?

    A padded vocabulary ends at a multiple of 8 not far away, or its last rows are zero.
    """
    rows = raw[EMBEDDING]
    surplus = len(rows) - (tokens + 1)
    if surplus <= 0:
        return False
    is_rounded = len(rows) % 8 == 0 and surplus < 1024
    return is_rounded or not rows[tokens + 1 :].any()


def without_padding(state: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """The weights with the rows of `tokens` tokens and the mask alone."""
    return state | {
        key: state[key][: tokens + 1] for key in ROWS if key in state and state[key].ndim
    }

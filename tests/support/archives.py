"""Hostile files of weights, written byte by byte: pickles, PyTorch's archives and safetensors."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from halfstep.data.tokenizer import train_bpe
from halfstep.models.dit import DiT

TOKENS = 257  # of the tokenizer in a published folder: EOS and all bytes
CONFIG = {"model_length": 16, "n_heads": 2}


def named(name: str) -> bytes:
    """A global, as torch.save writes it."""
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def whole(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def dict_of(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def called(function: str, *arguments: bytes) -> bytes:
    return named(function) + tuple_of(*arguments) + b"R"


def storage(kind: str = "FloatStorage", key: str = "0", elements: int = 4) -> bytes:
    parts = text("storage"), named(f"torch.{kind}"), text(key), text("cpu"), whole(elements)
    return tuple_of(*parts) + b"Q"


def tensor(size=(4,), stride=(1,), offset: int = 0, numbers: bytes | None = None) -> bytes:
    """A tensor over a storage of four numbers."""
    return called(
        "torch._utils._rebuild_tensor_v2",
        storage() if numbers is None else numbers,
        whole(offset),
        tuple_of(*map(whole, size)),
        tuple_of(*map(whole, stride)),
        b"\x89",
        called("collections.OrderedDict"),
    )


def write_archive(
    path: Path, body: bytes, members: dict[str, bytes] | None = None, top: str = "x"
) -> None:
    """A PyTorch archive whose pickle has this body, and one storage of 16 bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {"data.pkl": b"\x80\x02" + body + b".", "version": b"3\n", "data/0": bytes(16)}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (files | (members or {})).items():
            archive.writestr(f"{top}/{name}", data)


def write_safetensors(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header: an object for JSON, or bytes."""
    written = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(written)) + written + data)


class Overwrites(torch.nn.Module):
    """A TorchScript module that writes into a file when it is loaded."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.kept = torch.zeros(1, dtype=torch.uint8)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return (self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path = state[0]
        self.training = state[1]
        self.kept = torch.from_file(self.path, True, 4, dtype=torch.uint8).fill_(88)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def write_torchscript(path: Path, victim: Path) -> None:
    """An archive that overwrites four bytes of `victim` when torch.jit.load reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and still loaded
        torch.jit.save(torch.jit.script(Overwrites(str(victim))), path)


@cache
def _tokenizer() -> str:
    return train_bpe(["a"], TOKENS).to_str()


def weights(width: int = 16, blocks: int = 1, rows: int = TOKENS + 1) -> dict[str, torch.Tensor]:
    """The tensors of a small denoiser, in our names."""
    torch.manual_seed(0)
    return dict(DiT(rows - 1, width, blocks, 2).state_dict())


def publish(folder: Path, state: dict | None = None, config: object = CONFIG) -> Path:
    """A folder as on the hub that can be imported; `config` may be the bytes of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights() if state is None else state, folder / "model.safetensors")
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    (folder / "config.json").write_bytes(data)
    (folder / "tokenizer.json").write_text(_tokenizer())
    return folder


def publish_shards(folder: Path, index: object = None) -> Path:
    """A published folder whose weights are in two files; `index` replaces the index."""
    publish(folder)
    (folder / "model.safetensors").unlink()
    state = weights()
    names = sorted(state)
    places = {name: f"{1 + (i % 2)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({n: state[n] for n in names if places[n] == file}, folder / file)
    if index is None:
        index = {"metadata": {"total_size": 1}, "weight_map": places}
    written = index if isinstance(index, bytes) else json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(written)
    return folder

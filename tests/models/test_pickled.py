"""The check of pickles: it lets pass what torch.save writes, and never raises anything unexpected.

tests/hostile/test_imported_weights.py has the hostile files.
"""

import collections
import pickletools
import random
import zipfile
from pathlib import Path

import archives
import pytest
import torch

from halfstep.models import pickled
from halfstep.models.pickled import Inert, RefusedError
from halfstep.models.weight_files import read_weights

PARITY = Path(__file__).parents[1] / "parity"
SAVED = {
    "numbers and texts": {"a": 1, "b": -2.5, "c": "ü", "d": None, "e": True, "f": 2**70},
    "containers": {"a": [1, [2]], "b": (1, (2, 3)), "c": {"d": {}}, "e": {1, 2}},
    "an ordered dict": collections.OrderedDict(a=torch.zeros(2)),
    "bytes": {"state": bytes(range(256))},
    "a size, a device, a dtype": {
        "a": torch.Size([2, 3]),
        "b": torch.device("cpu"),
        "c": torch.half,
    },
    "a parameter": {"a": torch.nn.Parameter(torch.ones(2, 3))},
    "a view": {"a": torch.arange(12.0).view(3, 4).T[1:3]},
    "two names of one storage": dict.fromkeys("ab", torch.arange(3)),
    "no dimension": {"a": torch.tensor(3.0)},
    "no elements": {"a": torch.zeros(0, 4)},
    "an optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict(),
}


@pytest.mark.parametrize("name", SAVED)
def test_what_torch_saves_is_read(name, tmp_path):
    torch.save(SAVED[name], tmp_path / "x.pt")
    found, files = read_weights(tmp_path / "x.pt")
    assert files == [tmp_path / "x.pt"]
    assert found.keys() == SAVED[name].keys()
    for key, value in SAVED[name].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value)
        else:
            assert found[key] == value


def test_objects_of_other_libraries_are_stand_ins(tmp_path):
    torch.save({"a": Path("x")}, tmp_path / "x.pt")
    found, _ = read_weights(tmp_path / "x.pt")
    assert type(found["a"]) is Inert


@pytest.mark.parametrize("kind", [dict, list, tuple, int, float, str, bool, object])
def test_types_are_stand_ins(kind, tmp_path):
    """OmegaConf keeps the types of its values. Protocol 2 has the names of Python 2 for some."""
    torch.save({"a": kind}, tmp_path / "x.pt")
    found, _ = read_weights(tmp_path / "x.pt")
    assert found == {"a": Inert}


def test_a_default_dict_is_a_dict(tmp_path):
    torch.save({"b": collections.defaultdict(list, a=[1])}, tmp_path / "x.pt")
    found, _ = read_weights(tmp_path / "x.pt")
    assert found["b"] == {"a": [1]}


def test_any_damage_of_a_pickle_is_one_refusal_or_none(tmp_path):
    """Random bytes in the pickle of a real checkpoint: no other error, no file, no call."""
    with zipfile.ZipFile(PARITY / "sdtt_lightning_plain.ckpt") as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    data = files.pop("data.pkl")[2:-1]  # without its first and last operation
    generator = random.Random(3)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 3, 30])):
            damaged[generator.randrange(len(data))] = generator.randrange(256)
        archives.write_archive(tmp_path / "x.ckpt", bytes(damaged), files)
        try:
            read_weights(tmp_path / "x.ckpt")
        except RefusedError as error:
            refused += 1
            assert str(error)
    assert refused > 200


def test_torch_reads_every_operation_that_passes():
    """Otherwise the check would let pass what torch refuses, or understands in another way."""
    from torch import _weights_only_unpickler as reader

    known = {*pickled.CONSTANTS, *pickled.LITERALS, *pickled.EMPTY, *pickled.ACTIONS}
    known |= {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "PROTO", "STOP"}
    codes = {operation.name: operation.code.encode("latin1") for operation in pickletools.opcodes}
    assert {name for name in known if getattr(reader, name, None) != codes[name]} == set()

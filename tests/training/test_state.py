"""The rolling checkpoint: whatever bit of it changes, no training continues from it."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_loop import STEPS, Interrupted, run

from halfstep.errors import HalfstepError
from halfstep.training import loop, state
from halfstep.training.state import CHECKSUM, STATE, contents_sha256


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A training that was interrupted, with the rolling checkpoint of its fourth step."""
    monkeypatch.setattr(loop, "SAVE_EVERY_S", 0)
    with pytest.raises(Interrupted):
        run(tmp_path / "out", stop_at=4)
    return tmp_path / "out"


def test_one_flipped_bit_anywhere_is_found(folder):
    """In the header's length, in every byte of the header and in every seventh of the tensors."""
    file = folder / "state" / STATE
    whole = file.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    assert len(whole) > 8 + header + 900  # there are tensors
    state._read_state(file)
    end = 8 + header
    for at in [*range(end), *range(end, len(whole), 7)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        with pytest.raises(HalfstepError, match="delete the folder .* to start this train"):
            state._read_state(file)


@pytest.mark.parametrize("at", ["the fingerprint", "a tensor"])
def test_a_training_does_not_continue_from_it(folder, at):
    """It is an error. Only the state of another training is passed over, without a message."""
    file = folder / "state" / STATE
    content = bytearray(file.read_bytes())
    place = content.index(b'"fingerprint":"') + 20 if at == "the fingerprint" else len(content) - 9
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(HalfstepError, match=rf"{STATE}: damaged, .*delete the folder .*state to"):
        run(folder)
    file.unlink()
    assert run(folder).step == STEPS


@pytest.mark.parametrize("size", [0, 1, 8, 100, -1])
def test_a_cut_file_is_found(folder, size):
    file = folder / "state" / STATE
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(HalfstepError, match="not a whole file"):
        run(folder)


def test_a_state_without_a_checksum_is_refused(folder):
    file = folder / "state" / STATE
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    del header[CHECKSUM]
    save_file(load_file(file), file, header)
    with pytest.raises(HalfstepError, match="delete the folder"):
        run(folder)


def test_the_checksum_depends_on_everything():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    found = {
        contents_sha256(*given)
        for given in [
            (one, {}),
            (one, {"step": "1"}),
            (one, {"step": "2"}),
            (one | {"c": torch.zeros(())}, {}),
            (one | {"a": torch.zeros(3, 2)}, {}),
            (one | {"a": torch.zeros(2, 3, dtype=torch.int32)}, {}),
            ({"a": one["b"], "b": one["a"]}, {}),
        ]
    }
    assert len(found) == 7
    assert contents_sha256(dict(reversed(one.items())), {}) == contents_sha256(one, {})


def test_the_header_is_read_with_the_checksum_of_its_own_file(folder):
    with safe_open(folder / "state" / STATE, "pt") as opened:
        header = opened.metadata()
    checksum = header.pop(CHECKSUM)
    assert contents_sha256(load_file(folder / "state" / STATE), header) == checksum
    assert json.loads(header["logged"])

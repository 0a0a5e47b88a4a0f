"""Variables of torchrun and Slurm: whole numbers, and one sentence for anything else."""

import pytest

from halfstep.distributed.environment import check_first_address, environment_number, own_rank
from halfstep.errors import HalfstepError

NO_NUMBERS = [
    "abc",
    "",
    "-1",
    "+1",
    "1.0",
    "1e3",
    " 1",
    "1_0",
    "0x1",
    "٣",
    "²",
    "9" * 5000,
    "\x1b[2J",
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=ascii)
def test_what_is_no_number_is_a_sentence(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(HalfstepError, match="WORLD_SIZE: found .*, expected a whole") as caught:
        environment_number("WORLD_SIZE", 1)
    assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


def test_a_number_the_least_and_the_default(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert environment_number("RANK", 3) == 3
    with pytest.raises(HalfstepError, match="RANK: found no value, expected a whole number"):
        environment_number("RANK")
    monkeypatch.setenv("RANK", "007")
    assert environment_number("RANK", 3) == environment_number("RANK", least=7) == 7
    with pytest.raises(HalfstepError, match="RANK: found '007', expected .* of at least 8"):
        environment_number("RANK", least=8)


def test_a_rank_is_below_the_world_size(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert own_rank() == 1
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(HalfstepError, match="RANK: found 2, expected a number below WORLD_SIZE"):
        own_rank()


@pytest.mark.parametrize(
    ("address", "port", "message"),
    [
        ("localhost", "29500", None),
        ("127.0.0.1", "1", None),
        ("localhost", "65536", "expected an address that this machine can look up"),
        ("localhost", "0", "MASTER_PORT: found '0'"),
        ("localhost", "port", "MASTER_PORT: found 'port'"),
        ("", "29500", "found '' and 29500"),
        ("no such host", "29500", "found 'no such host' and 29500"),
        ("a" * 300, "29500", "expected an address"),
    ],
)
def test_the_first_address(monkeypatch, address, port, message):
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", port)
    if message is None:
        check_first_address()
        return
    with pytest.raises(HalfstepError, match=message):
        check_first_address()

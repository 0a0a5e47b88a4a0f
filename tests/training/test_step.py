"""The parts of one step: random numbers, batches made ahead, micro-batches, the ranks' gradient."""

import threading

import pytest
import torch
from torch import nn

from halfstep.config import Training
from halfstep.distributed.group import Group
from halfstep.errors import HalfstepError
from halfstep.training.step import GlobalGradient, micro_batches, prefetched, step_generator


class Interrupted(Exception):
    pass


def test_generator_is_a_function_of_seed_and_step():
    places = [(seed, step) for seed in (0, 1, 11) for step in (0, 1, 10, 110)]
    draws = {torch.rand(4, generator=step_generator(*place)).sum().item() for place in places}
    assert len(draws) == len(places)
    again = [torch.rand(4, generator=step_generator(11, 10)) for _ in range(2)]
    assert torch.equal(*again)


def test_the_next_batch_is_made_while_one_is_used():
    made = [threading.Event() for _ in range(5)]

    def make(step):
        if step == 4:
            raise Interrupted
        made[step].set()
        return 10 * step

    found = []
    with pytest.raises(Interrupted):  # when step 4 is asked for, not before
        for batch in prefetched(make, 1, 6):
            assert len(found) == 2 or made[len(found) + 2].wait(10)
            found.append(batch)
    assert found == [10, 20, 30]
    assert list(prefetched(make, 2, 2)) == []


@pytest.mark.parametrize("size", [1, 3, 4, 5, 9])
def test_micro_batches_are_every_row_once_in_order(size):
    tensors = {"x": torch.arange(8).view(4, 2), "t": torch.arange(4)}
    parts = list(micro_batches(tensors, size))
    for name, value in tensors.items():
        assert torch.equal(torch.cat([part[name] for part, _ in parts]), value)
    assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part["t"]) <= size for part, _ in parts)


@pytest.mark.parametrize(("batch_size", "ranks"), [(1, 2), (2, 3)])
def test_a_batch_with_fewer_rows_than_ranks(batch_size, ranks):
    training = Training(num_steps=5, warmup_steps=1, batch_size=batch_size)
    message = f"batch_size: found {batch_size}, but {ranks} processes share it"
    with pytest.raises(HalfstepError, match=message):
        GlobalGradient(nn.Linear(1, 1), None, training, Group(0, ranks))


def test_a_sharded_network_needs_a_batch_that_the_ranks_divide(monkeypatch):
    training = Training(num_steps=5, warmup_steps=1, batch_size=8)
    monkeypatch.setattr("halfstep.training.step.is_sharded", lambda p: True)
    with pytest.raises(HalfstepError, match="found 8, but 3 processes share it"):
        GlobalGradient(nn.Linear(1, 1), None, training, Group(0, 3))
    assert GlobalGradient(nn.Linear(1, 1), None, training, Group(0, 4)).scale == 1.0

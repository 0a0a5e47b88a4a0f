"""`find_device` only finds a device; the command line prepares the process, and only once."""

from types import SimpleNamespace

import pytest
import torch
from small import MACHINE, call

from halfstep.commands.generate import generate
from halfstep.config import GenerateOptions, Machine
from halfstep.distributed import device, group
from halfstep.distributed.device import find_device, prepare_process
from halfstep.distributed.group import Group, join_group
from halfstep.errors import HalfstepError

CPU = torch.device("cpu")


@pytest.fixture
def threads(monkeypatch):
    """Every number of threads that torch is given; none reaches it."""
    given = []
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs, as torch sees them; the current one is noted."""
    chosen = []
    fake = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, set_device=chosen.append
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return chosen


def test_find_device_changes_nothing(threads):
    before = torch.get_num_threads()
    assert find_device(Machine(device="cpu", threads=before + 1)) == CPU
    assert find_device(Machine()).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert threads == [] and torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("ranks", "asked", "each"), [(None, 2, 2), ("1", 3, 3), ("2", 4, 2), ("2", 5, 2), ("4", 2, 1)]
)
def test_the_ranks_of_a_machine_share_its_threads(monkeypatch, threads, ranks, asked, each):
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    prepare_process(Machine(threads=asked))
    assert threads == [each]


def test_without_a_number_torch_keeps_its_own(threads):
    prepare_process(Machine())
    assert threads == []


@pytest.mark.parametrize("name", ["generate", "score-samples"])
def test_the_command_line_prepares_the_process_once(pipeline, tmp_path, threads, name):
    score = f"--samples {pipeline.samples} --corpus {pipeline.corpus} --bootstrap 100"
    options = {
        "generate": f"--checkpoint {pipeline.teacher} --steps 2 --num-samples 1",
        "score-samples": f"{score} --judge {pipeline.baseline}/hf {pipeline.baseline}/hf",
    }[name]
    machine = MACHINE.replace("--threads 1", "--threads 3")
    assert call(f"{name} {options} --output {tmp_path}/out {machine}") == 0
    assert threads == [3]


def test_a_command_called_from_python_changes_no_setting(pipeline, tmp_path, threads):
    options, machine = GenerateOptions(num_samples=1), Machine(device="cpu", threads=3)
    generate(pipeline.teacher, options, machine, tmp_path / "out", [2])
    assert threads == []


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_rank_has_its_own_gpu(monkeypatch, gpus, name):
    monkeypatch.setattr(
        torch, "empty", lambda n, device: SimpleNamespace(device=torch.device(device))
    )
    assert find_device(Machine(device=name)) == torch.device("cuda", 0)
    assert find_device(Machine(device="cuda:1")) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert find_device(Machine(device=name)) == torch.device("cuda", 1)
    assert gpus == []  # the current device is the group's to set
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = "processes: found 4 on this machine, but torch sees 2 GPUs; ask for at most 2"
    with pytest.raises(HalfstepError, match=message):
        find_device(Machine(device=name))


@pytest.mark.parametrize(
    ("name", "backend", "chosen"),
    [
        ("auto", "cpu:gloo,cuda:nccl", [torch.device("cuda", 1)]),
        ("cuda", "cpu:gloo,cuda:nccl", [torch.device("cuda", 1)]),
        ("cpu", "gloo", []),
    ],
)
def test_a_rank_that_joins_a_group_takes_its_gpu(monkeypatch, gpus, name, backend, chosen):
    backends = []
    fake = SimpleNamespace(
        is_initialized=lambda: False,
        init_process_group=lambda name, timeout: backends.append(name),
        get_rank=lambda: 1,
        get_world_size=lambda: 2,
    )
    monkeypatch.setattr(group, "dist", fake)
    variables = {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "MASTER_PORT": 1}
    for variable, value in variables.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert join_group(Machine(device=name)) == Group(1, 2)
    assert backends == [backend] and gpus == chosen


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda:7"])
def test_a_device_that_torch_cannot_use(name):
    with pytest.raises(HalfstepError, match=f"device: found '{name}', which torch cannot use"):
        find_device(Machine(device=name))


def test_the_allocator_of_another_c_library_is_left_alone(monkeypatch, threads):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: object())
    prepare_process(Machine(threads=1))
    assert threads == [1]

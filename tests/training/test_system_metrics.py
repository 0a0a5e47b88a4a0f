"""Figures of the machine agree with other sources, and peak FLOP/s with the data sheets."""

import os
from types import SimpleNamespace

import pytest
import torch
from small import call

from halfstep.data.windows import Windows
from halfstep.records import journal
from halfstep.training import loop
from halfstep.training import system_metrics as module
from halfstep.training.system_metrics import peak_flops, system_metrics

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_memory_of_this_process():
    with open(f"/proc/{os.getpid()}/status") as file:
        (resident,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
    assert system_metrics(CPU) == {"system/memory_gb": pytest.approx(resident / 1e9, rel=0.05)}


PEAKS = {
    "NVIDIA H100 80GB HBM3": 989.5e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H200": 989.5e12,
    "Quadro": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA, "bfloat16") == PEAKS[name]
    assert peak_flops(CUDA, "float32") is None
    assert peak_flops(CPU, "bfloat16") is None


def test_without_nvml_the_other_figures_are_there(monkeypatch):
    def absent(device):
        raise ModuleNotFoundError("pynvml")

    fake = SimpleNamespace(
        memory_reserved=lambda device: 3e9,
        max_memory_allocated=lambda device: 2e9,
        utilization=absent,
        power_draw=absent,
    )
    monkeypatch.setattr(module.torch, "cuda", fake)
    found = system_metrics(CUDA)
    assert found["system/gpu_memory_gb"] == 3.0 and found["system/gpu_peak_memory_gb"] == 2.0
    assert "system/gpu_power_w" not in found
    fake.utilization, fake.power_draw = lambda device: 87, lambda device: 345_600
    found = system_metrics(CUDA)
    assert found["system/gpu_use_percent"] == 87.0 and found["system/gpu_power_w"] == 345.6


def test_every_log_line_has_the_model_flops_utilization(pipeline, tmp_path, monkeypatch, capsys):
    """MFU = tokens/s * FLOPs per token / peak, to 2%.

    FLOPs per token (PaLM appendix B): 6 N + 6 L D per layer for the blocks, except 9/12 of the last
    one, which is computed for the masked half alone; 3 V D for half the readout.
    """
    monkeypatch.setattr(loop, "peak_flops", lambda device, precision: 1e9)
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would leave it out
    options = "--size tiny --num-steps 3 --batch-size 8 --warmup-steps 1 --precision float32"
    place = f"--corpus {pipeline.corpus} --output {tmp_path}/t/out --device cpu --threads 1"
    assert call(f"pretrain {options} {place}") == 0
    metrics = [point["metrics"] for point in journal.read_journal(tmp_path / "t/out")[1]]
    points = [point for point in metrics if "train/loss" in point]
    blocks, width, length = 3, 128, 24
    vocabulary = Windows(pipeline.corpus, "train").vocab_size
    matrices = 6 * (blocks * 12 - 9 / 2) * width**2
    attention = 12 * blocks * length * width
    readout = 6 * vocabulary * width / 2
    expected = matrices + attention + readout
    assert len(points) == 3
    for point in points:
        mfu = point["train/tokens_per_s"] * expected / 1e9
        assert point["train/mfu"] == pytest.approx(mfu, rel=0.02)
        assert point["system/memory_gb"] > 0
    assert "% of peak FLOPs |" in capsys.readouterr().err

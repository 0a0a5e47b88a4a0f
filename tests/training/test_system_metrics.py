"""What the machine does: figures that agree with other sources, and peaks that are the maker's."""

import os
from types import SimpleNamespace

import pytest
import torch
from small import call

from halfstep.commands import train
from halfstep.records import journal
from halfstep.training import loop
from halfstep.training import system_metrics as module
from halfstep.training.system_metrics import peak_flops, system_metrics


def test_memory_of_this_process():
    with open(f"/proc/{os.getpid()}/status") as file:
        (resident,) = (int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
    assert system_metrics(torch.device("cpu")) == {
        "system/memory_gb": pytest.approx(resident / 1e9, rel=0.05)
    }


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H100 80GB HBM3", 989.5e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989.5e12), ("Quadro", None)])  # fmt: skip
def test_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert (
        peak_flops(torch.device("cuda"), "bfloat16") == peak
        and peak_flops(torch.device("cuda"), "float32") is None
    )
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


def test_without_nvml_the_rest_is_there(monkeypatch):
    def absent(device):
        raise ModuleNotFoundError("pynvml")

    fake = SimpleNamespace(
        memory_reserved=lambda device: 3e9,
        max_memory_allocated=lambda device: 2e9,
        utilization=absent,
        power_draw=absent,
    )
    monkeypatch.setattr(module.torch, "cuda", fake)
    found = system_metrics(torch.device("cuda"))
    assert (found["system/gpu_memory_gb"], found["system/gpu_peak_memory_gb"]) == (
        3.0,
        2.0,
    ) and "system/gpu_power_w" not in found
    fake.utilization, fake.power_draw = lambda device: 87, lambda device: 345_600
    assert (
        system_metrics(torch.device("cuda"))["system/gpu_use_percent"],
        system_metrics(torch.device("cuda"))["system/gpu_power_w"],
    ) == (87.0, 345.6)


def test_every_log_line_has_the_model_flops_utilisation(pipeline, tmp_path, monkeypatch, capsys):
    """MFU = tokens/s * FLOPs a token / peak; 6 N + 6 L D a layer a token of the blocks (PaLM appendix B; 9/12 of the last
    one is computed of the masked half alone), 3 V D of half the readout, to 2%."""
    monkeypatch.setattr(loop, "peak_flops", lambda device, precision: 1e9)
    line = f"pretrain --corpus {pipeline.corpus} --size tiny --num-steps 3 --batch-size 8 --warmup-steps 1 --precision float32 --device cpu --threads 1"
    assert call(f"{line} --output {tmp_path}/t/out") == 0
    points = [
        p["metrics"]
        for p in journal.read_journal(tmp_path / "t/out")[1]
        if "train/loss" in p["metrics"]
    ]
    blocks, width, length = 3, 128, 24
    vocabulary = train.Windows(pipeline.corpus, "train").vocab_size
    expected = (
        6 * (blocks * 12 - 9 / 2) * width**2
        + 12 * blocks * length * width
        + 6 * vocabulary * width / 2
    )
    assert len(points) == 3
    for point in points:
        assert (
            point["train/mfu"]
            == pytest.approx(point["train/tokens_per_s"] * expected / 1e9, rel=0.02)
            and point["system/memory_gb"] > 0
        )
    assert "| mfu " in capsys.readouterr().err

"""GPUs by name, and the speeds that prices assume."""

import pytest

from halfstep.gpus import FULL_WIDTH, GPUS, find_gpu, sustained


@pytest.mark.parametrize("name, key", [
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H100 PCIe", "h100 pcie"),
    ("nvidia_h100_nvl", "h100 nvl"),
    ("h200", "h200"),
    ("NVIDIA A100-SXM4-80GB", "a100"),
    ("NVIDIA GeForce RTX 4090", "4090"),
    ("Quadro", None),
    ("", None),
])  # fmt: skip
def test_names_of_devices_and_of_slurm(name, key):
    assert find_gpu(name) == key


@pytest.mark.parametrize("name", GPUS)
def test_a_speed_is_below_the_peak_and_grows_with_the_width(name):
    gpu = GPUS[name]
    for precision, peak in (("bfloat16", gpu.bfloat16), ("float32", gpu.float32)):
        speeds = [sustained(gpu, width, precision) for width in (128, 768, FULL_WIDTH, 4096)]
        assert speeds == sorted(speeds) and speeds[-1] == speeds[-2] < peak
    assert sustained(gpu, 128, "float32") <= sustained(gpu, 128, "bfloat16")


def test_the_paper_size_on_an_h100():
    """309,000 tokens/s of training 169M weights are expected, at 1.04 GFLOP a token: 23% of 989."""
    assert sustained(GPUS["h100"], 768, "bfloat16") / GPUS["h100"].bfloat16 == pytest.approx(
        0.23, abs=0.005
    )

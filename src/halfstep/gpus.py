"""GPUs: what their makers promise, and the share of it that networks reach."""

from typing import NamedTuple


class Gpu(NamedTuple):
    """Peaks of one GPU according to its maker."""

    bfloat16: float
    """dense FLOP/s; data sheets print the figure "with sparsity", which is twice this"""
    float32: float
    """FLOP/s outside of tensor cores"""
    bandwidth: float
    """bytes/s of its memory"""


# By a part of the device's name, which is also a part of its name in Slurm; the first match counts.
# Sources: NVIDIA's data sheets; HGX B200 divided by 8; of the A100 the 40 GB version's memory.
GPUS = {
    "b200":      Gpu(2250e12,  75e12,  7.7e12),
    "h200":      Gpu(989.5e12, 67e12,  4.8e12),
    "h100 pcie": Gpu(756e12,   51e12,  2.0e12),
    "h100 nvl":  Gpu(835e12,   60e12,  3.9e12),
    "h100":      Gpu(989.5e12, 67e12,  3.35e12),
    "a100":      Gpu(312e12,   19.5e12, 1.55e12),
    "l40s":      Gpu(362e12,   91.6e12, 0.86e12),
    "4090":      Gpu(165e12,   82.6e12, 1.0e12),
}  # fmt: skip

SUSTAINED = 0.4
"""Share of its peak in bfloat16 that a wide network reaches. Source: MPT on H100s reaches 40% with
width 1,536 and 38% to 46% above (llm-foundry's benchmarks, texts of 1,024 tokens)."""
FULL_WIDTH = 1344
"""Width from which on a network reaches SUSTAINED; below, the share falls with the width. At width
768 it is 23%, which is expected of this code and not measured."""
SUSTAINED_FLOAT32 = 0.6
"""Share of the peak in float32: products take most of the time, whatever the width (assumed)"""
SUSTAINED_BANDWIDTH = 0.4
"""Share of the memory's bandwidth that decoding reaches, step after step (assumed)"""


def sustained(gpu: Gpu, width: int, precision: str) -> float:
    """FLOP/s that a network of this width reaches in float32 or bfloat16."""
    half = gpu.bfloat16 * SUSTAINED * min(1.0, width / FULL_WIDTH)
    return half if precision == "bfloat16" else min(half, gpu.float32 * SUSTAINED_FLOAT32)


def find_gpu(name: str) -> str | None:
    """The key of GPUS for the name of a device, or of a model in Slurm (nvidia_h100_pcie)."""
    words = name.lower().replace("_", " ")
    return next((key for key in GPUS if key in words), None)

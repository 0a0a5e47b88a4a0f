"""Memory, power and use of the machine during training, for the journal."""

import psutil
import torch

from halfstep.gpus import GPUS, find_gpu


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of a device according to its maker.

    None if they are not known, or if the precision is not bfloat16.
    """
    if device.type != "cuda" or precision != "bfloat16":
        return None
    key = find_gpu(torch.cuda.get_device_name(device))
    return GPUS[key].bfloat16 if key else None


def system_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this process in GB; for a CUDA device also its use in percent and its power in W.

    The GPU's memory in GB is what torch holds there now, and the most that it has allocated.
    """
    found = {"system/memory_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type != "cuda":
        return found
    found["system/gpu_memory_gb"] = torch.cuda.memory_reserved(device) / 1e9
    found["system/gpu_peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    try:
        found["system/gpu_use_percent"] = float(torch.cuda.utilization(device))
        found["system/gpu_power_w"] = torch.cuda.power_draw(device) / 1e3
    except (ImportError, RuntimeError):  # NVML is not installed
        pass
    return found

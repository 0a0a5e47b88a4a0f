"""What the machine does while it trains, for the journal: of the GPU through NVML where there is one, of the process always."""

import os

import torch

PEAKS = {  # part of the device's name: dense bfloat16 FLOP/s, half of what the sheet says "with sparsity"; the first that fits holds
    "H100 PCIe": 756e12,  # NVIDIA H100 datasheet: 1,513 TFLOPS
    "H100 NVL": 835e12,  # 1,671 TFLOPS
    "H100": 989.5e12,  # SXM: 1,979 TFLOPS
    "H200": 989.5e12,  # NVIDIA H200 datasheet, SXM: 1,979 TFLOPS
    "A100": 312e12,  # NVIDIA A100 datasheet: 312 TFLOPS dense
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of a device by its maker; None where they are not known, or another precision than bfloat16 is asked for."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda" and precision == "bfloat16"
        else ""
    )
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def system_metrics(device: torch.device) -> dict[str, float]:
    """Memory of this process in GB; of a CUDA device its use in percent, power in W, and the memory that torch holds there and held at most, in GB."""
    with open("/proc/self/statm") as file:
        found = {"system/memory_gb": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9}
    if device.type != "cuda":
        return found
    found["system/gpu_memory_gb"] = torch.cuda.memory_reserved(device) / 1e9
    found["system/gpu_peak_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    try:
        found["system/gpu_use_percent"] = float(torch.cuda.utilization(device))
        found["system/gpu_power_w"] = torch.cuda.power_draw(device) / 1e3
    except (ImportError, RuntimeError):  # no NVML here
        pass
    return found

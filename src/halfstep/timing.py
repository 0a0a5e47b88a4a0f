"""Wall-clock times that can be compared: warm-up, synchronised devices, repeats taken in turns, medians with their spread."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, quartiles, and every repeat in the order taken; joules of a call, the mean, where the device counts them."""

    median_s: float
    low_s: float
    high_s: float
    all: tuple[float, ...]
    joules: float | None = None


def measure(
    fn: Callable[[], object], repeats: int, warmup: int = 1, device: str | torch.device = "cpu"
) -> Timing:
    """Time `repeats` calls of fn after `warmup` calls that do not count."""
    return measure_in_turns({"": fn}, repeats, warmup, device)[""]


def measure_in_turns(
    cases: dict,
    repeats: int,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    tick: Callable[[], None] | None = None,
) -> dict:
    """Time the functions of `cases` against one another: {name: fn} -> {name: Timing}.

    Each repeat calls every case once, and every second repeat in the opposite order, so that a machine that grows slower (heat, a
    neighbour) slows all of them. A CUDA device has finished all its work before the clock is read. `tick` is called after each call.
    """
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    counter, joules = energy_counter(device), dict.fromkeys(cases, 0.0)
    seconds: dict = {name: [] for name in cases}
    for repeat in range(-warmup, repeats):
        for name in list(cases)[:: -1 if repeat % 2 else 1]:
            wait()
            before = counter() if counter else 0.0
            start = time.perf_counter()
            cases[name]()
            wait()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
                joules[name] += counter() - before if counter else 0.0
            if tick:
                tick()
    quartiles = {name: np.quantile(values, [0.5, 0.25, 0.75]) for name, values in seconds.items()}
    energy = {name: joules[name] / repeats if counter else None for name in cases}
    return {
        name: Timing(*map(float, quartiles[name]), tuple(seconds[name]), energy[name])
        for name in cases
    }


def energy_counter(device: str | torch.device = "cpu") -> Callable[[], float] | None:
    """Joules that the device has used since its driver was loaded (NVML, which counts in steps of some 20 ms); None where nothing counts them."""
    if torch.device(device).type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        )
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:  # an older card, or a virtual one
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def device_name(device: str | torch.device = "cpu") -> str:
    """`NVIDIA H100 80GB HBM3`, or the processor's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.partition(":")[2].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """What a time was taken on."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return {
        "device": device_name(device), "cores": cores, "threads": torch.get_num_threads(), "system": platform.platform(),
        "python": platform.python_version(), "torch": metadata.version("torch"),
    }  # fmt: skip

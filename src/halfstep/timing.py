"""Comparable wall-clock times: warm-up, synchronized devices, cases in turns, intervals."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

FEWEST_FOR_QUARTILES = 8
"""Fewer values have no quartile that means something."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, interval, and all repeats in order.

    The interval from low_s to high_s is that of the quartiles. Of fewer than FEWEST_FOR_QUARTILES
    repeats it reaches from the shortest to the longest. `joules` is the mean energy of a call, on a
    device that measures it.
    """

    median_s: float
    low_s: float
    high_s: float
    all: tuple[float, ...]
    joules: float | None = None

    @property
    def bounds(self) -> str:
        """What low_s and high_s are: quartiles of 10, range of 3."""
        kind = "quartiles" if len(self.all) >= FEWEST_FOR_QUARTILES else "range"
        return f"{kind} of {len(self.all)}"


def measure(
    fn: Callable[[], object], repeats: int, warmup: int = 1, device: str | torch.device = "cpu"
) -> Timing:
    """Time `repeats` calls of fn after `warmup` untimed ones."""
    return measure_in_turns({"": fn}, repeats, warmup, device)[""]


def measure_in_turns(
    cases: dict,
    repeats: int,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    tick: Callable[[], None] | None = None,
) -> dict:
    """Time the functions of `cases` in turns: {name: fn} -> {name: Timing}.

    Each repeat calls every case once, every second repeat in reverse order. So a machine that slows
    down (heat, other jobs) slows all cases alike. A CUDA device is synchronized before the clock is
    read. `tick` is called after each call.
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
    timings = {}
    for name, values in seconds.items():
        ends = [0.25, 0.75] if len(values) >= FEWEST_FOR_QUARTILES else [0.0, 1.0]
        median, low, high = map(float, np.quantile(values, [0.5, *ends]))
        energy = joules[name] / repeats if counter else None
        timings[name] = Timing(median, low, high, tuple(values), energy)
    return timings


def energy_counter(device: str | torch.device = "cpu") -> Callable[[], float] | None:
    """A function that returns the joules used since the driver was loaded, or None without a meter.

    NVML updates its counter about every 20 ms.
    """
    if torch.device(device).type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        return None
    except pynvml.NVMLError:  # an older card, or a virtual one
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def device_name(device: str | torch.device = "cpu") -> str:
    """Name of the GPU (`NVIDIA H100 80GB HBM3`) or of the processor."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str | torch.device = "cpu") -> dict[str, str | int]:
    """The machine on which times are measured."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return {
        "device": device_name(device),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }

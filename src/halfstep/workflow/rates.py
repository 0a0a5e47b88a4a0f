"""How long work takes: on GPUs by the peaks of their makers, on CPUs as measured."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from halfstep.errors import HalfstepError
from halfstep.gpus import FULL_WIDTH, GPUS, SUSTAINED_BANDWIDTH, find_gpu, sustained

CPU_SPEED = 38e9
"""FLOP/s of one CPU thread in float32, of networks of any width: measured in the preset laptop"""


class Work(NamedTuple):
    """Work of one kind. Its parts follow one another, so that their times add up."""

    flops: float
    width: int
    """of the network, on which the speed of a GPU depends"""
    precision: str = "float32"
    """of the matrix products: float32 or bfloat16"""
    moved: float = 0.0
    """bytes of weights and caches that are read again and again, because steps wait for another"""
    host: float = 0.0
    """seconds that are not the device's, whatever it is"""

    def times(self, number: float) -> Work:
        """The same work `number` times."""
        return self._replace(
            flops=number * self.flops, moved=number * self.moved, host=number * self.host
        )


class Rates:
    """The speed of GPUs of one model, and of CPU threads."""

    def __init__(self, gpu: str = "h100", assumed: str = ""):
        self.gpu, self.assumed = gpu, assumed

    def seconds(self, work: Work, gpus: int, threads: int) -> float:
        """Seconds of work that `gpus` GPUs share without loss, or `threads` threads without a GPU.

        A GPU needs the longer of the times of its products and of its memory.
        """
        if not gpus:
            return work.flops / (CPU_SPEED * threads) + work.host
        gpu = GPUS[self.gpu]
        products = work.flops / sustained(gpu, work.width, work.precision)
        memory = work.moved / (SUSTAINED_BANDWIDTH * gpu.bandwidth)
        return max(products, memory) / gpus + work.host

    def described(self, on_gpus: bool) -> str:
        """The assumed speeds, for a user."""
        if not on_gpus:
            return f"{CPU_SPEED / 1e9:.0f} GFLOP/s on a CPU thread"
        half, single = (
            sustained(GPUS[self.gpu], FULL_WIDTH, precision) / 1e12
            for precision in ("bfloat16", "float32")
        )
        return (
            f"{self.gpu}{self.assumed} with {half:.0f} TFLOP/s in bfloat16, less below width "
            f"{FULL_WIDTH:,}, and {single:.0f} TFLOP/s in float32"
        )


def choose_rates(gpu: str | None, environment: Mapping[str, str] = os.environ) -> Rates:
    """The rates of the GPU that is asked for, or of the site's, or of an H100.

    Raises HalfstepError for a model that has none.
    """
    if gpu is not None:
        key = find_gpu(gpu)
        if key is None:
            raise HalfstepError(
                f"--gpu: found {gpu[:40]!r}, expected one of {', '.join(GPUS)}; "
                "name the one that is most like yours"
            )
        return Rates(key)
    site = environment.get("HALFSTEP_SLURM_GPU_MODEL", "")
    if key := find_gpu(site):
        return Rates(key)
    return Rates(assumed=" (assumed; --gpu names another)")

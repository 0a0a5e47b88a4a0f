"""The device of this rank, and the settings of its process: CPU threads and memory allocator."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import psutil
import torch

from halfstep.config import Device
from halfstep.distributed.environment import environment_number
from halfstep.errors import HalfstepError, reason


def prepare_process(machine: Device) -> None:
    """Set the threads of torch and the allocator of glibc; the command line calls this once.

    machine.threads is for all ranks of this machine; each rank gets an equal share of it. Without
    it torch keeps its own number. Sums depend on the number of threads to the last bits.
    """
    _keep_freed_memory()
    if machine.threads:
        ranks = environment_number("LOCAL_WORLD_SIZE", 1, least=1)
        torch.set_num_threads(max(1, machine.threads // ranks))


def find_device(machine: Device) -> torch.device:
    """The device that machine.device names; each rank has its own GPU.

    Raises HalfstepError if torch cannot use the device, or if there are fewer GPUs than ranks.
    """
    if machine.device == "auto":
        return local_gpu() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.empty(0, device=machine.device).device
    # An unknown name; a device that torch was not compiled for; a GPU that does not exist.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise HalfstepError(
            f"device: found {machine.device!r}, which torch cannot use ({reason(error)}); "
            "name cpu, or auto"
        ) from None
    return local_gpu() if machine.device == "cuda" else device


def local_gpu() -> torch.device:
    """This rank's GPU. Raises HalfstepError if this machine has fewer GPUs than ranks."""
    device = torch.device("cuda", environment_number("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if device.index >= gpus:
        ranks = environment_number("LOCAL_WORLD_SIZE", device.index + 1)
        raise HalfstepError(
            f"processes: found {ranks} on this machine, but torch sees {gpus} GPUs; "
            f"ask for at most {gpus} processes, or name --device cpu"
        )
    return device


def memory_of(device: torch.device) -> int:
    """Bytes of memory that this rank can have: of its GPU, or its share of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    ranks = environment_number("LOCAL_WORLD_SIZE", 1, least=1)
    return psutil.virtual_memory().total // ranks


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory instead of returning it to the system.

    Otherwise the pages of large tensors are mapped and faulted in again and again, which takes a
    fifth of a training step on a CPU.
    """
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD; glibc accepts no larger value

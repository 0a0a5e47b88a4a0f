"""The variables of torchrun and Slurm that number the processes of a job, checked before use."""

from __future__ import annotations

import os
import socket

from halfstep.errors import HalfstepError


def environment_number(name: str, default: int | None = None, least: int = 0) -> int:
    """The whole number in an environment variable.

    Raises HalfstepError for anything else, and for a missing variable without a default.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    plain = text.isascii() and text.isdecimal() and len(text) < 10
    if plain and int(text) >= least:
        return int(text)
    found = repr(text[:40]) if text else "no value"
    raise HalfstepError(
        f"{name}: found {found}, expected a whole number of at least {least}; "
        "set this environment variable to one, or unset all that the launcher should set"
    )


def world_size() -> int:
    """Number of processes of this job: torchrun's WORLD_SIZE (1)."""
    return environment_number("WORLD_SIZE", 1, least=1)


def own_rank() -> int:
    """Number of this process in its job: torchrun's RANK, which is below WORLD_SIZE."""
    rank, size = environment_number("RANK"), world_size()
    if rank >= size:
        raise HalfstepError(
            f"RANK: found {rank}, expected a number below WORLD_SIZE, which is {size}; "
            "let torchrun set both"
        )
    return rank


def check_first_address() -> None:
    """Check torchrun's MASTER_ADDR and MASTER_PORT, where rank 0 listens and all ranks meet."""
    port = environment_number("MASTER_PORT", least=1)
    address = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(address or None, port)
    except (OSError, OverflowError, UnicodeError):
        address = ""
    if not address or port >= 2**16:
        found = f"{os.environ.get('MASTER_ADDR', '')[:100]!r} and {port}"
        raise HalfstepError(
            f"MASTER_ADDR and MASTER_PORT: found {found}, expected an address that this machine "
            "can look up and a port below 65536; let torchrun set both"
        )

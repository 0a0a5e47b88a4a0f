"""How torchrun meets its processes on one machine: in memory and in a file, without a port."""

from __future__ import annotations

from typing import Any

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

ONE_MACHINE = "one-machine"  # the name of this rendezvous for torchrun


class OneMachine(RendezvousHandler):
    """torchrun's rendezvous of a single launcher, which has nobody to meet.

    torchrun's own one listens on all interfaces, and it keeps pickles. The processes do not use the
    address given here: they meet in the file that launch.MEETING names.
    """

    def __init__(self, run_id: str):
        self.run_id = run_id

    def get_backend(self) -> str:
        return ONE_MACHINE

    def next_rendezvous(self) -> RendezvousInfo:
        nowhere = RendezvousStoreInfo("localhost", 0)
        return RendezvousInfo(HashStore(), rank=0, world_size=1, bootstrap_store_info=nowhere)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> Any:
    return OneMachine(parameters.run_id)


def register_one_machine() -> None:
    """Make ONE_MACHINE known to torchrun."""
    rendezvous_handler_registry.register(ONE_MACHINE, _create)

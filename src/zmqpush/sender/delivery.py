"""Where the sender's payloads go: what plain and acknowledged delivery have in common."""

from typing import NamedTuple, Protocol

from zmqpush.core.records.encode import Payload
from zmqpush.runtime.shutdown import Ending


class Outcome(NamedTuple):
    """
    What became of the records of a run.

    Attributes:
        spooled: How many are left for the next run.
        failed: Whether their disk has failed.
        doubtful: How many of the delivered receivers may not have read, at most.

    """

    delivered: int
    dropped: int
    lost: int
    spooled: int = 0
    failed: bool = False
    doubtful: int = 0


class Outlet(Protocol):
    """Takes payloads and delivers them."""

    @property
    def progress(self) -> object:
        """What changes as long as records are delivered."""

    @property
    def waiting(self) -> int:
        """How many records wait to be delivered."""

    @property
    def statistics(self) -> str:
        """How many records were delivered, wait and were dropped."""

    def put(self, payload: Payload) -> None:
        """Take the next payload."""

    async def open(self, ending: Ending) -> None:
        """Get ready to take payloads; while there is no room on the disk, wait for it."""

    async def room(self) -> None:
        """Return once there is room to read on."""

    async def run(self) -> None:
        """Deliver, for ever."""

    async def drain(self) -> None:
        """Return once everything is delivered."""

    async def close(self, ending: Ending) -> Outcome:
        """End delivery, unless patience ends first; return what became of all records."""

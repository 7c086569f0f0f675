"""Where the sender's payloads go: what plain and acknowledged delivery have in common."""

from typing import NamedTuple, Protocol

from zmqpush.core.envelope import Payload
from zmqpush.endings import Ending


class Outcome(NamedTuple):
    """What became of the records of a run; ``spooled`` ones are for the next run."""

    delivered: int
    dropped: int
    lost: int
    spooled: int = 0


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

    async def room(self) -> None:
        """Return once there is room to read on."""

    async def run(self) -> None:
        """Deliver, for ever."""

    async def drain(self) -> None:
        """Return once everything is delivered."""

    async def close(self, ending: Ending) -> Outcome:
        """End delivery, unless patience ends first; return what became of all records."""

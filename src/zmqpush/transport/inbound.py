"""What sockets that receive messages have in common."""

from collections.abc import Iterator

from zmqpush.core.zmtp.frames import Body
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.inbox import Inbox
from zmqpush.transport.link import Link

# A turn ends after so many bytes.
_TURN_BYTES = 1 << 20


class InboundLink(Link):
    """
    A socket that keeps what comes until the program takes it.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        budget: How much all peers together may have us hold, in bytes, before some are paused.

    Raises:
        EndpointError: If an endpoint cannot be bound.

    """

    def __init__(self, endpoints: Endpoints, guard: Guard, budget: int) -> None:
        super().__init__(endpoints, guard)
        self._inbox = Inbox(budget, self._channels, guard.complaints)

    @property
    def appetite(self) -> int:
        """How much is read of a connection at once, in bytes."""
        return self._inbox.appetite

    def on_parts(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Keep parts until the program takes them."""
        self._inbox.put(channel, parts, size)
        if parts:
            self.wake()

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Note that a connection has ended; what it has brought stays."""
        self._inbox.forget(channel)
        super().on_closed(channel, why)

    def _review(self) -> None:
        super()._review()
        self._inbox.review(self._guard.admits)

    def _take_turn(self) -> Iterator[tuple[Channel, list[Body]]]:
        """Yield what is there, and of whom, a MiB of it or one message that is longer."""
        self._check_memory()
        size = 0
        while self._inbox and size < _TURN_BYTES:
            channel, parts, weight = self._inbox.take()
            size += weight
            yield channel, parts

    async def readable(self) -> None:
        """Return when a message may be there or the connections may have changed, or earlier."""
        if not self._inbox:
            await self._wait()

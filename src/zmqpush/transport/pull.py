"""A PULL socket: plain delivery, the receiver's end."""

from collections.abc import Iterator

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.frames import Body
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.guard import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.inbox import Inbox
from zmqpush.transport.link import Link

# The longest message that is taken, in bytes, and of how many parts. zmqpush makes no longer
# ones but of a line that is as long.
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_PARTS = 1 << 20
# A turn ends after so many bytes or frames.
_TURN_BYTES = 1 << 20
_TURN_FRAMES = 1 << 14


class PullSocket(Link):
    """
    A PULL socket.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        memory: How much all peers together may have us hold, in bytes.

    Raises:
        EndpointError: If an endpoint cannot be bound.

    """

    socket_type = SocketType.PULL

    def __init__(self, endpoints: Endpoints, guard: Guard, memory: int) -> None:
        self.limits = Limits(min(_MAX_MESSAGE_BYTES, memory), _MAX_PARTS, v2=True)
        super().__init__(endpoints, guard)
        self._inbox = Inbox(memory // 2, self._channels, guard.complaints)

    @property
    def appetite(self) -> int:
        """How much is read of a connection at once, in bytes."""
        return self._inbox.appetite

    def on_parts(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Keep parts for :meth:`receive`."""
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

    def receive(self, max_frames: int | None = None) -> list[bytes]:
        """Return frames that are there, a MiB of them or one that is longer; none if none are."""
        self._check_memory()
        frames: list[bytes] = []
        most = _TURN_FRAMES if max_frames is None else min(max_frames, _TURN_FRAMES)
        size = 0
        while self._inbox and size < _TURN_BYTES and len(frames) < most:
            channel, parts, weight = self._inbox.take()
            frames += parts  # type: ignore[arg-type]
            size += weight
            if len(frames) > most:
                self._inbox.put_back(channel, frames[most:])
                del frames[most:]
        return frames

    async def readable(self) -> None:
        """Return when a frame may be there, or earlier."""
        if not self._inbox:
            await self._wait()

    def read_all(self) -> bool:
        """Read what the kernel holds, some of it; whether there was something."""
        return sum(channel.read() for channel in list(self._channels)) > 0

    def drain(self) -> Iterator[list[bytes]]:
        """Yield the frames that are there until none is, and what the kernel holds now."""
        self.read_all()
        while frames := self.receive():
            yield frames

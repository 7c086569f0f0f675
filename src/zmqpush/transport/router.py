"""A ROUTER socket: acknowledged delivery, the receiver's end."""

from itertools import count

from zmqpush.core.frames import MAX_FRAME_BYTES
from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.errors import ZmtpError
from zmqpush.core.zmtp.frames import Body
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.guard import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.inbox import Inbox
from zmqpush.transport.link import Link

# A turn ends after so many bytes or frames.
_TURN_BYTES = 1 << 20
_TURN_FRAMES = 1 << 10
# A peer that does not read gets no more answers while so many bytes wait for it.
_MAX_UNSENT_BYTES = 64 << 10
_PEER_BYTES = 8


class RouterSocket(Link):
    """
    A ROUTER socket for senders that want acknowledgements: messages have one frame.

    Args:
        endpoints: Where to bind.
        guard: How to encrypt, and whom to admit.
        memory: How much all peers together may have us hold, in bytes.

    Raises:
        EndpointError: If an endpoint cannot be bound.

    Attributes:
        malformed: How many connections were closed since their peers broke ZMTP.

    """

    socket_type = SocketType.ROUTER
    limits = Limits(MAX_FRAME_BYTES, views=True)

    def __init__(self, endpoints: Endpoints, guard: Guard, memory: int) -> None:
        super().__init__(endpoints, guard)
        self._inbox = Inbox(memory // 2, self._channels, guard.complaints)
        # A peer's number is never another one's later, whatever identity it claims.
        self._numbers = count(1)
        self._peers: dict[bytes, Channel] = {}
        self._gone: list[Channel] = []
        self.malformed = 0

    def on_ready(self, channel: Channel) -> None:
        """Give the peer a number."""
        super().on_ready(channel)
        channel.number = next(self._numbers).to_bytes(_PEER_BYTES)
        self._peers[channel.number] = channel

    @property
    def appetite(self) -> int:
        """How much is read of a connection at once, in bytes."""
        return self._inbox.appetite

    def on_parts(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Keep frames for :meth:`receive`."""
        self._inbox.put(channel, parts, size)
        if parts:
            self.wake()

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Note that a connection has ended; what it has brought stays."""
        self._inbox.forget(channel)
        if self._peers.pop(channel.number, None):
            self._gone.append(channel)
            self.malformed += isinstance(why, ZmtpError)
        super().on_closed(channel, why)

    def _review(self) -> None:
        super()._review()
        self._inbox.review(self._guard.admits)

    def receive(self) -> list[tuple[bytes, Body, str]]:
        """Return peers, their frames and principals, those that are there, a MiB of them."""
        self._check_memory()
        messages: list[tuple[bytes, Body, str]] = []
        size = 0
        while self._inbox and size < _TURN_BYTES and len(messages) < _TURN_FRAMES:
            channel, frames, weight = self._inbox.take()
            messages += [(channel.number, frame, channel.principal) for frame in frames]
            size += weight
        return messages

    def take_gone(self) -> list[bytes]:
        """Return peers that have gone, and of which nothing is left to :meth:`receive`."""
        gone = [channel for channel in self._gone if not channel.waiting]
        if gone:
            self._gone = [channel for channel in self._gone if channel.waiting]
        return [channel.number for channel in gone]

    async def readable(self) -> None:
        """Return when a frame may be there, or earlier."""
        if not self._inbox:
            await self._wait()

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Send a frame to a peer; whether the peer is there. One that is behind gets none."""
        if (channel := self._peers.get(peer)) is None:
            return False
        if channel.unsent < _MAX_UNSENT_BYTES:
            channel.send(channel.connection.encode_messages((frame,)))
        return not channel.closed

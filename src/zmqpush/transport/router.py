"""A ROUTER socket: acknowledged delivery, the receiver's end."""

from itertools import count

from zmqpush.core.protocol.messages import MAX_FRAME_BYTES
from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.errors import ZmtpError
from zmqpush.core.zmtp.frames import Body
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.inbound import InboundLink

# A turn ends after so many frames.
_TURN_FRAMES = 1 << 10
# A peer that does not read gets no more answers while so many bytes wait for it.
_MAX_UNSENT_BYTES = 64 << 10
_PEER_BYTES = 8


class RouterSocket(InboundLink):
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
        super().__init__(endpoints, guard, memory // 2)
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

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Note that a connection has ended; what it has brought stays."""
        if self._peers.pop(channel.number, None):
            self._gone.append(channel)
            self.malformed += isinstance(why, ZmtpError)
        super().on_closed(channel, why)

    def receive(self) -> list[tuple[bytes, Body, str]]:
        """Return peers, their frames and principals, those that are there, a MiB of them."""
        messages: list[tuple[bytes, Body, str]] = []
        for channel, frames in self._take_turn():
            messages += [(channel.number, frame, channel.principal) for frame in frames]
            if len(messages) >= _TURN_FRAMES:
                break
        return messages

    def take_gone(self) -> list[bytes]:
        """Return peers that have gone, and of which nothing is left to :meth:`receive`."""
        gone = [channel for channel in self._gone if not channel.waiting]
        if gone:
            self._gone = [channel for channel in self._gone if channel.waiting]
        return [channel.number for channel in gone]

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Send a frame to a peer; whether the peer is there. One that is behind gets none."""
        if (channel := self._peers.get(peer)) is None:
            return False
        if channel.unsent < _MAX_UNSENT_BYTES:
            channel.send(channel.connection.encode_message(frame))
        return not channel.closed

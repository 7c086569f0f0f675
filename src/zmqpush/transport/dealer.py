"""A DEALER socket: acknowledged delivery, the sender's end."""

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.inbound import InboundLink
from zmqpush.transport.push import MAX_REPLY_BYTES

# How much answers may take that were not looked at, in bytes, and how many are in a turn.
_BUDGET = 4 << 20
_TURN_FRAMES = 1 << 10


class DealerSocket(InboundLink):
    """
    A DEALER socket: one sender's connection to one receiver that acknowledges.

    Args:
        endpoint: What to connect to.
        guard: How to encrypt.

    """

    socket_type = SocketType.DEALER
    limits = Limits(MAX_REPLY_BYTES)

    def __init__(self, endpoint: str, guard: Guard) -> None:
        super().__init__(Endpoints(connect=(endpoint,)), guard, _BUDGET)
        self._channel: Channel | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._channel is not None

    def on_ready(self, channel: Channel) -> None:
        """Note that there is a connection."""
        super().on_ready(channel)
        self._channel = channel
        self.wake()

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Note that there is no connection; what it has brought stays."""
        if channel is self._channel:
            self._channel = None
        super().on_closed(channel, why)

    def send(self, frame: bytes) -> bool:
        """Send a frame; whether there is a connection."""
        if self._channel:
            self._channel.send(self._channel.connection.encode_message(frame))
        return self.connected

    def receive(self) -> list[bytes]:
        """Return frames that are there, some at a time, however many there are."""
        frames: list[bytes] = []
        for _, parts in self._take_turn():
            frames += map(bytes, parts)
            if len(frames) >= _TURN_FRAMES:
                break
        return frames

    def discard(self, linger: float) -> None:
        """Close the connection; what is unsent may be sent for so many seconds."""
        self.stop()
        for channel in list(self._channels):
            channel.end()
            self._loop.call_later(linger, channel.close)

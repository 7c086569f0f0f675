"""A PULL socket: plain delivery, the receiver's end."""

from collections.abc import Iterator

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.inbound import InboundLink

# The longest message that is taken, in bytes, and of how many parts. zmqpush makes none of over
# 16 MiB, but of a line that is as long: that one must fit into the memory.
_MAX_MESSAGE_BYTES = 64 << 20
_MAX_BLOCK_BYTES = 17 << 20
_MAX_PARTS = 1 << 20
# A turn ends after so many frames.
_TURN_FRAMES = 1 << 14


class PullSocket(InboundLink):
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
        longest = max(_MAX_BLOCK_BYTES, min(_MAX_MESSAGE_BYTES, memory))
        self.limits = Limits(longest, _MAX_PARTS, v2=True)
        super().__init__(endpoints, guard, memory // 2)

    def receive(self, max_frames: int | None = None) -> list[bytes]:
        """Return frames that are there, a MiB of them or one that is longer; none if none are."""
        frames: list[bytes] = []
        most = _TURN_FRAMES if max_frames is None else min(max_frames, _TURN_FRAMES)
        for channel, parts in self._take_turn():
            frames += parts  # type: ignore[arg-type]
            if len(frames) >= most:
                if rest := frames[most:]:
                    self._inbox.put_back(channel, rest)
                    del frames[most:]
                break
        return frames

    def read_all(self) -> bool:
        """Read what the kernel holds, some of it; whether there was something."""
        return sum(channel.read() for channel in list(self._channels)) > 0

    def drain(self) -> Iterator[list[bytes]]:
        """Yield the frames that are there until none is, and what the kernel holds now."""
        self.read_all()
        while frames := self.receive():
            yield frames

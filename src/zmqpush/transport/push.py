"""A PUSH socket: plain delivery, the sender's end."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from zmqpush.core.records.encode import Payload
from zmqpush.core.records.framing import Framing, to_frames
from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.frames import Sealed, Unsealed
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import Channel
from zmqpush.transport.link import Link

# A receiver says little, or nothing.
MAX_REPLY_BYTES = 1 << 16
# Of so many blocks the size is remembered, to know what the kernel still had.
_BLOCKS_IN_DOUBT = 1024


@dataclass(slots=True)
class _Block:
    """Records that go to one receiver, in so many bytes."""

    frames: list[bytes]
    records: int
    size: int = 0


@dataclass(slots=True)
class _Peer:
    """
    A receiver.

    Attributes:
        block: What the kernel has not taken whole.
        sent: How many bytes and records the last blocks had.

    """

    block: _Block | None = None
    sent: deque[tuple[int, int]] = field(default_factory=lambda: deque(maxlen=_BLOCKS_IN_DOUBT))

    def records_in(self, size: int) -> int:
        """Return how many records may be in the last bytes that were sent."""
        records = 0
        for block_size, block_records in reversed(self.sent):
            if size <= 0:
                break
            size -= block_size
            records += block_records
        return records


class PushSocket(Link):
    """
    A PUSH socket: blocks go to the receivers in turn, to those that have room.

    A block is sent when the kernel has taken it. If the connection breaks before that, it is
    sent again, to any receiver, from the first message on that the kernel had not whole.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        framing: What a message carries.
        separator: What ends each record of a payload.

    Raises:
        EndpointError: If an endpoint cannot be bound.

    Attributes:
        accepted: How many records the kernel has taken, so far.
        unsent: How many it has not, of those that were given to :meth:`send`.
        doubtful: How many it had taken when connections broke, and receivers may not have.

    """

    socket_type = SocketType.PUSH
    limits = Limits(MAX_REPLY_BYTES, v2=True)

    def __init__(
        self, endpoints: Endpoints, guard: Guard, framing: Framing, separator: bytes
    ) -> None:
        super().__init__(endpoints, guard)
        self._framing = framing
        self._separator = separator
        self._peers: dict[Channel, _Peer] = {}
        self._idle: deque[Channel] = deque()
        self._returned: deque[_Block] = deque()
        self.accepted = self.unsent = self.doubtful = 0
        self._is_giving = False

    @property
    def has_room(self) -> bool:
        """Whether a receiver may take a block at once."""
        return bool(self._idle)

    @property
    def connected(self) -> bool:
        """Whether there is a receiver."""
        return bool(self._peers)

    @property
    def unread(self) -> int:
        """How many bytes the kernel holds that no receiver has taken yet."""
        return sum(channel.in_kernel for channel in self._peers)

    @property
    def untaken(self) -> int:
        """How many of the accepted records receivers that are connected have yet to take."""
        return sum(peer.records_in(channel.in_kernel) for channel, peer in self._peers.items())

    @property
    def unconfirmed(self) -> int:
        """How many of the accepted records they may not have read, at most."""
        return sum(peer.records_in(channel.unconfirmed) for channel, peer in self._peers.items())

    def send(self, payload: Payload) -> None:
        """Send a payload; there must be room."""
        block = _Block(to_frames(self._framing, payload.data, self._separator), payload.records)
        self.unsent += payload.records
        try:
            self._give(block)
        except MemoryError:  # the caller has it still
            self.unsent -= payload.records
            raise

    def _give(self, block: _Block) -> None:
        channel = self._idle.popleft()
        connection = channel.connection
        buffers: Sequence[Sealed | Unsealed]
        if len(block.frames) == 1:
            buffers = connection.encode_message(block.frames[0])
        elif self._framing is Framing.SINGLE:
            buffers = connection.encode_messages(block.frames)
        else:
            buffers = connection.encode_parts(block.frames)
        block.size = sum(map(len, buffers))
        peer = self._peers[channel]
        peer.block = block
        peer.sent.append((block.size, block.records))
        channel.send(buffers)
        if not channel.closed and not channel.unsent:
            self._finish(channel)

    def _finish(self, channel: Channel) -> None:
        peer = self._peers[channel]
        if peer.block:
            self._count(peer.block.records)
            peer.block = None
        self._idle.append(channel)

    def _count(self, records: int) -> None:
        self.accepted += records
        self.unsent -= records

    def _give_returned(self) -> None:
        if self._is_giving:  # to one that is broken, too: not each within the other
            return
        self._is_giving = True
        while self._returned and self._idle:
            self._give(self._returned.popleft())
        self._is_giving = False

    def on_ready(self, channel: Channel) -> None:
        """Send what was sent in vain; then there may be room."""
        super().on_ready(channel)
        self._peers[channel] = _Peer()
        self._idle.append(channel)
        self._give_returned()
        self.wake()

    def on_sent(self, channel: Channel) -> None:
        """Note that the kernel has taken a block."""
        if (peer := self._peers.get(channel)) and peer.block:  # and not a PONG only
            self._finish(channel)
            self._give_returned()
            self.wake()

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Take back what the kernel had not taken whole, and count what it had."""
        if peer := self._peers.pop(channel, None):
            if channel in self._idle:
                self._idle.remove(channel)
            if peer.block:
                peer.sent[-1] = self._take_back(channel, peer.block)
            if doubtful := peer.records_in(channel.left):
                self.doubtful += doubtful
                self._guard.complaints.warn(
                    f"the connection to {channel.peer} broke: of what was sent up to {doubtful} "
                    "records may be lost",
                    kind=f"broke {channel.endpoint}",
                )
            self._loop.call_soon(self._give_returned)  # others may end at the same time
        super().on_closed(channel, why)

    def _expel(self, channel: Channel) -> None:
        channel.close(reset=True)  # it gets nothing more, also not what the kernel has

    def _take_back(self, channel: Channel, block: _Block) -> tuple[int, int]:
        """Return how many bytes and whole records of a block the kernel had taken."""
        whole = 0
        taken = block.size - channel.unsent
        if self._framing is Framing.SINGLE:
            sizes = map(channel.connection.wire_size, map(len, block.frames))
            whole = sum(end <= taken for end in accumulate(sizes))
            self._count(whole)
        self._returned.append(_Block(block.frames[whole:], block.records - whole))
        return taken, whole

    async def changed(self) -> None:
        """Return when a receiver may have room, something was sent, or a connection ended."""
        await self._wait()

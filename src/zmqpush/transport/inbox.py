"""
What has come and waits for the program, and a bound to all that peers have us hold.

While what they have us hold is within the budget, a connection is paused only if the program
does not take what it brought. Beyond it those are paused that hold more than their share, and
the others go on. Once the program has taken all that is whole, one of the paused may finish
its message, whatever the budget, or is cut off if it does not go on.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Sequence

from zmqpush.core.zmtp.frames import PART_OVERHEAD, Body
from zmqpush.telemetry import Complaints
from zmqpush.transport.channel import Channel

# So much of one connection waits for the program, in bytes, before it is paused.
_CHANNEL_BYTES = 1 << 20
# How long the one that may finish its message may send nothing, in seconds.
_PATIENCE = 1.0


class Inbox:
    """
    Whole messages of many connections, in the order in which they came.

    Args:
        budget: How much all connections together may have us hold, in bytes.
        channels: The connections.
        complaints: Where to report who was cut off.

    """

    def __init__(self, budget: int, channels: Collection[Channel], complaints: Complaints) -> None:
        self._budget = budget
        self._channels = channels
        self._complaints = complaints
        self._entries: deque[tuple[Channel, list[Body], int]] = deque()
        self._held = 0
        self._paused: dict[Channel, None] = {}
        self._favoured: Channel | None = None  # goes on beyond the budget
        self._timer: asyncio.TimerHandle | None = None

    def __bool__(self) -> bool:
        return bool(self._entries)

    def put(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Take parts that a connection brought in so many bytes, none if they are not whole."""
        before = channel.waiting + channel.partial
        if parts:
            weight = size + channel.partial + PART_OVERHEAD * len(parts)
            channel.waiting += weight
            self._entries.append((channel, parts, weight))
        channel.partial = channel.connection.held
        self._held += channel.waiting + channel.partial - before
        if channel.waiting >= _CHANNEL_BYTES or self._is_over(channel):
            channel.pause()
            self._paused[channel] = None
            self._resume()
        elif parts and channel is self._favoured:
            self._favour(None)

    def take(self) -> tuple[Channel, list[Body], int]:
        """Return what came first, of whom, and its weight in bytes; there must be something."""
        channel, parts, weight = self._entries.popleft()
        channel.waiting -= weight
        self._held -= weight
        if self._paused:
            self._resume()
        return channel, parts, weight

    def put_back(self, channel: Channel, parts: Sequence[Body]) -> None:
        """Return some of what was taken last."""
        self._entries.appendleft((channel, list(parts), 0))

    def forget(self, channel: Channel, *, drop: bool = False) -> None:
        """Note that a connection has ended; with ``drop``, what it brought is not wanted."""
        self._held -= channel.partial
        channel.partial = 0
        self._paused.pop(channel, None)
        if drop:
            self._held -= channel.waiting
            self._entries = deque(entry for entry in self._entries if entry[0] is not channel)
        if channel is self._favoured:
            self._favour(None)
        self._resume()

    def _is_over(self, channel: Channel) -> bool:
        if self._held <= self._budget or channel is self._favoured:
            return False
        # Who has gone leaves what it brought, so there is a bound for those who hold little, too.
        share = self._budget // max(1, len(self._channels))
        return channel.waiting + channel.partial > share or self._held > 2 * self._budget

    def _resume(self) -> None:
        for channel in list(self._paused):
            if not self._entries and self._favoured is None and self._is_over(channel):
                self._favour(channel)
            if channel.waiting <= _CHANNEL_BYTES // 2 and not self._is_over(channel):
                del self._paused[channel]
                channel.resume()

    def _favour(self, channel: Channel | None) -> None:
        self._favoured = channel
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if channel:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_PATIENCE, self._check_progress, channel.received)

    def _check_progress(self, before: int) -> None:
        channel = self._favoured
        assert channel
        if channel.received != before:
            self._favour(channel)
            return
        self._complaints.warn(
            f"cut off {channel.peer}, which does not go on with a message: memory is short",
            kind=f"memory {channel.peer.rpartition(':')[0]}",
        )
        channel.close(reset=True)

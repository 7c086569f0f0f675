"""
What has come and waits for the program, and a bound to all that peers have us hold.

While what they have us hold is within the budget, a connection is paused only if the program
does not take what it brought. Beyond it less is read at once, those are paused that hold more
than their share, and the others go on. Once the program has taken all that is whole, those of
the paused may finish their messages that lack least, as many as there is memory for, one in any
case; who does not go on with it is cut off.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from zmqpush.core.zmtp.frames import PART_OVERHEAD, Body
from zmqpush.runtime.reporting import Complaints
from zmqpush.transport.channel import READ_BYTES, Channel

# So much of one connection waits for the program, in bytes, before it is paused.
_CHANNEL_BYTES = 1 << 20
# Beyond the budget so much is read at once of each at least, in bytes.
_LEAST_READ = 4 << 10
# So much who may finish a message may bring at least, if its end is not known, in bytes.
_LEAST_LOAN = 256 << 10
# So many bytes it has to bring in so many seconds, or all that it may.
_LEAST_PROGRESS = 256 << 10
_PATIENCE = 1.0


class _Loan(NamedTuple):
    """How much memory who may finish a message may take, of which so much is more than it had."""

    limit: int
    more: int
    timer: asyncio.TimerHandle


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
        self._paused: dict[Channel, float] = {}  # since when
        self._favoured: dict[Channel, _Loan] = {}  # go on beyond the budget
        self._lent = 0
        self._endless: dict[Channel, None] = {}  # had all that they might, and went on
        self._loop = asyncio.get_running_loop()
        self._will_resume = False

    def __bool__(self) -> bool:
        return bool(self._entries)

    @property
    def appetite(self) -> int:
        """How much to read of a connection at once, in bytes."""
        if self._held > 2 * self._budget:
            return _LEAST_READ
        if self._held > self._budget:
            return min(max(_LEAST_READ, self._share), READ_BYTES)
        return READ_BYTES

    @property
    def _share(self) -> int:
        return self._budget // max(1, len(self._channels))

    @property
    def _pressure(self) -> int:
        return (self._held - 1) // self._budget

    def put(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Take parts that a connection brought in so many bytes, none if they are not whole."""
        before = channel.waiting + channel.partial
        if parts:
            weight = size + channel.partial + PART_OVERHEAD * len(parts)
            channel.waiting += weight
            self._entries.append((channel, parts, weight))
        channel.partial = channel.connection.held
        self._held += channel.waiting + channel.partial - before
        if (loan := self._favoured.get(channel)) and (parts or channel.partial > loan.limit):
            self._end_loan(channel)
            if not parts:
                self._endless[channel] = None
        if parts:
            self._endless.pop(channel, None)
        if channel.waiting >= _CHANNEL_BYTES or self._is_over(channel):
            channel.pause()
            self._paused.setdefault(channel, time.monotonic())
            if not self._entries:
                self._resume_soon()

    def take(self) -> tuple[Channel, list[Body], int]:
        """Return what came first, of whom, and its weight in bytes; there must be something."""
        channel, parts, weight = self._entries.popleft()
        before = self._pressure
        channel.waiting -= weight
        self._held -= weight
        if self._paused:
            if not self._entries or self._pressure != before:
                self._resume()
            elif channel in self._paused:
                self._go_on(channel)
        return channel, parts, weight

    def put_back(self, channel: Channel, parts: Sequence[Body]) -> None:
        """Return some of what was taken last."""
        self._entries.appendleft((channel, list(parts), 0))

    def forget(self, channel: Channel) -> None:
        """Note that a connection has ended; what it brought stays."""
        self._held -= channel.partial
        channel.partial = 0
        self._paused.pop(channel, None)
        self._end_loan(channel)
        self._endless.pop(channel, None)
        self._resume_soon()

    def review(self, admits: Callable[[str], bool]) -> None:
        """Drop what those have brought who are not admitted any more."""
        entries, self._entries = self._entries, deque()
        for channel, parts, weight in entries:
            if admits(channel.principal):
                self._entries.append((channel, parts, weight))
            else:
                channel.waiting -= weight
                self._held -= weight
        self._resume_soon()

    def _is_over(self, channel: Channel) -> bool:
        if self._held <= self._budget or channel in self._favoured:
            return False
        held = channel.waiting + channel.partial
        if held > self._share:
            return True
        # Who has gone leaves what it brought, and shares get smaller: so there is a bound for
        # those who hold little, too. Who holds nothing may go on once all the rest are parts.
        return self._held > 2 * self._budget and (held > 0 or bool(self._entries))

    def _resume_soon(self) -> None:
        if self._paused and not self._will_resume:  # once, however many are paused or end
            self._will_resume = True
            self._loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._will_resume = False
        if not self._entries and self._held > self._budget:
            self._lend()
        for channel in list(self._paused):
            self._go_on(channel)

    def _lend(self) -> None:
        """Let those go on that lack least of a message; cut off who would not."""
        stuck = [it for it in self._paused if it.partial and self._is_over(it)]
        mute_since = time.monotonic() - _PATIENCE
        for channel in sorted(stuck, key=lambda it: it.connection.missing):
            if self._paused[channel] < mute_since and not channel.unread:
                self._loop.call_soon(self._cut_off, channel)
                continue
            more = max(channel.connection.missing, _LEAST_LOAN)
            limit = channel.partial + more
            if self._held + self._lent + more > 3 * self._budget:
                if self._endless:
                    largest = max(self._endless, key=lambda it: it.partial)
                    self._loop.call_soon(self._cut_off, largest)
                    break
                if self._favoured:
                    break
                limit = sys.maxsize  # it alone, to its end
            timer = self._loop.call_later(
                _PATIENCE, self._check_progress, channel, channel.received
            )
            self._favoured[channel] = _Loan(limit, more, timer)
            self._lent += more

    def _go_on(self, channel: Channel) -> None:
        if channel.waiting <= _CHANNEL_BYTES // 2 and not self._is_over(channel):
            del self._paused[channel]
            channel.resume()

    def _end_loan(self, channel: Channel) -> None:
        if loan := self._favoured.pop(channel, None):
            self._lent -= loan.more
            loan.timer.cancel()

    def _check_progress(self, channel: Channel, before: int) -> None:
        if channel.received - before < _LEAST_PROGRESS:
            self._cut_off(channel)
            return
        loan = self._favoured[channel]
        timer = self._loop.call_later(_PATIENCE, self._check_progress, channel, channel.received)
        self._favoured[channel] = loan._replace(timer=timer)

    def _cut_off(self, channel: Channel) -> None:
        if channel.closed:
            return
        self._complaints.warn(
            f"cut off {channel.peer}, which does not go on with a message: memory is short",
            kind=f"memory {channel.peer.rpartition(':')[0]}",
        )
        channel.close(reset=True)

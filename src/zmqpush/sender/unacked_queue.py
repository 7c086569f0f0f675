"""Bounded memory: what waits until it is acknowledged."""

import os
from collections import deque

from zmqpush.core.protocol.messages import DROPPED, MAX_CREDIT_BYTES, Data, Labels, Skip
from zmqpush.core.records.encode import Payload
from zmqpush.sender.queue import PAYLOAD_BYTES
from zmqpush.settings import WhenFull


class UnackedQueue:
    """
    Numbered blocks that stay until they are acknowledged: a ``core.protocol.sender.Store``.

    Args:
        max_bytes: As of :class:`zmqpush.sender.queue.Queue`.
        when_full: The same; ``drop-oldest`` spares what is in flight.
        labels: Of all records.

    Attributes:
        secret: What the name of the stream is made of, random.
        was: Empty: there was no version 1 of the stream.
        labels: Those of all records.
        recovered: 0, since there are no earlier runs.
        spooled: False: the stream ends with the process.
        acked: How many records were acknowledged, so far.
        records: How many records wait or are in flight.
        dropped: How many were dropped, so far.

    """

    def __init__(self, max_bytes: int, when_full: WhenFull, labels: Labels) -> None:
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._blocks: deque[Data | Skip] = deque()
        self._taken = 0  # so many of them are in flight
        self._next = 1
        self._bytes = 0
        self.spooled = False
        self.was = ""
        self.labels = labels
        self.rename_stream()
        self.recovered = self.acked = self.records = self.dropped = 0

    @property
    def first(self) -> int:
        """The lowest sequence number that is not acknowledged."""
        return self._blocks[0].first if self._blocks else self._next

    @property
    def full(self) -> bool:
        """Whether reading must wait for room."""
        return self._when_full is WhenFull.BLOCK and self._bytes >= self._max_bytes

    @property
    def ahead(self) -> bool:
        """Whether more than a receiver's credit waits, so that it leaves the cache."""
        return self._bytes >= 2 * MAX_CREDIT_BYTES

    def put(self, payload: Payload) -> None:
        """Append a payload as the next block, or drop as the policy says."""
        if self._when_full is not WhenFull.BLOCK:
            oldest = self._when_full is WhenFull.DROP_OLDEST
            while self._blocks and not self._has_room(payload) and oldest:
                oldest = self._drop_oldest()
            if self._bytes and not self._has_room(payload):
                self.dropped += payload.records
                return
        block = Data.of(self._next, payload.records, payload.data)
        self._next += payload.records
        self._blocks.append(block)
        self._bytes += len(payload.data) + PAYLOAD_BYTES
        self.records += payload.records

    def _has_room(self, payload: Payload) -> bool:
        return self._bytes + len(payload.data) + PAYLOAD_BYTES <= self._max_bytes

    def _drop_oldest(self) -> bool:
        # Skips may be anywhere behind what is in flight: those that were in flight in a
        # session that has ended, too. One takes the place of all before the next block.
        at = self._taken
        if at == len(self._blocks):
            return False
        first = last = self._blocks[at].first
        block: Data | Skip | None = None
        while at < len(self._blocks) and not isinstance(block, Data):
            block = self._blocks[at]
            last = block.end
            del self._blocks[at]
        self._blocks.insert(at, Skip(first, last - first + 1, DROPPED))
        if not isinstance(block, Data):
            return False
        self._remove(block)
        self.dropped += block.records
        return True

    def _remove(self, block: Data) -> None:
        self._bytes -= len(block.payload) + PAYLOAD_BYTES
        self.records -= block.records

    @property
    def next_labels(self) -> Labels | None:
        """What the records of the next block have in common; None if there is none."""
        return self.labels if self._taken < len(self._blocks) else None

    def take(self) -> Data | Skip | None:
        """Return the next block that is to be sent, and pass over it."""
        if self._taken == len(self._blocks):
            return None
        self._taken += 1
        return self._blocks[self._taken - 1]

    def rewind(self) -> None:
        """Begin again at the first block that is not acknowledged."""
        self._taken = 0

    def acknowledge(self, acked: int) -> None:
        """Forget every record up to sequence number ``acked``."""
        while self._blocks and self._blocks[0].end <= acked:
            block = self._blocks.popleft()
            self._taken = max(0, self._taken - 1)
            if isinstance(block, Data):
                self._remove(block)
                self.acked += block.records

    def rename_stream(self) -> None:
        """Give the stream a new secret, and so a new name."""
        self.secret = os.urandom(16).hex()

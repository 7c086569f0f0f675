"""Bounded memory: what waits while no receiver takes it."""

from collections import deque

from zmqpush.core.records.encode import Payload
from zmqpush.settings import WhenFull

# What a waiting payload costs beside its bytes, rounded up, so that a queue of many
# small payloads is bounded, too.
PAYLOAD_BYTES = 256


class Queue:
    """
    Payloads that wait to be sent, first in, first out.

    Args:
        max_bytes: Most bytes to hold, but always one payload. With ``block`` the last
            payload may go over it; the reader looks at :attr:`full` before it reads on.
        when_full: What happens to records when there is no room.

    Attributes:
        records: How many records wait.
        dropped: How many were dropped, so far.

    """

    def __init__(self, max_bytes: int, when_full: WhenFull) -> None:
        self._max_bytes = max_bytes
        self._when_full = when_full
        self._payloads: deque[Payload] = deque()
        self._bytes = 0
        self.records = 0
        self.dropped = 0

    def __bool__(self) -> bool:
        return bool(self._payloads)

    @property
    def full(self) -> bool:
        """Whether reading must wait for room."""
        return self._when_full is WhenFull.BLOCK and self._bytes >= self._max_bytes

    def put(self, payload: Payload) -> None:
        """Append a payload, or drop as the policy says."""
        if self._when_full is WhenFull.DROP_OLDEST:
            while self._payloads and not self._has_room(payload):
                self.dropped += self.get().records
        elif self._when_full is WhenFull.DROP_NEWEST and not self._has_room(payload):
            self.dropped += payload.records
            return
        self._payloads.append(payload)
        self._bytes += len(payload.data) + PAYLOAD_BYTES
        self.records += payload.records

    @property
    def first(self) -> Payload:
        """The oldest payload."""
        return self._payloads[0]

    def get(self) -> Payload:
        """Remove the oldest payload and return it."""
        payload = self._payloads.popleft()
        self._bytes -= len(payload.data) + PAYLOAD_BYTES
        self.records -= payload.records
        return payload

    def _has_room(self, payload: Payload) -> bool:
        after = self._bytes + len(payload.data) + PAYLOAD_BYTES
        return not self._payloads or after <= self._max_bytes

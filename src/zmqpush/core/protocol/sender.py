"""
Acknowledged delivery, the sender's end: a state machine, as ``docs/protocol.md`` says.

No sockets, files or clocks: frames and the time (monotonic, in seconds) come in as
arguments; frames and requests come out. :class:`Sender` reads its blocks from a
:class:`Store`, which a queue in memory and the spool both are.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

from zmqpush.core.protocol.messages import (
    MAX_CREDIT_BLOCKS,
    MAX_CREDIT_BYTES,
    MAX_SEQ,
    PING_INTERVAL,
    VERSION,
    Ack,
    Data,
    Error,
    Goodbye,
    Hello,
    Labels,
    Message,
    Ping,
    Reset,
    Skip,
    Welcome,
    decode,
    encode,
    public_name,
)
from zmqpush.errors import RemoteProtocolError

# With something in flight silence is suspicious much earlier; after so many signs of life
# that did not come the receiver is dead. Times are in seconds.
_IN_FLIGHT_PING_INTERVAL = 1.0
_DEAD_PINGS = 3
_HELLO_INTERVAL = 2.0
_REFUSED_DELAY = 30.0
# After one session in vain the next may begin at once. The one after that waits for so long
# since the last began, the next twice as long, and so on.
_FIRST_PAUSE, _MAX_PAUSE = 1.0, 10.0
_MAX_PING_INTERVAL = 3600.0
# How long sockets may go without an answer, at most.
_MAX_PATIENCE = 10.0
_HEX_SESSION = re.compile(r"[0-9a-f]{16}")


class Store(Protocol):
    """The numbered blocks of a sender, from when they are made until they are acknowledged."""

    @property
    def secret(self) -> str:
        """What the name of the stream is made of: 32 hexadecimal digits."""

    @property
    def was(self) -> str:
        """The name that the stream had under version 1; empty if it had none."""

    @property
    def labels(self) -> Labels:
        """What the records of this run have in common."""

    @property
    def next_labels(self) -> Labels | None:
        """What those of the next block have in common; None if no block may be sent."""

    @property
    def first(self) -> int:
        """The lowest sequence number that is not acknowledged."""

    @property
    def recovered(self) -> int:
        """The last sequence number of earlier runs."""

    @property
    def spooled(self) -> bool:
        """Whether the stream goes on after this process."""

    def take(self) -> Data | Skip | None:
        """Return the next block that may be sent, and pass over it; None if there is none."""

    def rewind(self) -> None:
        """Begin again at the first block that is not acknowledged."""

    def acknowledge(self, acked: int) -> None:
        """Forget every record up to sequence number ``acked``."""

    def rename_stream(self) -> None:
        """Give the stream a new secret, and so a new name; the records keep their numbers."""


class State(Enum):
    """What a sender waits for."""

    GREETING = auto()
    STREAMING = auto()


class Redial(NamedTuple):
    """
    A request: close the socket and connect to the next endpoint.

    Attributes:
        delay: How long not to come back to this one, in seconds.
        reason: Why.
        refused: Whether that is for people to know.

    """

    delay: float
    reason: str
    refused: bool = False


class Sender:
    """
    The sender's end.

    Args:
        store: Where the blocks are.
        run: What names this process: 32 hexadecimal digits.
        patience: How long the first socket may go without an answer, in seconds; each
            further one may twice as long as the one before.
        random: Returns a number from 0 to 1.

    """

    def __init__(
        self,
        store: Store,
        run: str,
        patience: float = 8.0,
        random: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self._store = store
        self._run = run
        self._labels = store.labels  # as the last HELLO said
        self._random = random
        self._state = State.GREETING
        self._session = 0
        self._in_flight: deque[tuple[int, int]] = deque()  # last number, bytes
        self._in_flight_bytes = 0
        self._sent = 0  # the last number that this run has ever sent
        self._credit = (0, 0)
        self._ping_interval = PING_INTERVAL
        self._first_patience = self._patience = patience
        self._heard = self._pinged = self._hello_at = self._give_up_at = 0.0
        self._unanswered = 0  # HELLOs on this socket
        # How often one was answered since something was acknowledged, and when last: a
        # receiver that begins and ends sessions, or streams, must not keep us busy.
        self._in_vain = 0
        self._answered = 0.0
        self._paused_until = 0.0

    @property
    def streaming(self) -> bool:
        """Whether there is a session."""
        return self._state is State.STREAMING

    def connect(self, now: float) -> None:
        """Begin on a new socket."""
        self._unanswered = 0
        self._greet(now)
        self._wait_from(now)
        self._patience = min(2 * self._patience, _MAX_PATIENCE)

    def disconnected(self, now: float) -> None:
        """Note that the socket has no connection now; it will make one by itself."""
        if self._state is State.STREAMING:
            self._greet(now + self._pause(now))
        self._hello_at = max(self._paused_until, min(self._hello_at, now))

    def _note_answer(self, now: float) -> None:
        self._in_vain += 1
        self._answered = now

    def _pause(self, now: float) -> float:
        """Return how long to wait before the next HELLO, once a session has ended."""
        if self._in_vain < 2:
            return 0.0
        pause = min(_FIRST_PAUSE * 2.0 ** min(self._in_vain - 2, 9), _MAX_PAUSE)
        return max(0.0, self._answered + pause * (1 + self._random() / 2) - now)

    def _wait_from(self, now: float) -> None:
        self._give_up_at = now + self._patience * (1 + self._random() / 2)

    def _greet(self, hello_at: float) -> None:
        if self._state is State.STREAMING:
            self._wait_from(hello_at)
        self._state = State.GREETING
        self._session = 0
        self._hello_at = self._paused_until = hello_at
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._store.rewind()

    def deadline(self, now: float) -> float:
        """Return when to call :meth:`tick` and :meth:`next_frame` at the latest."""
        if self._state is State.GREETING:
            hello_at = self._hello_at if self._hello_at > now else math.inf
            return min(hello_at, self._give_up_at)
        return min(self._ping_at(), self._heard + _DEAD_PINGS * self._ping_interval)

    def _ping_at(self) -> float:
        interval = self._ping_interval
        if self._in_flight:
            interval = min(interval, _IN_FLIGHT_PING_INTERVAL)
        return max(self._heard, self._pinged) + interval

    def tick(self, now: float) -> Redial | None:
        """Return what is to be done because nothing has been heard for long."""
        if self._state is State.GREETING:
            return Redial(0, "no answer") if now >= self._give_up_at else None
        if now >= self._heard + _DEAD_PINGS * self._ping_interval:
            return Redial(0, "no sign of life")
        return None

    def next_frame(self, now: float) -> bytes | None:
        """Return what to send next, if there is anything; it counts as sent."""
        if self._state is State.GREETING:
            if now < self._hello_at:
                return None
            self._hello_at = now + _HELLO_INTERVAL
            self._unanswered += 1
            return self._hello()
        if now >= self._ping_at():
            self._pinged = now
            last, _ = self._in_flight[-1] if self._in_flight else (0, 0)
            return encode(Ping(last), self._session)
        blocks, size = self._credit
        if len(self._in_flight) >= blocks or self._in_flight_bytes >= size:
            return None
        if (labels := self._store.next_labels) is None:
            return None
        if labels != self._labels:
            if self._in_flight:
                return None
            self._greet(now)
            return self.next_frame(now)
        if (entry := self._store.take()) is None:
            return None
        if not self._in_flight:
            self._pinged = now  # from now on silence is suspicious
        entry_bytes = len(entry.payload) if isinstance(entry, Data) else 0
        self._in_flight.append((entry.end, entry_bytes))
        self._in_flight_bytes += entry_bytes
        self._sent = max(self._sent, entry.end)
        return encode(entry, self._session)

    def _hello(self) -> bytes:
        store = self._store
        self._labels = store.next_labels or store.labels
        values = {
            "versions": [VERSION, VERSION],
            "secret": store.secret,
            "run": self._run,
            "first": store.first,
            "spooled": store.spooled,
            **self._labels._asdict(),
        }
        return encode(Hello(values | ({"was": store.was} if store.was else {})), 0)

    def goodbye(self) -> bytes | None:
        """Return the last frame of a session, if there is one."""
        return encode(Goodbye(), self._session) if self.streaming else None

    def receive(self, frame: bytes, now: float) -> Redial | None:
        """Take a frame from the receiver; return what is to be done, if anything."""
        try:
            message, session = decode(frame)
        except RemoteProtocolError:
            return None
        if session != self._session and not isinstance(message, Welcome):
            return None  # of a session that has ended, or never began
        handle = self._TRANSITIONS.get((self._state, type(message)))
        if handle is None:
            return None
        self._heard = now
        return handle(self, message, now)

    def _on_welcome(self, message: Message, now: float) -> None:
        assert isinstance(message, Welcome)
        if (welcome := _read_welcome(message.values)) is None:
            return
        named = welcome.stream, welcome.labels
        if named != (public_name(self._store.secret), self._labels) or not self._unanswered:
            return  # that answers a HELLO from before the stream got a new name, others, or none
        self._unanswered -= 1
        self._note_answer(now)
        ours = max(self._store.recovered, self._sent if welcome.run == self._run else 0)
        if welcome.acked > ours:
            # Somebody else gave these numbers to other records.
            self._store.rename_stream()
            self._greet(now + self._pause(now))
            return
        self._session = welcome.session
        self._take_credit(*welcome.credit)
        self._ping_interval = welcome.ping
        self._state = State.STREAMING
        self._patience = self._first_patience
        self._pinged = now
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._acknowledge(welcome.acked)
        self._store.rewind()

    def _on_ack(self, message: Message, now: float) -> None:
        assert isinstance(message, Ack)
        self._take_credit(message.credit_blocks, message.credit_bytes)
        acked = 0
        while self._in_flight and self._in_flight[0][0] <= message.acked:
            acked, size = self._in_flight.popleft()
            self._in_flight_bytes -= size
        if acked:
            self._acknowledge(acked)

    def _acknowledge(self, acked: int) -> None:
        before = self._store.first
        self._store.acknowledge(acked)
        if self._store.first > before:
            self._in_vain = 0

    def _take_credit(self, blocks: int, size: int) -> None:
        # No more than the link has room for, whatever the receiver says.
        self._credit = (min(blocks, MAX_CREDIT_BLOCKS), min(size, MAX_CREDIT_BYTES))

    def _on_reset(self, message: Message, now: float) -> None:
        if self._state is State.GREETING:
            self._note_answer(now)
        self._greet(now + self._pause(now))

    def _on_goodbye(self, message: Message, now: float) -> Redial:
        return Redial(self._pause(now), "it ends")

    def _on_error(self, message: Message, now: float) -> Redial:
        assert isinstance(message, Error)
        reason = f"it refuses: {message.text} ({message.code})"
        if message.code == 505:
            reason += f"; this sender speaks version {VERSION}: upgrade the older one"
        return Redial(_REFUSED_DELAY, reason, refused=True)

    _TRANSITIONS: Mapping[tuple[State, type], Callable[["Sender", Any, float], Redial | None]] = {
        (State.GREETING, Welcome): _on_welcome,
        (State.GREETING, Reset): _on_reset,
        (State.GREETING, Error): _on_error,
        (State.STREAMING, Welcome): _on_welcome,  # a second HELLO was answered, too
        (State.STREAMING, Ack): _on_ack,
        (State.STREAMING, Reset): _on_reset,
        (State.STREAMING, Goodbye): _on_goodbye,
        (State.STREAMING, Error): _on_error,
    }


class _WelcomeValues(NamedTuple):
    stream: str
    labels: Labels
    session: int
    acked: int
    run: str
    credit: tuple[int, int]
    ping: float


def _read_welcome(values: Mapping[str, Any]) -> _WelcomeValues | None:
    try:
        session = int(values["session"], 16) if _HEX_SESSION.fullmatch(values["session"]) else 0
        stream, run = (values[key] for key in ("stream", "run"))
        labels = Labels(*(values[key] for key in Labels._fields))
        acked, blocks, size = (values[key] for key in ("acked", "blocks", "bytes"))
        ping = values["ping"]
        named = all(isinstance(name, str) for name in (stream, run))
        counted = all(type(n) is int and 0 <= n <= MAX_SEQ for n in (acked, blocks, size))
        timed = type(ping) in (int, float) and 1 <= ping <= _MAX_PING_INTERVAL
        if session and named and counted and timed and values["version"] == VERSION:
            credit = (blocks, size)
            return _WelcomeValues(stream, labels, session, acked, run, credit, float(ping))
    except (KeyError, TypeError):
        pass
    return None

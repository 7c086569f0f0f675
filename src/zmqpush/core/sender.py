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

from zmqpush.core.frames import (
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
    Message,
    Ping,
    Reset,
    Skip,
    Welcome,
    decode,
    encode,
)
from zmqpush.errors import RemoteProtocolError

# With something in flight silence is suspicious much earlier; after so many signs of life
# that did not come the receiver is dead. Times are in seconds.
_IN_FLIGHT_PING_INTERVAL = 1.0
_DEAD_PINGS = 3
_HELLO_INTERVAL = 2.0
_RESET_INTERVAL = 1.0
_REFUSED_DELAY = 30.0
_MAX_PING_INTERVAL = 3600.0
# How long sockets may go without an answer, at most.
_MAX_PATIENCE = 10.0
_HEX_SESSION = re.compile(r"[0-9a-f]{16}")


class Store(Protocol):
    """The numbered blocks of a sender, from when they are made until they are acknowledged."""

    @property
    def stream(self) -> str:
        """The name of the stream: 32 hexadecimal digits."""

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
        """Give the stream a new name; the records keep their numbers."""


class State(Enum):
    """What a sender waits for."""

    GREETING = auto()
    STREAMING = auto()


class Redial(NamedTuple):
    """A request: close the socket and connect to the next endpoint after ``delay`` seconds."""

    delay: float
    reason: str


class Sender:
    """
    The sender's end.

    Args:
        store: Where the blocks are.
        run: What names this process: 32 hexadecimal digits.
        labels: ``type`` and ``host`` of the records, and whether they are ``raw``.
        patience: How long the first socket may go without an answer, in seconds; each
            further one may twice as long as the one before.
        random: Returns a number from 0 to 1.

    """

    def __init__(
        self,
        store: Store,
        run: str,
        labels: Mapping[str, str | bool],
        patience: float = 8.0,
        random: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self._store = store
        self._run = run
        self._labels = labels
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
        self._last_reset = -math.inf

    @property
    def streaming(self) -> bool:
        """Whether there is a session."""
        return self._state is State.STREAMING

    def connect(self, now: float) -> None:
        """Begin on a new socket."""
        self._greet(now)
        self._wait_from(now)
        self._patience = min(2 * self._patience, _MAX_PATIENCE)

    def disconnected(self, now: float) -> None:
        """Note that the socket has no connection now; it will make one by itself."""
        if self._state is State.STREAMING:
            self._greet(now)
        self._hello_at = min(self._hello_at, now)

    def _wait_from(self, now: float) -> None:
        self._give_up_at = now + self._patience * (1 + self._random() / 2)

    def _greet(self, hello_at: float) -> None:
        if self._state is State.STREAMING:
            self._wait_from(hello_at)
        self._state = State.GREETING
        self._session = 0
        self._hello_at = hello_at
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
            values = {
                "versions": [VERSION, VERSION],
                "stream": self._store.stream,
                "run": self._run,
                "first": self._store.first,
                "spooled": self._store.spooled,
            }
            return encode(Hello({**values, **self._labels}), 0)
        if now >= self._ping_at():
            self._pinged = now
            last, _ = self._in_flight[-1] if self._in_flight else (0, 0)
            return encode(Ping(last), self._session)
        blocks, size = self._credit
        if len(self._in_flight) >= blocks or self._in_flight_bytes >= size:
            return None
        if (entry := self._store.take()) is None:
            return None
        if not self._in_flight:
            self._pinged = now  # from now on silence is suspicious
        entry_bytes = len(entry.payload) if isinstance(entry, Data) else 0
        self._in_flight.append((entry.end, entry_bytes))
        self._in_flight_bytes += entry_bytes
        self._sent = max(self._sent, entry.end)
        return encode(entry, self._session)

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
        if welcome.stream != self._store.stream:
            return  # that answers a HELLO from before the stream got a new name
        ours = max(self._store.recovered, self._sent if welcome.run == self._run else 0)
        if welcome.acked > ours:
            # Somebody else gave these numbers to other records.
            self._store.rename_stream()
            self._start_over(now)
            return
        self._session = welcome.session
        self._take_credit(*welcome.credit)
        self._ping_interval = welcome.ping
        self._state = State.STREAMING
        self._patience = self._first_patience
        self._pinged = now
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._store.acknowledge(welcome.acked)
        self._store.rewind()

    def _on_ack(self, message: Message, now: float) -> None:
        assert isinstance(message, Ack)
        self._take_credit(message.credit_blocks, message.credit_bytes)
        acked = 0
        while self._in_flight and self._in_flight[0][0] <= message.acked:
            acked, size = self._in_flight.popleft()
            self._in_flight_bytes -= size
        if acked:
            self._store.acknowledge(acked)

    def _take_credit(self, blocks: int, size: int) -> None:
        # No more than the link has room for, whatever the receiver says.
        self._credit = (min(blocks, MAX_CREDIT_BLOCKS), min(size, MAX_CREDIT_BYTES))

    def _on_reset(self, message: Message, now: float) -> None:
        self._start_over(now)

    def _start_over(self, now: float) -> None:
        soon = now - self._last_reset < _RESET_INTERVAL
        self._last_reset = now
        self._greet(now + _RESET_INTERVAL if soon else now)

    def _on_goodbye(self, message: Message, now: float) -> Redial:
        return Redial(0, "it ends")

    def _on_error(self, message: Message, now: float) -> Redial:
        assert isinstance(message, Error)
        return Redial(_REFUSED_DELAY, f"it refuses: {message.text} ({message.code})")

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
    session: int
    acked: int
    run: str
    credit: tuple[int, int]
    ping: float


def _read_welcome(values: Mapping[str, Any]) -> _WelcomeValues | None:
    try:
        session = int(values["session"], 16) if _HEX_SESSION.fullmatch(values["session"]) else 0
        stream, run = (values[key] for key in ("stream", "run"))
        acked, blocks, size = (values[key] for key in ("acked", "blocks", "bytes"))
        ping = values["ping"]
        named = all(isinstance(name, str) for name in (stream, run))
        counted = all(type(n) is int and 0 <= n <= MAX_SEQ for n in (acked, blocks, size))
        timed = type(ping) in (int, float) and 1 <= ping <= _MAX_PING_INTERVAL
        if session and named and counted and timed and values["version"] == VERSION:
            return _WelcomeValues(stream, session, acked, run, (blocks, size), float(ping))
    except (KeyError, TypeError):
        pass
    return None

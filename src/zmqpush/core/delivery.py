"""
Acknowledged delivery: the state machines of both ends, as ``docs/protocol.md`` says.

No sockets, files or clocks: frames and the time (monotonic, in seconds) come in as
arguments; frames and requests come out. :class:`Sender` reads its blocks from a
:class:`Store`, which a queue in memory and the spool both are.
"""

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple, Protocol

from zmqpush.core.frames import (
    MAX_SEQ,
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

# After so many seconds of silence a sender asks for a sign of life; after three times as
# many the receiver is dead, after six times as many the sender is.
_PING_INTERVAL = 5.0
_DEAD_PINGS = 3
_EXPIRED_PINGS = 6
# With something in flight silence is suspicious much earlier.
_IN_FLIGHT_PING_INTERVAL = 1.0
_HELLO_INTERVAL = 2.0
_RESET_INTERVAL = 1.0
_REFUSED_DELAY = 30.0
_MAX_PING_INTERVAL = 3600.0
# How long sockets may go without an answer, at most.
_MAX_PATIENCE = 10.0
# The credit of a session: in blocks what a link's high-water marks allow, in bytes what
# a disk that syncs within some milliseconds needs to be busy.
MAX_CREDIT_BLOCKS = 256
_MAX_CREDIT_BYTES = 8 << 20
# A stream that has been quiet for so long is forgotten, in seconds.
_QUIET_TIMEOUT = 30 * 86400.0
_MAX_LABEL = 256
_HEX_ID = re.compile(r"[0-9a-f]{32}")
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
        labels: ``type`` and ``host`` of the records.
        patience: How long the first socket may go without an answer, in seconds; each
            further one may twice as long as the one before.
        random: Returns a number from 0 to 1.

    """

    def __init__(
        self,
        store: Store,
        run: str,
        labels: Mapping[str, str],
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
        self._ping_interval = _PING_INTERVAL
        self._first_patience = self._patience = patience
        self._heard = self._pinged = self._hello_at = self._give_up_at = 0.0
        self._last_reset = -math.inf

    @property
    def streaming(self) -> bool:
        """Whether there is a session."""
        return self._state is State.STREAMING

    @property
    def out_of_credit(self) -> bool:
        """Whether only an ack can make room for the next block."""
        blocks, size = self._credit
        too_much = len(self._in_flight) >= blocks or self._in_flight_bytes >= size
        return self.streaming and too_much

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
        if self.out_of_credit or (entry := self._store.take()) is None:
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
        self._credit = (min(blocks, MAX_CREDIT_BLOCKS), min(size, _MAX_CREDIT_BYTES))

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


class Floor(NamedTuple):
    """What a receiver remembers of a stream: how much it holds, and which run sent the last."""

    acked: int
    run: str


# The principal (``anonymous`` without CURVE) and the name of a stream.
Key = tuple[str, str]


class Arrival(NamedTuple):
    """A block for the sink, and the labels of its sender."""

    labels: Mapping[str, str]
    block: Data


class Progress(NamedTuple):
    """How far a stream was accepted when :meth:`Receiver.take_accepted` was called."""

    key: Key
    floor: Floor
    blocks: int
    size: int


@dataclass(slots=True)
class _Stream:
    key: Key
    floor: int = 0
    run: str = ""
    end: int = 0  # accepted up to here
    # How much was ever accepted and not yet committed.
    blocks: int = 0
    size: int = 0  # in bytes
    held: bool = False  # the sink got something of it, now or before
    over: bool = False  # its sender has ended it
    # Since when it has had no session and has not moved; None: look at the next tick.
    quiet_since: float | None = None
    session: "_Session | None" = None
    # A sender that waits until all that was accepted is committed.
    waiting: "tuple[bytes, _HelloValues] | None" = None


class _HelloValues(NamedTuple):
    stream: str
    run: str
    first: int
    spooled: bool
    labels: Mapping[str, str]


@dataclass(slots=True)
class _Session:
    token: int
    peer: bytes
    stream: _Stream
    run: str
    spooled: bool
    labels: Mapping[str, str]
    heard: float
    granted: int = 0  # bytes, now
    max_granted: int = 0  # bytes, ever
    ack_due: bool = False


@dataclass(slots=True)
class Counters:
    """What a receiver has seen, in records or frames."""

    accepted: int = 0
    duplicates: int = 0
    skipped: int = 0
    missing: int = 0  # passed over because this receiver's memory is older than the sender's
    resets: int = 0
    malformed: int = 0


class Receiver:
    """
    The receiver's end.

    Args:
        floors: What earlier runs remember.
        memory: The budget of all sessions' credit, in bytes.
        durability: What an ack means: ``disk`` or ``sink``.
        tokens: Returns a random number from 1 to 2^64 - 1.

    """

    def __init__(
        self,
        floors: Mapping[Key, Floor],
        memory: int,
        durability: str,
        tokens: Callable[[], int],
    ) -> None:
        self._streams = {
            key: _Stream(key, floor.acked, floor.run, floor.acked, held=True)
            for key, floor in floors.items()
        }
        self._memory = memory
        self._durability = durability
        self._tokens = tokens
        self._sessions: dict[int, _Session] = {}
        self._peers: dict[bytes, _Session] = {}
        self._granted = 0
        self._accepted: dict[Key, _Stream] = {}  # since take_accepted()
        self._forgotten: list[Key] = []
        self._ack_due: list[_Session] = []
        self._replies: list[tuple[bytes, bytes]] = []
        self._now = 0.0
        self._stopped = False
        self.counters = Counters()

    @property
    def sessions(self) -> int:
        """How many senders there are."""
        return len(self._sessions)

    def receive(
        self, peer: bytes, frame: bytes, now: float, principal: str = "anonymous"
    ) -> Arrival | None:
        """
        Take a frame from a sender.

        Args:
            peer: Where the answer goes.
            frame: What came.
            now: When, in seconds.
            principal: Who sent it.

        Returns:
            A block for the sink, if the frame holds one that is not there yet.

        """
        self._now = now
        try:
            message, token = decode(frame)
        except RemoteProtocolError as exc:
            self.counters.malformed += 1
            if exc.code == 505:
                self._reply(peer, Error(505, str(exc)), exc.session)
            elif session := self._session_of(peer, exc.session):
                self._reset(session, exc.code, str(exc))
            return None
        if self._stopped and not isinstance(message, Goodbye):
            return None
        if isinstance(message, Hello):
            self._on_hello(peer, message, principal)
            return None
        handle = self._HANDLERS.get(type(message))
        if handle is None:
            self.counters.malformed += 1
            return None
        session = self._session_of(peer, token)
        if session is None:
            if not isinstance(message, Goodbye):
                self.counters.resets += 1
                self._reply(peer, Reset(404, "this session has ended"), token)
            return None
        session.heard = now
        return handle(self, session, message)

    def _session_of(self, peer: bytes, token: int) -> _Session | None:
        session = self._sessions.get(token)
        return session if session and session.peer == peer else None

    def _on_hello(self, peer: bytes, message: Hello, principal: str) -> None:
        versions, hello = _read_hello(message.values)
        if versions and not versions[0] <= VERSION <= versions[1]:
            self._reply(peer, Error(505, f"this receiver speaks version {VERSION}"), 0)
        elif hello is None:
            self.counters.malformed += 1
        else:
            key = (principal, hello.stream)
            if (older := self._streams.get(key)) and older.session:
                self._end(older.session)
            stream = self._streams.setdefault(key, _Stream(key))
            stream.over = False
            if stream.floor < stream.end:
                stream.waiting = (peer, hello)
            else:
                self._welcome(stream, peer, hello)

    def _welcome(self, stream: _Stream, peer: bytes, hello: _HelloValues) -> None:
        if stream.floor < hello.first - 1:
            self.counters.missing += hello.first - 1 - stream.floor if stream.floor else 0
            stream.floor = stream.end = hello.first - 1
            stream.run = hello.run
        session = _Session(
            self._tokens(), peer, stream, hello.run, hello.spooled, hello.labels, self._now
        )
        self.forget(peer)
        self._sessions[session.token] = self._peers[peer] = stream.session = session
        values = {
            "version": VERSION,
            "stream": hello.stream,
            "session": f"{session.token:016x}",
            "acked": stream.floor,
            "run": stream.run,
            "blocks": MAX_CREDIT_BLOCKS,
            "bytes": self._grant(session),
            "ping": _PING_INTERVAL,
            "durability": self._durability,
        }
        self._reply(peer, Welcome(values), session.token)

    def _grant(self, session: _Session) -> int:
        share = min(_MAX_CREDIT_BYTES, self._memory // len(self._sessions))
        free = self._memory - (self._granted - session.granted)
        granted = max(1, min(share, free))
        self._granted += granted - session.granted
        session.granted = granted
        session.max_granted = max(session.max_granted, granted)
        return granted

    def _on_data(self, session: _Session, data: Data) -> Arrival | None:
        stream = session.stream
        if data.end <= stream.end:
            self.counters.duplicates += data.records
            self._acknowledge(session)
        elif data.first != stream.end + 1:
            self._reset(session, 412, f"{data.first} comes after {stream.end}")
        elif stream.blocks >= MAX_CREDIT_BLOCKS or stream.size >= session.max_granted:
            self._reset(session, 429, "beyond the credit")
        else:
            self.counters.accepted += data.records
            self._accept(session, data.end, len(data.payload))
            return Arrival(session.labels, data)
        return None

    def _on_skip(self, session: _Session, skip: Skip) -> None:
        stream = session.stream
        if skip.end <= stream.end:
            self._acknowledge(session)
        elif skip.first > stream.end + 1:
            self._reset(session, 412, f"{skip.first} comes after {stream.end}")
        elif stream.blocks >= MAX_CREDIT_BLOCKS:
            self._reset(session, 429, "beyond the credit")
        else:
            self.counters.skipped += skip.end - stream.end
            self._accept(session, skip.end, 0)

    def _accept(self, session: _Session, end: int, size: int) -> None:
        stream = session.stream
        stream.end = end
        stream.run = session.run
        stream.held = True
        stream.blocks += 1
        stream.size += size
        self._accepted[stream.key] = stream

    def _on_ping(self, session: _Session, ping: Ping) -> None:
        if ping.last > session.stream.end:
            self._reset(session, 412, f"{ping.last} was lost on the way")
        else:
            self._acknowledge(session)

    def _on_goodbye(self, session: _Session, goodbye: Goodbye) -> None:
        session.stream.over = not session.spooled
        self._end(session)

    _HANDLERS: Mapping[type, Callable[["Receiver", _Session, Any], Arrival | None]] = {
        Data: _on_data,
        Skip: _on_skip,
        Ping: _on_ping,
        Goodbye: _on_goodbye,
    }

    def _reply(self, peer: bytes, message: Message, token: int) -> None:
        self._replies.append((peer, encode(message, token)))

    def _reset(self, session: _Session, code: int, text: str) -> None:
        self.counters.resets += 1
        self._end(session)
        self._reply(session.peer, Reset(code, text), session.token)

    def _end(self, session: _Session) -> None:
        stream = session.stream
        del self._sessions[session.token], self._peers[session.peer]
        self._granted -= session.granted
        stream.session = None
        stream.quiet_since = self._now
        self._drop_if_done(stream)

    def _drop_if_done(self, stream: _Stream) -> None:
        if stream.over or not stream.held:
            self._drop_if_quiet(stream)

    def _drop_if_quiet(self, stream: _Stream) -> None:
        if stream.session or stream.floor < stream.end:  # then one may wait, too
            return
        del self._streams[stream.key]
        if stream.held:
            self._forgotten.append(stream.key)

    def _acknowledge(self, session: _Session) -> None:
        if not session.ack_due:
            session.ack_due = True
            self._ack_due.append(session)

    def take_accepted(self) -> list[Progress]:
        """Return how far each stream was accepted, of those that have moved since the last call."""
        moved = [
            Progress(stream.key, Floor(stream.end, stream.run), stream.blocks, stream.size)
            for stream in self._accepted.values()
        ]
        self._accepted.clear()
        return moved

    def committed(self, moved: Iterable[Progress]) -> None:
        """Note that the sink holds, and the receiver remembers, what was accepted last."""
        for progress in moved:
            stream = self._streams[progress.key]
            stream.floor = progress.floor.acked
            stream.blocks -= progress.blocks
            stream.size -= progress.size
            if stream.session:
                self._acknowledge(stream.session)
            if stream.waiting and stream.floor == stream.end:
                peer, hello = stream.waiting
                stream.waiting = None
                self._welcome(stream, peer, hello)
            stream.quiet_since = self._now
            self._drop_if_done(stream)

    def take_forgotten(self) -> list[Key]:
        """
        Return the streams to forget durably, of those that were forgotten since the last call.

        To be deleted before what :meth:`take_accepted` returns after this is stored.
        """
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def take_replies(self) -> list[tuple[bytes, bytes]]:
        """Return what to send: each peer and its frame."""
        for session in self._ack_due:
            session.ack_due = False
            if self._sessions.get(session.token) is session:
                ack = Ack(session.stream.floor, MAX_CREDIT_BLOCKS, self._grant(session))
                self._reply(session.peer, ack, session.token)
        self._ack_due.clear()
        replies, self._replies = self._replies, []
        return replies

    def tick(self, now: float) -> None:
        """Forget the sessions that have been silent, and the streams that were quiet, for long."""
        self._now = now
        silent = now - _EXPIRED_PINGS * _PING_INTERVAL
        for session in [s for s in self._sessions.values() if s.heard < silent]:
            self._end(session)
        for stream in list(self._streams.values()):
            if stream.quiet_since is None:
                stream.quiet_since = now
            elif stream.quiet_since <= now - _QUIET_TIMEOUT:
                self._drop_if_quiet(stream)

    def forget(self, peer: bytes) -> None:
        """Forget the session of a peer that has gone."""
        if session := self._peers.get(peer):
            self._end(session)

    def stop(self) -> None:
        """Accept nothing more, but for the senders' goodbyes."""
        self._stopped = True

    def goodbyes(self) -> list[tuple[bytes, bytes]]:
        """Return the last frames of all sessions, after the last acks."""
        return [(s.peer, encode(Goodbye(), s.token)) for s in self._sessions.values()]


def _read_hello(values: Mapping[str, Any]) -> tuple[list[int], _HelloValues | None]:
    versions = values.get("versions")
    if not isinstance(versions, list) or len(versions) != 2:
        return [], None
    if not all(type(version) is int for version in versions):
        return [], None
    stream, run, first = (values.get(key) for key in ("stream", "run", "first"))
    labels = {key: values.get(key, "") for key in ("type", "host")}
    named = all(isinstance(name, str) and _HEX_ID.fullmatch(name) for name in (stream, run))
    numbered = type(first) is int and 0 < first <= MAX_SEQ
    labelled = all(isinstance(x, str) and len(x) <= _MAX_LABEL for x in labels.values())
    spooled = values.get("spooled", True)
    if not (named and numbered and labelled and isinstance(spooled, bool)):
        return versions, None
    return versions, _HelloValues(str(stream), str(run), int(first or 0), spooled, labels)

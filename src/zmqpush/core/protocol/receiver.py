"""
Acknowledged delivery, the receiver's end: a state machine, as ``docs/protocol.md`` says.

No sockets, files or clocks: frames and the time (monotonic, in seconds) come in as
arguments; blocks for the sink and answers come out.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zmqpush.core.protocol.messages import (
    MAX_CREDIT_BLOCKS,
    MAX_CREDIT_BYTES,
    MAX_LABEL,
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
    wrong_version,
)
from zmqpush.errors import RemoteProtocolError

# After so many signs of life that did not come the sender is gone.
_EXPIRED_PINGS = 6
# Until its first ack, so that those who come first, many at once, leave something for the
# others: a large block or two.
_FIRST_CREDIT_BYTES = 256 << 10
# A stream that has been quiet for so long is forgotten, in seconds.
_QUIET_TIMEOUT = 30 * 86400.0
# What ended sessions sent may still wait for the sink, beside what live ones may send: so
# many budgets in all.
_PENDING_FACTOR = 2
# What the name of a stream of version 1 begins with in what is remembered. Nobody can greet
# under it: the names of version 2 have no such beginning.
FORMER = "v1/"
_HEX_ID = re.compile(r"[0-9a-f]{32}")


# The principal of a peer without CURVE.
ANONYMOUS = "anonymous"


class Floor(NamedTuple):
    """What a receiver remembers of a stream: how much it holds, and which run sent the last."""

    acked: int
    run: str


# The principal (``anonymous`` without CURVE) and the name of a stream.
Key = tuple[str, str]


class Arrival(NamedTuple):
    """A block for the sink, whose it is, and the labels of its records."""

    key: Key
    labels: Mapping[str, str]
    block: Data
    raw: bool


class Progress(NamedTuple):
    """How far a stream was accepted when :meth:`Receiver.take_accepted` was called."""

    key: Key
    floor: Floor


@dataclass(slots=True)
class _Stream:
    key: Key
    floor: int = 0
    run: str = ""
    end: int = 0  # accepted up to here
    # What was ever accepted and not yet committed: the end of each block, and its bytes.
    pending: deque[tuple[int, int]] = field(default_factory=deque)
    size: int = 0  # of all that, in bytes
    held: bool = False  # the sink got something of it, now or before
    over: bool = False  # its sender has ended it
    # Since when it has had no session and has not moved; None: look at the next tick.
    quiet_since: float | None = None
    session: "_Session | None" = None
    # A sender that waits until all that was accepted is committed.
    waiting: "tuple[bytes, _HelloValues] | None" = None


class _HelloValues(NamedTuple):
    stream: str
    was: str
    run: str
    first: int
    spooled: bool
    labels: Labels


@dataclass(slots=True)
class _Session:
    token: int
    peer: bytes
    stream: _Stream
    run: str
    spooled: bool
    labels: Labels
    of_records: Mapping[str, str]  # those of its labels that a sink gets
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
        admits: Tells whether a principal may name a host as its own.

    """

    def __init__(
        self,
        floors: Mapping[Key, Floor],
        memory: int,
        durability: str,
        tokens: Callable[[], int],
        admits: Callable[[str, str], bool] = lambda principal, host: True,
    ) -> None:
        self._streams = {
            key: _Stream(key, floor.acked, floor.run, floor.acked, held=True)
            for key, floor in floors.items()
        }
        self._memory = memory
        self._pending = 0  # accepted and not committed, in bytes, of all streams
        self._durability = durability
        self._tokens = tokens
        self._admits = admits
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
        self, peer: bytes, frame: bytes | memoryview, now: float, principal: str = ANONYMOUS
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
            self._reply(peer, Error(505, wrong_version(versions[1])), 0)
        elif hello is None:
            self.counters.malformed += 1
        else:
            key = (principal, hello.stream)
            if (older := self._streams.get(key)) and older.session:
                self._end(older.session)
            if key not in self._streams:
                self._begin(key, (principal, FORMER + hello.was))
            stream = self._streams[key]
            stream.over = False
            if stream.floor < stream.end:
                stream.waiting = (peer, hello)
            else:
                self._welcome(stream, peer, hello)

    def _begin(self, key: Key, former: Key) -> None:
        stream = self._streams[key] = _Stream(key)
        if older := self._streams.pop(former, None):
            # It is as if all that were accepted now: the sender waits until it is safe.
            self._forgotten.append(former)
            self._accept(stream, older.run, older.floor, 0)

    def _welcome(self, stream: _Stream, peer: bytes, hello: _HelloValues) -> None:
        if not self._admits(stream.key[0], host := hello.labels.host):
            self.refuse(peer, f"this key is not for the host {host!r}")
            self._drop_if_done(stream)
            return
        if stream.floor < hello.first - 1:
            self.counters.missing += hello.first - 1 - stream.floor if stream.floor else 0
            stream.floor = stream.end = hello.first - 1
            stream.run = hello.run
        session = _Session(
            self._tokens(),
            peer,
            stream,
            hello.run,
            hello.spooled,
            hello.labels,
            {"type": hello.labels.type, "host": hello.labels.host},
            self._now,
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
            "ping": PING_INTERVAL,
            "durability": self._durability,
            **hello.labels._asdict(),
        }
        self._reply(peer, Welcome(values), session.token)

    def _grant(self, session: _Session) -> int:
        most = MAX_CREDIT_BYTES if session.max_granted else _FIRST_CREDIT_BYTES
        share = min(most, self._memory // len(self._sessions))
        free = self._memory - (self._granted - session.granted)
        granted = max(1, min(share, free))
        self._granted += granted - session.granted
        session.granted = granted
        session.max_granted = max(session.max_granted, granted)
        return granted

    def _on_data(self, session: _Session, data: Data) -> Arrival | None:
        stream = session.stream
        end = data.end
        if end <= stream.end:
            self.counters.duplicates += data.records
            self._acknowledge(session)
        elif data.first != stream.end + 1:
            self._reset(session, 412, f"{data.first} comes after {stream.end}")
        elif len(stream.pending) >= MAX_CREDIT_BLOCKS or stream.size >= session.max_granted:
            self._reset(session, 429, "beyond the credit")
        elif self._pending >= _PENDING_FACTOR * self._memory:
            self._reset(session, 429, "the receiver's memory is full")
        else:
            self.counters.accepted += data.records
            self._accept(stream, session.run, end, len(data.payload))
            return Arrival(stream.key, session.of_records, data, session.labels.raw)
        return None

    def _on_skip(self, session: _Session, skip: Skip) -> None:
        stream = session.stream
        if skip.end <= stream.end:
            self._acknowledge(session)
        elif skip.first > stream.end + 1:
            self._reset(session, 412, f"{skip.first} comes after {stream.end}")
        elif len(stream.pending) >= MAX_CREDIT_BLOCKS:
            self._reset(session, 429, "beyond the credit")
        else:
            self.counters.skipped += skip.end - stream.end
            self._accept(stream, session.run, skip.end, 0)

    def _accept(self, stream: _Stream, run: str, end: int, size: int) -> None:
        stream.end = end
        stream.run = run
        stream.held = True
        stream.pending.append((end, size))
        stream.size += size
        self._pending += size
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
            Progress(stream.key, Floor(stream.end, stream.run))
            for stream in self._accepted.values()
        ]
        self._accepted.clear()
        return moved

    def committed(self, moved: Iterable[Progress]) -> None:
        """Note that the sink holds, and the receiver remembers, what was accepted last."""
        for key, floor in moved:
            stream = self._streams[key]
            stream.floor = floor.acked
            while stream.pending and stream.pending[0][0] <= stream.floor:
                self._release(stream, stream.pending.popleft())
            if stream.session:
                self._acknowledge(stream.session)
            if stream.waiting and stream.floor == stream.end:
                peer, hello = stream.waiting
                stream.waiting = None
                self._welcome(stream, peer, hello)
            stream.quiet_since = self._now
            self._drop_if_done(stream)

    def _release(self, stream: _Stream, block: tuple[int, int]) -> None:
        _, size = block
        stream.size -= size
        self._pending -= size

    def give_back(self, key: Key, first: int, text: str) -> None:
        """
        Leave to its sender what was accepted of a stream, and tell it why.

        Args:
            key: Of the stream.
            first: The first record of the first block that it keeps.
            text: Why the sink does not take it.

        """
        stream = self._streams[key]
        while stream.pending and stream.pending[-1][0] >= first:
            self._release(stream, stream.pending.pop())
        stream.end = first - 1
        self._accepted.pop(key, None)
        if stream.session:
            self._refuse(stream.session.peer, 503, text)
        if stream.waiting:
            peer, _ = stream.waiting
            stream.waiting = None
            self._refuse(peer, 503, text)

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
        silent = now - _EXPIRED_PINGS * PING_INTERVAL
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

    def refuse(self, peer: bytes, text: str) -> None:
        """End the session of a peer that may send nothing, if it has one, and tell it why."""
        self._refuse(peer, 403, text)

    def _refuse(self, peer: bytes, code: int, text: str) -> None:
        session = self._peers.get(peer)
        self.counters.resets += code != 503  # which is no fault of the peer's
        self.forget(peer)
        self._reply(peer, Error(code, text), session.token if session else 0)

    def review(self) -> None:
        """End the sessions whose principals may not name their hosts any more."""
        for session in list(self._sessions.values()):
            host = session.labels.host
            if not self._admits(session.stream.key[0], host):
                self.refuse(session.peer, f"this key is not for the host {host!r}")

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
    secret, run, first = (values.get(key) for key in ("secret", "run", "first"))
    was, spooled = values.get("was", ""), values.get("spooled", True)
    labels = Labels(values.get("type", ""), values.get("host", ""), values.get("raw", False))
    names = secret, run, secret if was == "" else was
    named = all(isinstance(name, str) and _HEX_ID.fullmatch(name) for name in names)
    numbered = type(first) is int and 0 < first <= MAX_SEQ
    labelled = all(isinstance(x, str) and len(x) <= MAX_LABEL for x in labels[:2])
    flagged = all(isinstance(flag, bool) for flag in (spooled, labels.raw))
    if not (named and numbered and labelled and flagged):
        return versions, None
    stream = public_name(str(secret))
    return versions, _HelloValues(stream, was, str(run), int(first or 0), spooled, labels)

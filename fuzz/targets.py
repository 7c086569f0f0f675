"""
What is fuzzed: functions that take any bytes, and fail if the product does wrong with them.

Usage: python fuzz/targets.py TARGET FILE...: run some inputs again, without a fuzzer.
"""

import contextlib
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import by_json
import wire
from choices import Choices, frame, seal
from zmqpush.core.omprog import DEFER_COMMIT, OK, REFUSED, Dialogue, MarkFilter, Marks
from zmqpush.core.protocol.messages import (
    MAX_CREDIT_BLOCKS,
    MAX_CREDIT_BYTES,
    MAX_SEQ,
    Ack,
    Data,
    Hello,
    Labels,
    Message,
    Ping,
    Skip,
    Welcome,
    checksum,
    decode,
    encode,
    public_name,
)
from zmqpush.core.protocol.receiver import FORMER, Floor, Key, Progress, Receiver
from zmqpush.core.protocol.sender import Sender
from zmqpush.core.records.decode import RecordDecoder
from zmqpush.core.records.encode import Envelope, Format, Payload
from zmqpush.core.records.framing import Framing, to_frames
from zmqpush.core.records.lines import Block, LineSplitter
from zmqpush.errors import RemoteProtocolError, SpoolForeignError
from zmqpush.sender.unacked_queue import UnackedQueue
from zmqpush.settings import Sync, WhenFull
from zmqpush.spool.segment import (
    FORMER_MARK,
    HEADER,
    STATE_SLOTS,
    inode_of,
    new_header,
    pack_state,
)
from zmqpush.spool.slots import survey
from zmqpush.spool.spool import Spool

RUNS = ("aa" * 16, "bb" * 16)
SECRETS = ("cd" * 16, "ef" * 16, "01" * 16)
LABELS = Labels("t", "h")
# Seconds that pass: within all the timeouts of the protocol, and beyond each of them.
STEPS = (0.0, 0.1, 0.6, 1.1, 2.1, 5.1, 16.0, 31.0, 4000.0, 31 * 86400.0)


# The codec.


def _decode(data: bytes) -> tuple[Message | None, int] | None:
    try:
        found = decode(data)
    except RemoteProtocolError as exc:
        assert exc.code in (400, 505), exc.code
        return None
    assert decode(memoryview(data)) == found
    return found


def codec(data: bytes) -> None:
    """Check that a frame is a message or an error, and what one changed bit makes of it."""
    for it in (data, seal(data)):
        message, session = _decode(it) or (None, 0)
        if message is None:
            continue
        if _fits(message):
            again = encode(message, session)
            assert repr(_decode(again)) == repr((message, session)) or message == decode(again)[0]
        bit = zlib.crc32(it) % (8 * len(it))
        damaged = bytearray(it)
        damaged[bit // 8] ^= 1 << bit % 8
        other, _ = _decode(bytes(damaged)) or (None, 0)
        assert other is None or other == message, (other, message)


def _fits(message: Message) -> bool:
    # What JSON and UTF-8 write in more than one way may grow beyond the limits.
    values = message.values if isinstance(message, Hello | Welcome) else {}
    return len(json.dumps(values)) <= 4096 and len(getattr(message, "text", "").encode()) <= 1024


# The receiver.

RECEIVER_STEPS = ("frame", "commit", "answer", "wait", "forget", "restart", "stop", *["frame"] * 9)
PEERS = (b"one", b"two", b"three")
PRINCIPALS = ("anonymous", "another")


class _Receiving:
    """A receiver, its sink, and what it would find after its death."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.tokens = count(1)
        # Streams of version 1.
        self.durable: dict[Key, Floor] = {
            (principal, FORMER + SECRETS[0]): Floor(3, RUNS[0]) for principal in PRINCIPALS
        }
        self.claimed = 0  # the highest number that a sender says to be acknowledged
        self.start()

    def start(self) -> None:
        """Begin with what is durable."""
        self.receiver = Receiver(self.durable, self.memory, "disk", self.tokens.__next__)
        self.written = {key: floor.acked for key, floor in self.durable.items()}
        self.forgotten: list[Key] = []
        self.pending: tuple[list[Key], list[Progress]] | None = None

    def receive(self, choices: Choices, now: float) -> None:
        """Let a frame come from a peer."""
        who = choices.byte()
        peer, principal = PEERS[who % 3], PRINCIPALS[who // 3 % 2]
        session = self.receiver._peers.get(peer)
        token = choices.number() if who & 0x80 else session.token if session else 0
        end = session.stream.end if session else 0
        hello = {
            "versions": [2, 2],
            "secret": SECRETS[who // 6 % 3],
            "was": SECRETS[who // 36 % 2],
            "run": RUNS[who // 18 % 2],
            "first": choices.number(1) if who & 0x40 else 1,
            "spooled": not who & 0x40,
            **LABELS._asdict(),
        }
        data = frame(choices, end + 1, hello, token)
        with contextlib.suppress(RemoteProtocolError):
            message, _ = decode(data)
            first = message.values.get("first") if isinstance(message, Hello) else 0
            self.claimed = max(self.claimed, first - 1 if type(first) is int else 0)
        held = session.stream.size if session else 0
        arrival = self.receiver.receive(peer, data, now, principal)
        if arrival:
            assert session and arrival.block.first == end + 1
            assert session.stream.end == arrival.block.end
            assert held < session.max_granted
            assert end >= self.written.get(session.stream.key, 0)
            self.written[session.stream.key] = arrival.block.end

    def note_forgotten(self) -> None:
        """Forget what the receiver has forgotten."""
        for key in self.receiver.take_forgotten():
            self.forgotten.append(key)
            self.written.pop(key, None)  # what was skipped is not in it

    def commit(self) -> None:
        """Begin to make safe what has come; the next time note that it is."""
        if self.pending is None:
            self.pending = self.forgotten, self.receiver.take_accepted()
            self.forgotten = []
            return
        forgotten, moved = self.pending
        self.pending = None
        for key in forgotten:
            del self.durable[key]
        for progress in moved:
            assert progress.floor.acked >= self.durable.get(progress.key, Floor(0, "")).acked
            self.durable[progress.key] = progress.floor
        self.receiver.committed(moved)

    def answer(self) -> None:
        """Check what is sent."""
        for peer, data in self.receiver.take_replies():
            message, token = decode(data)
            session = self.receiver._sessions.get(token)
            if isinstance(message, Ack):
                assert session and session.peer == peer
                assert message.acked == session.stream.floor
                assert message.credit_bytes == session.granted

    def check(self) -> None:
        """Check what always holds."""
        it = self.receiver
        granted = [session.granted for session in it._sessions.values()]
        assert it._granted == sum(granted) <= self.memory + len(granted)
        assert all(1 <= size <= MAX_CREDIT_BYTES for size in granted)
        assert len(it._peers) == len(it._sessions) == it.sessions
        for token, session in it._sessions.items():
            assert token == session.token
            assert it._peers[session.peer] is session is session.stream.session
            assert it._streams[session.stream.key] is session.stream
        for key, stream in it._streams.items():
            assert key == stream.key
            assert stream.session is None or it._sessions[stream.session.token] is stream.session
            assert 0 <= stream.floor <= stream.end <= MAX_SEQ
            safe = self.durable[key].acked if key in self.durable else 0
            assert stream.floor <= max(safe, self.claimed)
            assert len(stream.pending) <= MAX_CREDIT_BLOCKS
            assert stream.size == sum(size for _, size in stream.pending)
            assert (stream.floor < stream.end) == bool(stream.pending)
            assert stream.session or stream.held  # else nobody would ever forget it
            assert stream.waiting is None or stream.floor < stream.end


def receiver(data: bytes) -> None:
    """Let frames come to a receiver from three peers, while time passes and it dies."""
    choices = Choices(data)
    it = _Receiving(choices.pick((64 << 20, 300 << 10, 100, 1)))
    now = 0.0
    while choices.more:
        match choices.pick(RECEIVER_STEPS):
            case "frame":
                it.receive(choices, now)
            case "commit":
                it.commit()
            case "answer":
                it.answer()
            case "wait":
                now += choices.pick(STEPS)
                it.receiver.tick(now)
            case "forget":
                it.receiver.forget(choices.pick(PEERS))
            case "restart":
                it.start()
            case "stop":
                it.receiver.stop()
        it.note_forgotten()
        it.check()
    for peer, farewell in it.receiver.goodbyes():
        assert it.receiver._sessions[decode(farewell)[1]].peer == peer
    for _ in range(4):
        it.commit()
        it.note_forgotten()
        it.check()
    assert set(it.durable) == {key for key, s in it.receiver._streams.items() if s.held}


# The sender.

SENDER_STEPS = ("frame", "put", "send", "wait", "disconnect", "goodbye", *["frame"] * 6)


class _Store(UnackedQueue):
    """A queue that knows what was taken of it."""

    def __init__(self, max_bytes: int, when_full: WhenFull) -> None:
        self.names = map("{:032x}".format, count())
        super().__init__(max_bytes, when_full, LABELS)
        self.sent = 0
        self.next: int | None = None

    def take(self) -> Data | Skip | None:
        """Take the next block, which must follow the last one."""
        entry = super().take()
        if entry:
            assert entry.first == (self.first if self.next is None else self.next)
            self.next = entry.end + 1
            self.sent = max(self.sent, entry.end)
        return entry

    def rewind(self) -> None:
        """Begin again."""
        self.next = None
        super().rewind()

    def acknowledge(self, acked: int) -> None:
        """Forget what must have been sent."""
        assert type(acked) is int
        assert acked <= max(self.recovered, self.sent)
        super().acknowledge(acked)

    def rename_stream(self) -> None:
        """Give the stream another secret, but none at random."""
        self.secret = next(self.names)

    def fill(self, size: int) -> None:
        """Put a block of some records."""
        self.put(Payload(b"x" * size + b"\n" + b"y\n" * (size % 3), 1 + size % 3))


class _Sending:
    """A sender and its store."""

    def __init__(self, choices: Choices) -> None:
        when_full = choices.pick(tuple(WhenFull))
        self.store = _Store(choices.pick((1 << 30, 1500)), when_full)
        for size in range(choices.byte() % 5):
            self.store.fill(size)
        self.store.recovered = choices.pick((0, self.store._next - 1))
        self.sender = Sender(self.store, RUNS[0], 2.0)
        self.sender.connect(0.0)

    def receive(self, choices: Choices, now: float) -> None:
        """Let a frame come from the receiver."""
        how = choices.byte()
        welcome = {
            "version": 2,
            "stream": public_name(self.store.secret),
            **LABELS._asdict(),
            "session": f"{how % 3 + 1:016x}",
            "acked": choices.number(self.store.first - 1),
            "run": RUNS[how // 3 % 2],
            "blocks": choices.number(3) if how & 0x40 else 256,
            "bytes": choices.number(100) if how & 0x40 else 1 << 18,
            "ping": 5.0,
        }
        session = choices.number() if how & 0x80 else self.sender._session
        data = frame(choices, self.sender._sent, welcome, session)
        if self.sender.receive(data, now):
            self.sender.connect(now)

    def send(self, now: float) -> None:
        """Send all that may be sent."""
        it = self.sender
        while True:
            blocks, size = len(it._in_flight), it._in_flight_bytes
            data = it.next_frame(now)
            if data is None:
                break
            message, session = decode(data)
            assert session == it._session
            if isinstance(message, Data | Skip):
                assert it.streaming
                assert blocks < it._credit[0] <= MAX_CREDIT_BLOCKS
                assert size < it._credit[1] <= MAX_CREDIT_BYTES
                assert message.end == it._in_flight[-1][0]
            elif isinstance(message, Ping):
                assert it.streaming and (message.last == 0) == (not blocks)
            else:
                assert isinstance(message, Hello) and not it.streaming
        if it.tick(now):
            it.connect(now)
        else:
            assert it.deadline(now) > now  # else it would never come to rest

    def check(self) -> None:
        """Check what always holds."""
        flight = self.sender._in_flight
        assert self.store._taken == len(flight)
        assert self.sender._in_flight_bytes == sum(size for _, size in flight)
        assert all(one < two for (one, _), (two, _) in pairwise(flight))
        assert self.sender.streaming == (self.sender._session != 0)
        assert all(type(number) is int for number in self.sender._credit)
        assert self.store.records >= 0 and self.store._bytes >= 0


def sender(data: bytes) -> None:
    """Let a sender send while frames come and time passes."""
    choices = Choices(data)
    it = _Sending(choices)
    now = 0.0
    while choices.more:
        match choices.pick(SENDER_STEPS):
            case "frame":
                it.receive(choices, now)
            case "put":
                it.store.fill(choices.byte())
            case "send":
                it.send(now)
            case "wait":
                now += choices.pick(STEPS)
            case "disconnect":
                it.sender.disconnected(now)
            case "goodbye":
                farewell = it.sender.goodbye()
                assert (farewell is not None) == it.sender.streaming
        it.check()
    it.send(now)
    it.check()


# The spool.


class _Silent:
    """A reporter that says nothing."""

    def warn(self, text: str) -> None:
        """Say nothing."""


def _state(choices: Choices) -> bytes:
    if choices.byte() % 2:
        return choices.data()
    one, two = (pack_state(choices.byte(), choices.number(1)) for _ in range(2))
    return one.ljust(STATE_SLOTS[1], b"\0") + two


def _meta(choices: Choices, slot: Path) -> bytes:
    if choices.byte() % 2:
        return choices.data()
    values = {"format": choices.number(2), "inode": inode_of(slot)}
    names = {"secret": SECRETS[0], "was": SECRETS[1], "stream": SECRETS[1]}
    return json.dumps(values | names).encode()


def _segment(choices: Choices, near: int) -> tuple[str, bytes, int]:
    """Return a suffix, the bytes of a segment, and the number that would follow."""
    kind = choices.byte() % 4
    suffix, mark, beginning = "seg", FORMER_MARK, b""
    if kind:
        suffix, mark = "seg2", b"the mark"
        _, beginning = new_header(mark, LABELS)
    if kind == 2:
        at = choices.byte() % len(beginning)
        beginning = beginning[:at] + choices.take(1) + beginning[at + 1 :]
    elif kind == 3:
        beginning = choices.data()
    parts = [beginning]
    for _ in range(choices.byte() % 6):
        how = choices.byte() % 8
        if how == 0:
            parts.append(choices.data())
            continue
        first = choices.number(near) if how == 1 else near
        payload = choices.data() + b"\n"
        records = choices.number(1) if how == 2 else payload.count(b"\n")
        if how == 3:
            payload = payload[:-1] or b"x"
        crc = checksum(first, records, payload)
        entry = HEADER.pack(mark[:4], len(payload), mark[4:], first, records, crc) + payload
        if how == 4:
            at = choices.byte() % len(entry)
            entry = entry[:at] + choices.take(1) + entry[at + 1 :]
        elif how == 5:
            entry = entry[: choices.byte()]
        parts.append(entry)
        near = (first + records) % (1 << 64)
    return suffix, b"".join(parts), near


def _open(slot: Path, when_full: WhenFull) -> Spool:
    return Spool(
        slot,
        max_bytes=1 << 20,
        when_full=when_full,
        sync=Sync.BLOCK,
        labels=LABELS,
        reporter=_Silent(),  # type: ignore[arg-type]
        segment_bytes=256,
    )


def _read(spool: Spool) -> Iterator[Data]:
    """Yield all blocks, which must follow one another, and could be sent."""
    end = spool.first - 1
    while entry := spool.take():
        assert entry.first == end + 1 <= entry.end <= spool._synced
        end = entry.end
        assert decode(encode(entry, 1)) == (entry, 1)
        if isinstance(entry, Data):
            assert checksum(entry.first, entry.records, entry.payload) == entry.crc
            yield entry
    assert end == spool._synced


def spool(data: bytes) -> None:
    """Open a slot with any bytes in its files; what is written then must be found again."""
    choices = Choices(data)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        slot = Path(directory)
        files = choices.byte()
        if files & 1:
            (slot / "state").write_bytes(_state(choices))
        if files & 2:
            (slot / "meta").write_bytes(_meta(choices, slot))
        near = 1
        for _ in range(files // 4 % 4):
            number = choices.number(near)
            suffix, content, near = _segment(choices, number)
            (slot / f"{number:020d}.{suffix}").write_bytes(content)
        when_full = choices.pick(tuple(WhenFull))
        try:
            survey(slot)
            it = _open(slot, when_full)
        except SpoolForeignError:
            return
        found = sum(block.records for block in _read(it))
        if choices.byte() % 2:
            it.acknowledge(it.recovered)
            found = 0
        if it.recovered < MAX_SEQ - 10:
            it.put(Payload(b"new\n", 1))
            found += 1
        it.close()
        it = _open(slot, when_full)
        again = [(block.records, block.payload) for block in _read(it)]
        assert sum(records for records, _ in again) == found
        assert not found or it.recovered >= MAX_SEQ - 10 or again[-1] == (1, b"new\n")
        it.close()


# Records, plain.


def _objects(payload: Payload) -> list[dict[str, Any]]:
    """Return the records of a payload, each of which must be a JSON object in one line."""
    objects = by_json.values_of(payload.data)
    assert len(objects) == payload.records
    assert all(type(it) is dict for it in objects)
    return objects


def records(data: bytes) -> None:
    """
    Decode frames, with two zero bytes between them.

    The first byte says how many records to take: one, at least, as ``--count`` has it.
    """
    most, frames = max(1, int.from_bytes(data[:1])), data[1:].split(b"\0\0")
    decoder = RecordDecoder()
    everything = _joined(decoder.decode(frames))
    objects = _objects(everything)
    assert decoder.foreign <= len(objects)
    if data.count(b"[") + data.count(b"{") < 500:  # else the limit on recursion matters
        assert everything.data == by_json.records_of(frames)
    part = _joined(RecordDecoder().decode(frames, most))
    assert part.records == min(most, everything.records)
    assert everything.data.startswith(part.data)
    lines = b"".join(frame + b"\n" for frame in frames)
    assert len(_objects(_joined(RecordDecoder().wrap(lines)))) == lines.count(b"\n")


def _joined(payloads: Iterator[Payload]) -> Payload:
    parts = [*payloads]
    return Payload(b"".join(part.data for part in parts), sum(part.records for part in parts))


# Lines and the envelope.

DELIMITERS = (b"\n", b"\0", b"ab", b"aa", b"\n\n", b"\xc3", b'"', b"\\", b"\r\n", b"\xff")


def _format(
    chunks: list[bytes], format: Format, delimiter: bytes, max_line_bytes: int
) -> tuple[list[Block], Payload, int]:
    splitter = LineSplitter(delimiter, max_line_bytes)
    fields = {} if format is Format.RAW else {"k\udcff": 'v"'}
    envelope = Envelope(format=format, pid=1, host="h", fields=fields, delimiter=delimiter)
    blocks = [block for chunk in chunks for block in splitter.feed(chunk)] + splitter.finish()
    payloads = [envelope.format(block, 1.25) for block in blocks]
    for payload in payloads:
        assert len(to_frames(Framing.SINGLE, *payload[:1], envelope.separator)) == payload.records
    data = b"".join(payload.data for payload in payloads)
    return blocks, Payload(data, sum(p.records for p in payloads)), envelope.invalid_bytes


def lines(data: bytes) -> None:
    """Make records of any bytes; where they are cut into chunks must not matter."""
    choices = Choices(data)
    options = choices.pick(tuple(Format)), choices.pick(DELIMITERS), 4 + choices.byte()
    cuts = [choices.number() for _ in range(choices.byte() % 8)]
    text = choices.rest()
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    whole = _format([text], *options)
    parts = _format([text[a:b] for a, b in pairwise(edges)], *options)
    assert whole[1:] == parts[1:]
    blocks, payload, _ = whole
    format, delimiter, max_line_bytes = options

    pieces = [(line, block.partial) for block in blocks for line in block.data.split(delimiter)]
    assert all(len(line) <= max_line_bytes for line, _ in pieces)
    expected = text.split(delimiter)
    if expected[-1] == b"":
        expected.pop()
        if delimiter == b"\n":
            expected = [line.removesuffix(b"\r") for line in expected]
    elif delimiter == b"\n":
        expected = [line.removesuffix(b"\r") for line in expected[:-1]] + expected[-1:]
    joined = [b""]
    for line, partial in pieces:
        joined[-1] += line
        if not partial:
            joined.append(b"")
    assert joined == [*expected, b""]
    assert payload.records == len(pieces)
    if format is not Format.RAW:
        messages = [record["message"] for record in _objects(payload)]
        assert messages == [line.decode("utf-8", "backslashreplace") for line, _ in pieces]
    elif delimiter not in (b"aa", b"\n\n"):
        assert payload.data.split(delimiter) == [line for line, _ in pieces] + [b""]


# rsyslog's dialogue.

BEGIN, COMMIT = MARKS = Marks()


def dialogue(data: bytes) -> None:
    """
    Take messages, a line each, from rsyslog.

    The first byte says how much may be held, and whether transactions are declared.
    """
    first, lines = int.from_bytes(data[:1]), data[1:].replace(b"\0", b"").replace(b"\r", b"")
    max_bytes, messages = first & 0x7F, lines.split(b"\n")
    marks = MARKS if first & 0x80 else None
    it = Dialogue(marks, b"\0", max_bytes)
    if marks:
        assert [it.take(mark).answer for mark in MARKS] == [OK, REFUSED]
    safe: list[bytes] = []
    for at, message in enumerate(messages, 1):
        turn = it.take(message)
        safe += turn.lines.split(b"\0")[:-1]
        if not marks:
            assert (turn.answer, safe) == (OK, messages[:at])
            continue
        ordinary = [text for text in messages[:at] if text not in MARKS]
        done = [text for text in safe if text not in MARKS]
        assert done == ordinary[: len(done)]
        held = sum(len(text) + 1 for text in ordinary[len(done) :])
        assert held < max(1, max_bytes)
        assert turn.answer in (OK, DEFER_COMMIT)
        assert turn.answer == DEFER_COMMIT or not held

    filter, size = MarkFilter(MARKS), first % 4 + 1
    left: list[bytes] = []
    for at in range(0, len(messages), size):
        for block in filter.strip(Block(b"\n".join(messages[at : at + size]))):
            left += block.data.split(b"\n")
    if marks:  # what is not committed is held in a dialogue, and passes here
        ordinary = [text for text in safe if text not in MARKS]
        assert [text for text in left if text not in MARKS][: len(ordinary)] == ordinary


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        *(codec, receiver, sender, spool, records, lines, dialogue),
        *(wire.wire_frames, wire.wire_null, wire.wire_curve),
    )
}

if __name__ == "__main__":
    for name in sys.argv[2:]:
        TARGETS[sys.argv[1]](Path(name).read_bytes())

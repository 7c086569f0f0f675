"""
Messages of the delivery protocol to and from frames: ``docs/protocol.md``, version 2.

What a peer sends is either a message within all bounds or a :class:`RemoteProtocolError`,
never any other error. Nothing is allocated by a length that a peer claims. What was
damaged on the way is never taken for another message.
"""

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from zmqpush.errors import RemoteProtocolError

VERSION = 2
# In the header of what must be understood by peers of any version.
_ANY_VERSION = 1
# Reasons of a Skip.
DROPPED = 1
DAMAGED = 2
MAX_PAYLOAD_BYTES = 16 << 20
MAX_SEQ = (1 << 63) - 1
MAX_LABEL = 256  # characters
# The credit of a session, at most: in blocks what a link's high-water marks allow, in
# bytes what a disk that syncs within some milliseconds needs to be busy.
MAX_CREDIT_BLOCKS = 256
MAX_CREDIT_BYTES = 8 << 20
# After so many seconds of silence a sender asks for a sign of life.
PING_INTERVAL = 5.0

_MAGIC = 0x5A50  # "ZP"
_MUST_UNDERSTAND = 1 << 15
_MAX_HEADER_BYTES = 1024
_MAX_GREETING_BYTES = 4096
_MAX_TEXT_BYTES = 1024

# magic, version, type, flags, header length, session
_HEADER = struct.Struct(">HBBHHQ")
_RANGE = struct.Struct(">QQ")  # first, count
_BLOCK = struct.Struct(">QQI")  # first, count, CRC
_ACK = struct.Struct(">QIQ")  # ack floor, credit in blocks, credit in bytes
_PING = struct.Struct(">Q")  # the last sequence number in flight
_REFUSAL = struct.Struct(">H")  # code
_CRC = struct.Struct(">I")  # ends every frame without a block

_PAYLOAD_OFFSET = _HEADER.size + _BLOCK.size
MAX_FRAME_BYTES = _PAYLOAD_OFFSET + MAX_PAYLOAD_BYTES


def checksum(first: int, records: int, payload: bytes | memoryview) -> int:
    """Return the CRC-32 that stands for a block on the wire and on disk."""
    return zlib.crc32(payload, zlib.crc32(_RANGE.pack(first, records)))


def public_name(secret: str) -> str:
    """Return the name of a stream, from which nobody can find its secret."""
    return hashlib.sha256(b"zmqpush stream\0" + secret.encode()).hexdigest()[:32]


class Labels(NamedTuple):
    """What the records of a run have in common; ``raw`` if they are lines, not JSON."""

    type: str = ""
    host: str = ""
    raw: bool = False


class Hello(NamedTuple):
    """A sender's greeting: the keys that the specification names, checked by the receiver."""

    values: Mapping[str, Any]


class Welcome(NamedTuple):
    """A receiver's answer to it."""

    values: Mapping[str, Any]


class Data(NamedTuple):
    """A block: so many records from sequence number ``first`` on, a newline after each."""

    first: int
    records: int
    payload: bytes | memoryview
    crc: int

    @classmethod
    def of(cls, first: int, records: int, payload: bytes) -> "Data":
        """Return a new block."""
        return cls(first, records, payload, checksum(first, records, payload))

    @property
    def end(self) -> int:
        """The sequence number of the last record."""
        return self.first + self.records - 1


class Ack(NamedTuple):
    """The sink holds every record up to ``acked``; credit in blocks and in bytes."""

    acked: int
    credit_blocks: int
    credit_bytes: int


class Ping(NamedTuple):
    """A sender asks for a sign of life, an :class:`Ack`; 0 if nothing is in flight."""

    last: int = 0


class Reset(NamedTuple):
    """Back to HELLO on the same socket, for the reason that ``code`` names."""

    code: int
    text: str


class Skip(NamedTuple):
    """So many records from ``first`` on will never come; ``reason`` as specified."""

    first: int
    records: int
    reason: int

    @property
    def end(self) -> int:
        """The sequence number of the last record."""
        return self.first + self.records - 1


class Goodbye(NamedTuple):
    """The peer is about to end."""


class Error(NamedTuple):
    """The sender must not go on like this; ``code`` names why."""

    code: int
    text: str


Message = Hello | Welcome | Data | Ack | Ping | Reset | Skip | Goodbye | Error

_TYPES: dict[type[Message], int] = {
    Hello: 1,
    Welcome: 2,
    Data: 3,
    Ack: 4,
    Ping: 5,
    Reset: 7,
    Skip: 8,
    Goodbye: 9,
    Error: 10,
}
_VERSIONS: dict[type[Message] | None, int] = {Hello: _ANY_VERSION, Error: _ANY_VERSION}
_CLASSES = {number: kind for kind, number in _TYPES.items()}


def encode(message: Message, session: int) -> bytes:
    """Return the frame of a message."""
    kind = type(message)
    version = _VERSIONS.get(kind, VERSION)
    header = _HEADER.pack(_MAGIC, version, _TYPES[kind], 0, _HEADER.size, session)
    match message:
        case Hello(values) | Welcome(values):
            # At most 6 bytes a character, so that the longest labels fit into a greeting;
            # what UTF-8 cannot hold becomes an escape of JSON.
            text = json.dumps(values, separators=(",", ":"), ensure_ascii=False)
            body = text.encode("utf-8", "backslashreplace")
        case Data(first, records, payload, crc):
            return b"".join((header, _BLOCK.pack(first, records, crc), payload))
        case Ack(acked, blocks, size):
            body = _ACK.pack(acked, blocks, size)
        case Skip(first, records, reason):
            why = bytes((reason,))
            return header + _BLOCK.pack(first, records, checksum(first, records, why)) + why
        case Ping(last):
            body = _PING.pack(last)
        case Reset(code, text) | Error(code, text):
            body = _REFUSAL.pack(code) + _cut(text)
        case _:
            body = b""
    return header + body + _CRC.pack(zlib.crc32(header + body))


def wrong_version(version: int) -> str:
    """Return what to say to a peer of another version."""
    older = "sender" if version < VERSION else "receiver"
    return f"this receiver speaks version {VERSION}, not {version}: upgrade the {older}"


def decode(frame: bytes | memoryview) -> tuple[Message | None, int]:
    """
    Return the message of a frame, and its session.

    The message is ``None`` if its type is unknown and may be ignored.

    Raises:
        RemoteProtocolError: If the frame is malformed (code 400), or of a version, type or
            flag that must be understood and is not (505). Its ``session`` tells which one
            the frame claims.

    """
    if len(frame) < _HEADER.size:
        raise RemoteProtocolError(400, "a frame is shorter than its header")
    magic, version, number, flags, header_bytes, session = _HEADER.unpack_from(frame)
    if magic != _MAGIC or not _HEADER.size <= header_bytes <= min(len(frame), _MAX_HEADER_BYTES):
        raise RemoteProtocolError(400, "a frame has no valid header")
    kind = _CLASSES.get(number)
    known_flags = not flags & ~_MUST_UNDERSTAND
    if version != _VERSIONS.get(kind, VERSION):
        code = 400 if kind in _VERSIONS else 505
        raise RemoteProtocolError(code, wrong_version(version), session)
    if flags & _MUST_UNDERSTAND and not (kind and known_flags):
        raise RemoteProtocolError(505, f"unknown: type {number}, flags {flags}", session)
    if kind is None:
        return None, session
    try:
        if kind is not Data and kind is not Skip:
            frame = _without_crc(frame, header_bytes)
        if header_bytes > _HEADER.size:
            frame = bytes(frame[: _HEADER.size]) + frame[header_bytes:]
        return _decode_body(kind, frame), session
    except (struct.error, ValueError, IndexError, RecursionError) as exc:
        raise RemoteProtocolError(400, f"a malformed {kind.__name__}", session) from exc


def _without_crc(frame: bytes | memoryview, header_bytes: int) -> bytes | memoryview:
    end = max(header_bytes, len(frame) - _CRC.size)
    (crc,) = _CRC.unpack(frame[end:])
    if zlib.crc32(frame[:end]) != crc:
        raise ValueError("the checksum is wrong")
    return frame[:end]


def _decode_body(kind: type[Message], frame: bytes | memoryview) -> Message:
    if kind is Data or kind is Skip:
        return _decode_block(kind, frame)
    body = frame[_HEADER.size :]
    if kind is Hello or kind is Welcome:
        return kind(_decode_greeting(body))
    if kind is Reset or kind is Error:
        (code,) = _REFUSAL.unpack_from(body)
        text = body[_REFUSAL.size :]
        if len(text) > _MAX_TEXT_BYTES:
            raise ValueError("the text is too long")
        return kind(code, str(text, "utf-8", "replace"))
    if kind is Ack:
        ack = Ack(*_ACK.unpack(body))
        if ack.acked > MAX_SEQ:
            raise ValueError("the ack floor is out of bounds")
        return ack
    if kind is Ping:
        ping = Ping(*_PING.unpack(body))
        if ping.last > MAX_SEQ:
            raise ValueError("the sequence number is out of bounds")
        return ping
    if body:
        raise ValueError("there must be no body")
    return Goodbye()


def _decode_block(kind: type[Message], frame: bytes | memoryview) -> Message:
    first, records, crc = _BLOCK.unpack_from(frame, _HEADER.size)
    payload = memoryview(frame)[_PAYLOAD_OFFSET:]
    if not first or not records or first + records - 1 > MAX_SEQ:
        raise ValueError("the sequence numbers are out of bounds")
    if len(payload) > MAX_PAYLOAD_BYTES or checksum(first, records, payload) != crc:
        raise ValueError("the payload is too long or the checksum is wrong")
    if kind is Skip:
        (reason,) = payload
        return Skip(first, records, reason)
    if frame[-1:] != b"\n" or bytes(frame).count(b"\n", _PAYLOAD_OFFSET) != records:
        raise ValueError("the payload does not hold so many records")
    return Data(first, records, payload, crc)


def _decode_greeting(body: bytes | memoryview) -> Mapping[str, Any]:
    if len(body) > _MAX_GREETING_BYTES:
        raise ValueError("the greeting is too long")
    values = json.loads(str(body, "utf-8"))
    if not isinstance(values, dict):
        raise ValueError("the greeting is no object")
    return values


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:_MAX_TEXT_BYTES]

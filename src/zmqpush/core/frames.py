"""
Messages of the delivery protocol to and from frames: ``docs/protocol.md``, version 1.

What a peer sends is either a message within all bounds or a :class:`RemoteProtocolError`,
never any other error. Nothing is allocated by a length that a peer claims.
"""

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from zmqpush.errors import RemoteProtocolError

VERSION = 1
MAX_PAYLOAD_BYTES = 8 << 20
MAX_SEQ = (1 << 63) - 1

_MAGIC = 0x5A50  # "ZP"
_MUST_UNDERSTAND = 1 << 15
_MAX_HEADER_BYTES = 1024
_MAX_GREETING_BYTES = 4096
_MAX_TEXT_BYTES = 1024

# magic, version, type, flags, header length, session
_HEADER = struct.Struct(">HBBHHQ")
_BLOCK = struct.Struct(">QI")  # first, count
_CRC = struct.Struct(">I")
_ACK = struct.Struct(">QIQ")  # ack floor, credit in blocks, credit in bytes
_SKIP = struct.Struct(">QQB")  # first, count, reason
_REFUSAL = struct.Struct(">H")  # code

_DATA_OFFSET = _HEADER.size + _BLOCK.size + _CRC.size


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
    payload: bytes


class Ack(NamedTuple):
    """The sink holds every record up to ``acked``; credit in blocks and in bytes."""

    acked: int
    credit_blocks: int
    credit_bytes: int


class Ping(NamedTuple):
    """A sender asks for a sign of life."""


class Pong(NamedTuple):
    """A receiver gives it; ``state`` is 0 well, 1 sink stalled, 2 about to end."""

    acked: int
    credit_blocks: int
    credit_bytes: int
    state: int


class Reset(NamedTuple):
    """Back to HELLO on the same socket, for the reason that ``code`` names."""

    code: int
    text: str


class Skip(NamedTuple):
    """So many records from ``first`` on will never come; ``reason`` as specified."""

    first: int
    records: int
    reason: int


class Goodbye(NamedTuple):
    """The peer is about to end."""


class Error(NamedTuple):
    """The sender must not go on like this; ``code`` names why."""

    code: int
    text: str


Message = Hello | Welcome | Data | Ack | Ping | Pong | Reset | Skip | Goodbye | Error

_TYPES: dict[type[Message], int] = {
    Hello: 1,
    Welcome: 2,
    Data: 3,
    Ack: 4,
    Ping: 5,
    Pong: 6,
    Reset: 7,
    Skip: 8,
    Goodbye: 9,
    Error: 10,
}
_CLASSES = {number: kind for kind, number in _TYPES.items()}


def encode(message: Message, session: int) -> bytes:
    """Return the frame of a message."""
    header = _HEADER.pack(_MAGIC, VERSION, _TYPES[type(message)], 0, _HEADER.size, session)
    match message:
        case Hello(values) | Welcome(values):
            body = json.dumps(values, separators=(",", ":")).encode()
        case Data(first, records, payload):
            block = _BLOCK.pack(first, records)
            crc = zlib.crc32(payload, zlib.crc32(block))
            return b"".join((header, block, _CRC.pack(crc), payload))
        case Ack(acked, blocks, size):
            body = _ACK.pack(acked, blocks, size)
        case Pong(acked, blocks, size, state):
            body = _ACK.pack(acked, blocks, size) + bytes((state,))
        case Skip(first, records, reason):
            body = _SKIP.pack(first, records, reason)
        case Reset(code, text) | Error(code, text):
            body = _REFUSAL.pack(code) + _cut(text)
        case _:
            body = b""
    return header + body


def decode(frame: bytes) -> tuple[Message | None, int]:
    """
    Return the message of a frame, and its session.

    The message is ``None`` if its type is unknown and may be ignored.

    Raises:
        RemoteProtocolError: If the frame is malformed (code 400), too long (413), or of a
            version, type or flag that must be understood and is not (505).

    """
    if len(frame) < _HEADER.size:
        raise RemoteProtocolError(400, "a frame is shorter than its header")
    magic, version, number, flags, header_bytes, session = _HEADER.unpack_from(frame)
    if magic != _MAGIC or not _HEADER.size <= header_bytes <= min(len(frame), _MAX_HEADER_BYTES):
        raise RemoteProtocolError(400, "a frame has no valid header")
    kind = _CLASSES.get(number)
    known_flags = not flags & ~_MUST_UNDERSTAND
    if version != VERSION or (flags & _MUST_UNDERSTAND and not (kind and known_flags)):
        raise RemoteProtocolError(505, f"version {version}, type {number}, flags {flags:#x}")
    if kind is None:
        return None, session
    if header_bytes > _HEADER.size:
        frame = frame[: _HEADER.size] + frame[header_bytes:]
    try:
        return _decode_body(kind, frame), session
    except (struct.error, ValueError, IndexError, RecursionError) as exc:
        raise RemoteProtocolError(400, f"a malformed {kind.__name__}") from exc


def _decode_body(kind: type[Message], frame: bytes) -> Message:
    if kind is Data:
        return _decode_data(frame)
    body = frame[_HEADER.size :]
    if kind is Hello or kind is Welcome:
        return kind(_decode_greeting(body))
    if kind is Reset or kind is Error:
        (code,) = _REFUSAL.unpack_from(body)
        text = body[_REFUSAL.size :]
        if len(text) > _MAX_TEXT_BYTES:
            raise ValueError("the text is too long")
        return kind(code, text.decode("utf-8", "replace"))
    if kind is Ack or kind is Pong:
        state = () if kind is Ack else (body[_ACK.size],)
        floor_and_credit = _ACK.unpack(body[: len(body) - len(state)])
        if floor_and_credit[0] > MAX_SEQ:
            raise ValueError("the ack floor is out of bounds")
        return kind(*floor_and_credit, *state)
    if kind is Skip:
        skip = Skip(*_SKIP.unpack(body))
        _check_range(skip.first, skip.records)
        return skip
    if body:
        raise ValueError("there must be no body")
    return Ping() if kind is Ping else Goodbye()


def _decode_data(frame: bytes) -> Data:
    first, records = _BLOCK.unpack_from(frame, _HEADER.size)
    (crc,) = _CRC.unpack_from(frame, _HEADER.size + _BLOCK.size)
    payload = frame[_DATA_OFFSET:]
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError(413, f"a block of {len(payload)} bytes")
    _check_range(first, records)
    block = frame[_HEADER.size : _HEADER.size + _BLOCK.size]
    if zlib.crc32(payload, zlib.crc32(block)) != crc:
        raise ValueError("the checksum is wrong")
    if not payload.endswith(b"\n") or payload.count(b"\n") != records:
        raise ValueError("the payload does not hold so many records")
    return Data(first, records, payload)


def _decode_greeting(body: bytes) -> Mapping[str, Any]:
    if len(body) > _MAX_GREETING_BYTES:
        raise ValueError("the greeting is too long")
    values = json.loads(body.decode())
    if not isinstance(values, dict):
        raise ValueError("the greeting is no object")
    return values


def _check_range(first: int, records: int) -> None:
    if not first or not records or first + records - 1 > MAX_SEQ:
        raise ValueError("the sequence numbers are out of bounds")


def _cut(text: str) -> bytes:
    return text.encode("utf-8", "replace")[:_MAX_TEXT_BYTES]

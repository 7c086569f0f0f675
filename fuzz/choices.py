"""
Bytes read as a row of choices, and frames of the delivery protocol made of them.

The same bytes make the same choices with and without a fuzzer, so that whatever is found
can be run again.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from zmqpush.core.protocol.messages import (
    MAX_SEQ,
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
    encode,
)

T = TypeVar("T")

FORMS = ("raw", "sealed", "changed", "changed and sealed", "good", "good", "good", "good")
KINDS = (Data, Skip, Ping, Goodbye, Hello, Welcome, Ack, Reset, Error)
_SMALL = 128
_NUMBERS = (MAX_SEQ, MAX_SEQ + 1, (1 << 64) - 1, 1 << 32, (1 << 32) - 1, 1 << 31, 1 << 16)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, MAX_SEQ, 1 << 63, 1 << 64, 10**300, 1.5, 1e308, float("nan")),
    *("", "x", "x" * 257, "\ud800", "0" * 16, "0" * 32, "a" * 32, "\u0661" * 32, "a" * 32 + "\n"),
    *([], [1], [1, 1], [2, 3], [0, 1 << 80], [1, "1"], [True, True], {}, {"a": []}),
)


class Choices:
    """Reads bytes as choices; behind their end each choice is the first one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def more(self) -> bool:
        """Whether there is anything left."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        """Return so many bytes, or as many as there are."""
        self._at += size
        return self._data[self._at - size : self._at]

    def byte(self) -> int:
        """Return the next byte."""
        return int.from_bytes(self.take(1))

    def data(self) -> bytes:
        """Return some bytes; the first one says how many."""
        return self.take(self.byte())

    def rest(self) -> bytes:
        """Return all that is left."""
        return self.take(len(self._data))

    def pick(self, options: Sequence[T]) -> T:
        """Return one of some options."""
        return options[self.byte() % len(options)]

    def number(self, near: int = 0) -> int:
        """Return a number of 64 bits: one about ``near``, one that is a limit, or any."""
        byte = self.byte()
        if byte < _SMALL:
            return max(0, near + (byte + 1) // 2 * (1 if byte % 2 else -1)) % (1 << 64)
        if byte - _SMALL < len(_NUMBERS):
            return _NUMBERS[byte - _SMALL]
        return int.from_bytes(self.take(8)) if byte & 1 else self.byte()


def message(choices: Choices, near: int, greeting: Mapping[str, Any]) -> Message:
    """
    Return a message whose form is right.

    Args:
        choices: Of what is in it.
        near: The sequence number that would be a good one.
        greeting: The values of a good greeting.

    """
    kind = choices.pick(KINDS)
    if kind is Data:
        first, size = choices.number(near), choices.byte()
        payload = choices.take(size) + b"\n"
        return Data.of(first, choices.number(payload.count(b"\n")), payload)
    if kind is Skip:
        return Skip(choices.number(near), choices.number(1), choices.byte())
    if kind is Ping:
        return Ping(choices.number(near))
    if kind is Ack:
        return Ack(choices.number(near), choices.number() % (1 << 32), choices.number())
    if kind is Reset or kind is Error:
        return kind(choices.number() % (1 << 16), choices.data().decode("utf-8", "replace"))
    if kind is Goodbye:
        return Goodbye()
    values = dict(greeting)
    for _ in range(choices.byte() % 4):
        values[choices.pick([*greeting, "x"])] = choices.pick(_VALUES)
    return kind(values)


def frame(choices: Choices, near: int, greeting: Mapping[str, Any], session: int) -> bytes:
    """Return a frame: any bytes, a good one, or one of which a byte has changed."""
    form = choices.pick(FORMS)
    if form == "raw":
        return choices.data()
    if form == "sealed":
        return seal(choices.data())
    made = encode(message(choices, near, greeting), session)
    if form != "good":
        at = choices.byte() % len(made)
        made = made[:at] + choices.take(1) + made[at + 1 :]
    return seal(made) if form == "changed and sealed" else made


def seal(frame: bytes) -> bytes:
    """Return a frame with its checksum put right, if there is a place for it."""
    if len(frame) < 16:
        return frame
    kind, body = frame[3], int.from_bytes(frame[6:8])
    if kind not in (3, 8):
        return frame[:-4] + struct.pack(">I", zlib.crc32(frame[:-4]))
    numbers, payload = frame[body : body + 16], frame[body + 20 :]
    crc = zlib.crc32(payload, zlib.crc32(numbers))
    return frame[: body + 16] + struct.pack(">I", crc) + payload if len(numbers) == 16 else frame

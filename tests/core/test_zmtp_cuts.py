"""Where a stream is cut into segments does not matter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.curve import CurveServer
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.core.zmtp.null import Null
from zmtp_links import CLIENT, SERVER, Link, client, command, frame, greeting, null, ready

LIMITS = Limits(200_000, max_parts=5, v2=True)
PING = b"\4PING\0\0context"
# Commands, all forms of headers, messages of several parts, and what has a buffer of its own.
BODIES = [[b"a"], [b""], [b"b" * 255, b"", b"c"], [b"d" * 256], [b"e" * 9000], [b"f" * 100_000]]
PARTS = [part for parts in BODIES for part in parts]


class Seeded(CurveServer):
    """An end that binds whose handshake is the same each time."""

    shared: bytes

    def handshake(self, write, metadata, check):
        # What precedes it was checked by the end that recorded it.
        yield from (yield_all(STREAMS["curve"].before))
        self._shared = self.shared
        self._last_nonce = (2).to_bytes(8)


def yield_all(size):
    yield size


class Stream:
    """What an end sent, and how to make another end that takes it."""

    def __init__(self, data, make, before=0):
        self.data, self.make, self.before = data, make, before


def null_stream():
    data = greeting() + ready()
    for parts in BODIES:
        for part in parts[:-1]:
            data += frame(part, 1) + command(PING)
        data += frame(parts[-1]) + command(b"\5OTHERx")
    return Stream(data, lambda: null(limits=LIMITS))


def v2_stream():
    data = b"\xff" + bytes(8) + b"\x7f\1\x08" + frame(b"identity")
    data += b"".join(frame(part, part is not parts[-1]) for parts in BODIES for part in parts)
    return Stream(data, lambda: null(limits=LIMITS))

"""Where a stream is cut into segments does not matter."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.metadata import SocketType
from zmtp_links import CLIENT, SERVER, Link, client, command, frame, greeting, null, ready, server

LIMITS = Limits(200_000, max_parts=5, v2=True)
PING = b"\4PING\0\0context"
SHORT = [[b"a"], [b""], [b"b" * 255, b"", b"c"], [b"d" * 256]]
LONG = [*SHORT, [b"e" * 9000], [b"f" * 100_000, b"g" * 66_000], [b"h"]]
V2_GREETING = b"\xff" + bytes(8) + b"\x7f\1\x08" + frame(b"identity")


def unsealed(messages):
    """Return messages with commands between their parts."""
    data = b""
    for parts in messages:
        for part in parts:
            data += command(b"\5OTHERx") + frame(part, part is not parts[-1]) + command(PING)
    return data


def null_end(messages):
    """Return an end and what comes to it, from the greeting on."""
    return null(limits=LIMITS), greeting() + ready() + unsealed(messages)


def v2_end(messages):
    frames = (frame(part, part is not parts[-1]) for parts in messages for part in parts)
    return null(limits=LIMITS), V2_GREETING + b"".join(frames)


def curve_end(messages):
    """Return an end after its handshake: one that was recorded is refused."""
    link = Link(client(limits=LIMITS), server(limits=LIMITS)).run()
    one = link.one
    data = b""
    for parts in messages:
        data += b"".join(one.encode_parts(parts)) + one._mechanism.encode_command(PING)
    return link.other, data


makers = pytest.mark.parametrize("make", [null_end, v2_end, curve_end])


def check(make, messages, cuts):
    """Check what an end takes of segments."""
    end, data = make(messages)
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    taken = [part for a, b in pairwise(edges) for part in end.receive(data[a:b])]

    assert not end.failure
    assert end.ready
    assert [*map(bytes, taken)] == [part for parts in messages for part in parts]
    assert end.held == 0
    assert bool(end.take_output()) or make is v2_end


@makers
def test_a_byte_at_a_time(make):
    check(make, LONG, range(200_000))


@makers
def test_each_cut_into_two(make):
    for cut in range(len(make(SHORT)[1])):
        check(make, SHORT, [cut])


@makers
@given(cuts=st.lists(st.integers(0, 1 << 18), max_size=20))
def test_any_cuts(make, cuts):
    check(make, LONG, cuts)


@makers
@given(size=st.integers(2, 70_000))
def test_segments_of_one_size(make, size):
    check(make, LONG, range(0, 180_000, size))


@given(size=st.integers(1, 300), with_keys=st.booleans())
def test_a_handshake_may_come_in_segments_of_any_size(size, with_keys):
    class Cut(Link):
        def pass_on(self, end, data):
            for at in range(0, len(data), size):
                super().pass_on(end, data[at : at + size])

        def _piece(self, end, data):
            return len(data)

    link = Cut(client(), server()) if with_keys else Cut(null(SocketType.PUSH, binds=False), null())
    link.run().send(link.one, [b"a"], [b"b", b"c" * 300])

    assert link.accepted == {link.one: [], link.other: [b"a", b"b", b"c" * 300]}
    assert (link.one.key, link.other.key) == (
        (SERVER.public, CLIENT.public) if with_keys else (None, None)
    )

"""Frames, messages, heartbeats: what is taken of a peer, and how much of it."""

import sys
import tracemalloc

import pytest

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.frames import PART_OVERHEAD
from zmqpush.core.zmtp.metadata import SocketType
from zmtp_links import LIMITS, Link, client, command, frame, greeted, server

MIB = 1 << 20


def curved(limits):
    """Return an end that connects, with keys, and one that binds, once they are ready."""
    link = Link(client(limits=limits), server(limits=limits)).run()
    assert link.one.ready
    assert link.other.ready
    return link.one, link.other


def refused(data, limits=LIMITS):
    """Return what was taken before bytes were refused, and why they were."""
    end = greeted(limits=limits)
    taken = end.receive(data)
    assert end.failure
    assert end.receive(frame(b"later")) == []
    return taken, end.failure.fault


@pytest.mark.parametrize("size", [0, 1, 255])
@pytest.mark.parametrize("long", [False, True])
def test_a_short_body_may_have_either_header(size, long):
    body = b"x" * size

    assert greeted().receive(frame(body, long=long)) == [body]


@pytest.mark.parametrize(
    "size", [256, 257, 65535, 65536, 65537, 262143, 262144, 262145, MIB - 1, MIB]
)
@pytest.mark.parametrize("segment", [1 << 30, 65536, 10000])
def test_a_long_body_comes_whole(size, segment):
    end = greeted(limits=Limits(MIB))
    data = frame(bytes(range(256)) * (size // 256) + b"y" * (size % 256)) + frame(b"next")
    taken = [
        part for at in range(0, len(data), segment) for part in end.receive(data[at:][:segment])
    ]

    assert taken == [data[9 : 9 + size], b"next"]
    assert end.held == 0


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("size", [70_000, 300_000, MIB])
def test_a_long_body_may_be_filled_in_where_it_belongs(views, with_keys, size):
    limits = Limits(MIB, views=views)
    if with_keys:
        one, end = curved(limits)
        data = b"".join(one.encode_messages([b"x" * size]))
    else:
        end, data = greeted(limits=limits), frame(b"x" * size)
    taken = end.receive(data[:66_000])
    at = 66_000
    while at < len(data):
        view = end.free()  # kept while it is noted as filled
        part = data[at : at + min(len(view), 50_000)]
        view[: len(part)] = part
        taken += end.fill(len(part))
        at += len(part)

    assert not end.failure
    assert [bytes(part) for part in taken] == [b"x" * size]
    assert end.free() is None
    assert end.held == 0


def test_too_little_memory_for_a_frame_ends_its_connection_alone(monkeypatch):
    end = greeted(limits=Limits(MIB))
    end.receive(b"\2" + MIB.to_bytes(8) + bytes(70_000))

    def fails(filled):
        raise MemoryError

    monkeypatch.setattr(end._reader, "_grow", fails)
    assert end.fill(len(end.free())) == []
    assert end.failure.fault is Fault.INTERNAL
    assert isinstance(end.failure.__cause__, MemoryError)
    assert end.fill(1) == end.receive(frame(b"x")) == []


@pytest.mark.parametrize("size", [1001, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("flags", [2, 3, 6])
def test_a_size_beyond_the_limit_is_refused_from_the_header(size, flags):
    header = bytes((flags,)) + size.to_bytes(8)

    assert refused(frame(b"a") + header) == ([b"a"], Fault.LIMIT)


def test_the_limit_itself_is_taken_with_and_without_keys():
    limits = Limits(1000)
    one, other = curved(limits)
    sealed = b"".join(one.encode_messages([b"x" * 1000]))

    assert greeted(limits=limits).receive(frame(b"x" * 1000)) == [b"x" * 1000]
    assert other.receive(sealed) == [b"x" * 1000]
    assert other.receive(b"".join(one.encode_messages([b"x" * 1001]))) == []
    assert other.failure.fault is Fault.LIMIT


def test_the_sum_of_the_parts_is_limited():
    taken, fault = refused(frame(b"a" * 500, 1) + frame(b"b" * 500) + frame(b"c" * 500, 1) * 3)

    assert (taken, fault) == ([b"a" * 500, b"b" * 500], Fault.LIMIT)


def test_the_number_of_parts_is_limited_also_of_empty_ones():
    good = frame(b"", 1) * 4 + frame(b"")

    assert refused(good + frame(b"", 1) * 6) == ([b""] * 5, Fault.LIMIT)
    assert refused(good + frame(b"", 1) * 5 + frame(b"")) == ([b""] * 5, Fault.LIMIT)
    assert refused(frame(b"", 1) + frame(b""), Limits(1000)) == ([], Fault.LIMIT)


def test_reserved_flags_and_more_on_a_command_are_refused():
    for flags in {*range(256)} - {0, 1, 2, 3, 4, 6}:
        said = frame(b"a") + bytes((flags, 7)) + b"\4PING\0\0"
        assert refused(said) == ([b"a"], Fault.PROTOCOL)


def test_an_empty_message_is_a_message():
    assert greeted().receive(frame(b"") + frame(b"") + frame(b"x")) == [b"", b"", b"x"]


def test_a_message_is_given_whole_or_not_at_all():
    end = greeted()

    assert end.receive(frame(b"a", 1) + frame(b"b", 1)) == []
    assert end.held >= 2 * PART_OVERHEAD + 2
    assert end.receive(frame(b"c") + frame(b"d", 1)) == [b"a", b"b", b"c"]
    assert end.receive(frame(b"e")) == [b"d", b"e"]
    assert end.held == 0


# Memory and time.


def test_memory_follows_what_came_and_not_what_is_claimed():
    end = greeted(limits=Limits(64 * MIB))
    header = b"\2" + (64 * MIB).to_bytes(8)
    end.receive(header)
    assert end.held < 100
    came = 0
    while came < 2 * MIB:
        end.receive(bytes(50_000))
        came += 50_000
        assert came <= end.held + 9
        assert end.held <= 4 * came + 9


@pytest.mark.parametrize("size", [1000, 60_000, 70_000, 1_000_000])
def test_held_is_what_is_allocated(size):
    end = greeted(limits=Limits(2_000_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for at in range(0, size, 1000):
            end.receive((b"\2" + (2_000_000).to_bytes(8) if not at else b"") + bytes(1000))
        allocated = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert size <= end.held
    assert allocated < 1.2 * end.held + 2000


def test_parts_that_wait_are_counted_as_what_they_take():
    end = greeted(limits=Limits(MIB, max_parts=100_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(500):
            end.receive(frame(b"ab", 1) * 100)
        allocated = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()

    assert allocated < 1.1 * end.held


def test_a_frame_that_comes_a_byte_at_a_time_is_not_copied_with_each(monkeypatch):
    """What is copied is counted by a reader that notes each time it begins anew."""
    end = greeted(limits=Limits(MIB))
    measured = []
    reader = end._reader
    measure = reader._measure
    monkeypatch.setattr(reader, "_measure", lambda *args: measured.append(1) or measure(*args))
    data = frame(b"x" * 60_000)
    taken = [part for at in range(len(data)) for part in end.receive(data[at : at + 1])]

    assert taken == [b"x" * 60_000]
    assert len(measured) < 10


# Commands and heartbeats.


def test_a_ping_is_answered_with_its_context():
    end = greeted()

    assert end.receive(command(b"\4PING\0\1context")) == []
    assert end.take_output() == command(b"\4PONGcontext")
    assert end.take_output() == b""


@pytest.mark.parametrize("ttl", [b"\0\0", b"\xff\xff"])
def test_a_ping_without_a_context_has_a_pong_without_one(ttl):
    end = greeted()
    end.receive(command(b"\4PING" + ttl))

    assert end.take_output() == command(b"\4PONG")


@pytest.mark.parametrize("size", [16, 17, 900])
def test_the_context_of_a_ping_is_cut_to_16_bytes(size):
    end = greeted()
    end.receive(command(b"\4PING\0\0" + b"c" * size))

    assert end.take_output() == command(b"\4PONG" + b"c" * 16)


@pytest.mark.parametrize("body", [b"\4PING", b"\4PING\0"])
def test_a_short_ping_is_refused(body):
    assert refused(frame(b"a") + command(body) + frame(b"b")) == ([b"a"], Fault.PROTOCOL)


@pytest.mark.parametrize("body", [b"", b"\0", b"\0PING", b"\5PING", b"\xff" + b"x" * 254, b"\1"])
def test_a_malformed_command_is_refused(body):
    assert refused(frame(b"a") + command(body) + frame(b"b")) == ([b"a"], Fault.PROTOCOL)


@pytest.mark.parametrize("body", [b"\4PONG", b"\4PONG" + b"x" * 500, b"\1x", b"\x09SUBSCRIBEx"])
def test_an_unknown_command_is_ignored(body):
    end = greeted()

    assert end.receive(frame(b"a") + command(body) + frame(b"b")) == [b"a", b"b"]
    assert end.take_output() == b""
    assert not end.failure


def test_a_ping_may_come_between_the_parts_of_a_message():
    end = greeted()

    assert end.receive(frame(b"a", 1) + command(b"\4PING\0\0") + frame(b"b")) == [b"a", b"b"]
    assert end.take_output() == command(b"\4PONG")


def test_a_pong_is_never_within_a_message():
    end = greeted(SocketType.PUSH)
    end.receive(command(b"\4PING\0\0"))
    message = b"".join(end.encode_parts([b"a", b"b", b"c"]))

    assert message == frame(b"a", 1) + frame(b"b", 1) + frame(b"c")
    assert end.take_output() == command(b"\4PONG")


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_million_pings_have_one_pong_and_take_no_memory(with_keys):
    if with_keys:
        one, end = curved(Limits(1000))
        rounds, many = 100, 100  # each is a box
    else:
        end = greeted()
        rounds, many = 1000, 1000
    for n in range(rounds):
        ping = b"\4PING\0\0%d" % n
        pings = (
            b"".join(one._mechanism.encode_command(ping) for _ in range(many))
            if with_keys
            else command(ping) * many
        )
        assert end.receive(pings) == []
        if n == 1:
            before = sys.getallocatedblocks()

    assert not end.failure
    assert sys.getallocatedblocks() < before + 500
    assert end.held == 0
    pong = end.take_output()
    assert len(pong) < 100
    if not with_keys:
        assert pong == command(b"\4PONG999")


# What is sent.


@pytest.mark.parametrize("size", [0, 255, 256, 70_000])
def test_what_is_sent_has_the_shortest_header(size):
    end = greeted(SocketType.PUSH)
    body = b"x" * size
    alone = b"".join(end.encode_messages([body]))
    parts = b"".join(end.encode_parts([body, body]))

    assert alone == frame(body)
    assert b"".join(end.encode_messages([body, b"y"])) == frame(body) + frame(b"y")
    assert parts == frame(body, 1) + frame(body)

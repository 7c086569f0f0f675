"""The handshake without keys, and the metadata of all handshakes."""

import gc
import weakref

import pytest

from zmqpush.core.zmtp.connection import Connection
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.metadata import SocketType, check_type, encode
from zmqpush.core.zmtp.null import Null
from zmtp_links import (
    GREETING_BYTES,
    LIMITS,
    Link,
    client,
    command,
    field,
    frame,
    greeted,
    greeting,
    null,
    ready,
    server,
)

TYPES = list(SocketType)
OTHER_TYPES = ["PAIR", "PUB", "SUB", "REQ", "REP", "DEALER", "ROUTER", "PULL", "XPUB", "STREAM"]


def refused(said, kind=SocketType.PULL):
    """Return how an end that binds refuses what comes after a greeting; it sends nothing more."""
    end = null(kind)
    assert end.receive(greeting() + said) == []
    assert not end.ready
    assert end.failure
    assert len(end.take_output()) == GREETING_BYTES
    return end.failure


@pytest.mark.parametrize("kind", TYPES)
def test_both_ends_of_each_type_shake_hands_and_talk(kind):
    one, other = null(kind, binds=False), null(kind.peer)
    link = Link(one, other).run()
    assert one.ready
    assert other.ready
    assert one.key is other.key is None
    link.send(one, [b"a"], [b""], [b"b" * 400, b"c"]).send(other, [b"d"], [b"e" * 256])

    assert link.accepted == {one: [b"d", b"e" * 256], other: [b"a", b"", b"b" * 400, b"c"]}
    assert one.held == other.held == 0


def test_who_connects_says_ready_first_and_who_binds_once_it_knows_the_peer():
    connects, binds = null(SocketType.PUSH, binds=False), null()
    connects.receive(greeting())
    binds.receive(greeting())

    assert connects.take_output()[GREETING_BYTES:] == (
        b"\x04\x27\x05READY\x0bSocket-Type\0\0\0\x04PUSH\x08Identity\0\0\0\0"
    )
    assert len(binds.take_output()) == GREETING_BYTES
    binds.receive(ready())
    assert binds.take_output().startswith(b"\x04\x27\x05READY")
    connects.receive(ready(b"PULL"))
    assert connects.ready
    assert connects.take_output() == b""


def test_no_message_is_taken_before_ready():
    assert refused(frame(b"x") + ready()).fault is Fault.PROTOCOL


def test_greeting_ready_and_messages_may_come_at_once():
    end = null(binds=False)

    assert end.receive(greeting() + ready() + frame(b"a") + frame(b"b")) == [b"a", b"b"]


@pytest.mark.parametrize(
    ("kind", "other"), [(kind, it) for kind in TYPES for it in OTHER_TYPES if it != kind.peer]
)
def test_another_type_is_named_and_gets_no_answer(kind, other):
    failure = refused(ready(other.encode()), kind)

    assert failure.fault is Fault.SOCKET_TYPE
    assert str(failure) == f"it is a {other} socket, not a {kind.peer}"


def test_another_type_is_named_with_keys_as_well():
    one = client(SocketType.PUSH)
    other = server(SocketType.ROUTER)
    Link(one, other).run()

    assert other.failure.fault is Fault.SOCKET_TYPE
    assert str(other.failure) == "it is a PUSH socket, not a DEALER"
    assert not one.ready
    assert other.key is None


@pytest.mark.parametrize(
    "kind", [b"push", b"PUSH ", b"PUSH\0", b"", b"PUS", b"\x1b[2J" + b"x" * 99]
)
def test_the_value_of_the_type_is_taken_as_it_is_and_shown_in_print(kind):
    failure = refused(ready(kind))

    assert failure.fault is Fault.SOCKET_TYPE
    assert str(failure).isprintable()
    assert len(str(failure)) < 100


@pytest.mark.parametrize("name", [b"socket-type", b"SOCKET-TYPE", b"sOcKeT-tYpE"])
def test_names_are_read_in_any_case(name):
    check_type(field(name, b"PUSH"), SocketType.PULL)


@pytest.mark.parametrize(
    "more",
    [
        field(b"Identity", b""),
        field(b"Identity", b"\0me" * 80),
        field(b"X-else", bytes(2000)) + field(b"Resource", b"r"),
        field(b"x" * 255, b""),
    ],
)
def test_all_but_the_type_says_nothing(more):
    end = null()
    end.receive(greeting() + ready(more=more))

    assert end.ready


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        field(b"Identity", b""),
        encode(SocketType.PUSH) + field(b"SOCKET-type", b"PUSH"),
        encode(SocketType.PUSH) + field(b"identity", b""),
        encode(SocketType.PUSH) + field(b"X", b"1") + field(b"x", b"2"),
        encode(SocketType.PUSH) + field(b"", b"x"),
        encode(SocketType.PUSH) + field(b"caf\xc3\xa9", b"x"),
        encode(SocketType.PUSH) + b"\x01",
        encode(SocketType.PUSH) + b"\x01X\0\0\0",
        encode(SocketType.PUSH) + b"\x01X\0\0\0\x01",
        encode(SocketType.PUSH) + b"\x01X\x7f\xff\xff\xff",
        encode(SocketType.PUSH) + b"\x01X\xff\xff\xff\xff",
        *(encode(SocketType.PUSH)[:n] for n in range(1, 33) if n != 20),
    ],
)
def test_metadata_without_a_type_or_twice_or_malformed_is_refused(metadata):
    assert refused(command(b"\x05READY" + metadata)).fault is Fault.PROTOCOL


def test_an_error_is_a_hint_in_print_and_short():
    reason = b"\x1b[31mno\n" + b"x" * 200
    failure = refused(command(b"\x05ERROR" + bytes((len(reason),)) + reason))

    assert failure.fault is Fault.REFUSED
    assert str(failure).isprintable()
    assert len(str(failure)) < 100
    assert "[31mno" in str(failure)
    assert "no reason" in str(refused(command(b"\x05ERROR")))


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (command(b"\x05HELLO"), Fault.PROTOCOL),
        (command(b""), Fault.PROTOCOL),
        (command(b"READY"), Fault.PROTOCOL),
        (command(b"\4PING\0\0"), Fault.PROTOCOL),
        (frame(b"\x05READY"), Fault.PROTOCOL),
        (frame(b"\x05READY", 5), Fault.PROTOCOL),
        (frame(b"\x05READY", 12), Fault.PROTOCOL),
        (b"\x06" + (8193).to_bytes(8), Fault.LIMIT),
        (b"\x06" + (1 << 63).to_bytes(8), Fault.LIMIT),
        (b"\x06" + b"\xff" * 8, Fault.LIMIT),
    ],
)
def test_what_is_no_ready_and_what_is_too_long_is_refused_from_its_beginning(said, fault):
    assert refused(said).fault is fault


def test_a_long_header_of_a_short_ready_is_fine():
    end = null()
    end.receive(greeting() + frame(ready()[2:], 4, long=True))

    assert end.ready


class Broken(Null):
    """A mechanism with a bug."""

    def handshake(self, write, metadata, check):
        yield 1
        raise KeyError("a bug")


class BrokenLater(Null):
    """A mechanism with a bug in what comes after the handshake."""

    def open(self, flags, bodies, *, views):
        if bodies:
            del flags[1:], bodies[1:]
            raise KeyError("a bug")


def test_an_error_of_ours_ends_the_connection_and_lets_nobody_in():
    end = Connection(SocketType.PULL, Broken(binds=True), LIMITS)
    for _ in range(3):
        assert end.receive(greeting() + ready() + frame(b"x")) == []

    assert not end.ready
    assert end.failure.fault is Fault.INTERNAL
    assert isinstance(end.failure.__cause__, KeyError)


def test_an_error_of_ours_after_the_handshake_ends_the_connection():
    end = Connection(SocketType.PULL, BrokenLater(binds=True), LIMITS)
    end.receive(greeting() + ready())

    assert end.receive(frame(b"a") + frame(b"b")) == [b"a"]
    assert end.failure.fault is Fault.INTERNAL
    assert end.receive(frame(b"c")) == []


def kept_by_cycles(make):
    """Return whether an end lives on when nobody has it, until the collector comes."""
    gc.collect()
    gc.disable()
    try:
        end = make()
        watch = weakref.ref(end)
        del end
        return watch() is not None
    finally:
        gc.enable()


def silent():
    end = server()
    end.receive(greeting(b"CURVE"))
    return end


def failed():
    end = greeted()
    end.receive(b"\xff" * 1000)
    assert end.failure
    return end


def forged():
    end = server()
    end.receive(greeting(b"CURVE") + command(b"\5HELLO\1\0" + bytes(111) + b"\1" + bytes(80)))
    assert end.failure.fault is Fault.KEY
    return end


@pytest.mark.parametrize("make", [failed, forged])
def test_a_failure_keeps_no_frame_of_the_stack(make):
    """Secret keys are arguments there, and what was in boxes."""
    failure = make().failure

    assert failure.__traceback__ is failure.__context__ is failure.__cause__ is None


@pytest.mark.parametrize("make", [silent, failed, forged, greeted])
def test_a_connection_that_nobody_has_is_gone_at_once(make):
    assert not kept_by_cycles(make)

"""Who a peer says it is first: ZMTP 3, 2.0, 1.0, something else."""

import pytest

from zmqpush.core.zmtp.connection import Limits
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.metadata import SocketType
from zmtp_links import Link, client, command, frame, greeting, null, ready, server

OPENING = b"\xff" + bytes(7) + b"\x01\x7f\x03"
V2 = Limits(1000, max_parts=5, v2=True)
V2_GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x01"


def fault(end):
    assert not end.ready
    assert end.failure
    return end.failure.fault


@pytest.mark.parametrize("binds", [False, True])
@pytest.mark.parametrize("make", [null, lambda binds: server() if binds else client()])
def test_eleven_bytes_are_sent_before_anything_came_and_the_rest_after_the_peers_version(
    make, binds
):
    end = make(binds=binds)
    assert end.take_output() == OPENING
    end.receive(greeting()[:10])
    assert end.take_output() == b""
    end.receive(greeting()[10:11])
    rest = end.take_output()

    assert len(OPENING + rest) == 64
    assert rest[0] == 1
    assert rest[1:21].rstrip(b"\0") in (b"NULL", b"CURVE")
    assert rest[22:] == bytes(31)


def test_the_padding_says_nothing():
    end = null()
    end.receive(b"\xff" + b"identity" + greeting()[9:] + ready())

    assert end.ready


@pytest.mark.parametrize(("major", "minor"), [(3, 0), (3, 1), (3, 2), (3, 255), (4, 0), (255, 9)])
def test_each_version_from_3_on_is_taken(major, minor):
    end = null()
    end.receive(OPENING[:10] + bytes((major,)) + greeting(minor=minor)[11:] + ready())

    assert end.ready


@pytest.mark.parametrize("as_server", [0, 1, 255])
def test_as_server_says_nothing(as_server):
    end = null()
    end.receive(greeting(as_server=as_server) + ready())

    assert end.ready


@pytest.mark.parametrize(
    ("end", "expected"), [(null(), 0), (null(binds=False), 0), (client(), 0), (server(), 1)]
)
def test_as_server_is_sent_as_the_roles_are(end, expected):
    end.receive(OPENING)

    assert end.take_output()[32] == expected


@pytest.mark.parametrize("theirs", [b"CURVE", b"PLAIN", b"null", b"", b"NULL\0X", b"NULLX"])
def test_another_mechanism_is_named_and_told_ours(theirs):
    end = null()
    end.receive(greeting(theirs))

    assert fault(end) is Fault.MECHANISM
    assert len(end.take_output()) == 64
    assert "not NULL" in str(end.failure)


@pytest.mark.parametrize("make", [client, server])
def test_an_end_with_keys_takes_no_peer_without(make):
    end = make()
    end.receive(greeting(b"NULL") + ready())

    assert fault(end) is Fault.MECHANISM
    assert end.key is None


def test_what_is_not_zmtp_is_known_by_its_first_byte():
    for first in {*range(256)} - {0x01, 0xFF}:
        end = null()
        end.receive(bytes((first,)))

        assert fault(end) is Fault.NOT_ZMTP
        assert end.take_output() == OPENING


@pytest.mark.parametrize("last", [0x01, 0x7D, 0x81, 0xFF])
def test_a_signature_that_ends_otherwise_is_not_zmtp(last):
    end = null()
    end.receive(b"\xff" + bytes(8) + bytes((last,)))

    assert fault(end) is Fault.NOT_ZMTP


def test_an_identity_of_zmtp_1_with_a_text_is_not_zmtp():
    end = null()
    end.receive(b"\x01x")

    assert fault(end) is Fault.NOT_ZMTP


@pytest.mark.parametrize(
    "said", [b"\x01\x00", b"\xff" + (300).to_bytes(8) + b"\x00", OPENING[:10] + b"\x00"]
)
@pytest.mark.parametrize("make", [lambda: null(limits=V2), client, server])
def test_zmtp_1_is_refused_by_name(make, said):
    end = make()
    end.receive(said)

    assert fault(end) is Fault.VERSION
    assert "ZMTP 1.0" in str(end.failure)
    assert end.take_output() == OPENING


@pytest.mark.parametrize(
    "make",
    [
        lambda: client(limits=V2),
        lambda: server(limits=V2),
        null,
        lambda: null(SocketType.ROUTER, limits=V2),
        lambda: null(SocketType.DEALER, limits=V2),
    ],
)
@pytest.mark.parametrize("revision", [1, 2])
def test_zmtp_2_is_refused_with_keys_with_acknowledgements_and_where_it_is_not_wanted(
    make, revision
):
    end = make()
    end.receive(OPENING[:10] + bytes((revision, 8, 0, 0)))

    assert fault(end) is Fault.VERSION
    assert "ZMTP 2.0" in str(end.failure)
    assert end.take_output() == OPENING  # and nothing else


def greet_v2(kind, *, binds, number, identity=b""):
    """Return an end that was greeted as ZMTP 2.0 has it, and what it said."""
    end = null(kind, binds=binds, limits=V2)
    end.receive(V2_GREETING)
    said = [end.take_output()]
    end.receive(bytes((number,)))
    said.append(end.take_output())  # libzmq 3.2 waits for it
    end.receive(frame(identity))
    assert end.take_output() == b""
    return end, said


@pytest.mark.parametrize("identity", [b"", b"me", b"x" * 255])
def test_a_puller_that_binds_answers_zmtp_2_once_it_knows_the_peer(identity):
    end, said = greet_v2(SocketType.PULL, binds=True, number=8, identity=identity)

    assert end.ready
    assert said == [OPENING, b"\x07\0\0"]
    assert end.receive(frame(b"a") + frame(b"b", 1) + frame(b"c" * 300)) == [b"a", b"b", b"c" * 300]


def test_a_pusher_that_connects_says_at_once_what_it_is_to_zmtp_2():
    end, said = greet_v2(SocketType.PUSH, binds=False, number=7)

    assert end.ready
    assert said == [OPENING + b"\x08\0\0", b""]
    assert b"".join(end.encode_messages([b"a", b"b"])) == b"\0\1a\0\1b"


def test_both_ends_speak_zmtp_2_with_themselves():
    def older(end, data):
        return data[:10] + b"\1" + data[11:] if data.startswith(OPENING) else data

    push, pull = null(SocketType.PUSH, binds=False, limits=V2), null(limits=V2)
    link = Link(push, pull, change=older).run().send(push, [b"a"], [b"b", b"c"])

    assert push.ready
    assert pull.ready
    assert link.accepted[pull] == [b"a", b"b", b"c"]


@pytest.mark.parametrize(("number", "name"), [(0, "PAIR"), (7, "PULL"), (6, "ROUTER"), (99, "99")])
def test_a_wrong_type_of_zmtp_2_is_named_and_gets_no_answer(number, name):
    end, said = greet_v2(SocketType.PULL, binds=True, number=number)

    assert fault(end) is Fault.SOCKET_TYPE
    assert name in str(end.failure)
    assert said == [OPENING, b""]


@pytest.mark.parametrize("identity", [b"\x01\0", b"\x02" + bytes(8), b"\x04\0"])
def test_the_identity_of_zmtp_2_is_one_short_last_frame(identity):
    end = null(limits=V2)
    end.receive(V2_GREETING + b"\x08" + identity)

    assert fault(end) is Fault.PROTOCOL


def test_zmtp_2_has_no_commands():
    end, _ = greet_v2(SocketType.PULL, binds=True, number=8)

    assert end.receive(frame(b"a") + command(b"\4PING\0\0") + frame(b"b")) == [b"a"]
    assert end.failure.fault is Fault.PROTOCOL


def test_a_failure_lasts_and_nothing_more_is_taken_or_kept():
    end = null()
    end.receive(b"G")
    failure = end.failure

    assert end.receive(b"ET / HTTP/1.1\r\n" * 1000) == []
    assert end.receive(greeting() + ready() + frame(b"x")) == []
    assert end.failure is failure
    assert not end.ready
    assert end.held == 0

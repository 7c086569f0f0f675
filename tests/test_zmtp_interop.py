"""Our ZMTP and libzmq's: all types, both directions, with keys and without, with heartbeats."""

from itertools import product

import pytest

from zmqpush.core.zmtp.errors import ZmtpError
from zmqpush.core.zmtp.metadata import SocketType
from zmtp_wire import MESSAGES, Wire, libzmq, make_end, talk

BIG = b"x" * 300_000
PARTS = [part for parts in MESSAGES for part in parts]


@pytest.mark.parametrize(
    ("kind", "binds", "with_keys"), [*product(SocketType, (False, True), (False, True))]
)
def test_messages_pass_in_both_directions_and_heartbeats_are_answered(kind, binds, with_keys):
    with libzmq(kind.peer, binds=binds, with_keys=with_keys) as (peer, socket):
        wire = Wire(make_end(kind, binds=binds, with_keys=with_keys), socket)
        took = talk(kind, wire, peer)

        assert took == ([] if kind is SocketType.PULL else MESSAGES)
        assert wire.taken == ([] if kind is SocketType.PUSH else PARTS)
        for _ in range(4):
            before = len(wire.steps)
            wire.run(lambda before=before: any("says" in it for it in wire.steps[before:]))
        if kind is not SocketType.PULL:
            wire.send([BIG])
            assert peer.recv_multipart()[-1] == BIG
        else:
            peer.send(BIG)
            wire.run(lambda: wire.taken[-1:] == [BIG])
        assert wire.end.held == 0


@pytest.mark.parametrize(("kind", "binds"), [*product(SocketType, (False, True))])
def test_a_peer_of_another_type_is_named(kind, binds):
    with libzmq("PAIR", binds=binds, with_keys=False) as (_, socket):
        wire = Wire(make_end(kind, binds=binds, with_keys=False), socket)
        with pytest.raises((ZmtpError, ConnectionError)):
            wire.run(lambda: wire.end.ready)

        assert not wire.end.ready
        if binds:  # else libzmq may close first
            assert str(wire.end.failure) == f"it is a PAIR socket, not a {kind.peer}"

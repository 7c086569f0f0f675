"""What libzmq said, as it was recorded: tests/zmtp_wire.py."""

import json
from itertools import product

import pytest

from zmqpush.core.zmtp import curve
from zmqpush.core.zmtp.errors import Fault
from zmqpush.core.zmtp.metadata import SocketType
from zmtp_wire import MESSAGES, TRANSCRIPTS, make_end

CASES = [*product(SocketType, (False, True), (False, True))]
CURVE_CASES = [(kind, binds) for kind, binds, with_keys in CASES if with_keys]


def transcript(kind, binds, with_keys):
    name = f"{kind}-{'binds' if binds else 'connects'}-{'curve' if with_keys else 'null'}"
    return json.loads((TRANSCRIPTS / f"{name.lower()}.json").read_text())


def said(kind, binds):
    """Return all that libzmq said in one connection with keys."""
    steps = transcript(kind, binds, True)["steps"]
    return b"".join(bytes.fromhex(step["peer"]) for step in steps if "peer" in step)


@pytest.mark.parametrize(("kind", "binds", "with_keys"), CASES)
def test_a_transcript_is_taken_and_answered_as_it_was(kind, binds, with_keys, monkeypatch):
    it = transcript(kind, binds, with_keys)
    pairs = iter(it["pairs"])
    numbers = iter(it["numbers"])
    monkeypatch.setattr(curve, "crypto_box_keypair", lambda: tuple(map(bytes.fromhex, next(pairs))))
    monkeypatch.setattr(curve, "randombytes", lambda size: bytes.fromhex(next(numbers)))
    end = make_end(kind, binds=binds, with_keys=with_keys)
    taken = []
    for step in it["steps"]:
        if "peer" in step:
            taken += map(bytes, end.receive(bytes.fromhex(step["peer"])))
            assert not end.failure
        elif "says" in step:
            assert end.take_output().hex() == step["says"]
        else:
            parts = [bytes.fromhex(part) for part in step["sends"]]
            assert b"".join(end.encode_parts(parts)).hex() == step["bytes"]

    assert end.ready
    assert taken == ([] if kind is SocketType.PUSH else [p for parts in MESSAGES for p in parts])
    assert end.take_output() == b""
    assert end.held == 0


@pytest.mark.parametrize(("kind", "binds"), CURVE_CASES)
def test_a_recorded_peer_with_keys_is_refused(kind, binds):
    end = make_end(kind, binds=binds, with_keys=True)

    assert end.receive(said(kind, binds)) == []
    assert not end.ready
    assert end.failure.fault is Fault.KEY


@pytest.mark.parametrize(("kind", "binds"), CURVE_CASES)
def test_what_was_recorded_of_a_peer_is_refused_by_the_other_role(kind, binds):
    end = make_end(kind.peer, binds=not binds, with_keys=True)

    assert end.receive(said(kind, binds)) == []
    assert not end.ready
    assert end.failure


def test_libzmq_is_as_the_profile_says():
    """It pads its signature with a 1, is no server, and hides commands of traffic in messages."""
    for kind, binds, with_keys in CASES:
        steps = transcript(kind, binds, with_keys)["steps"]
        it = b"".join(bytes.fromhex(step["peer"]) for step in steps if "peer" in step)
        assert it[8] == 1
        assert it[32] == 0
        assert (b"\4PING" in it) == (not with_keys)
        if with_keys:
            assert it[it.rindex(b"\7MESSAGE") - 2] == 0

"""
Who reaches the open port can harm neither zmqpull nor the honest senders.

They send all the time here, and nothing of theirs is lost or repeated.
"""

import contextlib
import os
import socket
import struct
import threading

import pytest
import zmq

from chaos import LONG as LONG_DOSE, DOSE
from helpers import wait_until
from hostile import (
    COMMAND,
    LONG,
    MORE,
    Target,
    connect,
    frame,
    greeting,
    is_closed,
    pour,
    ready,
    shake_hands,
)
from peers import bare, greet, receive
from zmqpush.core.frames import Ack, Data, Hello, Reset, decode, encode

MIB = 1 << 20
# Beside --memory: the program, libzmq, and the honest senders' credit.
AT_REST = 160 * MIB
# What a peer brings until it is cut off.
UNTIL_CUT = 320 * MIB
IDLE = 10_000 if DOSE is LONG_DOSE else 2_000


@pytest.fixture
def target(start, tmp_path):
    return Target(start, tmp_path, plain=True)


def test_lengths_that_peers_claim_are_not_believed(target):
    claims = [
        greeting() + ready() + frame(b"", LONG, claim=8 << 30),
        greeting() + ready() + frame(b"", LONG, claim=1 << 40),
        greeting() + ready() + frame(b"", LONG | MORE, claim=(1 << 64) - 1),
        greeting() + frame(b"", LONG | COMMAND, claim=256 * MIB),
        greeting(b"CURVE") + frame(b"", LONG | COMMAND, claim=256 * MIB),
    ]
    with target.under_attack("lengths"):
        for port in (target.port, target.plain_port):
            for claim in claims:
                with connect(port, claim) as peer:
                    pour(peer, bytes(MIB), 256 * MIB)
                    wait_until(lambda peer=peer: is_closed(peer))

    assert target.peak < AT_REST
    target.verify()


def test_garbage_ends_its_own_connection_only(target):
    garbage = [
        b"GET / HTTP/1.1\r\nHost: collector\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(500),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"<34>1 2026-01-01T00:00:00Z host app - - - a line of syslog\n",
        os.urandom(MIB),
    ]
    with target.under_attack("garbage"):
        for number in range(200):
            with contextlib.ExitStack() as stack:
                # The MiB only now and then: libzmq reads little of it.
                some = garbage if not number % 10 else garbage[:4] * 2
                port = target.port if number % 2 else target.plain_port
                peers = [stack.enter_context(connect(port, data)) for data in some]
                if not number % 10:
                    wait_until(lambda peers=peers: all(map(is_closed, peers)))

    assert target.peak < AT_REST
    assert "does not speak ZMTP 3" in target.errors
    assert target.errors.count("\n") < 30
    target.verify()


def test_who_connects_and_does_not_finish_the_handshake_is_cut_off(target):
    before = target.connections
    memory = target.memory
    with target.under_attack(f"{IDLE} idle connections"), contextlib.ExitStack() as stack:
        peers = [stack.enter_context(connect(target.port)) for _ in range(IDLE)]
        wait_until(lambda: target.connections > before + IDLE // 2)
        print(f"{(target.memory - memory) / IDLE:.0f} bytes each")  # noqa: T201
        # Some send their greeting, a byte at a time.
        slow, rest = peers[:20], iter(greeting())
        stop = threading.Event()

        def drip() -> None:
            while not stop.wait(1):
                byte = bytes((next(rest),))
                for peer in slow:
                    with contextlib.suppress(ConnectionError):
                        peer.sendall(byte)

        dripping = threading.Thread(target=drip)
        dripping.start()
        wait_until(lambda: target.connections <= before)
        stop.set()
        dripping.join()

    assert target.peak < AT_REST + IDLE * 10_000
    target.verify()


@pytest.mark.parametrize("port", ["port", "plain_port"])
@pytest.mark.parametrize(
    "part",
    [frame(bytes(MIB), MORE), frame(b"", MORE) * MIB],
    ids=["large parts", "empty parts"],
)
def test_a_message_without_an_end_is_cut_off(start, tmp_path, port, part):
    target = Target(start, tmp_path, plain=True)
    kind = {"port": b"DEALER", "plain_port": b"PUSH"}[port]
    with target.under_attack(f"endless multipart at {port}"):
        for _ in range(3):
            with shake_hands(getattr(target, port), kind) as peer:
                assert pour(peer, part, 4 << 30) < 4 << 30

    assert target.peak < AT_REST + UNTIL_CUT
    assert "memory is short: cut off 127.0.0.1:" in target.errors
    target.verify()

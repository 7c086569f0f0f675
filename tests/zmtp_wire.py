"""
A connection of ours to a socket of libzmq, and what was recorded of such connections.

Usage: python tests/zmtp_wire.py: record tests/transcripts anew, with the libzmq of pyzmq.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import zmq
from nacl.bindings import crypto_box_keypair, randombytes
from zmq.utils import z85

from zmqpush.core.zmtp import curve
from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.curve import CurveClient, CurveServer, Keys
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.core.zmtp.null import Null
from zmtp_links import CLIENT, SERVER

PATIENCE = 30.0
TRANSCRIPTS = Path(__file__).parent / "transcripts"
LIMITS = Limits(1 << 20, max_parts=100)
# What each end sends.
MESSAGES = [[b"a"], [b""], [b"b", b"", b"c" * 300]]


def make_end(kind: SocketType, *, binds: bool, with_keys: bool) -> Connection:
    """Return an end of ours."""
    if not with_keys:
        return Connection(kind, Null(binds=binds), LIMITS)
    if binds:
        return Connection(kind, CurveServer(SERVER, CLIENT.public.__eq__), LIMITS)
    return Connection(kind, CurveClient(CLIENT, SERVER.public), LIMITS)


@contextlib.contextmanager
def libzmq(
    kind: str, *, binds: bool, with_keys: bool
) -> Iterator[tuple[zmq.Socket, socket.socket]]:
    """Return a socket of libzmq and one that is connected to it; ours binds, or it does."""
    with (
        zmq.Context() as context,
        context.socket(getattr(zmq, kind)) as peer,
        contextlib.ExitStack() as stack,
    ):
        peer.linger = 0
        peer.rcvtimeo = peer.sndtimeo = int(PATIENCE * 1000)
        peer.heartbeat_ivl = 50
        peer.heartbeat_timeout = int(PATIENCE * 1000)  # tests may be slow
        if with_keys:
            ours: Keys = CLIENT if binds else SERVER  # those of the socket of libzmq
            peer.curve_publickey, peer.curve_secretkey = map(z85.encode, ours)
            if binds:
                peer.curve_serverkey = z85.encode(SERVER.public)
            else:
                peer.curve_server = True
        if binds:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            peer.connect(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
            wire, _ = listener.accept()
        else:
            port = peer.bind_to_random_port("tcp://127.0.0.1")
            wire = socket.create_connection(("127.0.0.1", port))
        yield peer, stack.enter_context(wire)


class Wire:
    """
    Carries bytes between a connection of ours and a socket.

    Attributes:
        steps: What passed, in order: what the peer said, what we said, what we sent.
        taken: The parts that came.

    """

    def __init__(self, end: Connection, wire: socket.socket) -> None:
        self.end = end
        self._wire = wire
        wire.settimeout(0.05)
        self.steps: list[dict[str, Any]] = []
        self.taken: list[bytes] = []

    def run(self, until: Callable[[], object]) -> None:
        """
        Go on until a condition holds.

        Raises:
            ZmtpError: If our end must close the connection.
            ConnectionError: If the peer has closed it.

        """
        deadline = time.monotonic() + PATIENCE
        while True:
            if said := self.end.take_output():
                self.steps.append({"says": said.hex()})
                self._wire.sendall(said)
            if until():
                return
            if self.end.failure:
                raise self.end.failure
            assert time.monotonic() < deadline
            with contextlib.suppress(TimeoutError):
                data = self._wire.recv(1 << 18)
                if not data:
                    raise ConnectionError("the peer has closed it")
                self.steps.append({"peer": data.hex()})
                self.taken += map(bytes, self.end.receive(data))

    def send(self, parts: list[bytes]) -> None:
        """Send a message."""
        data = b"".join(self.end.encode_parts(parts))
        self.steps.append({"sends": [part.hex() for part in parts], "bytes": data.hex()})
        self._wire.sendall(data)


def talk(kind: SocketType, wire: Wire, peer: zmq.Socket) -> list[list[bytes]]:
    """Shake hands and exchange messages; return what libzmq took."""
    end = wire.end
    wire.run(lambda: end.ready)
    route: list[bytes] = []
    if kind is SocketType.DEALER:  # a ROUTER answers only who has spoken
        wire.send([b"who"])
        route = peer.recv_multipart()[:1]
    took = []
    if kind is not SocketType.PULL:
        for parts in MESSAGES:
            wire.send(parts)
        took = [peer.recv_multipart()[len(route) :] for _ in MESSAGES]
    if kind is not SocketType.PUSH:
        for parts in MESSAGES:
            peer.send_multipart(route + parts)
        wire.run(lambda: len(wire.taken) >= sum(map(len, MESSAGES)))
    return took


def record(kind: SocketType, *, binds: bool, with_keys: bool) -> dict[str, Any]:
    """Return a transcript; with the random numbers of our end, so that it can be replayed."""
    pairs: list[tuple[bytes, bytes]] = []
    numbers: list[bytes] = []

    def pair() -> tuple[bytes, bytes]:
        pairs.append(crypto_box_keypair())
        return pairs[-1]

    def number(size: int) -> bytes:
        numbers.append(randombytes(size))
        return numbers[-1]

    with (
        mock.patch.multiple(curve, crypto_box_keypair=pair, randombytes=number),
        libzmq(kind.peer, binds=binds, with_keys=with_keys) as (peer, socket_of_peer),
    ):
        wire = Wire(make_end(kind, binds=binds, with_keys=with_keys), socket_of_peer)
        talk(kind, wire, peer)
        before = len(wire.steps)
        wire.run(lambda: any("says" in step for step in wire.steps[before:]))  # a PONG
    return {
        "peer": f"libzmq {zmq.zmq_version()}, {kind.peer}, {'connects' if binds else 'binds'}",
        "pairs": [[half.hex() for half in it] for it in pairs],
        "numbers": [it.hex() for it in numbers],
        "steps": wire.steps,
    }


def main() -> None:
    """Record all of them."""
    TRANSCRIPTS.mkdir(exist_ok=True)
    for kind, binds, with_keys in product(SocketType, (False, True), (False, True)):
        name = f"{kind}-{'binds' if binds else 'connects'}-{'curve' if with_keys else 'null'}"
        transcript = record(kind, binds=binds, with_keys=with_keys)
        path = TRANSCRIPTS / f"{name.lower()}.json"
        path.write_text(json.dumps(transcript, indent=1) + "\n")


if __name__ == "__main__":
    main()

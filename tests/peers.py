"""Bare peers of acknowledged delivery: sockets that speak its frames, and nothing else."""

import contextlib
from collections.abc import Iterator

import zmq

from helpers import PATIENCE
from zmqpush.core.protocol.messages import (
    Ack,
    Data,
    Hello,
    Message,
    Welcome,
    decode,
    encode,
    public_name,
)

SECRET = "ab" * 16
STREAM = public_name(SECRET)


@contextlib.contextmanager
def bare(kind: int, endpoint: str, routing_id: bytes = b"") -> Iterator[zmq.Socket]:
    """Return a socket: a ROUTER or PULL is bound, a DEALER or PUSH connected."""
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDTIMEO, int(PATIENCE * 1000))
        socket.setsockopt(zmq.RCVTIMEO, int(PATIENCE * 1000))
        socket.setsockopt(zmq.RECONNECT_IVL, 10)
        if routing_id:
            socket.setsockopt(zmq.ROUTING_ID, routing_id)
        if kind in (zmq.ROUTER, zmq.PULL):
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
        yield socket


def receive(socket: zmq.Socket, wanted: type[Message]) -> tuple[Message, int]:
    """Return the next message of a kind, and its session."""
    while True:
        message, session = decode(socket.recv())
        if isinstance(message, wanted):
            return message, session


def greet(socket: zmq.Socket, secret: str = SECRET, **values: object) -> tuple[dict, int]:
    """Begin a session; return what WELCOME says, and the session."""
    hello = {"versions": [2, 2], "secret": secret, "run": "cd" * 16, "first": 1, **values}
    socket.send(encode(Hello(hello), 0))
    welcome, session = receive(socket, Welcome)
    return welcome.values, session


def deliver(socket: zmq.Socket, session: int, first: int, *records: bytes) -> None:
    """Send a block, and wait until all of it is acknowledged."""
    block = Data.of(first, len(records), b"".join(record + b"\n" for record in records))
    socket.send(encode(block, session))
    while receive(socket, Ack)[0].acked < block.end:
        pass

"""What the tests of ZMTP share: both ends of a connection without a network, and its bytes."""

from collections.abc import Callable

from nacl.bindings import crypto_box_seed_keypair

from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.curve import CurveClient, CurveServer, Keys
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.core.zmtp.null import Null

LIMITS = Limits(1000, max_parts=5)
SERVER, CLIENT, OTHER = (Keys(*crypto_box_seed_keypair(bytes((n,)) * 32)) for n in (1, 2, 3))
GREETING_BYTES = 64


def greeting(mechanism: bytes = b"NULL", minor: int = 1, as_server: int = 0) -> bytes:
    """Return a greeting as RFC 37 has it."""
    signature = b"\xff" + bytes(8) + b"\x7f\x03"
    return (
        signature + bytes((minor,)) + mechanism.ljust(20, b"\0") + bytes((as_server,)) + bytes(31)
    )


def frame(body: bytes, flags: int = 0, *, long: bool = False) -> bytes:
    """Return a frame; it is long if it must be, or if that is wanted."""
    if long or len(body) > 255:
        return bytes((flags | 2,)) + len(body).to_bytes(8) + body
    return bytes((flags, len(body))) + body


def command(body: bytes) -> bytes:
    """Return a command."""
    return frame(body, 4)


def field(name: bytes, value: bytes) -> bytes:
    """Return a property of metadata."""
    return bytes((len(name),)) + name + len(value).to_bytes(4) + value


def ready(kind: bytes = b"PUSH", more: bytes = b"") -> bytes:
    """Return a READY of the mechanism NULL."""
    return command(b"\x05READY" + field(b"Socket-Type", kind) + more)


def null(
    kind: SocketType = SocketType.PULL, *, binds: bool = True, limits: Limits = LIMITS
) -> Connection:
    """Return an end without keys."""
    return Connection(kind, Null(binds=binds), limits)


def greeted(
    kind: SocketType = SocketType.PULL, *, binds: bool = True, limits: Limits = LIMITS
) -> Connection:
    """Return an end without keys that is ready."""
    end = null(kind, binds=binds, limits=limits)
    assert end.receive(greeting() + ready(kind.peer.encode())) == []
    assert end.ready
    end.take_output()
    return end


def client(
    kind: SocketType = SocketType.PUSH,
    keys: Keys = CLIENT,
    server: bytes = SERVER.public,
    limits: Limits = LIMITS,
) -> Connection:
    """Return an end that connects, with keys."""
    return Connection(kind, CurveClient(keys, server), limits)


def server(
    kind: SocketType = SocketType.PULL,
    keys: Keys = SERVER,
    admits: Callable[[bytes], bool] = CLIENT.public.__eq__,
    limits: Limits = LIMITS,
) -> Connection:
    """Return an end that binds, with keys."""
    return Connection(kind, CurveServer(keys, admits), limits)


class Link:
    """
    What joins an end that connects to one that binds; it may change what passes.

    Args:
        one: The end that connects.
        other: The end that binds.
        change: Is given the sender and each piece, returns what arrives of it. A piece is
            the signature, the rest of the greeting, a command, or a message.

    Attributes:
        sent: All pieces in the order in which they were sent, with their sender.
        accepted: The parts that each end has taken.

    """

    def __init__(
        self,
        one: Connection,
        other: Connection,
        change: Callable[[Connection, bytes], bytes] = lambda _, data: data,
    ) -> None:
        self.one, self.other = one, other
        self._change = change
        self.sent: list[tuple[Connection, bytes]] = []
        self.accepted: dict[Connection, list[bytes]] = {one: [], other: []}

    def pass_on(self, end: Connection, data: bytes) -> None:
        """Carry bytes from an end to the other."""
        self.sent.append((end, data))
        peer = self.other if end is self.one else self.one
        self.accepted[peer] += map(bytes, peer.receive(self._change(end, data)))

    def run(self) -> "Link":
        """Carry what both have to say of themselves, until they are silent."""
        moved = True
        while moved:
            moved = False
            for end in (self.one, self.other):
                data = end.take_output()
                while data:
                    moved = True
                    size = self._piece(end, data)
                    self.pass_on(end, data[:size])
                    data = data[size:]
        return self

    def _piece(self, end: Connection, data: bytes) -> int:
        sent = sum(len(piece) for it, piece in self.sent if it is end)
        if sent < GREETING_BYTES:
            return GREETING_BYTES - sent if sent else 11
        return 9 + int.from_bytes(data[1:9]) if data[0] & 2 else 2 + data[1]

    def send(self, end: Connection, *messages: list[bytes]) -> "Link":
        """Have an end send messages."""
        for parts in messages:
            self.pass_on(end, b"".join(end.encode_parts(parts)))
        return self


def curve_link(**changes: Callable[[Connection, bytes], bytes]) -> Link:
    """Return a link of two ends with keys that fit, before their handshake."""
    return Link(client(SocketType.DEALER), server(SocketType.ROUTER), **changes)

"""
Metadata of a handshake: names and values, and the socket type among them.

::

    name length (1)  name  value length (4)  value
"""

from collections.abc import Iterator
from enum import StrEnum

from zmqpush.core.zmtp.errors import Fault, ZmtpError


class SocketType(StrEnum):
    """The types of sockets that zmqpush and zmqpull have."""

    PUSH = "PUSH"
    PULL = "PULL"
    DEALER = "DEALER"
    ROUTER = "ROUTER"

    @property
    def peer(self) -> "SocketType":
        """The one type that it talks to."""
        return _PEERS[self]


_PEERS = {
    SocketType.PUSH: SocketType.PULL,
    SocketType.PULL: SocketType.PUSH,
    SocketType.DEALER: SocketType.ROUTER,
    SocketType.ROUTER: SocketType.DEALER,
}
# What ZMTP 2.0 calls the types of plain delivery.
V2_TYPES = {SocketType.PULL: 7, SocketType.PUSH: 8}
_V2_NAMES = ("PAIR", "PUB", "SUB", "REQ", "REP", "DEALER", "ROUTER", "PULL", "PUSH")
_TYPE = "socket-type"
_SHOWN = 40


def encode(socket_type: SocketType) -> bytes:
    """Return the metadata of a socket."""
    return _property(b"Socket-Type", socket_type.encode()) + _property(b"Identity", b"")


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4) + value


def check_type(metadata: bytes, socket_type: SocketType) -> None:
    """
    Check that a peer's metadata names the type that a socket talks to.

    Raises:
        ZmtpError: If it names another or none, or is malformed.

    """
    values: dict[str, bytes] = {}
    for name, value in _read(metadata):
        if name in values:
            raise ZmtpError(Fault.PROTOCOL, f"metadata with {printable(name.encode())} twice")
        values[name] = value
    if _TYPE not in values:
        raise ZmtpError(Fault.PROTOCOL, "metadata without a socket type")
    _compare(values[_TYPE], socket_type)


def check_v2_type(number: int, socket_type: SocketType) -> None:
    """
    Check the number with which a peer that speaks ZMTP 2.0 says what it is.

    Raises:
        ZmtpError: If it is another type.

    """
    name = _V2_NAMES[number] if number < len(_V2_NAMES) else f"type {number}"
    _compare(name.encode(), socket_type)


def _compare(theirs: bytes, socket_type: SocketType) -> None:
    if theirs != socket_type.peer.encode():
        raise ZmtpError(
            Fault.SOCKET_TYPE, f"it is a {printable(theirs)} socket, not a {socket_type.peer}"
        )


def _read(metadata: bytes) -> Iterator[tuple[str, bytes]]:
    at = 0
    while at < len(metadata):
        start = at + 1
        stop = start + metadata[at]
        name = metadata[start:stop]
        size = int.from_bytes(metadata[stop : stop + 4])
        at = stop + 4 + size
        if not name or at > len(metadata) or not name.isascii():
            raise ZmtpError(Fault.PROTOCOL, "malformed metadata")
        yield name.decode("ascii").lower(), metadata[stop + 4 : at]


def printable(text: bytes) -> str:
    """Return what a peer says as something to show: short, without control characters."""
    shown = text[:_SHOWN].decode("ascii", "backslashreplace")
    return "".join(c if c.isprintable() else "?" for c in shown)

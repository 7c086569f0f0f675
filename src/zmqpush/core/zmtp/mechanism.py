"""
What a security mechanism does: the handshake, and each frame after it.

A step of a handshake is a generator: it yields how many bytes it wants, and is sent them.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from zmqpush.core.zmtp.errors import Fault, ZmtpError
from zmqpush.core.zmtp.frames import COMMAND, LONG, Body, Sealed, Unsealed
from zmqpush.core.zmtp.metadata import printable

# Far more than the metadata of any peer, in bytes.
_MAX_COMMAND_BYTES = 8 << 10
_ERROR = b"\x05ERROR"


class Mechanism(Protocol):
    """
    One end of one connection.

    Attributes:
        name: As in greetings.
        binds: Whether this end is the server.
        overhead: How much longer what a frame carries is than the body in it, in bytes.
        key: The peer's public key, once the handshake is over; None if there is none.

    """

    name: bytes
    binds: bool
    overhead: int
    key: bytes | None

    def handshake(
        self, write: Callable[[bytes], None], metadata: bytes, check: Callable[[bytes], None]
    ) -> Generator[int, bytes, None]:
        """
        Do the handshake.

        Args:
            write: Sends bytes.
            metadata: What this end says of itself.
            check: Takes the peer's metadata, or raises.

        Raises:
            ZmtpError: If the peer is to be refused.

        """

    def encode_message(self, body: bytes) -> list[Sealed | Unsealed]:
        """Return buffers with a message of one frame; of a long one not all may be encrypted."""

    def encode_messages(self, bodies: Sequence[bytes]) -> list[Sealed]:
        """Return buffers with a message of one frame for each body."""

    def encode_parts(self, bodies: Sequence[bytes]) -> list[Sealed]:
        """Return buffers with one message, whose parts are the bodies, of which there is one."""

    def encode_command(self, body: bytes) -> bytes:
        """Return the frame of a command."""

    def open(self, flags: bytearray, bodies: list[Body], *, views: bool) -> None:
        """
        Put in the place of frames what is in them.

        Args:
            flags: Of the frames.
            bodies: Of the frames.
            views: Whether a long body may be a view.

        Raises:
            ZmtpError: If a frame is not what the peer has sent. It is gone, with all after it.

        """


def read_command(name: bytes) -> Generator[int, bytes, bytes]:
    """
    Read a command of a handshake; return all of its body.

    Args:
        name: Of the command, and the length of the name before it.

    Raises:
        ZmtpError: If something else comes.

    """
    flags, size = yield 2
    if flags & ~LONG != COMMAND:
        raise ZmtpError(Fault.PROTOCOL, "a message within the handshake")
    if flags & LONG:
        size = int.from_bytes(bytes((size,)) + (yield 7))
    if size > _MAX_COMMAND_BYTES:
        raise ZmtpError(Fault.LIMIT, f"a handshake command of {size} bytes")
    body = yield size
    if body.startswith(_ERROR):
        reason = printable(body[len(_ERROR) + 1 :])
        raise ZmtpError(Fault.REFUSED, f"it refuses the handshake: {reason or 'no reason'}")
    if not body.startswith(name):
        theirs = printable(body[1 : len(name)]) or "nothing"
        raise ZmtpError(Fault.PROTOCOL, f"{theirs} instead of {name[1:].decode()}")
    return body

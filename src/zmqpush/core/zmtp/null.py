"""The mechanism without keys: https://rfc.zeromq.org/spec/37/, "The NULL Mechanism"."""

from collections.abc import Callable, Generator
from typing import ClassVar

from zmqpush.core.zmtp import frames
from zmqpush.core.zmtp.frames import Body
from zmqpush.core.zmtp.mechanism import read_command

_READY = b"\x05READY"


class Null:
    """
    A :class:`~zmqpush.core.zmtp.mechanism.Mechanism` without keys.

    Who binds hears what the peer is before it answers: a libzmq that connected and was
    told of another socket type does not come again.
    """

    name = b"NULL"
    overhead = 0
    key: bytes | None = None
    encode_message: ClassVar = staticmethod(frames.encode_message)
    encode_messages: ClassVar = staticmethod(frames.encode_messages)
    encode_parts: ClassVar = staticmethod(frames.encode_parts)
    encode_command: ClassVar = staticmethod(frames.encode_command)

    def __init__(self, *, binds: bool) -> None:
        self.binds = binds

    def handshake(
        self, write: Callable[[bytes], None], metadata: bytes, check: Callable[[bytes], None]
    ) -> Generator[int, bytes, None]:
        """Exchange READY."""
        if not self.binds:
            write(frames.encode_command(_READY + metadata))
        ready = yield from read_command(_READY)
        check(ready[len(_READY) :])
        if self.binds:
            write(frames.encode_command(_READY + metadata))

    def open(self, flags: bytearray, bodies: list[Body], *, views: bool) -> None:
        """Do nothing: nothing is encrypted."""

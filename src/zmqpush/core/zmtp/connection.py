"""One connection: greeting, handshake, traffic."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from zmqpush.core.zmtp import greeting, metadata
from zmqpush.core.zmtp.errors import Fault, ZmtpError
from zmqpush.core.zmtp.frames import (
    COMMAND,
    PART_OVERHEAD,
    Body,
    FrameReader,
    Sealed,
    Unsealed,
    frame_size,
)
from zmqpush.core.zmtp.mechanism import Mechanism
from zmqpush.core.zmtp.metadata import V2_TYPES, SocketType, printable

_PING = b"\x04PING"
_PONG = b"\x04PONG"
_TTL_BYTES = 2
# A command is read so far: a PING's context has 16 bytes, and no other says anything to us.
_MAX_READ_BYTES = len(_PING) + _TTL_BYTES + 16


@dataclass(frozen=True, slots=True)
class Limits:
    """
    What is taken of a peer.

    Attributes:
        max_bytes: The longest message, in bytes: 255 at least.
        max_parts: How many parts a message may have.
        views: Whether a long part may be a view of what was received, not a copy.
        v2: Whether ZMTP 2.0 is spoken with a peer that knows no later one, without keys.

    """

    max_bytes: int
    max_parts: int = 1
    views: bool = False
    v2: bool = False


class Connection:
    """
    Bytes to and from one peer.

    Args:
        socket_type: What this end is.
        mechanism: How it encrypts.
        limits: What is taken of the peer.

    Attributes:
        ready: Whether the handshake is over, and messages may be sent.
        failure: Why the connection must be closed, once it must be: nothing more is taken. No
            method that takes bytes of the peer raises.

    """

    def __init__(self, socket_type: SocketType, mechanism: Mechanism, limits: Limits) -> None:
        self._mechanism = mechanism
        self._limits = limits
        views = limits.views or mechanism.overhead > 0  # what is encrypted is copied anyway
        self._reader = FrameReader(limits.max_bytes + mechanism.overhead, views=views)
        self._output: list[bytes] = []
        self._said = 0
        self._pong = b""
        self._parts: list[Body] = []  # of a message whose end has not come
        self._part_bytes = 0
        self._v2 = False
        self._early = b""  # of the handshake, and not enough for its next step
        self._steps = _shake_hands(socket_type, mechanism, self._output.append, v2=limits.v2)
        self._wanted = next(self._steps)
        self.ready = False
        self.failure: ZmtpError | None = None

    @property
    def key(self) -> bytes | None:
        """The peer's public key, once the connection is ready; None without encryption."""
        return self._mechanism.key

    @property
    def held(self) -> int:
        """
        How much memory what is not complete takes, in bytes.

        A part that is a view may keep twice as much.
        """
        parts = self._part_bytes + PART_OVERHEAD * len(self._parts)
        return self._reader.held + len(self._early) + parts

    @property
    def missing(self) -> int:
        """How many bytes an incomplete part lacks, as far as it is known."""
        return self._reader.missing

    @property
    def said(self) -> int:
        """
        How many steps of the handshake this end has taken.

        One before it has heard a greeting, two before it has heard all of it, and then one for
        each of its commands.
        """
        return self._said + len(self._output)

    def take_output(self) -> bytes:
        """
        Return what is to be sent, before messages or between them.

        What is encrypted is numbered: this and all messages are sent in the order in which
        they were returned.
        """
        output = b"".join(self._output)
        self._said += len(self._output)
        self._output.clear()
        if self._pong:
            output += self._mechanism.encode_command(self._pong)
            self._pong = b""
        return output

    def encode_message(self, body: bytes) -> list[Sealed | Unsealed]:
        """Return buffers with a message of one frame; of a long one not all may be encrypted."""
        return self._mechanism.encode_message(body)

    def encode_messages(self, bodies: Sequence[bytes]) -> list[Sealed]:
        """Return buffers with a message of one frame for each body."""
        return self._mechanism.encode_messages(bodies)

    def encode_parts(self, bodies: Sequence[bytes]) -> list[Sealed]:
        """Return buffers with one message, whose parts are the bodies; there is one at least."""
        return self._mechanism.encode_parts(bodies)

    def wire_size(self, size: int) -> int:
        """Return how many bytes are sent for a part of so many."""
        return frame_size(size + self._mechanism.overhead)

    def free(self) -> memoryview | None:
        """Return where the next bytes belong, if a long frame is not complete."""
        return self._reader.free()

    def fill(self, size: int) -> list[Body]:
        """Note that so many bytes were put there; return as :meth:`receive` does."""
        if self.failure:
            return []
        flags = bytearray()
        bodies: list[Body] = []
        try:
            if frame := self._reader.fill(size):
                flags.append(frame[0])
                bodies.append(frame[1])
        except Exception as exc:
            self._fail(exc)
        return self._take(flags, bodies)

    def receive(self, data: bytes) -> list[Body]:
        """Take what came; return the parts of all messages that are complete."""
        if self.failure:
            return []
        flags = bytearray()
        bodies: list[Body] = []
        try:
            if not self.ready:
                data = self._advance(data)
            if self.ready:
                self._reader.feed(data, flags, bodies)
        except Exception as exc:
            self._fail(exc)
        return self._take(flags, bodies)

    def _fail(self, exc: Exception) -> None:
        """Note an error: of two that one segment makes, the last one lies first in it."""
        if isinstance(exc, ZmtpError):
            # Its traceback would keep all that came, and what was in boxes, in a cycle.
            exc.__context__ = None
            self.failure = exc.with_traceback(None)
        else:  # a bug of ours must not let anybody in
            self.failure = ZmtpError(Fault.INTERNAL, f"an error of ours: {exc!r}")
            self.failure.__cause__ = exc

    def _advance(self, data: bytes) -> bytes:
        """Go on with the handshake; return what is left once it is over."""
        data = self._early + data
        at = 0
        while self._wanted <= len(data) - at:
            start, at = at, at + self._wanted
            try:
                self._wanted = self._steps.send(data[start:at])
            except StopIteration as exc:
                self._v2 = exc.value
                self._early = b""
                self.ready = True
                return data[at:]
        self._early = data[at:]
        return b""

    def _take(self, flags: bytearray, bodies: list[Body]) -> list[Body]:
        """Return the parts of all messages that are complete."""
        whole: list[Body] = []
        try:
            try:
                self._mechanism.open(flags, bodies, views=self._limits.views)
            finally:
                if not self._parts and not flags.strip(b"\0"):
                    whole = bodies  # each is a message
                else:
                    self._assemble(flags, bodies, whole)
        except Exception as exc:
            self._fail(exc)
        return whole

    def _assemble(self, flags: bytearray, bodies: list[Body], whole: list[Body]) -> None:
        """Do what commands say; add the parts of all messages that are complete."""
        if COMMAND not in flags:
            self._join(flags, bodies, whole)
            return
        others: list[Body] = []
        other_flags = bytearray()
        try:
            for flag, body in zip(flags, bodies, strict=True):
                if flag == COMMAND:
                    self._obey(bytes(body[:_MAX_READ_BYTES]), len(body))
                else:
                    other_flags.append(flag)
                    others.append(body)
        finally:
            self._join(other_flags, others, whole)

    def _join(self, flags: bytearray, bodies: list[Body], whole: list[Body]) -> None:
        start = 0
        while (end := flags.find(0, start)) >= 0:
            self._add(bodies[start : end + 1])
            whole += self._parts
            self._parts = []
            self._part_bytes = 0
            start = end + 1
        if start < len(bodies):
            self._add(bodies[start:])

    def _add(self, parts: list[Body]) -> None:
        self._parts += parts
        self._part_bytes += sum(map(len, parts))
        if len(self._parts) > self._limits.max_parts:
            most = self._limits.max_parts
            many = f"more than {most}" if most > 1 else "several"
            raise ZmtpError(Fault.LIMIT, f"a message of {many} parts")
        if self._part_bytes > self._limits.max_bytes:
            most = self._limits.max_bytes
            raise ZmtpError(Fault.LIMIT, f"a message of more than {most} bytes")

    def _obey(self, body: bytes, size: int) -> None:
        if self._v2:
            raise ZmtpError(Fault.PROTOCOL, "a command in ZMTP 2.0")
        if not body or not body[0] or 1 + body[0] > size:
            raise ZmtpError(Fault.PROTOCOL, "a malformed command")
        if body.startswith(_PING):
            if size < len(_PING) + _TTL_BYTES:
                raise ZmtpError(Fault.PROTOCOL, "a short PING")
            self._pong = _PONG + body[len(_PING) + _TTL_BYTES :]


def _shake_hands(
    socket_type: SocketType, mechanism: Mechanism, write: Callable[[bytes], None], *, v2: bool
) -> Generator[int, bytes, bool]:
    """Do the handshake; return whether ZMTP 2.0 is spoken from then on."""
    write(greeting.OPENING)
    version = yield from greeting.read_greeting()
    if version == greeting.V2:
        if not v2 or mechanism.name != b"NULL" or socket_type not in V2_TYPES:
            raise ZmtpError(Fault.VERSION, "it speaks ZMTP 2.0: libzmq 4 or later is wanted")
        yield from _shake_hands_v2(socket_type, write, binds=mechanism.binds)
        return True
    as_server = mechanism.binds and mechanism.name != b"NULL"
    write(greeting.encode_rest(mechanism.name, as_server=as_server))
    theirs = yield from greeting.read_mechanism()
    if theirs != mechanism.name:
        raise ZmtpError(
            Fault.MECHANISM,
            f"it has the mechanism {printable(theirs)}, not {mechanism.name.decode()}",
        )
    yield from mechanism.handshake(
        write,
        metadata.encode(socket_type),
        lambda data: metadata.check_type(data, socket_type),
    )
    return False


def _shake_hands_v2(
    socket_type: SocketType, write: Callable[[bytes], None], *, binds: bool
) -> Generator[int, bytes, None]:
    ours = bytes((V2_TYPES[socket_type], 0, 0))  # and an empty identity
    if not binds:
        write(ours)
    (number,) = yield 1
    metadata.check_v2_type(number, socket_type)
    if binds:  # a peer that has connected says its identity once it knows our type
        write(ours)
    flags, size = yield 2
    if flags:
        raise ZmtpError(Fault.PROTOCOL, "what should be its identity is not")
    yield size

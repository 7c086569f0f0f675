"""
Frames: https://rfc.zeromq.org/spec/37/, "Framing".

::

    flags (1 byte: MORE 1, LONG 2, COMMAND 4)  size (1 byte, or 8 if LONG)  body

A body is sliced out of what came, in a loop with a bound in each of its lines. Memory follows
what has come, not the size that a peer claims: it is four times as much at most.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

from zmqpush.core.zmtp.errors import Fault, ZmtpError

MORE = 1
LONG = 2
COMMAND = 4

# What a part, or a message without content, takes in memory beside its bytes.
PART_OVERHEAD = 64
_SHORT_HEADER = 2
LONG_HEADER = 9
_MAX_SHORT = 255
# An incomplete frame of which so much is there gets a buffer of its own, so many times longer.
_OWN_BUFFER_BYTES = 64 << 10
_GROWTH = 4
# A frame is not copied if it is longer, and at least half of what keeps it in memory.
_COPY_BYTES = 8 << 10

Body = bytes | memoryview
# What is sent; it does not change any more.
Sealed = bytes | bytearray


class Unsealed:
    """
    What is sent once it is encrypted, which takes time: a thread may do it.

    Args:
        message: What is sent.
        encrypt: Encrypts it, in place.

    """

    __slots__ = ("message", "seal")

    def __init__(self, message: bytearray, encrypt: Callable[[], None]) -> None:
        self.message = message
        self.seal = encrypt

    def __len__(self) -> int:
        return len(self.message)


class _Prefixes(dict[int, bytes]):
    """What goes before a body of so many bytes."""

    _MOST = 1 << 12

    def __init__(self, flags: int) -> None:
        self._flags = flags

    def __missing__(self, size: int) -> bytes:
        prefix = _prefix(self._flags, size)
        if len(self) < self._MOST:
            self[size] = prefix
        return prefix


def _prefix(flags: int, size: int) -> bytes:
    if size <= _MAX_SHORT:
        return bytes((flags, size))
    return bytes((flags | LONG,)) + size.to_bytes(8)


_last = _Prefixes(0).__getitem__
_more = _Prefixes(MORE).__getitem__


def frame_size(size: int) -> int:
    """Return how long the frame is whose body has so many bytes."""
    return size + (_SHORT_HEADER if size <= _MAX_SHORT else LONG_HEADER)


def encode_command(body: bytes) -> bytes:
    """Return a command's frame."""
    return _prefix(COMMAND, len(body)) + body


def encode_message(body: Sealed | Unsealed) -> list[Sealed | Unsealed]:
    """Return buffers with a message of one frame."""
    return [_last(len(body)), body]


def encode_messages(bodies: Sequence[Sealed]) -> list[Sealed]:
    """Return buffers with a message of one frame for each body."""
    if len(bodies) == 1:
        return [_last(len(bodies[0])), bodies[0]]
    return [_join(map(_last, map(len, bodies)), bodies)]


def encode_parts(bodies: Sequence[Sealed]) -> list[Sealed]:
    """Return buffers with one message, whose parts are the bodies, of which there is one."""
    if len(bodies) == 1:
        return encode_messages(bodies)
    prefixes = chain(map(_more, map(len, bodies[:-1])), (_last(len(bodies[-1])),))
    return [_join(prefixes, bodies)]


def _join(prefixes: Iterable[bytes], bodies: Iterable[Sealed]) -> bytes:
    return b"".join(chain.from_iterable(zip(prefixes, bodies, strict=True)))


class FrameReader:
    """
    Cuts what comes into frames.

    Args:
        max_bytes: The longest body that is taken, in bytes: 255 at least.
        views: Whether a long body may be a view of what was received, not a copy.

    """

    def __init__(self, max_bytes: int, *, views: bool = False) -> None:
        self._max_bytes = max(max_bytes, _MAX_SHORT)
        self._views = views
        self._rest = bytearray()  # of a frame that is not complete
        self._wanted = 0  # how long the rest must be before it says more
        self._flags = 0  # of a frame that has a buffer of its own
        self._size = 0
        self._buffer: bytearray | None = None
        self._filled = 0

    @property
    def held(self) -> int:
        """How many bytes an incomplete frame takes."""
        return len(self._rest) + (len(self._buffer) if self._buffer is not None else 0)

    @property
    def missing(self) -> int:
        """How many bytes an incomplete frame lacks; if its size is not known, a few."""
        if self._buffer is not None:
            return self._size - self._filled
        return self._wanted - len(self._rest) if self._rest else 0

    def free(self) -> memoryview | None:
        """Return where the next bytes belong, if a long frame is not complete."""
        return None if self._buffer is None else memoryview(self._buffer)[self._filled :]

    def fill(self, size: int) -> tuple[int, Body] | None:
        """Note that so many bytes were put there; return the frame if it is complete."""
        assert self._buffer is not None
        self._filled += size
        if self._filled < len(self._buffer):
            return None
        if self._filled < self._size:
            self._grow(self._buffer)
            return None
        body = memoryview(self._buffer) if self._views else bytes(self._buffer)
        self._buffer = None
        return self._flags, body

    def feed(self, data: bytes, flags: bytearray, bodies: list[Body]) -> None:
        """
        Take what came; add the frames that are complete: their flags and bodies.

        Only MORE and COMMAND are left of the flags.

        Raises:
            ZmtpError: If a header is wrong, or claims more than is taken.

        """
        if self._buffer is not None:
            data = self._refill(data, flags, bodies)
        elif self._rest:
            if len(self._rest) + len(data) < self._wanted:
                self._rest += data  # not joined: it may come a byte at a time
                self._give_buffer()
                return
            data = b"".join((self._rest, data))
            self._rest = bytearray()
        add, mark = bodies.append, flags.append
        end = len(data)
        at = 0
        while at < end - 1:  # a short header is there
            flag = data[at]
            if flag < LONG:
                start = at + 2
                stop = start + data[at + 1]
                if stop > end:
                    break
                add(data[start:stop])
                mark(flag)
            else:
                start, stop = self._measure(data, at)
                if stop > end or not start:
                    break
                add(self._body(data, start, stop))
                mark(flag & ~LONG)
            at = stop
        if at < end:
            self._keep(data, at)

    def _measure(self, data: bytes | bytearray, at: int) -> tuple[int, int]:
        """Return where a body begins and ends; 0 and 0 if its header is not complete."""
        flag = data[at]
        if flag > (COMMAND | LONG) or (flag & COMMAND and flag & MORE):
            raise ZmtpError(Fault.PROTOCOL, f"a frame with the flags {flag:#04x}")
        if not flag & LONG:
            size = data[at + 1]
            start = at + _SHORT_HEADER
        elif at + LONG_HEADER > len(data):
            return 0, 0
        else:
            start = at + LONG_HEADER
            size = int.from_bytes(data[at + 1 : start])
        if size > self._max_bytes:
            raise ZmtpError(Fault.LIMIT, f"a frame of {size} bytes, of {self._max_bytes} at most")
        return start, start + size

    def _body(self, data: bytes, start: int, stop: int) -> Body:
        size = stop - start
        if self._views and size > _COPY_BYTES and 2 * size >= len(data):
            return memoryview(data)[start:stop]
        return data[start:stop]

    def _keep(self, data: bytes, at: int) -> None:
        self._rest += data[at:]
        if len(self._rest) < _SHORT_HEADER:
            self._wanted = _SHORT_HEADER
            return
        start, stop = self._measure(self._rest, 0)
        self._wanted = stop if start else LONG_HEADER
        self._give_buffer()

    def _give_buffer(self) -> None:
        if len(self._rest) < _OWN_BUFFER_BYTES:
            return
        # Its header is complete.
        start, stop = self._measure(self._rest, 0)
        self._flags = self._rest[0] & ~LONG
        self._size = stop - start
        self._filled = len(self._rest) - start
        self._grow(self._rest[start:])
        self._rest = bytearray()

    def _grow(self, filled: bytearray) -> None:
        """Go on in a longer buffer: whoever fills the last one may still have a view of it."""
        self._buffer = bytearray(min(_GROWTH * len(filled), self._size))
        self._buffer[: len(filled)] = filled

    def _refill(self, data: bytes, flags: bytearray, bodies: list[Body]) -> bytes:
        at = 0
        while at < len(data) and (free := self.free()) is not None:
            part = data[at : at + len(free)]
            free[: len(part)] = part
            at += len(part)
            if frame := self.fill(len(part)):
                flags.append(frame[0])
                bodies.append(frame[1])
        return data[at:]

"""
File descriptors that belong to others as well.

``O_NONBLOCK`` is a property of the open file, which a shell, a terminal and other
programs share with us, so it is never set on a descriptor that we were given. A pipe,
FIFO or terminal is opened once more instead, through ``/proc``, which gives an open
file of our own.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import stat
import struct
from collections.abc import Callable

from zmqpush.errors import ResourceError

# What a program needs for itself, and some to spare.
_LEAST_FREE = 48


def allow_many_descriptors() -> None:
    """Raise the limit on open descriptors as far as the system lets us: each peer takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def require_descriptors() -> None:
    """
    See that there are enough descriptors to begin with, while it can still be said.

    Raises:
        ResourceError: If the system does not allow as many.

    """
    for last in (False, True):
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        try:
            taken = len(os.listdir("/proc/self/fd"))
        except OSError as exc:
            taken = limit if exc.errno == errno.EMFILE else 3
        if limit == resource.RLIM_INFINITY or limit - taken >= _LEAST_FREE:
            return
        if last:
            raise ResourceError(
                f"too few file descriptors: {limit} are allowed and {taken} in use: "
                f"raise the limit to {taken + _LEAST_FREE} or more (ulimit -n, LimitNOFILE=)"
            )
        allow_many_descriptors()


def open_again(fd: int, flags: int) -> int | None:
    """
    Open the pipe, FIFO or terminal behind ``fd`` anew, without blocking.

    Args:
        fd: An open descriptor.
        flags: ``os.O_RDONLY`` or ``os.O_WRONLY``.

    Returns:
        A new descriptor, or ``None`` where that is impossible: for sockets and
        regular files, without ``/proc``, or when the file belongs to somebody else.

    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(fd)):
        return None
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None


def pipe_reader(fd: int, max_bytes: int) -> Callable[[], bytes]:
    """
    Return a function that reads from a pipe that cannot be opened again, and never blocks.

    All who read from a pipe are woken, and one gets what is there; the others would wait in
    ``read``. But ``splice`` can be told not to wait, and moves it into a pipe of our own.

    Args:
        fd: The pipe.
        max_bytes: Most bytes to read at once.

    """
    ours, inlet = os.pipe()

    def read() -> bytes:
        moved = os.splice(fd, inlet, max_bytes, flags=os.SPLICE_F_NONBLOCK)
        return os.read(ours, moved) if moved else b""

    return read


def pipe_writer(fd: int) -> Callable[[memoryview], int]:
    """
    Return a function that writes like :func:`pipe_reader` reads.

    After ``BlockingIOError`` and after a part was written, it must be given the rest.
    """
    outlet, ours = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    held = 0

    def write(data: memoryview) -> int:
        nonlocal held
        held = held or os.write(ours, data)
        moved = os.splice(outlet, fd, held, flags=os.SPLICE_F_NONBLOCK)
        held -= moved
        return moved

    return write


def pending_bytes(fd: int, request: int) -> int:
    """
    Return how many bytes the kernel holds for ``fd``; 0 where it does not tell.

    Args:
        fd: A descriptor.
        request: ``termios.FIONREAD`` for what can be read, ``termios.TIOCOUTQ`` for what
            the peer has not taken.

    """
    try:
        return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])
    except OSError:
        return 0


class Readiness:
    """
    Waits until a descriptor is ready, with level-triggered readiness.

    The loop watches the descriptor only while somebody waits.

    Args:
        fd: The descriptor.
        write: Wait for room to write, not for something to read.

    """

    def __init__(self, fd: int, *, write: bool = False) -> None:
        self._fd = fd
        self._write = write
        self._waiter: asyncio.Future[None] | None = None
        self._woken = False

    async def wait(self) -> None:
        """Return once the descriptor is ready or :meth:`wake` is called, or was since the last."""
        if self._woken:
            self._woken = False
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        if self._write:
            loop.add_writer(self._fd, self.wake)
        else:
            loop.add_reader(self._fd, self.wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            if self._write:
                loop.remove_writer(self._fd)
            else:
                loop.remove_reader(self._fd)

    def wake(self) -> None:
        """End the wait; if there is none, the next one."""
        if self._waiter is None:
            self._woken = True
        elif not self._waiter.done():
            self._waiter.set_result(None)

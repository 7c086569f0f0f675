"""Bytes from a file descriptor, whatever kind it is."""

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import termios
from collections.abc import Callable

from zmqpush.descriptors import Readiness, open_again, pending_bytes
from zmqpush.errors import SourceError

_READS_PER_TURN = 8
# A writer that takes turns with us goes on within microseconds, and to fall asleep and be
# woken takes as long as all the rest of a turn. So often a read looks before it does, which
# takes some 40 microseconds; then it keeps the loop from other work for a millisecond.
_WAKEFUL_POLLS = 60
_LINGER = 1
# So much such a writer may write at once, if the system lets us have it: what does not fit
# into the pipe comes in pieces. The rest gets so long to come, in seconds.
_TURN_BYTES = 1 << 20
_REST_DELAY = 0.1


class Source:
    """
    Reads what there is, and waits without waking up while there is nothing.

    Pipes, FIFOs, terminals and sockets are waited for; regular files and devices such
    as ``/dev/null`` are always ready. ``O_NONBLOCK`` is never set on ``fd``.

    Args:
        fd: The descriptor to read from; it stays open.
        max_bytes: Most bytes to read at once.
        in_turns: Whether the writer takes turns with us: it writes, and waits for an answer.

    Raises:
        SourceError: If ``fd`` is closed.

    Attributes:
        can_wait: Whether the input can be empty for now and go on later, as a pipe can
            and a file cannot.
        reads: How many reads were made, so far.
        waiting: Whether a read waits for input now.

    """

    def __init__(self, fd: int, max_bytes: int = 1 << 16, *, in_turns: bool = False) -> None:
        try:
            mode = os.fstat(fd).st_mode
        except OSError as exc:
            raise SourceError(f"cannot read standard input: {exc.strerror}") from exc
        self.can_wait = _can_be_waited_for(fd)
        # Without a descriptor of our own, only a read after readiness does not block.
        self._wait_first = False
        self._pipe_bytes = self._max_bytes = max_bytes
        self._receive: Callable[[], bytes]
        if stat.S_ISSOCK(mode):
            connection = socket.socket(fileno=os.dup(fd))
            self._receive = lambda: connection.recv(max_bytes, socket.MSG_DONTWAIT)
        else:
            own = open_again(fd, os.O_RDONLY)
            if stat.S_ISFIFO(mode):
                # A pipe holds 64 KiB unless told otherwise. A writer that can run ahead
                # by two reads does not make us wait for it, nor it for us.
                wanted = _TURN_BYTES if in_turns else 2 * max_bytes
                with contextlib.suppress(OSError):
                    if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < wanted:
                        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, wanted)
                self._pipe_bytes = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            self._wait_first = own is None and self.can_wait
            readable = fd if own is None else own
            self._receive = lambda: os.read(readable, max_bytes)
        self._fd = fd
        self._ready = Readiness(fd)
        self._in_turns = in_turns
        if in_turns:
            self._readable_now = select.poll()
            self._readable_now.register(fd, select.POLLIN)
        self.reads = 0
        self.waiting = False
        self._stopped = False

    async def read(self) -> bytes:
        """
        Return the next bytes, at most ``max_bytes``; none at the end of the input.

        Raises:
            SourceError: If the input cannot be read.

        """
        self.reads += 1
        if self.reads % _READS_PER_TURN == 0:
            await asyncio.sleep(0)  # others get a turn, however fast the input is
        if self._wait_first and not self._stopped:
            await self._wait()
        while not self._stopped:
            try:
                return self._receive()
            except BlockingIOError:
                if not self._comes_at_once():
                    await self._wait()
            except OSError as exc:
                if exc.errno == errno.EIO and self.can_wait:
                    return b""  # the terminal has gone
                raise SourceError(f"cannot read standard input: {exc.strerror}") from exc
        return b""

    def _comes_at_once(self) -> bool:
        if not self._in_turns:
            return False
        for _ in range(_WAKEFUL_POLLS):
            if self._readable_now.poll(0):
                return True
        return bool(self._readable_now.poll(_LINGER))

    async def turn_is_over(self, read_bytes: int) -> bool:
        """
        Tell whether a writer that takes turns has written all that it wants to, for now.

        Args:
            read_bytes: How much of it was read. If that would not have filled the pipe it
                is sure that nothing follows; else what follows may come too late.

        """
        if read_bytes >= self._pipe_bytes:
            await asyncio.sleep(_REST_DELAY)
        elif read_bytes < self._max_bytes:
            return True  # a read that could have returned more
        return not self.unread_bytes

    @property
    def unread_bytes(self) -> int:
        """How many bytes are there to be read, as far as the system tells."""
        status = os.fstat(self._fd)
        if stat.S_ISREG(status.st_mode):
            return status.st_size - os.lseek(self._fd, 0, os.SEEK_CUR)
        return pending_bytes(self._fd, termios.FIONREAD)

    async def _wait(self) -> None:
        self.waiting = True
        try:
            await self._ready.wait()
        finally:
            self.waiting = False

    def stop(self) -> None:
        """Let this and every later :meth:`read` return the end of the input."""
        self._stopped = True
        self._ready.wake()


def _can_be_waited_for(fd: int) -> bool:
    with select.epoll() as epoll:
        try:
            epoll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True

"""Bytes from a file descriptor, whatever kind it is."""

import asyncio
import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
from collections.abc import Callable

from zmqpush.errors import SourceError
from zmqpush.runtime.fds import Readiness, open_again, pending_bytes, pipe_reader

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
# getsockopt(2), linux/sock_diag.h: nine numbers, the last is how many messages had no room.
_SO_MEMINFO = 55
# Room for a message whose size the system does not say.
_MESSAGE_BYTES = 1 << 16
# So much of a turn each message takes at least, so that empty ones end it, too.
_LEAST_MESSAGE_BYTES = 64


class Source:
    """
    Reads what there is, and waits without waking up while there is nothing.

    Pipes, FIFOs, terminals and sockets are waited for; regular files and devices such
    as ``/dev/null`` are always ready. ``O_NONBLOCK`` is never set on ``fd``.

    Args:
        fd: The descriptor to read from; it stays open.
        max_bytes: Most bytes to read at once. A message of a socket is read whole.
        delimiter: What ends a line.
        in_turns: Whether the writer takes turns with us: it writes, and waits for an answer.
        warn: Called with a line about what was lost before it could be read.
        count_lost: Called with the number of messages, so far, for which the socket had no room.

    Raises:
        SourceError: If ``fd`` cannot be read.

    Attributes:
        can_wait: Whether the input can be empty for now and go on later, as a pipe can
            and a file cannot.
        has_messages: Whether the input consists of messages, as that of a datagram socket
            does: where a read ends, a line ends.
        message_cut: Whether the end of the message that was read last is lost.
        gaps: How often something was lost before it could be read.
        reads: How many reads were made, so far.
        waiting: Whether a read waits for input now.

    """

    def __init__(
        self,
        fd: int,
        max_bytes: int = 1 << 16,
        *,
        delimiter: bytes = b"\n",
        in_turns: bool = False,
        warn: Callable[[str], None] = lambda _: None,
        count_lost: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._fd = fd
        self._pipe_bytes = self._max_bytes = max_bytes
        self._full_read = max_bytes  # one that returns less has left nothing
        self._delimiter = delimiter
        self._in_turns = in_turns
        self._warn = warn
        self._count_lost = count_lost
        self._connection: socket.socket | None = None  # of messages
        self._lost = 0  # messages
        self.has_messages = self.message_cut = False
        self._can_block = False
        self._aside: asyncio.Future[bytes] | None = None
        try:
            self._mode = _mode_of_readable(fd)
            self.can_wait = _can_be_waited_for(fd)
            self._receive = self._way_to_read()
        except OSError as exc:
            raise _unreadable(exc.strerror) from exc
        self._ready = Readiness(fd)
        self._look = select.poll()
        self._look.register(fd, select.POLLIN | select.POLLRDHUP)
        self.reads = self.gaps = 0
        self.waiting = False
        self._stopped = self._ended = False

    def _way_to_read(self) -> Callable[[], bytes]:
        fd, max_bytes = self._fd, self._max_bytes
        if stat.S_ISSOCK(self._mode):
            connection = socket.socket(fileno=os.dup(fd))
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise _unreadable("the socket listens, and is no connection (systemd: Accept=yes)")
            if connection.type == socket.SOCK_STREAM:
                return lambda: connection.recv(max_bytes, socket.MSG_DONTWAIT)
            self.has_messages = True
            self._connection = connection
            self._overflowed = _overflowed(connection)
            return lambda: self._receive_messages(connection)
        own = open_again(fd, os.O_RDONLY)
        if stat.S_ISFIFO(self._mode):
            # A pipe holds 64 KiB unless told otherwise. A writer that can run ahead
            # by two reads does not make us wait for it, nor it for us.
            wanted = _TURN_BYTES if self._in_turns else 2 * max_bytes
            with contextlib.suppress(OSError):
                if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < wanted:
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, wanted)
            self._pipe_bytes = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
            if own is None:
                self._full_read = 0
                return pipe_reader(fd, max_bytes)
        self._can_block = own is None and self.can_wait
        readable = fd if own is None else own
        return lambda: os.read(readable, max_bytes)

    async def read(self) -> bytes:
        """
        Return the next bytes, at most ``max_bytes``; none at the end of the input.

        Raises:
            SourceError: If the input cannot be read.

        """
        self.reads += 1
        if self.reads % _READS_PER_TURN == 0:
            await asyncio.sleep(0)  # others get a turn, however fast the input is
        while not self._stopped:
            try:
                chunk = await self._receive_aside() if self._can_block else self._receive()
            except BlockingIOError:
                if not self._comes_at_once():
                    await self._wait()
                continue
            except OSError as exc:
                if exc.errno == errno.EPIPE:  # only /dev/kmsg has that
                    self._note_gap("the kernel has overwritten messages")
                    continue
                if exc.errno != errno.EIO or not self.can_wait:
                    raise _unreadable(exc.strerror) from exc
                chunk = b""  # the terminal has gone
            if not chunk:
                self._ended = not self._stopped
            return chunk
        return b""

    async def _receive_aside(self) -> bytes:
        """Read in a thread: another reader may take first what we were woken for."""
        await self._wait()
        if self._stopped:
            return b""
        self._aside = asyncio.get_running_loop().run_in_executor(None, self._receive)
        self.waiting = True
        try:
            return await self._aside
        except asyncio.CancelledError:
            if not self._stopped:
                raise
            return b""
        finally:
            self.waiting = False

    def _receive_messages(self, connection: socket.socket) -> bytes:
        """Return some of the messages that are there, with the delimiter after each."""
        pieces: list[bytes] = []
        self.message_cut = False
        # A message may end with a part of a longer delimiter, so it comes alone.
        end = self._delimiter if len(self._delimiter) == 1 else b""
        room = self._max_bytes if end else 1
        while room > 0 and not self.message_cut:
            size = max(self._pending_bytes, _MESSAGE_BYTES)
            try:
                message, _, flags, _ = connection.recvmsg(size, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                self.note_overflow()
                break
            except OSError:
                if not pieces:
                    raise
                break  # if it lasts it comes again
            if not message and self._has_hung_up():
                break  # the end of a connection, which would come again and again
            room -= max(len(message), _LEAST_MESSAGE_BYTES)
            pieces.append(message)
            if flags & socket.MSG_TRUNC:
                self.message_cut = True
                self._note_gap(f"a message is longer than {size} bytes, and its end is lost")
            elif message and not message.endswith(end):
                pieces.append(end)
        if (chunk := b"".join(pieces)) or self._has_hung_up():
            return chunk
        raise BlockingIOError

    def note_overflow(self) -> None:
        """Look whether messages were lost for want of room in the socket."""
        if not self._connection:
            return
        before, self._overflowed = self._overflowed, _overflowed(self._connection)
        if lost := (self._overflowed - before) % (1 << 32):
            self.gaps += 1
            self._lost += lost
            self._count_lost(self._lost)

    def _note_gap(self, text: str) -> None:
        self.gaps += 1
        self._warn(f"standard input: {text}")

    def _comes_at_once(self) -> bool:
        if not self._in_turns:
            return False
        for _ in range(_WAKEFUL_POLLS):
            if self._look.poll(0):
                return True
        return bool(self._look.poll(_LINGER))

    async def turn_is_over(self, read_bytes: int) -> bool:
        """
        Tell whether a writer that takes turns has written all that it wants to, for now.

        Args:
            read_bytes: How much of it was read. If that would not have filled the pipe it
                is sure that nothing follows; else what follows may come too late.

        """
        if read_bytes >= self._pipe_bytes:
            await asyncio.sleep(_REST_DELAY)
        elif read_bytes < self._full_read:
            return True
        return not self._pending_bytes

    @property
    def has_ended(self) -> bool:
        """Whether nothing follows what was read; after :meth:`stop` that is looked up."""
        if self._ended or self.can_wait:
            return self._ended or self._has_hung_up()
        try:
            return not os.pread(self._fd, 1, os.lseek(self._fd, 0, os.SEEK_CUR))
        except OSError:
            return False

    def _has_hung_up(self) -> bool:
        gone = select.POLLHUP | select.POLLRDHUP
        events = [event for _, event in self._look.poll(0)]
        return any(event & gone for event in events) and not self._pending_bytes

    @property
    def unread_bytes(self) -> int:
        """How many bytes are there to be read, at least and as far as the system tells."""
        if self.has_ended:
            return 0
        if stat.S_ISREG(self._mode) and not self.can_wait:
            with contextlib.suppress(OSError):  # a file of the kernel's may have any size
                return max(1, os.fstat(self._fd).st_size - os.lseek(self._fd, 0, os.SEEK_CUR))
        return self._pending_bytes

    @property
    def _pending_bytes(self) -> int:
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
        if self._aside:
            self._aside.cancel()


def _unreadable(reason: object) -> SourceError:
    return SourceError(f"cannot read standard input: {reason}")


def _overflowed(connection: socket.socket) -> int:
    numbers = connection.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 9 * 4)
    return int(struct.unpack("9I", numbers)[-1])


def _mode_of_readable(fd: int) -> int:
    mode, flags = os.fstat(fd).st_mode, fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise _unreadable("it is closed, or not open for reading")
    if not stat.S_IFMT(mode):  # epoll, eventfd and their like
        raise _unreadable("it is no file, pipe, terminal or socket")
    return mode


def _can_be_waited_for(fd: int) -> bool:
    with select.epoll() as epoll:
        try:
            epoll.register(fd, select.EPOLLIN)
        except PermissionError:
            return False
    return True

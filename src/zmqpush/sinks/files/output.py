"""
One file that records are written to, or standard output.

A regular file is locked while it is open, carries the name of the run that opened it last, and
what is appended to it begins on a line of its own.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import secrets
import socket
import stat
from collections.abc import Callable

from zmqpush.errors import SinkBusyError, SinkClosedError, SinkError, SinkStalledError
from zmqpush.runtime.faults import fault_point
from zmqpush.runtime.fds import Readiness, open_again, pipe_writer
from zmqpush.runtime.files import has_no_room
from zmqpush.runtime.reporting import Reporter

# So much is written at once to a terminal that may make us wait.
_PIECE_BYTES = 4096
# Where a torn line begins is looked for in so many bytes.
_TAIL_BYTES = 4096
# A file that others append to as well is tried so often, in seconds, before that is reported.
_LOCK_ATTEMPTS, _LOCK_INTERVAL = 40, 0.05
_RUN = secrets.token_hex(8)
_RUN_ATTRIBUTE = "user.zmqpull.run"


class Output:
    """
    Writes bytes, in order, and waits while there is no room in a pipe.

    Args:
        to: ``-`` for standard output, or the path of a file to append to.
        reporter: Where to report a line that an earlier writer did not finish.

    Attributes:
        is_regular: Whether it is a regular file, which can be synced and cut off.
        run: What names this run in the file; ``-`` where the file system keeps no such names.

    Raises:
        SinkBusyError: If another process writes the file.
        SinkStalledError: If there is no room for it.
        SinkError: If it cannot be opened for another reason.

    """

    _told = False  # that a file cannot be locked

    def __init__(self, to: str, reporter: Reporter) -> None:
        self._to = to
        self._reporter = reporter
        self._name = "standard output" if to == "-" else to
        self._fd = 1
        self.is_regular = False
        self.run = "-"
        self._write: Callable[[memoryview], int]
        self._can_block = self._watched = False
        self._rest = memoryview(b"")
        if to == "-":
            self._use_standard_output()
            self._room = Readiness(self._fd, write=True)
        else:
            self._open()

    def forget_rest(self) -> None:
        """Begin the next write at its beginning, whatever of it was written."""
        self._rest = memoryview(b"")

    @property
    def unwritten(self) -> int:
        """How many records of the last write are not written, or not to their end."""
        return self._rest.tobytes().count(b"\n")

    def _use_standard_output(self) -> None:
        try:
            mode = os.fstat(1).st_mode
        except OSError as exc:
            raise SinkError(f"cannot write to {self._name}: {exc.strerror}") from exc
        if stat.S_ISSOCK(mode):
            connection = socket.socket(fileno=os.dup(1))
            self._write = lambda data: connection.send(data, socket.MSG_DONTWAIT)
            return
        self._watched = stat.S_ISFIFO(mode)
        own = open_again(1, os.O_WRONLY)
        if own is not None:
            self._fd = own
            self._write = lambda data: os.write(own, data)
        elif self._watched:
            self._write = pipe_writer(1)
        else:
            self._can_block = os.isatty(1)
            self._write = lambda data: os.write(1, data)

    @property
    def fd(self) -> int:
        """The descriptor that is written to."""
        return self._fd

    @property
    def status(self) -> os.stat_result:
        """What the system knows of the file."""
        return os.fstat(self._fd)

    @property
    def is_deleted(self) -> bool:
        """Whether it is a file that has no name any more, and ends with its descriptor."""
        return self.is_regular and not self.status.st_nlink

    @property
    def begun_bytes(self) -> int:
        """How much of the last write is not written, if a stall has ended it."""
        return len(self._rest)

    def reopen(self) -> bool:
        """
        Open a regular file anew, as after its rotation; whether it is another file now.

        Raises:
            SinkError: If it cannot be opened; the old one stays.

        """
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self._to), self.status):
                return False
        old = self._fd
        self._open()
        os.close(old)
        return True

    def sync(self) -> None:
        """
        Put what is written on the disk.

        Raises:
            SinkStalledError: If there is no room for it; it may be lost.
            SinkError: If that fails for another reason.

        """
        try:
            os.fsync(self._fd)
        except OSError as exc:
            if has_no_room(exc):
                raise SinkStalledError(f"{self._name}: {exc.strerror}") from exc
            raise SinkError(f"cannot write to {self._name}: {exc.strerror}") from exc

    def close(self) -> None:
        """Close the file."""
        if self.is_regular:  # a copy of the descriptor, which is being synced, holds no lock
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)

    def _open(self) -> None:
        flags = os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._to, flags | os.O_WRONLY, 0o640)
            try:
                mode = os.fstat(fd).st_mode
                if stat.S_ISREG(mode):
                    fd = _readable(fd)
                    if not lock(fd, self._name) and not Output._told:
                        Output._told = True
                        self._reporter.notice(f"{self._name} cannot be locked where it is")
                    self._end_line(fd)
                    self.run = "-"
                    with contextlib.suppress(OSError):
                        os.setxattr(fd, _RUN_ATTRIBUTE, _RUN.encode())
                        self.run = _RUN
            except BaseException:
                os.close(fd)
                raise
        except OSError as exc:
            if has_no_room(exc):
                raise SinkStalledError(f"{self._name}: {exc.strerror}") from exc
            raise SinkError(f"cannot open {self._name}: {exc.strerror}") from exc
        self._fd = fd
        self.is_regular = stat.S_ISREG(mode)
        self._watched = stat.S_ISFIFO(mode)
        self._room = Readiness(fd, write=True)
        self._write = lambda data: os.write(fd, data)

    def _end_line(self, fd: int) -> None:
        """End a line that a death or a full disk has torn, so that no record follows on it."""
        size = os.fstat(fd).st_size
        first = max(0, size - _TAIL_BYTES)
        try:
            tail = os.pread(fd, _TAIL_BYTES, first)
        except OSError:  # it may only be written
            return
        torn = len(tail) - tail.rfind(b"\n") - 1
        if torn:
            os.write(fd, b"\n")
            more = "" if torn < _TAIL_BYTES else "more than "
            self._reporter.warn(
                f"{self._name} ends within a line: {more}{torn} bytes of it are kept, and what "
                f"follows begins on a line of its own"
            )

    async def write(self, data: bytes | memoryview) -> None:
        """
        Write all of ``data``; after a stall, the rest of it.

        Raises:
            SinkClosedError: If the reader of the output has gone.
            SinkStalledError: If the disk is full.
            SinkError: If the output cannot be written for another reason.

        """
        self._rest = self._rest or memoryview(data)
        while self._rest:
            try:
                if self._can_block:
                    written = await self._write_aside()
                else:
                    written = self._write(self._rest)
                self._rest = self._rest[written:]
                fault_point("output-written")
            except BlockingIOError:
                await self._room.wait()
            except OSError as exc:
                if exc.errno in (errno.EPIPE, errno.ECONNRESET):
                    raise SinkClosedError(f"nobody reads {self._name}") from exc
                if has_no_room(exc):
                    raise SinkStalledError(f"{self._name}: {exc.strerror}") from exc
                raise SinkError(f"cannot write to {self._name}: {exc.strerror}") from exc

    async def _write_aside(self) -> int:
        """Write a piece in a thread: another writer may take first the room there was."""
        await self._room.wait()
        piece = self._rest[:_PIECE_BYTES]
        return await asyncio.get_running_loop().run_in_executor(None, self._write, piece)

    async def closed(self) -> None:
        """
        Wait until the reader of the output goes away, which may never happen.

        Raises:
            SinkClosedError: When it does.

        """
        if self._watched:
            # The writing end of a pipe is "readable" only when its reader has gone.
            await Readiness(self._fd).wait()
            raise SinkClosedError(f"nobody reads {self._name}")


async def open_shared(path: str, reporter: Reporter) -> Output:
    """
    Open a file that several processes append to, as soon as no other one does.

    Raises:
        SinkStalledError: If that takes long, or there is no room for the file.
        SinkError: If it cannot be opened for another reason.

    """
    for _ in range(_LOCK_ATTEMPTS):
        with contextlib.suppress(SinkBusyError):
            return Output(path, reporter)
        await asyncio.sleep(_LOCK_INTERVAL)
    raise SinkStalledError(f"{path}: another process has locked it")


def lock(fd: int, name: str) -> bool:
    """
    Lock a file as long as it is open; whether the file system can do that.

    Raises:
        SinkBusyError: If another process has locked it.

    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        message = f"{name} is in use by {_holder(fd)}: each receiver needs files of its own"
        raise SinkBusyError(message) from exc
    except OSError as exc:
        if exc.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def run_of(fd: int) -> str:
    """Return which run of zmqpull was the last to open a file; ``-`` if that is not known."""
    try:
        return os.getxattr(fd, _RUN_ATTRIBUTE).decode("ascii", "replace")
    except OSError:
        return "-"


def _readable(fd: int) -> int:
    """Return a descriptor of the same file that can be read, too, if that may be."""
    with contextlib.suppress(OSError):
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
        both = os.open(f"/proc/self/fd/{fd}", flags)
        os.close(fd)
        return both
    return fd


def _holder(fd: int) -> str:
    """Return who has locked a file, as far as the system tells."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    with contextlib.suppress(OSError, ValueError), open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == f"{device}:{status.st_ino}":
                own = " (this one, by another name)" if fields[4] == f"{os.getpid()}" else ""
                return f"process {fields[4]}{own}"
    return "another process"

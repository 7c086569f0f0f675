"""One file that records are written to, or standard output."""

import asyncio
import errno
import os
import socket
import stat
from collections.abc import Callable

from zmqpush.descriptors import Readiness, open_again, pipe_writer
from zmqpush.disk import has_no_room
from zmqpush.errors import SinkClosedError, SinkError, SinkStalledError
from zmqpush.faults import fault_point

# So much is written at once to a terminal that may make us wait.
_PIECE_BYTES = 4096


class Output:
    """
    Writes bytes, in order, and waits while there is no room in a pipe.

    Args:
        to: ``-`` for standard output, or the path of a file to append to.

    Raises:
        SinkStalledError: If there is no room for the file.
        SinkError: If it cannot be opened for another reason.

    """

    def __init__(self, to: str) -> None:
        self._to = to
        self._name = "standard output" if to == "-" else to
        self._fd = 1
        self._write: Callable[[memoryview], int]
        self._can_block = self._watched = False
        self._rest = memoryview(b"")
        if to == "-":
            self._use_standard_output()
            self._room = Readiness(self._fd, write=True)
        else:
            self._open()

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
    def is_regular(self) -> bool:
        """Whether what is written can be synced and cut off."""
        return self._to != "-" and stat.S_ISREG(os.fstat(self._fd).st_mode)

    def reopen(self) -> None:
        """
        Open a regular file anew, as after its rotation.

        Raises:
            SinkError: If it cannot be opened; the old one stays.

        """
        self._open()

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
        os.close(self._fd)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._to, flags, 0o640)
        except OSError as exc:
            if has_no_room(exc):
                raise SinkStalledError(f"{self._name}: {exc.strerror}") from exc
            raise SinkError(f"cannot open {self._name}: {exc.strerror}") from exc
        if self._fd != 1:
            os.close(self._fd)
        self._fd = fd
        self._watched = stat.S_ISFIFO(os.fstat(fd).st_mode)
        self._room = Readiness(fd, write=True)
        self._write = lambda data: os.write(fd, data)

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

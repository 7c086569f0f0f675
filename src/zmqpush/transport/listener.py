"""Accepts connections at one endpoint."""

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable

from zmqpush.transport.addresses import ANY_IPC, ipc_address, is_ipc, listen

# How many connections are accepted before others get a turn.
_TURN = 64
# So many descriptors are for the program's own files, not for connections.
_SPARE_DESCRIPTORS = 600
# When the system lets us accept none, when to try again, in seconds.
_RETRY_INTERVAL = 1.0


class Listener:
    """
    Accepts connections.

    Args:
        endpoint: Where.
        adopt: Called with each connection, and the endpoint.
        full: Called when a connection was closed since there are too many.

    Raises:
        EndpointError: If the endpoint cannot be bound.

    Attributes:
        endpoint: Where, with the port or path that was chosen.

    """

    def __init__(
        self, endpoint: str, adopt: Callable[[socket.socket, str], None], full: Callable[[], None]
    ) -> None:
        self._sock, self.endpoint = listen(endpoint)
        self._adopt = adopt
        self._full = full
        self._loop = asyncio.get_running_loop()
        self._inode = self._identity()
        self._has_directory = endpoint == ANY_IPC
        self._retry: asyncio.TimerHandle | None = None
        # Without a descriptor left a connection could not even be turned away.
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._loop.add_reader(self._sock, self._accept)

    def _identity(self) -> int | None:
        if not is_ipc(self.endpoint):
            return None
        with contextlib.suppress(OSError, ValueError):  # an abstract one
            return os.stat(ipc_address(self.endpoint).address).st_ino
        return None

    def _accept(self) -> None:
        for _ in range(_TURN):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                is_full = exc.errno in (errno.EMFILE, errno.ENFILE)
                if is_full:
                    self._full()
                if not is_full or not self._turn_away():
                    self._pause()
                return
            if sock.fileno() >= _highest_connection():
                sock.close()
                self._full()
            else:
                self._adopt(sock, self.endpoint)

    def _turn_away(self) -> bool:
        """Accept a connection with the spare descriptor and close it; whether that worked."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            self._sock.accept()[0].close()
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        return True

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock)
        self._retry = self._loop.call_later(_RETRY_INTERVAL, self._go_on)

    def _go_on(self) -> None:
        with contextlib.suppress(OSError):
            if self._spare is None:
                self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Accept no more; take away the socket's file, if it is still ours."""
        if self._retry:
            self._retry.cancel()
        self._loop.remove_reader(self._sock)
        self._sock.close()
        if self._spare is not None:
            os.close(self._spare)
        if self._inode is not None:
            with contextlib.suppress(OSError):
                path = ipc_address(self.endpoint).address
                if os.stat(path).st_ino == self._inode:
                    os.unlink(path)
                if self._has_directory:
                    os.rmdir(os.path.dirname(path))


def _highest_connection() -> int:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most - min(_SPARE_DESCRIPTORS, most // 4)

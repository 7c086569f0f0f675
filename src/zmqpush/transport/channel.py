"""One connection: a socket, and its ZMTP."""

import asyncio
import contextlib
import socket
import struct
import termios
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from zmqpush.core.zmtp.connection import Connection
from zmqpush.core.zmtp.frames import Body, Sealed, Unsealed
from zmqpush.runtime.fds import pending_bytes

# What is read at once, in bytes, if no long frame has a buffer of its own.
READ_BYTES = 256 << 10
# How many buffers the kernel takes at once.
_BUFFERS = 64
# How long a handshake may take, in seconds. A fleet that comes back at once takes half a
# millisecond each.
_HANDSHAKE_TIMEOUT = 5.0
# What a kernel keeps for a process that does not read, in bytes (net.ipv4.tcp_rmem), and more.
_MAX_RECEIVE_BUFFER = 8 << 20
_RESET = struct.pack("ii", 1, 0)


class Owner(Protocol):
    """What has channels."""

    @property
    def appetite(self) -> int:
        """How much is read of a connection at once, in bytes."""

    def may_go_on(self, channel: "Channel") -> bool:
        """Whether a handshake may go on now; if not, it is resumed later."""

    def on_ready(self, channel: "Channel") -> None:
        """Note that a handshake is over."""

    def on_parts(self, channel: "Channel", parts: list[Body], size: int) -> None:
        """Take parts of messages; so many bytes came, perhaps of a message without its end."""

    def on_sent(self, channel: "Channel") -> None:
        """Note that nothing waits to be sent any more."""

    def on_closed(self, channel: "Channel", why: "Exception | None") -> None:
        """Note that a connection has ended: why, or None if the peer closed it."""


class HandshakeTimeoutError(Exception):
    """The peer has not finished its handshake in time."""


class Channel:
    """
    One connection.

    Args:
        sock: A connected stream socket.
        owner: Who hears of it.
        endpoint: The endpoint that it belongs to.

    Attributes:
        peer: The address of the peer, as it is shown.
        connection: Its ZMTP, once it was started.
        endpoint: The endpoint that it belongs to.
        principal: Who the peer is, once it is ready.
        number: What stands for the peer, if its socket gives it a number.
        received: How many bytes came, so far.
        waiting: What the program has not taken yet of what came, in bytes.
        partial: What an incomplete message takes, in bytes.
        closed: Whether it has ended.
        left: How many of the last bytes that were sent the peer may not have read then.

    """

    connection: Connection

    def __init__(self, sock: socket.socket, owner: Owner, endpoint: str) -> None:
        self._sock = sock
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[Sealed | memoryview] = deque()
        # What is sent after that: what is being encrypted, and what comes after it.
        self._sealing: deque[tuple[Sealed, asyncio.Future[None] | None]] = deque()
        self._unsent_bytes = 0
        self._is_reading = self._is_writing = self._is_late = self._is_ending = False
        self._ready = False
        self.peer = _name(sock, endpoint)
        self.endpoint = endpoint
        self.principal = ""
        self.number = b""
        self.received = self.waiting = self.partial = self.left = 0
        self.closed = False
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            _set_options(sock)
        self._deadline = self._loop.call_later(_HANDSHAKE_TIMEOUT, self._be_late)

    def start(self, connection: Connection) -> None:
        """Begin the handshake."""
        self.connection = connection
        self.resume()
        self._write_output()

    @property
    def unsent(self) -> int:
        """How many bytes the kernel has not taken yet."""
        return self._unsent_bytes

    @property
    def unread(self) -> int:
        """How many bytes the kernel holds that were not read."""
        return pending_bytes(self._sock.fileno(), termios.FIONREAD)

    @property
    def in_kernel(self) -> int:
        """How many bytes the kernel holds that the peer's kernel (over ipc, the peer) has not."""
        return 0 if self.closed else pending_bytes(self._sock.fileno(), termios.TIOCOUTQ)

    @property
    def unconfirmed(self) -> int:
        """How many of the last bytes that were sent the peer may not have read, at most."""
        if self.closed:
            return 0
        if self._sock.family == socket.AF_UNIX:
            return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        return self.in_kernel + _MAX_RECEIVE_BUFFER

    def pause(self) -> None:
        """Read no more for now."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._sock)

    def resume(self) -> None:
        """Read on."""
        if not self._is_reading and not self.closed:
            self._is_reading = True
            self._loop.add_reader(self._sock, self.read)

    def read(self) -> bool:
        """Read what is there, some of it; whether there was something."""
        if self.closed or (not self._ready and not self._owner.may_go_on(self)):
            return False
        connection = self.connection
        free = connection.free()
        try:
            if free is None:
                data = self._sock.recv(self._owner.appetite)
                size = len(data)
            else:
                size = self._sock.recv_into(free)
        except (BlockingIOError, InterruptedError):
            return False
        except (OSError, MemoryError) as exc:
            self.close(exc)
            return False
        if not size:
            self.close()
            return False
        self.received += size
        parts = connection.receive(data) if free is None else connection.fill(size)
        if not self._ready:
            self._write_output()  # also what it must hear before it is refused
            if self.closed:  # it has gone without waiting for the answer
                return True
            if connection.ready and not connection.failure:
                self._ready = True
                self._deadline.cancel()
                self._owner.on_ready(self)
        if self._ready:
            self._owner.on_parts(self, parts, size)
        if connection.failure:
            self.close(connection.failure)
        elif not self._unsent_bytes:
            self._write_output()
        return True

    def send(self, buffers: Sequence[Sealed | Unsealed]) -> None:
        """Send whole messages, now, when they are encrypted or when the kernel takes more."""
        self._unsent_bytes += sum(map(len, buffers))
        for buffer in buffers:
            if isinstance(buffer, Unsealed):
                sealing = self._loop.run_in_executor(None, buffer.seal)
                self._sealing.append((buffer.message, sealing))
                sealing.add_done_callback(self._on_sealed)
            elif self._sealing:
                self._sealing.append((buffer, None))
            else:
                self._unsent.append(buffer)
        if not self._is_writing:
            self._write()

    def _on_sealed(self, sealed: "asyncio.Future[None]") -> None:
        sealed.result()
        sealing = self._sealing
        while sealing and (sealing[0][1] is None or sealing[0][1].done()):
            self._unsent.append(sealing.popleft()[0])
        if not self._is_writing:
            self._write()

    def _write_output(self) -> None:
        # A PONG after the last word would break the connection, and what the peer has not read.
        if not self._is_ending and (output := self.connection.take_output()):
            self.send((output,))

    def _write(self) -> None:
        unsent = self._unsent
        while unsent and not self.closed:
            try:
                sent = self._sock.sendmsg(list(islice(unsent, _BUFFERS)))
            except (BlockingIOError, InterruptedError):
                break
            except OSError as exc:
                self.close(exc)
                return
            self._unsent_bytes -= sent
            while sent and sent >= len(unsent[0]):
                sent -= len(unsent.popleft())
            if sent:
                unsent[0] = memoryview(unsent[0])[sent:]
            while unsent and not unsent[0]:
                unsent.popleft()
        if self.closed:
            return
        if unsent:
            if not self._is_writing:
                self._is_writing = self._is_late = True
                self._loop.add_writer(self._sock, self._write)
            return
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._sock)
        if self._sealing:
            self._is_late = True
        elif self._is_late:
            self._is_late = False
            self._owner.on_sent(self)
            if self._unsent_bytes or self.closed:  # by its owner, which had more to send
                return
            self._write_output()  # a PONG has waited for the end of a message
            if self._is_ending:
                self._shut()

    def end(self) -> None:
        """Send what is unsent, then say that no more comes; go on reading until the peer ends."""
        self._is_ending = True
        if not self._ready:
            self.close()
        elif not self._unsent_bytes:
            self._shut()

    def _shut(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def _be_late(self) -> None:
        self.close(HandshakeTimeoutError())

    def close(self, why: "Exception | None" = None, *, reset: bool = False) -> None:
        """Close the connection; with ``reset`` the kernel forgets what it holds of it."""
        if self.closed:
            return
        # A peer that has read all ends a connection without an error.
        self.left = self.unconfirmed if isinstance(why, OSError) else self.in_kernel
        self.closed = True
        self._deadline.cancel()
        self.pause()
        if self._is_writing:
            self._loop.remove_writer(self._sock)
        if reset:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._sock.close()
        self._owner.on_closed(self, why)


def _set_options(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The kernel notices a dead host while idle, without waking this process. Heartbeats or
        # TCP_USER_TIMEOUT would also cut off a peer that is only slow.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _name(sock: socket.socket, endpoint: str) -> str:
    if sock.family == socket.AF_UNIX:
        return endpoint
    try:
        host, port = sock.getpeername()[:2]
    except OSError:  # it has gone already
        return endpoint
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

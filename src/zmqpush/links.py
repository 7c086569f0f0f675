"""
ZeroMQ sockets, and every option that is set on them.

A link sends or receives what it can at once, on the plain socket, and waits on the event
loop only when libzmq says EAGAIN. A socket's descriptor is edge-triggered (it tells of
commands that wait for the socket, and any call may consume them), so every wait looks at
``EVENTS`` first and after each wake-up.
"""

import asyncio
import contextlib
import errno
import os
import random
import resource
import socket
import stat
import termios
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice, repeat
from operator import length_hint

import zmq

from zmqpush.core.envelope import Payload
from zmqpush.core.framing import Framing, to_frames
from zmqpush.descriptors import Readiness, lowest_free, pending_bytes
from zmqpush.errors import EndpointError, SettingsError
from zmqpush.guard import Doorman, Guard
from zmqpush.handshakes import HandshakeWatch, ipc_path
from zmqpush.pressure import Pressure
from zmqpush.settings import Endpoints, bad_endpoint

# Plain ints: the enums of pyzmq cost a conversion per call.
NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE = int(zmq.SNDMORE)
_POLLIN = int(zmq.POLLIN)
POLLOUT = int(zmq.POLLOUT)

# A peer that keeps up makes room within this time, in milliseconds: so long a send waits
# inside libzmq, since a turn of the event loop costs more.
_SEND_TIMEOUT = 1

# What libzmq holds cannot be got back, so its queue is as short as speed allows, in
# messages: 100 single records cost a third of the speed, and a few blocks none.
_SEND_HWM = {Framing.SINGLE: 1000, Framing.FRAMES: 4, Framing.ARRAY: 4, Framing.LINES: 4}
_RECEIVE_HWM = 1000

# A peer's claim of a message's size is not believed beyond this, in bytes.
_MAX_MESSAGE_BYTES = 64 << 20
MAX_REPLY_BYTES = 1 << 16  # of who only receives
# One turn of receiving ends after so many frames or bytes. Small ones are taken at once.
TURN_FRAMES = 64
_MOST_FRAMES = 1 << 14
TURN_BYTES = 1 << 20
# How often to look at the end whether the peers have taken everything, in seconds.
_UNREAD_INTERVAL = 0.005
# When to connect again where libzmq does not, in seconds.
_AGAIN_DELAY = 2.0
# So many descriptors are for the program's own files, not for connections.
_SPARE_DESCRIPTORS = 600
# When there are none left, how often to look whether some are free again, in seconds.
_DOORS_INTERVAL = 1.0
# How many payloads may be in doubt at the end, at most.
_PAYLOADS_IN_DOUBT = 1024


class Link:
    """
    A socket of one context of its own, bound or connected to endpoints.

    Args:
        kind: The type of the socket.
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        options: Of the socket, beside those of all links.
        context: If it is not to have one of its own.
        memory: How much the messages of its peers may take, in bytes; none if it only sends.

    Raises:
        EndpointError: If libzmq refuses an endpoint.

    Attributes:
        has_open_port: Whether the system chose a port; :attr:`address` tells which.

    """

    def __init__(
        self,
        kind: int,
        endpoints: Endpoints,
        guard: Guard,
        options: Mapping[zmq.SocketOption, int],
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
        memory: int | None = None,
    ) -> None:
        self.has_open_port = endpoints.has_open_port
        self._foreign_fds = _open_fds()
        self._peers = endpoints.count
        self._context = context or zmq.Context()
        self._socket = self._context.socket(kind)
        self._guard = guard
        self._doors: list[str] = []  # what is bound
        self._shut: list[str] = []  # what was, and will be again
        self._watch = HandshakeWatch(
            self._socket,
            guard,
            endpoints.connect,
            self._connect_later,
            self._let_in,
            self._shut_doors,
            self._look_closely,
        )
        # The compiled class's methods, without a Python wrapper per call.
        self._send = super(zmq.Socket, self._socket).send
        self._recv = super(zmq.Socket, self._socket).recv
        get = super(zmq.Socket, self._socket).get
        self._events: Callable[[], int] = partial(get, int(zmq.EVENTS))  # type: ignore[assignment]
        options = {
            zmq.LINGER: -1,  # close() decides how long to wait
            # The kernel notices a dead host while idle, without waking this process.
            # ZMTP heartbeats or TCP_MAXRT would also cut off a peer that is only slow,
            # and lose what it has not read yet.
            zmq.TCP_KEEPALIVE: 1,
            zmq.TCP_KEEPALIVE_IDLE: 60,
            zmq.TCP_KEEPALIVE_INTVL: 10,
            zmq.TCP_KEEPALIVE_CNT: 3,
            zmq.CONNECT_TIMEOUT: 5000,
            # Who connects and says nothing goes soon, and who is refused may try again. A
            # handshake takes a fleet that comes back at once half a millisecond each.
            zmq.HANDSHAKE_IVL: 5000,
            # A fleet, or a flood, that comes at once waits in the kernel.
            zmq.BACKLOG: 1024,
            zmq.RECONNECT_IVL: random.randint(50, 100),  # a fleet does not come back at once
            zmq.RECONNECT_IVL_MAX: 2000,
            **options,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        # Before anybody can connect.
        self._doorman = Doorman(self._context, guard) if endpoints.bind and guard.encrypts else None
        try:
            for endpoint in endpoints.bind:
                self._bind(endpoint)
            for endpoint in endpoints.connect:
                self._connect(endpoint)
        except (EndpointError, SettingsError):
            self._watch.close()
            self._context.destroy(linger=0)
            raise
        if self._doorman:
            self._doorman.start()
        self._signal = Readiness(self._socket.FD)
        self._pressure = Pressure(memory, guard.complaints, self._is_drained)

    def _bind(self, endpoint: str) -> None:
        self._guard.secure_server(self._socket)
        with _explained("bind", endpoint):
            _refuse_bound_ipc(endpoint)
            self._use_ipv6(endpoint)
            self._socket.bind(endpoint)
        self._doors.append(self.address)

    def _let_in(self, fd: int) -> None:
        # The kernel gives out the lowest numbers first.
        if fd >= _highest_connection():
            self._shut_doors()
        self._pressure.add(fd)

    def _look_closely(self) -> None:
        # Of two sockets that do not fit, the one that first hears what the other is goes away,
        # and the other never knows. With a doorman libzmq says nothing before it has heard.
        if self._doorman is None and self._doors and not self._socket.closed:
            with contextlib.suppress(zmq.ZMQError, RuntimeError):  # no descriptors, or threads
                doorman = Doorman(self._context, self._guard)
                doorman.start()
                self._doorman = doorman

    def _shut_doors(self) -> None:
        # Without descriptors the program cannot open its own files, and libzmq tries to
        # accept without a pause. Who is in stays, others are refused by the kernel.
        if self._socket.closed or not self._doors:
            return
        self._guard.complaints.warn(
            "as many connections as the limit on open descriptors allows: "
            "no more are accepted until some have ended"
        )
        for door in self._doors:
            self._socket.unbind(door)
        self._shut += self._doors
        self._doors.clear()
        asyncio.get_running_loop().call_later(_DOORS_INTERVAL, self._open_doors)

    def _open_doors(self) -> None:
        if self._socket.closed:
            return
        if lowest_free() < _highest_connection():
            for door in self._shut.copy():
                try:
                    self._use_ipv6(door)
                    self._socket.bind(door)
                except zmq.ZMQError as exc:
                    self._guard.complaints.warn(f"cannot bind {door} again: {exc}: waiting")
                else:
                    self._shut.remove(door)
                    self._doors.append(door)
        if self._shut:
            asyncio.get_running_loop().call_later(_DOORS_INTERVAL, self._open_doors)

    def _note(self, frame: zmq.Frame) -> None:
        if self._pressure.high and not frame.more:
            self._pressure.take(int(frame.get(zmq.SRCFD)))

    def _is_drained(self) -> bool:
        events = self._events()
        if events & (_POLLIN | POLLOUT):
            self._signal.wake()  # looking has consumed the edge
        return not events & _POLLIN

    def _connect(self, endpoint: str) -> None:
        self._guard.secure_client(self._socket, endpoint)
        with _explained("connect", endpoint):
            self._use_ipv6(endpoint)
            self._socket.connect(endpoint)

    def _use_ipv6(self, endpoint: str) -> None:
        # Only where asked for: libzmq would take "localhost" for ::1 alone.
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))

    def _connect_later(self, endpoint: str) -> None:
        asyncio.get_running_loop().call_later(_AGAIN_DELAY, self._connect_again, endpoint)

    def _connect_again(self, endpoint: str) -> None:
        if self._socket.closed:
            return
        if self._socket.TYPE == zmq.DEALER:  # which connects to an endpoint once only
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(endpoint)
        self._connect(endpoint)

    async def _wait_for(self, event: int) -> None:
        if not self._events() & event:
            await self._signal.wait()
            if not self._socket.closed:
                self._events()

    async def readable(self) -> None:
        """Return when a message may be there or the connection may have changed, or earlier."""
        await self._wait_for(_POLLIN)

    def wake(self) -> None:
        """End the wait; if there is none, the next one."""
        self._signal.wake()

    def wake_if_readable(self) -> None:
        """End a wait for input that another call on the socket has taken the signal of."""
        if not self._socket.closed and self._events() & _POLLIN:
            self._signal.wake()

    @property
    def address(self) -> str:
        """The last endpoint, with the port that the system chose for ``*``."""
        return str(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))

    @property
    def unread(self) -> int:
        """How many bytes the kernel holds that no peer has taken yet."""
        return sum(pending_bytes(fd, termios.TIOCOUTQ) for fd in self._own_fds())

    async def close(self) -> None:
        """
        Close the socket and wait until all it holds is delivered.

        Connections stay open until their peers have taken everything: over ipc a libzmq
        peer that is behind forgets what it has not read when the connection closes
        (libzmq issue 4660), and over TCP the kernel throws away what it has not sent when
        the peer sends something to a process that has gone, as with ZMTP heartbeats.
        """
        loop = asyncio.get_running_loop()
        closed = asyncio.Event()
        connections = self._connections()
        self._peers = max(self._peers, len(connections))

        def terminate() -> None:
            self._context.term()
            loop.call_soon_threadsafe(closed.set)

        self._stop_watching()
        self._socket.close()
        # A daemon: whoever loses patience ends the process and this wait with it.
        threading.Thread(target=terminate, daemon=True).start()
        await closed.wait()
        while any(map(_has_unread, connections)):  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(_UNREAD_INTERVAL)

    def _stop_watching(self) -> None:
        self._watch.close()
        self._pressure.close()

    def _own_fds(self) -> set[int]:
        # libzmq does not tell its connections: they are among what it opened.
        return _open_fds() - self._foreign_fds

    def _connections(self) -> list[socket.socket]:
        connections = []
        for fd in self._own_fds():
            with contextlib.suppress(OSError):  # closed meanwhile
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    connection = socket.socket(fileno=os.dup(fd))
                    if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                        connection.close()
                    else:
                        connections.append(connection)
        return connections


def _highest_connection() -> int:
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most - min(_SPARE_DESCRIPTORS, most // 4)


class PushLink(Link):
    """
    A PUSH socket.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        framing: What a message carries.
        separator: What ends each record of a payload.

    Attributes:
        accepted: How many records libzmq has taken, so far.

    """

    def __init__(
        self,
        endpoints: Endpoints,
        guard: Guard,
        framing: Framing,
        separator: bytes,
    ) -> None:
        hwm = _SEND_HWM[framing]
        # IMMEDIATE: only to peers that are there, so nothing sits in a queue for a dead
        # endpoint while another one lives, and nothing counts as sent to nobody.
        # MAXMSGSIZE: a PULL peer says nothing but its handshake.
        options = {
            zmq.SNDHWM: hwm,
            zmq.IMMEDIATE: 1,
            zmq.SNDTIMEO: _SEND_TIMEOUT,
            zmq.MAXMSGSIZE: MAX_REPLY_BYTES,
        }
        super().__init__(zmq.PUSH, endpoints, guard, options)
        self._framing = framing
        self._separator = separator
        self._frames: list[bytes] = []
        self._unsent = 0
        self._hwm = hwm
        self._last: deque[int] = deque(maxlen=_PAYLOADS_IN_DOUBT)
        self.accepted = 0
        guard.on_revocation = self._cut_connections

    def _cut_connections(self) -> None:
        # libzmq does not tell which connection is whose. Who is still admitted comes back.
        for connection in self._connections():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def unsent(self) -> int:
        """How many records of the loaded payload libzmq has not taken yet."""
        return self._unsent

    @property
    def in_doubt(self) -> int:
        """How many accepted records libzmq may still hold, at most."""
        messages = self._hwm * self._peers
        if self._framing is Framing.SINGLE:
            return min(self.accepted, messages)
        return sum(islice(reversed(self._last), messages))

    def load(self, payload: Payload) -> None:
        """Take the next payload; the last one must have been flushed."""
        self._frames = to_frames(self._framing, payload.data, self._separator)
        self._unsent = payload.records

    def flush(self) -> bool:
        """Send what is loaded; whether all of it was taken."""
        if not self._unsent:
            return True
        if self._framing is Framing.SINGLE:
            return self._flush_single()
        *first, last = self._frames
        try:
            # Once the first part is taken the others are, too: the high-water mark
            # counts messages, not parts.
            deque(map(self._send, first, repeat(_SNDMORE)), maxlen=0)
            self._send(last)
        except zmq.Again:
            return False
        self._last.append(self._unsent)
        self.accepted += self._unsent
        self._unsent = 0
        return True

    def _flush_single(self) -> bool:
        frames = iter(self._frames[-self._unsent :])
        try:
            deque(map(self._send, frames), maxlen=0)
        except zmq.Again:
            # The frame that was refused has left the iterator.
            left = length_hint(frames) + 1
            self.accepted += self._unsent - left
            self._unsent = left
            return False
        self.accepted += self._unsent
        self._unsent = 0
        return True

    async def writable(self) -> None:
        """Return when a peer may take a message, or earlier."""
        await self._wait_for(POLLOUT)


class PullLink(Link):
    """
    A PULL socket.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.
        memory: How much messages may take, in bytes, before peers are suspected.

    """

    def __init__(self, endpoints: Endpoints, guard: Guard, memory: int) -> None:
        options = {zmq.RCVHWM: _RECEIVE_HWM, zmq.MAXMSGSIZE: _MAX_MESSAGE_BYTES}
        super().__init__(zmq.PULL, endpoints, guard, options, memory=memory)

    def receive(self, max_frames: int | None = None) -> list[bytes]:
        """Return frames that are there, until they make a MiB; none if there are none."""
        if self._guard.revoked or self._pressure.high:
            return self._receive_and_look(max_frames)
        frames: list[bytes] = []
        most = _MOST_FRAMES if max_frames is None else min(max_frames, _MOST_FRAMES)
        size = 0
        try:
            # Empty frames have no size, and do not count for ever.
            while size < TURN_BYTES and len(frames) < most:
                # At first one, since each may have 64 MiB.
                before = len(frames)
                turn = min(before + 1, most - before, TURN_FRAMES)
                frames.extend(map(self._recv, repeat(NOBLOCK, turn)))
                size += sum(map(len, frames[before:]))
        except zmq.Again:
            pass  # what came before it is in the list
        return frames

    def _receive_and_look(self, max_frames: int | None = None) -> list[bytes]:
        # A connection outlives the admission of its key, and to ask each frame takes a while.
        frames: list[bytes] = []
        size = 0
        with contextlib.suppress(zmq.Again):
            for _ in range(TURN_FRAMES if max_frames is None else min(max_frames, TURN_FRAMES)):
                if size >= TURN_BYTES:
                    break
                frame = self._socket.recv(NOBLOCK, copy=False)
                if not self._guard.revoked or self._guard.admits(str(frame["User-Id"])):
                    frames.append(frame.bytes)
                    size += len(frame)
                self._note(frame)
        return frames

    def drain(self) -> Iterator[list[bytes]]:
        """Yield frames until none is there, at most what libzmq may hold now."""
        for _ in range(_RECEIVE_HWM * max(1, len(self._connections()))):
            if not (frames := self.receive()):
                return
            yield frames


def _has_unread(connection: socket.socket) -> bool:
    """Whether the peer has yet to take something; not if there is none (any more)."""
    try:
        connection.getpeername()
    except OSError:
        return False  # though the kernel may go on counting what nobody will take
    return pending_bytes(connection.fileno(), termios.TIOCOUTQ) > 0


@contextlib.contextmanager
def _explained(verb: str, endpoint: str) -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as exc:
        if exc.errno == errno.EINVAL:
            raise bad_endpoint(endpoint, bind=verb == "bind") from exc
        reason = zmq.strerror(exc.errno or 0)
        raise EndpointError(f"cannot {verb} {endpoint}: {reason}") from exc


def _refuse_bound_ipc(endpoint: str) -> None:
    # libzmq would take the path away from whoever listens there.
    if not endpoint.startswith("ipc://"):
        return
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(ipc_path(endpoint)) == 0:
            raise zmq.ZMQError(errno.EADDRINUSE)


def _open_fds() -> set[int]:
    try:
        return set(map(int, os.listdir("/proc/self/fd")))
    except OSError:
        return set()

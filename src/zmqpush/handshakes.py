"""
Why peers do not get together: libzmq's events of a socket, in words.

libzmq tells which handshakes fail on either side, but not to whom: of a socket that is
bound it names only the address where the peer came in.
"""

import asyncio
import contextlib
import errno
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import zmq

from zmqpush.background import begin
from zmqpush.descriptors import Readiness
from zmqpush.guard import Guard

_EVENT = struct.Struct("=Hi")
_FAILED_PROTOCOL = int(zmq.Event.HANDSHAKE_FAILED_PROTOCOL)
_FAILED_AUTH = int(zmq.Event.HANDSHAKE_FAILED_AUTH)
_FAILED = int(zmq.Event.HANDSHAKE_FAILED_NO_DETAIL)
_SUCCEEDED = int(zmq.Event.HANDSHAKE_SUCCEEDED)
_CONNECTED = int(zmq.Event.CONNECTED)
_DISCONNECTED = int(zmq.Event.DISCONNECTED)
_ACCEPTED = int(zmq.Event.ACCEPTED)
_ACCEPT_FAILED = int(zmq.Event.ACCEPT_FAILED)
_RETRIED = int(zmq.Event.CONNECT_RETRIED)
_EVENTS = (_FAILED_PROTOCOL | _FAILED_AUTH | _FAILED | _SUCCEEDED | _CONNECTED | _DISCONNECTED) | (
    _ACCEPTED | _ACCEPT_FAILED | _RETRIED
)
_CRYPTOGRAPHIC = int(zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC)
_MISMATCH = int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# How many events to take before others get a turn.
_TURN = 64
# A connection that ends sooner after it began, in seconds, was not ended by a time limit.
_AT_ONCE = 1.0
# A peer may close the connection before we have read why: so often in a row, and it has
# nothing to say.
_MUTE_FAILURES = 5
# Of a port scan, or a probe of ours, there are fewer in a row than of a sender that tries again.
_MUTE_PEERS = 3
# Who is not admitted is disconnected within so many seconds: the time limit of handshakes.
_REFUSED_FOR = 10.0
# How long to wait for an answer when we find out why libzmq gets none, and how often we do, in
# seconds.
_PROBE_TIMEOUT = 2.0
_PROBE_INTERVAL = 10.0
# A receiver tells of a sender that was never there when it has waited for so long, in seconds.
_ABSENCE_DELAY = 5.0
# The commonest mistake: what our sockets connect to then, and who connects to them.
_WRONG_PORT: dict[int, str] = {
    zmq.PUSH: "a port for --ack",
    zmq.DEALER: "a port for senders without --ack",
    zmq.PULL: "a port of a receiver",
}
_WRONG_PEER: dict[int, str] = {
    zmq.PULL: "a sender with --ack, which belongs at an --ack-bind",
    zmq.ROUTER: "a sender without --ack, which belongs at a --bind",
    zmq.PUSH: "another kind of socket than PULL",
}
_PROGRAM_THERE: dict[int, str] = {zmq.PULL: "zmqpush"}  # of all others zmqpull


class HandshakeWatch:
    """
    Tells of handshakes that fail, from the event loop.

    Args:
        link: The socket; it must not have another monitor.
        guard: Which keys there are, and where to complain.
        connect: The endpoints that it is to connect to.
        gave_up: Called with an endpoint that libzmq will not connect to again by itself.
        began: Called with the descriptor of each new connection.
        full: Called when the system has no more room for connections.
        suspect: Called when several peers have gone before they had said what they are.

    """

    def __init__(
        self,
        link: "zmq.Socket[bytes]",
        guard: Guard,
        connect: Sequence[str],
        gave_up: Callable[[str], None],
        began: Callable[[int], None],
        full: Callable[[], None],
        suspect: Callable[[], None],
    ) -> None:
        self._link = link
        self._guard = guard
        self._connect = connect
        self._gave_up = gave_up
        self._began = began
        self._full = full
        self._suspect = suspect
        self._kind = int(link.getsockopt(zmq.TYPE))
        self._connected: dict[str, float] = {}  # handshakes that we have begun, and when
        self._mute: dict[str, int] = {}  # how often it failed in a row without a reason
        self._accepted: dict[int, int] = {}  # connections, and how many had succeeded before
        self._succeeded = 0
        # When connections were that have yet to end.
        self._refused: deque[float] = deque(maxlen=1000)
        self._mute_peers = 0  # who have gone in a row before they had said what they are
        self._explained = False  # the next connection that ends was told of
        self._has_connected = False  # since it was tried last
        self._probed_at: dict[str, float] = {}
        self._tell_absence_at = time.monotonic() + _ABSENCE_DELAY
        if connect and self._kind == zmq.PULL:
            guard.why()  # nobody else asks, since for a receiver that is no outage
        self._monitor = link.get_monitor_socket(_EVENTS)
        self._readiness = Readiness(int(self._monitor.getsockopt(zmq.FD)))
        self._task = begin(self._watch())

    def close(self) -> None:
        """Stop watching, before the socket is closed."""
        self._task.cancel()
        self._link.disable_monitor()
        self._monitor.close()

    async def _watch(self) -> None:
        while True:
            with contextlib.suppress(zmq.Again):
                while True:
                    for _ in range(_TURN):
                        told, address = self._monitor.recv_multipart(zmq.NOBLOCK)
                        event, value = _EVENT.unpack(told)
                        self._take(event, value, address.decode())
                    await asyncio.sleep(0)  # hostile peers can cause any number
            await self._readiness.wait()

    def _take(self, event: int, value: int, endpoint: str) -> None:
        failed = event in (_FAILED, _FAILED_PROTOCOL)
        if event == _RETRIED:
            if not self._has_connected:
                self._probe(endpoint)
            self._has_connected = False
        elif event == _CONNECTED:
            self._has_connected = True
            self._connected[endpoint] = time.monotonic()
            self._began(value)
        elif event == _ACCEPTED:
            self._accepted[value] = self._succeeded
            self._began(value)
        elif event == _ACCEPT_FAILED and value in _EXHAUSTED:
            self._full()
        elif event == _ACCEPT_FAILED:
            self._complain(f"cannot accept a connection at {endpoint}: {zmq.strerror(value)}")
        elif event == _SUCCEEDED:
            self._connected.pop(endpoint, None)
            self._mute.pop(endpoint, None)
            self._succeeded += 1
            self._mute_peers = 0
            self._guard.reasons.clear()
        elif endpoint in self._connected:
            took = time.monotonic() - self._connected.pop(endpoint)
            self._take_failure(event, value, endpoint, took)
        elif event == _FAILED_AUTH:
            self._refused.append(time.monotonic())  # the doorman tells
        elif failed:
            self._mute_peers += event == _FAILED
            if self._mute_peers >= _MUTE_PEERS:
                self._suspect()
            self._explained = True
            if why := self._why_not_in(event, value, endpoint):
                self._complain(why)
        elif event == _DISCONNECTED:
            # Who is sure never to have succeeded, and was not told of, has sent something
            # that libzmq took for ZMTP 1.
            never = self._accepted.pop(value, -1) == self._succeeded
            if never and not self._explained and not self._was_refused():
                self._complain(self._strange(endpoint))
            self._explained = False

    def _was_refused(self) -> bool:
        since = time.monotonic() - _REFUSED_FOR
        while self._refused:
            if self._refused.popleft() > since:
                return True
        return False

    def _take_failure(self, event: int, value: int, address: str, took: float) -> None:
        if event == _FAILED and took < _AT_ONCE:
            self._mute[address] = self._mute.get(address, 0) + 1
            if self._mute[address] < _MUTE_FAILURES:
                return
        self._mute[address] = 0
        endpoint = _meant(address, self._connect)
        if event != _FAILED:
            self._gave_up(endpoint)
        # Of two ends that disagree one closes the connection, and the other reads why or not.
        mismatch = event == _FAILED_PROTOCOL and value == _MISMATCH
        disagree = event in (_FAILED, _DISCONNECTED) or mismatch
        kind = f"{endpoint} disagrees" if disagree and took < _AT_ONCE else ""
        why = self._why_not_out(event, value, endpoint, took)
        self._guard.explain(endpoint, why, said=True)
        self._complain(why, kind)

    def _complain(self, text: str, kind: str = "") -> None:
        self._guard.complaints.warn(text, kind)

    def _why_not_out(self, event: int, value: int, endpoint: str, took: float) -> str:
        encrypts = self._guard.encrypts
        if event == _FAILED_PROTOCOL and value == _MISMATCH:
            if encrypts:
                return f"{endpoint} does not encrypt: it has no --key, or is not what you think"
            return f"{endpoint} encrypts: it takes a --key and its --server-key"
        if event == _FAILED_AUTH or (event == _FAILED and took > _AT_ONCE):
            if encrypts:
                return f"{endpoint} does not admit the key {self._guard.own_key}, or says nothing"
            return f"{endpoint} says nothing: is it a ZeroMQ peer?"
        wrong = _WRONG_PORT[self._kind]
        if event == _FAILED and encrypts:
            return (
                f"{endpoint} is {wrong}, has another key than --server-key, "
                "or does not encrypt at all"
            )
        if event == _FAILED:
            return (
                f"{endpoint} closes the connection: it is {wrong}, encrypts, or is no ZeroMQ peer"
            )
        return (
            f"{endpoint} is {wrong}, another kind of ZeroMQ socket, "
            "or does not speak ZMTP 3 (is it an HTTP or ssh server?)"
        )

    def _why_not_in(self, event: int, value: int, endpoint: str) -> str | None:
        if event != _FAILED_PROTOCOL:
            return None  # the peer has just gone
        if value == _MISMATCH and self._guard.encrypts:
            return f"a peer at {endpoint} does not encrypt: it takes a --key and a --server-key"
        if value == _MISMATCH:
            return f"a peer at {endpoint} encrypts, and this end has no --key"
        if value == _CRYPTOGRAPHIC:
            return f"a peer at {endpoint} has a wrong --server-key: it is {self._guard.own_key}"
        return self._strange(endpoint)

    def _strange(self, endpoint: str) -> str:
        return (
            f"something that does not speak ZMTP 3 connects to {endpoint}, "
            f"or {_WRONG_PEER[self._kind]}"
        )

    def _probe(self, endpoint: str) -> None:
        # libzmq does not tell why it cannot connect, and not even that a name is unknown.
        now = time.monotonic()
        if self._kind == zmq.PULL and (self._succeeded or now < self._tell_absence_at):
            return
        if now - self._probed_at.get(endpoint, -_PROBE_INTERVAL) >= _PROBE_INTERVAL:
            self._probed_at[endpoint] = now
            loop = asyncio.get_running_loop()
            there = _PROGRAM_THERE.get(self._kind, "zmqpull")

            def probe() -> None:
                if why := _why_unreachable(endpoint, there):
                    loop.call_soon_threadsafe(self._guard.explain, endpoint, why)

            with contextlib.suppress(RuntimeError):  # no more threads: then it is not known
                threading.Thread(target=probe, daemon=True).start()


def ipc_path(endpoint: str) -> str:
    """Return the address of a Unix socket; that of an abstract one begins with a NUL."""
    path = endpoint.removeprefix("ipc://")
    return path.replace("@", "\0", 1) if path[0] == "@" else path


def _why_unreachable(endpoint: str, there: str) -> str:
    """Find out why nothing connects; this may take long. Empty, if something does."""
    try:
        if endpoint.startswith("ipc://"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_PROBE_TIMEOUT)
                connection.connect(ipc_path(endpoint))
            return ""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        family = socket.AF_INET6 if "[" in host else socket.AF_INET
        try:
            found = socket.getaddrinfo(host.strip("[]"), port, family, socket.SOCK_STREAM)
        except (OSError, UnicodeError) as exc:
            return f"cannot resolve {host}: {getattr(exc, 'strerror', None) or 'no such name'}"
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(_PROBE_TIMEOUT)
            connection.connect(found[0][4])
    except (ConnectionRefusedError, FileNotFoundError) as exc:
        return f"{endpoint}: {exc.strerror}: is {there} running there?"
    except TimeoutError:
        return f"{endpoint}: no answer: is that the address, and does a firewall let us?"
    except OSError as exc:
        return f"{endpoint}: {exc.strerror}"
    return ""


def _meant(address: str, endpoints: Sequence[str]) -> str:
    """Return the endpoint that libzmq connected to, of which it tells the address only."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    likely = [e for e in endpoints if e.rpartition(":")[2] == port]
    if address in endpoints or not likely:
        return address
    for endpoint in likely if len(likely) > 1 else ():
        name = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        with contextlib.suppress(OSError):
            if host.strip("[]") in {found[4][0] for found in socket.getaddrinfo(name, port)}:
                return endpoint
    return likely[0]

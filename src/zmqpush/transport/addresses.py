"""Endpoints, ``tcp://host:port`` and ``ipc://path``, to addresses of sockets."""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from zmqpush.errors import EndpointError

ANY_IPC = "ipc://*"  # the system chooses
_SIOCGIFADDR = 0x8915
_IFREQ = struct.Struct("16s2H4s8x")
# How long to wait for the lock of a directory, and how often to look, in seconds.
_LOCK_TIMEOUT = 1.0
_LOCK_INTERVAL = 0.01
_BACKLOG = 1024  # a fleet, or a flood, that comes at once waits in the kernel


class Address(NamedTuple):
    """What the kernel wants to know."""

    family: int
    address: Any


def split_tcp(endpoint: str) -> tuple[str, str]:
    """Return the host and the port of a ``tcp://`` endpoint, the host without brackets."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host.removeprefix("[").removesuffix("]"), port


def is_ipc(endpoint: str) -> bool:
    """Whether an endpoint is a Unix socket."""
    return endpoint.startswith("ipc://")


def ipc_address(endpoint: str) -> Address:
    """Return the address of an ``ipc://`` endpoint; that of an abstract one begins with a NUL."""
    path = endpoint.removeprefix("ipc://")
    return Address(socket.AF_UNIX, "\0" + path[1:] if path.startswith("@") else path)


def resolve(endpoint: str) -> list[Address]:
    """
    Return the addresses to try, in the order of the system. This may take long.

    Raises:
        OSError: If the name is unknown, in words.

    """
    if is_ipc(endpoint):
        return [ipc_address(endpoint)]
    host, port = split_tcp(endpoint)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as exc:
        reason = getattr(exc, "strerror", None) or "no such name"
        raise OSError(errno.EHOSTUNREACH, f"cannot resolve {host}: {reason}") from exc
    return [Address(family, address) for family, _, _, _, address in found]


def is_literal(endpoint: str) -> bool:
    """Whether an endpoint needs no look at a name server."""
    if is_ipc(endpoint):
        return True
    host, port = split_tcp(endpoint)
    try:
        socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True


def listen(endpoint: str) -> tuple[socket.socket, str]:
    """
    Bind an endpoint.

    Returns:
        The socket, not blocking, and the endpoint with the port or path that was chosen.

    Raises:
        EndpointError: If that is impossible.

    """
    try:
        return _listen_ipc(endpoint) if is_ipc(endpoint) else _listen_tcp(endpoint)
    except OSError as exc:
        reason = exc.strerror or str(exc)
        raise EndpointError(f"cannot bind {endpoint}: {reason}") from exc


def _listen_tcp(endpoint: str) -> tuple[socket.socket, str]:
    host, port = split_tcp(endpoint)
    number = 0 if port == "*" else int(port)
    if host == "*":
        family, address = Address(socket.AF_INET, ("0.0.0.0", number))
    elif found := _interface_address(host):
        family, address = Address(socket.AF_INET, (found, number))
    else:
        try:
            family, _, _, _, address = socket.getaddrinfo(
                host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except (OSError, UnicodeError) as exc:
            reason = "no such interface, address or name"
            raise OSError(errno.EADDRNOTAVAIL, reason) from exc
    listener = socket.socket(family, socket.SOCK_STREAM)
    with _closing_on_error(listener):
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    chosen, number = listener.getsockname()[:2]
    host = f"[{chosen}]" if ":" in chosen else chosen
    return listener, f"tcp://{host}:{number}"


def _interface_address(name: str) -> str | None:
    """Return the IPv4 address of a network interface; None if there is none of that name."""
    encoded = os.fsencode(name)
    if len(encoded) > 15:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe, _SIOCGIFADDR, encoded.ljust(32, b"\0"))
        except OSError:
            return None
    return socket.inet_ntoa(_IFREQ.unpack(found)[3])


def _listen_ipc(endpoint: str) -> tuple[socket.socket, str]:
    if endpoint == ANY_IPC:
        endpoint = f"ipc://{tempfile.mkdtemp(prefix='zmqpush-')}/socket"
    _, path = ipc_address(endpoint)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _closing_on_error(listener):
        listener.setblocking(False)
        if path.startswith("\0"):
            listener.bind(path)
            listener.listen(_BACKLOG)
        else:
            # Two that find the same stale socket must not take each other's away.
            with _locked(os.path.dirname(path) or "."):
                _remove_stale(path)
                listener.bind(path)
                listener.listen(_BACKLOG)
    return listener, endpoint


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Not for long: anyone who may read the directory can keep its lock.
        deadline = time.monotonic() + _LOCK_TIMEOUT
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_INTERVAL)
                continue
            except OSError:  # a file system without locks
                pass
            break
        yield
    finally:
        os.close(fd)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens at; nothing else."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "there is a file of that name, and it is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(path) == errno.ECONNREFUSED
    if not refused:
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    os.unlink(path)


@contextlib.contextmanager
def _closing_on_error(listener: socket.socket) -> Iterator[None]:
    try:
        yield
    except OSError:
        listener.close()
        raise

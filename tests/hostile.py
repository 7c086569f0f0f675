"""Raw ZMTP 3 over plain sockets, for peers that break its rules, and a receiver to attack."""

import contextlib
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from chaos import Feeder, compare, written
from helpers import PATIENCE, ZMQPULL, ZMQPUSH, wait_until
from keyring import Keyring
from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.curve import CurveClient, CurveServer, Keys
from zmqpush.core.zmtp.mechanism import Mechanism
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.core.zmtp.null import Null
from zmqpush.security.keyfile import decode, read_pair

MORE, LONG, COMMAND = 1, 2, 4
PING = b"\x04PING\0\0" + bytes(16)
# For patched(): what does not finish its handshake is cut off soon.
HASTY = "import zmqpush.transport.channel as c; c._HANDSHAKE_TIMEOUT = 2.0"
RESET = struct.pack("ii", 1, 0)


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """Return the 64 bytes that every connection begins with."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0, claim: int | None = None) -> bytes:
    """Return a frame; its header may claim another length than its body has."""
    size = len(body) if claim is None else claim
    if size > 255 or flags & LONG:
        return struct.pack(">BQ", flags | LONG, size) + body
    return bytes((flags, size)) + body


def ready(kind: bytes = b"DEALER") -> bytes:
    """Return the command that ends the NULL handshake."""
    properties = b"".join(
        bytes((len(name),)) + name + struct.pack(">I", len(value)) + value
        for name, value in ((b"Socket-Type", kind), (b"Identity", b""))
    )
    return frame(b"\x05READY" + properties, COMMAND)


def connect(port: int, data: bytes = b"") -> socket.socket:
    """Connect, and send some bytes."""
    peer = socket.create_connection(("127.0.0.1", port), PATIENCE)
    with contextlib.suppress(ConnectionError):
        peer.sendall(data)
    return peer


def shake_hands(port: int, kind: bytes = b"DEALER") -> socket.socket:
    """Return a connection whose NULL handshake is finished."""
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(connect(port, greeting() + ready(kind)))
        got = b""
        while b"READY" not in got:
            data = peer.recv(4096)
            if not data:
                raise ConnectionResetError("the handshake was refused")
            got += data
        stack.pop_all()
    return peer


def mechanism(keys: Keyring | None, *, binds: bool = False) -> Mechanism:
    """Return how a peer encrypts whose key is admitted; without keys it does not."""
    if not keys:
        return Null(binds=binds)
    pair = read_pair(keys.file("collector" if binds else "web1"))
    own = Keys(decode(pair.public), decode(pair.secret))
    if binds:
        return CurveServer(own, lambda _: True)
    return CurveClient(own, decode(keys.public("collector")))


class Intruder:
    """
    A peer that has finished its handshake, and does what it likes then.

    Args:
        sock: A connection.
        kind: What it says that it is.
        mechanism: How it encrypts.

    """

    def __init__(self, sock: socket.socket, kind: str, mechanism: Mechanism) -> None:
        self.sock = sock
        self._end = Connection(SocketType(kind), mechanism, Limits(1 << 20))
        self.command = mechanism.encode_command
        sock.settimeout(PATIENCE)
        sock.sendall(self._end.take_output())
        while not self._end.ready:
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("the handshake was refused")
            self._end.receive(data)
            if self._end.failure:
                raise self._end.failure
            sock.sendall(self._end.take_output())

    def message(self, body: bytes) -> bytes:
        """Return a message."""
        return b"".join(self._end.encode_messages((body,)))

    def pings(self, number: int, body: bytes | None = None) -> bytes:
        """Return so many PINGs, each after a message."""
        if body is None:
            each = [self.command(PING) for _ in range(number)]
        else:
            each = [self.message(body) + self.command(PING) for _ in range(number)]
        return b"".join(each)

    def send(self, data: bytes) -> None:
        """Send what the other end takes within a second."""
        self.sock.settimeout(1)
        with contextlib.suppress(ConnectionError, TimeoutError):
            self.sock.sendall(data)

    def vanish(self) -> None:
        """Close the connection by a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.sock.close()


def intrude(port: int, kind: str, keys: Keyring | None = None) -> Intruder:
    """Connect to what is bound, and finish the handshake."""
    return Intruder(connect(port), kind, mechanism(keys))


def pour(peer: socket.socket, data: bytes, most: int) -> int:
    """Send the same bytes again and again until the connection is cut; return how many in all."""
    poured = 0
    peer.settimeout(1)
    with contextlib.suppress(ConnectionError):
        while poured < most:
            # A connection that is closed with much unread may look full for a while.
            try:
                peer.sendall(data)
            except TimeoutError:
                if is_closed(peer):
                    break
            poured += len(data)
    return poured


def is_closed(peer: socket.socket) -> bool:
    """Whether the other end has closed a connection; reads what it has sent."""
    timeout = peer.gettimeout()
    peer.settimeout(0)
    try:
        while peer.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    finally:
        peer.settimeout(timeout)
    return True


def peak_memory(child: subprocess.Popen[bytes]) -> int:
    """Return how much a process took at most, in bytes."""
    return _status(child, "VmHWM")


def resident_memory(child: subprocess.Popen[bytes]) -> int:
    """Return how much a process takes now, in bytes."""
    return _status(child, "VmRSS")


def _status(child: subprocess.Popen[bytes], name: str) -> int:
    status = Path(f"/proc/{child.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) << 10


class Target:
    """
    A receiver of both kinds of delivery, with a file; and honest senders, all the time.

    With keys, those of the honest ones are ``web1``, which attackers have stolen.

    Attributes:
        port: Where senders are that want acknowledgements.
        plain_port: Where the others are.

    """

    def __init__(
        self,
        start: Callable[..., subprocess.Popen[bytes]],
        directory: Path,
        *options: object,
        plain: bool = False,
        command: Iterable[object] = (ZMQPULL,),
        keys: Keyring | None = None,
    ) -> None:
        self._errors = directory / "errors"
        self.path = directory / "all"
        any_port = "tcp://127.0.0.1:*"
        self.keys = keys
        binds, connects = (keys.binds(), keys.connects()) if keys else ([], [])
        args = ("-a", any_port, "-b", any_port, "--to", self.path, "--memory", "64MiB")
        with self._errors.open("wb") as errors:
            self.child = start(
                *command, *args, *binds, "--state", directory / "state", *options, stderr=errors
            )
        wait_until(lambda: self.errors.count("listening at") == 2)
        ports = {
            kind: int(port) for port, kind in re.findall(r":(\d+) for (\w+) delivery", self.errors)
        }
        self.port, self.plain_port = ports["acknowledged"], ports["plain"]
        to = f"tcp://127.0.0.1:{self.port}"
        self._senders = [start(ZMQPUSH, "--ack", "--format", "raw", "-c", to, *connects)]
        if plain:
            to = f"tcp://127.0.0.1:{self.plain_port}"
            self._senders.append(start(ZMQPUSH, "--framing", "lines", "-c", to, *connects))
        self._firsts = [1 + 500_000_000 * n for n in range(len(self._senders))]
        self._feeders = [
            Feeder(child, first, seed=first)
            for child, first in zip(self._senders, self._firsts, strict=True)
        ]
        self.wait_for_more()

    @property
    def errors(self) -> str:
        """What it has said on standard error."""
        return self._errors.read_text()

    @property
    def memory(self) -> int:
        """How much it takes now, in bytes."""
        return resident_memory(self.child)

    @property
    def peak(self) -> int:
        """How much it took at most, in bytes."""
        return peak_memory(self.child)

    @property
    def cpu(self) -> float:
        """How much processor time it has taken, in seconds."""
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / 100

    @property
    def connections(self) -> int:
        """How many sockets it has open."""
        fds = Path(f"/proc/{self.child.pid}/fd").iterdir()
        count = 0
        for fd in fds:
            with contextlib.suppress(FileNotFoundError):
                count += str(fd.readlink()).startswith("socket:")
        return count

    def _size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def wait_for_more(self) -> None:
        """Return once the honest senders have got something through that is not there now."""
        enough = self._size() + (1 << 19)
        wait_until(lambda: self._size() > enough)

    @contextlib.contextmanager
    def under_attack(self, what: str) -> Iterator[None]:
        """Tell what an attack costs."""
        began, size, cpu, memory = time.monotonic(), self._size(), self.cpu, self.memory
        yield
        took = time.monotonic() - began
        print(
            f"{what}: {took:.1f} s, {(self._size() - size) / took / 1e6:.1f} MB/s written, "
            f"{(self.cpu - cpu) / took:.0%} CPU, memory {memory >> 20} MiB before, "
            f"{self.memory >> 20} now, {self.peak >> 20} at most"
        )
        self.wait_for_more()

    def _records(self, stranger: bytes) -> list[bytes]:
        records = self.path.read_bytes().splitlines(keepends=True)
        return [it for it in records if it.endswith(b"\n") and it[:-1] != stranger]

    def verify(self, stranger: bytes = b"") -> None:
        """End the honest senders and look that all of theirs is there once, beside a stranger's."""
        expected: list[int] = []
        for sender, feeder, first in zip(self._senders, self._feeders, self._firsts, strict=True):
            expected += range(first, feeder.stop() + 1)
            _, err = sender.communicate(timeout=PATIENCE)
            assert sender.returncode == 0, err
        assert self.child.poll() is None, self.errors
        wait_until(lambda: len(self._records(stranger)) >= len(expected))
        honest = self.path.with_name("honest")
        honest.write_bytes(b"".join(self._records(stranger)))
        lost, too_often = compare(written(honest), expected)
        assert not lost, f"of {len(expected)} {len(lost)} are lost: {lost[:10]}"
        assert not too_often, f"{len(too_often)} are repeated: {too_often[:10]}"
        assert "Traceback" not in self.errors
        assert "internal error" not in self.errors

"""Sockets of ours within a test, and kernels that take as much as the test says."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from helpers import PATIENCE
from hostile import LONG, MORE, greeting, ready
from zmqpush.runtime.reporting import Reporter
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints, Security
from zmqpush.transport.link import Link

MIB = 1 << 20
AnyLink = TypeVar("AnyLink", bound=Link)
ANY_PORT = "tcp://127.0.0.1:*"


class Notes(Reporter):
    """Keeps what is reported."""

    def __init__(self) -> None:
        super().__init__("test")
        self.lines: list[str] = []

    def warn(self, text: str) -> None:
        self.lines.append(text)

    def __contains__(self, text: str) -> bool:
        return any(text in line for line in self.lines)


def guard(notes: Reporter | None = None) -> Guard:
    """Return a guard without keys."""
    return Guard(Security(), (), notes or Notes())


def bound(*endpoints: str) -> Endpoints:
    """Return endpoints to bind."""
    return Endpoints(bind=endpoints or (ANY_PORT,))


def run(test: Callable[[contextlib.ExitStack], Awaitable[None]]) -> None:
    """Run a test in a loop, close what it has opened, and look that no callback has failed."""

    async def whole() -> None:
        failures: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, it: failures.append(it))
        with contextlib.ExitStack() as stack:
            await test(stack)
        await asyncio.sleep(0)
        assert not failures

    asyncio.run(whole())


@contextlib.contextmanager
def opened(link: AnyLink) -> Iterator[AnyLink]:
    """Close a link at the end."""
    yield link
    link.stop()
    for channel in list(link._channels):
        channel.close()


async def until(condition: Callable[[], object]) -> None:
    """Return once a condition holds; fail when it does not come to hold."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.002)


class Trickle(socket.socket):
    """
    A socket whose kernel takes as much as it is told to.

    Attributes:
        room: How many bytes it takes yet.
        is_broken: Whether it then says that the connection is reset.

    """

    room = 1 << 40
    is_broken = False

    def sendmsg(self, buffers, *_):
        data = b"".join(buffers)[: self.room]
        if not data:
            if self.is_broken:
                raise ConnectionResetError
            raise BlockingIOError
        sent = self.send(data)
        self.room -= sent
        return sent


class Peer:
    """
    The other end of a connection to a link, in the test's hands.

    Args:
        link: Whose connection it becomes.
        kind: What it says that it is.

    Attributes:
        ours: The end of the link.
        sock: The other.
        received: What came after the handshake.

    """

    def __init__(self, link: Link, kind: bytes) -> None:
        ours, self.sock = socket.socketpair()
        self.ours = Trickle(fileno=ours.detach())
        self.sock.setblocking(False)
        self._came = b""
        self._start = len(greeting()) + len(ready(link.socket_type.encode()))
        link._adopt(self.ours, link.address)
        self.sock.sendall(greeting() + ready(kind))

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def read(self) -> bool:
        """Read what is there; whether that is all that will ever come."""
        with contextlib.suppress(BlockingIOError):
            while data := self.sock.recv(MIB):
                self._came += data
            return True
        return False

    @property
    def received(self) -> bytes:
        self.read()
        return self._came[self._start :]

    @property
    def is_ready(self) -> bool:
        """Whether the link has ended the handshake."""
        self.read()
        return len(self._came) >= self._start


def messages(data: bytes) -> Iterator[list[bytes]]:
    """Yield the whole messages that some bytes hold, without commands."""
    parts: list[bytes] = []
    at = 0
    while at + 2 <= len(data):
        flags, size, start = data[at], data[at + 1], at + 2
        if flags & LONG:
            size, start = int.from_bytes(data[at + 1 : at + 9]), at + 9
        if start + size > len(data) or (flags & LONG and start > len(data)):
            return
        at = start + size
        if flags & 4:
            continue
        parts.append(data[start:at])
        if not flags & MORE:
            yield parts
            parts = []

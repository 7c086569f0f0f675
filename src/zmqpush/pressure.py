"""
Cuts off peers that fill memory with a message that never ends.

libzmq bounds a message's parts in size and the messages of a peer in number, but not the
parts of a message, and holds all of them until the last one is there. So we look how many
bytes each connection has brought, and whether any message of it was whole: of senders
while memory is short, of who is sent to at any time.
"""

import asyncio
import contextlib
import os
import select
import socket
import struct
from collections.abc import Callable

from zmqpush.background import begin
from zmqpush.descriptors import Readiness
from zmqpush.telemetry import Complaints

# What the process and libzmq may take beside the budget, in bytes.
_ALLOWANCE = 96 << 20
# How often to look while bytes come, in seconds: a peer nearby brings a GB in one.
_INTERVAL = 0.1
# How often while memory is short.
_SHORT_INTERVAL = 0.02
# What a sender may bring then without a whole message, in bytes: zmqpush makes no larger
# ones, but of a line that is as long. Parts without content take 32 times as much memory.
_MAX_UNFINISHED = 8 << 20
# What may come at any time from who is sent to, and has little to say.
_MAX_UNFINISHED_REPLY = 256 << 10
# Who was asked for so many messages was asked in turn with all others.
_TURNS = 3
# When someone was cut off or all is taken, free memory is given back, so often and at such
# intervals.
_TRIMS = 6
_TRIM_INTERVAL = 0.5
# tcpi_bytes_received, in the kernel's struct tcp_info.
_BYTES_RECEIVED = struct.Struct("=128xQ")
_RESET = struct.pack("ii", 1, 0)
_EVENTS = select.EPOLLIN | select.EPOLLET


class Pressure:
    """
    Watches the connections of one socket. While nothing comes no timer runs.

    Args:
        budget: How much memory the messages of senders may take, in bytes; None for a socket
            that sends, whose peers are always suspected.
        complaints: Where to tell who was cut off.
        drained: Tells whether libzmq holds no whole message.

    Attributes:
        high: Whether memory is short. Then :meth:`take` must be told of each message.

    """

    def __init__(
        self, budget: int | None, complaints: Complaints, drained: Callable[[], bool]
    ) -> None:
        self.high = budget is None
        self._budget = None if budget is None else budget + _ALLOWANCE
        self._complaints = complaints
        self._drained = drained
        self._statm: int | None = None  # without /proc memory never seems short
        if budget is not None:
            with contextlib.suppress(OSError):
                self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._connections = select.epoll()
        self._readiness = Readiness(self._connections.fileno())
        self._before: dict[int, int] = {}  # what each had brought when it was judged last
        self._whole: dict[int, int] = {}  # how many whole messages each brought since
        self._task = begin(self._watch())
        self._giving_back = begin(asyncio.sleep(0))

    def close(self) -> None:
        """Stop watching."""
        self._task.cancel()
        self._giving_back.cancel()
        self._connections.close()
        if self._statm is not None:
            os.close(self._statm)

    def add(self, fd: int) -> None:
        """Watch a connection of libzmq's, until it is closed."""
        with contextlib.suppress(OSError):  # it is closed already
            self._connections.register(fd, _EVENTS)

    def take(self, fd: int) -> None:
        """Note that a whole message came from a connection."""
        self._whole[fd] = self._whole.get(fd, 0) + 1

    async def _watch(self) -> None:
        active: set[int] = set()
        while True:
            await self._readiness.wait()
            await asyncio.sleep(_SHORT_INTERVAL if self.high else _INTERVAL)
            active.update(fd for fd, _ in self._connections.poll(0))
            self.high = self._budget is None or self._resident() > self._budget
            if not self.high:
                active.clear()
                self._before.clear()
                self._whole.clear()
            # Whoever brought a whole message is known once all were asked for one.
            elif (drained := self._drained()) or max(self._whole.values(), default=0) >= _TURNS:
                cut = self._judge(active)
                active = set()
                if (cut or (drained and self._budget)) and self._giving_back.done():
                    self._giving_back = begin(self._give_back())

    def _resident(self) -> int:
        if self._statm is None:
            return 0
        pages = os.pread(self._statm, 128, 0).split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def _judge(self, active: set[int]) -> bool:
        cut = False
        for fd in active:
            with contextlib.suppress(OSError):  # it is closed meanwhile
                cut |= self._judge_one(fd)
        self._whole.clear()
        return cut

    async def _give_back(self) -> None:
        # What libzmq frees stays with the allocator, and memory would seem short for ever.
        import ctypes  # which takes a while, and is seldom needed

        with contextlib.suppress(AttributeError):
            trim = ctypes.CDLL(None).malloc_trim
            for _ in range(_TRIMS):
                await asyncio.sleep(_TRIM_INTERVAL)
                trim(0)

    def _judge_one(self, fd: int) -> bool:
        with socket.socket(fileno=os.dup(fd)) as connection:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_RECEIVED.size)
            (received,) = _BYTES_RECEIVED.unpack(info)
            before = self._before.get(fd)
            if before is None or received < before or fd in self._whole:
                self._before[fd] = received
            elif received - before > (_MAX_UNFINISHED if self._budget else _MAX_UNFINISHED_REPLY):
                host, port, *_ = connection.getpeername()
                # The kernel is not to keep what it has of it, either.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                connection.shutdown(socket.SHUT_RDWR)
                self._complaints.warn(
                    f"cut off {host}:{port}, which sends a message without an end",
                    kind=f"pressure {host}",
                )
                return True
        return False

"""A TCP proxy on loopback that does to connections what bad networks do."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable

_CHUNK_BYTES = 1 << 16
_STEP = 0.02  # seconds: how fine time is, where a link is slow or blocked
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of a close() that sends RST
_HELD = 256  # chunks on their way, each direction


class Proxy:
    """
    Forwards connections to ``port`` while the context lasts; faults may be set at any time.

    Attributes:
        connections: How many there were.
        resets: How many were ended with RST.
        blocked: Nothing passes, and nobody is told; what waits passes later.
        delay: How long each byte is on its way, in seconds.
        rate: Bytes a second, each direction; None for all there are.
        cut_after: Called for each new connection; after so many bytes from the one who
            connected it is reset, wherever that is.
        change: Called with what comes from the one who connected; returns what to pass.

    """

    def __init__(self, port: int) -> None:
        self.connections = self.resets = 0
        self.blocked = False
        self.delay = 0.0
        self.rate: float | None = None
        self.cut_after: Callable[[], int] | None = None
        self.change: Callable[[bytes], bytes] | None = None
        self._target = ("127.0.0.1", port)
        self._live: dict[tuple[socket.socket, socket.socket], set[asyncio.Task[None]]] = {}
        self._abandoned: list[socket.socket] = []

    def __enter__(self) -> "Proxy":
        self._server = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._server.setblocking(False)
        self.port = self._server.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=[self._run()])
        self._ended = asyncio.Event()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join()
        self._loop.close()

    @property
    def live(self) -> int:
        """How many connections there are now."""
        return len(self._live)

    def reset(self) -> None:
        """End all connections with RST, at both ends."""
        self._loop.call_soon_threadsafe(self._reset_all)

    def half_open(self) -> None:
        """End all connections with RST where they came from; the other ends never hear of it."""
        self._loop.call_soon_threadsafe(self._reset_all, 1)

    async def _run(self) -> None:
        accepting = asyncio.create_task(self._accept())
        await self._ended.wait()
        accepting.cancel()
        self._reset_all()
        for left in self._abandoned:
            left.close()
        self._loop.remove_reader(self._server)
        self._server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    async def _accept(self) -> None:
        waiting = asyncio.Event()
        self._loop.add_reader(self._server, waiting.set)
        while True:
            await waiting.wait()
            waiting.clear()
            try:
                near, _ = self._server.accept()  # at once: a cancelled sock_accept() may leave one
            except BlockingIOError:
                continue
            near.setblocking(False)
            self.connections += 1
            far = socket.socket()
            far.setblocking(False)
            try:
                await self._loop.sock_connect(far, self._target)
            except (OSError, asyncio.CancelledError) as exc:
                self._close(near)
                far.close()
                if isinstance(exc, OSError):
                    continue
                raise
            left = self.cut_after() if self.cut_after else None
            pair = (near, far)
            self._live[pair] = {
                asyncio.create_task(self._forward(pair, near, far, left, is_near=True)),
                asyncio.create_task(self._forward(pair, far, near, None, is_near=False)),
            }

    async def _forward(
        self,
        pair: tuple[socket.socket, socket.socket],
        source: socket.socket,
        to: socket.socket,
        left: int | None,
        *,
        is_near: bool,
    ) -> None:
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD)
        sending = asyncio.create_task(self._send(held, to))
        self._live[pair].add(sending)
        with contextlib.suppress(OSError):
            while data := await self._loop.sock_recv(source, _CHUNK_BYTES):
                if is_near and self.change:
                    data = self.change(data)
                if left is not None:
                    data, left = data[:left], left - len(data)
                await held.put((self._loop.time() + self.delay, data))
                if left is not None and left <= 0:
                    break
        await held.put((0.0, b""))
        with contextlib.suppress(OSError):
            await sending
        self._end(pair, reset=left is not None and left <= 0)

    async def _send(self, held: "asyncio.Queue[tuple[float, bytes]]", to: socket.socket) -> None:
        while True:
            due, data = await held.get()
            if not data:
                return
            while self.blocked or self._loop.time() < due:
                wait = _STEP if self.blocked else due - self._loop.time()
                await asyncio.sleep(max(0.0, wait))
            while data:
                rate = self.rate
                piece = len(data) if rate is None else max(1, int(rate * _STEP))
                await self._loop.sock_sendall(to, data[:piece])
                data = data[piece:]
                if rate is not None:
                    until = self._loop.time() + piece / rate
                    while self.rate == rate and self._loop.time() < until:
                        await asyncio.sleep(_STEP)
                while self.blocked:
                    await asyncio.sleep(_STEP)

    def _end(
        self, pair: tuple[socket.socket, socket.socket], *, reset: bool, ends: int = 2
    ) -> None:
        tasks = self._live.pop(pair, None)
        if tasks is None:
            return
        self.resets += reset
        for task in tasks - {asyncio.current_task()}:
            task.cancel()
        for end in pair[:ends]:
            # When the tasks have let go of it: its number may be another one's at once.
            self._loop.call_soon(self._close, end, reset)
        self._abandoned += pair[ends:]

    def _reset_all(self, ends: int = 2) -> None:
        for pair in list(self._live):
            self._end(pair, reset=True, ends=ends)

    @staticmethod
    def _close(end: socket.socket, reset: bool = True) -> None:
        if reset:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        end.close()

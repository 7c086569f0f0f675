"""What all sockets have in common: endpoints, connections, and why there are none."""

import asyncio
import socket
from collections import deque
from typing import ClassVar

from zmqpush.core.zmtp.connection import Connection, Limits
from zmqpush.core.zmtp.frames import Body
from zmqpush.core.zmtp.metadata import SocketType
from zmqpush.security.admission import Guard
from zmqpush.settings import Endpoints
from zmqpush.transport.channel import READ_BYTES, Channel
from zmqpush.transport.dialer import Dialer
from zmqpush.transport.listener import Listener
from zmqpush.transport.words import Words

# How many steps of handshakes are taken in one turn of the loop: with keys each costs a
# tenth of a millisecond.
_STEPS_PER_TURN = 8
# How many handshakes may be under way; the oldest makes room.
_MAX_HANDSHAKES = 1024


class Link:
    """
    A socket, bound and connected to endpoints.

    Args:
        endpoints: Where to bind and connect.
        guard: How to encrypt, and whom to admit.

    Raises:
        EndpointError: If an endpoint cannot be bound.

    Attributes:
        has_open_port: Whether the system chose a port; :attr:`address` tells which.

    """

    socket_type: ClassVar[SocketType]
    limits: Limits

    def __init__(self, endpoints: Endpoints, guard: Guard) -> None:
        self.has_open_port = endpoints.has_open_port
        self._guard = guard
        self._words = Words(self.socket_type, guard)
        self._loop = asyncio.get_running_loop()
        self._channels: dict[Channel, None] = {}
        self._greeting: dict[Channel, None] = {}  # whose handshakes are under way
        self._steps = _STEPS_PER_TURN
        self._resting: deque[Channel] = deque()  # whose handshakes wait for the next turn
        self._woken = asyncio.Event()
        self._out_of_memory: BaseException | None = None
        self._listeners: list[Listener] = []
        self._dialers = {
            endpoint: Dialer(endpoint, self._words.there, self._adopt, self._words.explain_absence)
            for endpoint in endpoints.connect
        }
        try:
            for endpoint in endpoints.bind:
                self._listeners.append(Listener(endpoint, self._adopt, self._words.complain_full))
        except BaseException:
            self.stop()
            raise
        if endpoints.bind:
            guard.reviewers.append(self._review)
        for dialer in self._dialers.values():
            self._loop.call_soon(dialer.dial)

    @property
    def address(self) -> str:
        """The endpoint that is bound last, with the port that the system chose for ``*``."""
        return self._listeners[-1].endpoint

    def stop(self) -> None:
        """Make no more connections."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        for dialer in self._dialers.values():
            dialer.close()

    async def close(self) -> None:
        """Hand over what is unsent, say that no more comes, and wait for the peers to end."""
        self.stop()
        for channel in list(self._channels):
            channel.end()
        while self._channels:
            await self._wait()

    # Waiting.

    def wake(self) -> None:
        """End the wait; if there is none, the next one."""
        self._woken.set()

    async def _wait(self) -> None:
        await self._woken.wait()
        self._woken.clear()

    def _check_memory(self) -> None:
        # Raised where it ends the program in order, and not in a callback.
        if self._out_of_memory:
            raise self._out_of_memory

    # What channels and endpoints call.

    @property
    def appetite(self) -> int:
        """How much is read of a connection at once, in bytes."""
        return READ_BYTES

    def _adopt(self, sock: socket.socket, endpoint: str) -> None:
        binds = endpoint not in self._dialers
        channel = Channel(sock, self, endpoint)
        mechanism = self._guard.mechanism(endpoint, channel.peer, binds=binds)
        self._channels[channel] = self._greeting[channel] = None
        if len(self._greeting) > _MAX_HANDSHAKES:
            next(iter(self._greeting)).close()
        channel.start(Connection(self.socket_type, mechanism, self.limits))

    def may_go_on(self, channel: Channel) -> bool:
        """Whether a handshake may go on now; if not, it is resumed later."""
        if not self._steps:
            channel.pause()
            self._resting.append(channel)
            return False
        if self._steps == _STEPS_PER_TURN:
            self._loop.call_soon(self._begin_turn)
        self._steps -= 1
        return True

    def _begin_turn(self) -> None:
        self._steps = _STEPS_PER_TURN
        while self._resting and self._steps:  # before those that come now
            channel = self._resting.popleft()
            channel.resume()
            channel.read()

    def on_ready(self, channel: Channel) -> None:
        """Note that a handshake is over."""
        del self._greeting[channel]
        channel.principal = self._guard.principal(channel.connection.key)
        self._words.note_success(channel)

    def on_parts(self, channel: Channel, parts: list[Body], size: int) -> None:
        """Take parts of messages; so many bytes came, perhaps of a message without its end."""

    def on_sent(self, channel: Channel) -> None:
        """Note that nothing waits to be sent any more."""

    def on_closed(self, channel: Channel, why: Exception | None) -> None:
        """Note that a connection has ended: why, or None if the peer closed it."""
        for error in (why, why and why.__cause__):
            if isinstance(error, MemoryError):
                self._out_of_memory = error
        was_ready = channel not in self._greeting
        self._greeting.pop(channel, None)
        self._channels.pop(channel, None)
        dialer = self._dialers.get(channel.endpoint)
        if dialer and not dialer.closed:
            self._words.explain_server(channel, why, was_ready=was_ready)
            dialer.dial_again(soon=was_ready)
        elif not dialer:
            self._words.explain_client(channel, why, was_ready=was_ready)
        self.wake()

    def _review(self) -> None:
        """Close the connections of those who are not admitted any more."""
        for channel in self._channels.keys() - self._greeting.keys():
            if channel.endpoint not in self._dialers and not self._guard.admits(channel.principal):
                self._expel(channel)

    def _expel(self, channel: Channel) -> None:
        channel.close()
